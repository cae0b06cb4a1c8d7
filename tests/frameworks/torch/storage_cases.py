"""What ranks run for test_storage.py: every loop with gradients in private memory and in memory that ranks share."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch_cases import FORMS

import commlib
import commlib.torch as comm
from commlib.torch import groups, storage


class Wide(nn.Module):
    """Two layers whose weights travel by themselves, and small tensors that travel in groups."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 160), nn.LayerNorm(160)
        self.middle, self.last = nn.Linear(160, 160), nn.Linear(160, 160)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(self.norm(self.first(x)))))


@contextmanager
def memory(kind):
    """Within it gradients are made private, or lie in shared memory by choice of the adapter."""
    if kind == "private":
        with mock.patch.object(storage, "shared_tensor", lambda *_: None), \
             mock.patch.object(groups, "shared_tensor", lambda *_: None):  # fmt: skip
            yield
    else:
        yield


def backward(model, step, rows=3):
    generator = torch.Generator().manual_seed(100 * step + comm.rank())
    x = torch.randn(rows, 8, generator=generator).to(next(model.parameters()).dtype)
    model(x).square().mean().backward()


def steps(model, optimizer, numbers, set_to_none=True, passes=1):
    for step in numbers:
        optimizer.zero_grad(set_to_none=set_to_none)
        for one in range(passes):
            backward(model, 10 * step + one)
        optimizer.step()


def plain(model, optimizer):
    steps(model, optimizer, range(5))


def zeroed(model, optimizer):
    steps(model, optimizer, range(5), set_to_none=False)


def accumulated(model, optimizer):
    optimizer.set_backward_passes_per_step(2)
    steps(model, optimizer, range(4), passes=2)


def frozen(model, optimizer):
    steps(model, optimizer, range(3))
    model.middle.weight.requires_grad_(False)
    steps(model, optimizer, range(3, 6))
    model.middle.weight.requires_grad_(True)
    steps(model, optimizer, range(6, 9))


def grown(model, optimizer):
    steps(model, optimizer, range(3))
    model.last = nn.Linear(160, 160)
    with torch.no_grad():
        model.last.weight.fill_(0.01)
    optimizer.add_param_group({"params": [model.last.weight], "lr": 0.01})
    steps(model, optimizer, range(3, 7))


def moved(model, optimizer):
    steps(model, optimizer, range(3))
    model.double()
    steps(model, optimizer, range(3, 6))
    model.float()
    steps(model, optimizer, range(6, 9))


def transposed(model, optimizer):
    """Gradients that are not contiguous are copied in any case."""
    with torch.no_grad():
        model.middle.weight.data = model.middle.weight.t().contiguous().t()
    steps(model, optimizer, range(4))


def looked_at(model, optimizer):
    """A gradient that was kept stays as it was; one that is read is the reduced one."""
    kept = []
    for step in range(5):
        steps_before = [(gradient, copy) for gradient, copy in kept]
        optimizer.zero_grad()
        backward(model, step)
        if step % 2:
            optimizer.synchronize()
            kept += [(p.grad if step == 1 else p.grad.view(-1), p.grad.flatten().clone()) for p in model.parameters()]
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        assert all(torch.equal(gradient.flatten(), copy) for gradient, copy in steps_before), step


def owned(model, optimizer):
    """p.grad stay, and are tensors that the user holds too, or whose memory he sees through another tensor."""
    seen, are_mine = [], True
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.zeros_like(parameter)
        seen.append(parameter.grad if number % 2 else parameter.grad.view(-1))
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        backward(model, step)
        optimizer.synchronize()
        if are_mine:
            assert all(torch.equal(mine.view(-1), p.grad.view(-1)) for mine, p in zip(seen, model.parameters()))
        with optimizer.skip_synchronize():
            optimizer.step()
        are_mine = model.first.weight.grad is not None  # with model=, step() takes them


def alternating(model, optimizer):
    """p.grad stays for some steps, is dropped, and stays again."""
    for first in (0, 4):
        steps(model, optimizer, range(first, first + 4), set_to_none=False)
        optimizer.zero_grad()


LOOPS = {loop.__name__: loop for loop in (plain, zeroed, accumulated, frozen, grown, moved, transposed, looked_at, owned,
                                      alternating)}
OPTIMIZERS = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)}


def trained(loop, form, kind):
    """(weights, {name of a group: where it was reduced last}) after a loop."""
    torch.manual_seed(3)
    model = Wide()
    with memory(kind):
        optimizer = FORMS[form](OPTIMIZERS["sgd"](model.parameters()), model)
        LOOPS[loop](model, optimizer)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        paths = {group["name"]: group["memory"] for group in optimizer.report()["groups"]}
    return weights, paths


def all_loops():
    """(loop, form, kind) -> (weights, paths)."""
    return {(loop, form, kind): trained(loop, form, kind)
            for loop in LOOPS for form in FORMS for kind in ("private", "shared")}  # fmt: skip


def without_memory():
    """The heap is full: (weights, paths) of a loop."""
    communicator = commlib.communicator()
    with mock.patch.object(type(communicator._engine), "shared_memory", lambda engine, nbytes: None):
        return trained("plain", "overlapped", "shared")


def again():
    """Gradients outlive the communicator; the next one has memory of its own."""
    torch.manual_seed(3)
    model = Wide()
    optimizer = FORMS["horovod"](OPTIMIZERS["sgd"](model.parameters()), model)
    steps(model, optimizer, range(3))
    before = model.middle.weight.grad, model.middle.weight.grad.clone()
    comm.shutdown()
    comm.init()
    result = trained("plain", "overlapped", "shared")
    assert torch.equal(*before)
    return result


def traced(path):
    """Writes a timeline of a loop in which p.grad stay."""
    comm.start_timeline(path)
    trained("zeroed", "horovod", "shared")
    comm.stop_timeline()
