"""Programs that end with gradients on their way, in every way a program can end; on real ranks, as whole scripts."""

import pytest
from support import run_script

HEAD = """
import os, sys, torch
from torch import nn
import commlib
import commlib.torch as comm
comm.init()
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 8))
optimizer = comm.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
rank = comm.rank()

def steps(count):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.full((4, 64), rank + 1.0)).square().sum().mul(1e-4).backward()
        optimizer.step()

steps(3)
"""
SAVE = """
print("sum", sum(p.double().sum() for p in model.state_dict().values()).item())
"""


def sums(outcomes):
    return {line for _, output in outcomes for line in output.splitlines() if line.startswith("sum")}


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "comm.shutdown()", "commlib.shutdown()", "del optimizer, model"])
def test_ranks_that_have_nothing_left_to_do_leave_their_gradients_behind(end):
    script = HEAD + f"""
if rank != 0:
    {end or 'pass'}
else:
    import time
    time.sleep(0.3)  # the others are gone by now; a slow rank, not a signal
{SAVE.replace(chr(10), chr(10) + '    ')}
"""
    outcomes = run_script(script, 2)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert len(sums(outcomes)) == 1


def test_weights_can_be_read_after_shutdown():
    outcomes = run_script(HEAD + "comm.shutdown()\n" + SAVE, 2)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert len(sums(outcomes)) == 1


@pytest.mark.parametrize("form", ["model=model", "named_parameters=model.named_parameters()"])
def test_an_optimizer_that_is_kept_over_shutdown_is_wrapped_again(form):
    middle = f"""
comm.shutdown()
comm.init()
try:
    steps(1)
except comm.CommlibError as error:
    assert "wrap it again" in str(error), error
    optimizer.zero_grad()
else:
    raise AssertionError("nobody noticed")
optimizer = comm.DistributedOptimizer(optimizer, {form})
"""
    head = HEAD.replace("model=model", form) if form != "model=model" else HEAD
    if form != "model=model":
        head = head.replace("optimizer = ", "comm.broadcast_parameters(model.state_dict(), 0)\noptimizer = ", 1)
    lines = [sums(run_script(head + between + "steps(3)\n" + SAVE, 2)) for between in ("", middle)]
    assert len(lines[0]) == 1 and lines[0] == lines[1], lines


@pytest.mark.parametrize("end, status", [("raise KeyError('mine')", 1), ("os._exit(3)", 3)])
def test_a_rank_that_fails_is_told_to_the_others(end, status):
    script = HEAD + f"""
if rank == 1:
    {end}
steps(3)
print("went on")
"""
    (code, output), (other_code, other_output) = run_script(script, 2)
    assert other_code == status
    assert code == 1 and "went on" not in output
    assert "CommlibError" in output or "rank 1" in output, output


def test_an_exception_in_the_middle_of_backward_ends_the_program_soon():
    script = HEAD + """
class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("in backward")

Failing.apply(model[:2](torch.ones(4, 64))).sum().add(model(torch.ones(4, 64)).sum()).backward()
"""
    for code, output in run_script(script, 2):
        assert code == 1
        assert "ArithmeticError: in backward" in output
