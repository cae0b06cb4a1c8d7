"""Other threads that look at a model while it trains: they see finished weights, and training does not notice them."""

import os
import threading

import pytest
import torch
from double import DoubleCommunicator, distribute
from models import Plain, batches, make, train, weights
from torch import nn

from commlib.torch.methods import DistributedMethods
from commlib.torch.turns import Turn

LIMIT_S = 30  # of waits for what comes at once


def in_thread(function, *args):
    """Runs a function in another thread and returns its result, or raises what it raised."""
    box = []

    def run():
        try:
            box.append((function(*args), None))
        except Exception as error:
            box.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "it hangs"
    result, error = box[0]
    if error is not None:
        raise error
    return result


class Halting(torch.optim.SGD):
    """Stops in the midst of a step, until it is told to go on."""

    entered, go_on = threading.Event(), threading.Event()
    halts = False

    def step(self, closure=None):
        if Halting.halts:
            Halting.entered.set()
            assert Halting.go_on.wait(LIMIT_S)
        return super().step(closure)


def test_an_update_in_another_thread_leaves_the_optimizer_as_it_is():
    model = make(Plain)
    optimizer = distribute(Halting(model.parameters(), lr=0.1), DoubleCommunicator(), model)
    train(model, optimizer, batches(3, rows=4))
    count = len(optimizer.param_groups[0]["params"])
    Halting.halts = True
    readers = [threading.Thread(target=lambda: seen.append(model.first.weight.detach().clone())) for _ in range(2)]
    seen = []
    for reader in readers:
        reader.start()
    assert Halting.entered.wait(LIMIT_S)
    try:
        assert isinstance(optimizer, DistributedMethods)
        assert len(optimizer.param_groups[0]["params"]) == count
        assert not seen  # both wait for the one that makes the update
    finally:
        Halting.halts = False
        Halting.go_on.set()
    for reader in readers:
        reader.join(LIMIT_S)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], model.first.weight)
    assert optimizer.report()["overlap"] == "backward and forward"


class Calling(torch.autograd.Function):
    """Runs something in another thread, in the midst of backward."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        in_thread(ctx.function)
        return gradient, None


def trained_while(look):
    """Weights after steps in whose backward pass look(model) runs in another thread."""
    model = make(Plain)
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), DoubleCommunicator(), model)
    for batch, _ in batches(5, rows=4):
        optimizer.zero_grad()
        hidden = torch.relu(model.first(batch))
        model.last(Calling.apply(hidden, lambda: look(model))).square().mean().backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("look", [
    lambda model: model.state_dict(), lambda model: list(model.parameters()), lambda model: model(torch.ones(1, 6)),
    lambda model: [p.norm() for p in nn.Module.parameters(model)],
], ids=["state_dict", "parameters", "forward", "norms"])  # fmt: skip
def test_a_look_in_the_midst_of_backward_sends_nothing(look):
    alone, watched = trained_while(lambda model: None), trained_while(look)
    for name in alone:
        assert torch.equal(alone[name], watched[name]), name


def test_threads_that_evaluate_all_the_time():
    data = batches(25, rows=4)
    results = []
    for watchers in (0, 3):
        model = make(Plain)
        optimizer = distribute(torch.optim.Adam(model.parameters(), lr=0.01), DoubleCommunicator(), model)
        over, errors = threading.Event(), []

        def watch():
            try:
                while not over.is_set():  # noqa: B023 (ended before the next turn)
                    model(torch.ones(2, 6))  # noqa: B023
                    model.state_dict()  # noqa: B023
                    optimizer.state_dict()  # noqa: B023
            except Exception as error:
                errors.append(error)  # noqa: B023

        threads = [threading.Thread(target=watch) for _ in range(watchers)]
        for thread in threads:
            thread.start()
        train(model, optimizer, data)
        over.set()
        for thread in threads:
            thread.join(LIMIT_S)
        assert not errors, errors
        results.append(weights(model))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent():
    turn, held, over = Turn(), threading.Event(), threading.Event()

    def hold():
        with turn:
            held.set()
            over.wait(LIMIT_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(LIMIT_S)
    child = os.fork()
    if child == 0:
        with turn:
            os._exit(7)
    over.set()
    thread.join(LIMIT_S)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
