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


class NormWithMomentum(GlobalNorm):
    """Scales by a norm over all parameters, but only where there is momentum."""

    def step(self, closure=None):
        if self.param_groups[0]["momentum"]:
            return super().step(closure)
        return torch.optim.SGD.step(self, closure)


def test_an_option_of_another_kind_is_a_reason_to_probe_again():
    data = batches(8, rows=4)
    plain, wrapped = make(Plain), make(Plain)
    for model in (plain, wrapped):
        optimizer = NormWithMomentum(model.parameters(), lr=0.1)
        if model is wrapped:
            optimizer = distribute(optimizer, DoubleCommunicator(), model)
        train(model, optimizer, data[:4])
        if model is wrapped:
            assert optimizer.report()["overlap"] == "backward and forward"
        optimizer.param_groups[0]["momentum"] = 0.9
        train(model, optimizer, data[4:])
    assert optimizer.report()["overlap"] == "backward"
    first, second = weights(plain), weights(wrapped)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("option, value, probes", [
    ("lr", 0.2, False), ("lr", 0.0, True), ("betas", (0.8, 0.9), False), ("betas", (0.0, 0.9), True), ("weight_decay", 0.5, True),
    ("fused", True, True), ("maximize", True, True), ("my_own", None, True), ("lr", torch.tensor(0.1), True),
])  # fmt: skip
def test_which_options_are_probed_again(monkeypatch, option, value, probes):
    model = make(Plain)
    optimizer = distribute(torch.optim.Adam(model.parameters(), lr=0.1), DoubleCommunicator(), model)
    train(model, optimizer, batches(3, rows=4))
    calls = []
    monkeypatch.setattr("commlib.torch.overlapping.reason_to_wait", lambda *args: calls.append(1))
    train(model, optimizer, batches(1, rows=4))
    assert not calls
    optimizer.param_groups[0][option] = value
    train(model, optimizer, batches(2, rows=4))
    assert len(calls) == probes


def test_an_option_changed_in_place_belongs_to_the_next_step():
    results = []
    for is_wrapped in (False, True):
        model = make(Plain)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer.param_groups[0]["betas"] = [0.9, 0.999]
        if is_wrapped:
            optimizer = distribute(optimizer, DoubleCommunicator(), model)

        def change():
            optimizer.param_groups[0]["betas"][0] *= 0.5  # noqa: B023 (used at once)

        train(model, optimizer, batches(5, rows=4), change)
        results.append(weights(model))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
