"""The probe finds what a whole step does across parameters; such optimizers are waited for, with the same weights."""

import logging
import re

import pytest
import torch
from double import DoubleCommunicator, distribute
from models import Plain, batches, make, train, weights


class GlobalNorm(torch.optim.SGD):
    """Scales by a norm over all parameters."""

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.div_(norm)
        return super().step(closure)


class Counting(torch.optim.SGD):
    """Counts its steps in the group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        return super().step(closure)


class CountingOnSelf(torch.optim.SGD):
    """Counts its steps in an attribute."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


class Noisy(torch.optim.SGD):
    """Adds noise."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.randn_like(p) * 1e-3)
        return super().step(closure)


class NeedsAll(torch.optim.SGD):
    """Fails unless every parameter has a gradient."""

    def step(self, closure=None):
        if len(self.param_groups[0]["params"]) < 6:
            raise KeyError("where are the others?")
        return super().step(closure)


CASES = [
    (GlobalNorm, "stepping layer by layer changes"),
    (Counting, r"param_groups.*"),
    (CountingOnSelf, "steps"),
    (Noisy, "random numbers"),
    (NeedsAll, "KeyError: 'where are the others"),
]


@pytest.mark.parametrize("optimizer_class, reason", CASES, ids=[case[0].__name__ for case in CASES])
def test_global_optimizers_are_waited_for_and_the_reason_is_said_once(optimizer_class, reason, caplog):
    data = batches(4, rows=4)
    plain, wrapped = make(Plain), make(Plain)
    torch.manual_seed(0)
    train(plain, optimizer_class(plain.parameters(), lr=0.1, momentum=0.9), data)
    torch.manual_seed(0)
    optimizer = distribute(optimizer_class(wrapped.parameters(), lr=0.1, momentum=0.9), DoubleCommunicator(), wrapped)
    with caplog.at_level(logging.WARNING, "commlib.torch"):
        train(wrapped, optimizer, data)
    report = optimizer.report()
    assert report["overlap"] == "backward"
    assert len(report["fallbacks"]) == 1 == len(caplog.records)
    assert re.search(reason, report["fallbacks"][0])
    first, second = weights(plain), weights(wrapped)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_probe_leaves_no_trace():
    model = make(Plain)
    optimizer = distribute(torch.optim.Adam(model.parameters()), DoubleCommunicator(), model)
    model(torch.ones(2, 6)).sum().backward()
    random_state, before = torch.get_rng_state(), {name: t.detach().clone() for name, t in model.named_parameters()}
    optimizer._commlib._may_put_off()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not optimizer.__dict__["state"]
    for name, tensor in model.named_parameters():
        assert torch.equal(before[name], tensor)


def test_a_step_replaced_by_the_user_is_kept_and_waited_for():
    model = make(Plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own_step, calls = optimizer.step, []

    def step_and_count():
        calls.append(1)
        return own_step()

    optimizer.step = step_and_count
    optimizer = distribute(optimizer, DoubleCommunicator(), model)
    before = weights(model)
    train(model, optimizer, batches(2, rows=4))
    assert len(calls) == 2
    assert "step_and_count" in optimizer.report()["fallbacks"][0]
    assert not torch.equal(before["first.weight"], weights(model)["first.weight"])


def test_step_hooks_see_whole_steps():
    model = make(Plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(1))
    optimizer = distribute(optimizer, DoubleCommunicator(), model)
    train(model, optimizer, batches(3, rows=4))
    assert len(seen) == 3
    assert optimizer.report()["overlap"] == "backward"
