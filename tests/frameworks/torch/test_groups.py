"""The order of need and the groups that follow it: measured, agreed, measured again when the model changes."""

import json

import pytest
import torch
from double import DoubleCommunicator, distribute
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, Plain, batches, make, train, weights
from torch import nn

from commlib.torch.groups import LADDER, SMALL_NBYTES, Capacity, Gradient, members_of_groups
from commlib.torch.order import FirstUse, merged, order_of_use

numbers = st.lists(st.integers(0, 20), unique=True)


def order_of(optimizer):
    """Modules in the order of their parameters' priorities."""
    names = sorted(optimizer.priorities, key=optimizer.priorities.get)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def groups_of(optimizer):
    return [[gradient.name for gradient in group.gradients] for group in optimizer._commlib.exchange.groups]


# ---- lists


@given(numbers, numbers)
def test_merged_keeps_both_orders_as_far_as_the_first_allows(first, second):
    both = merged(first, second)
    assert sorted(both) == sorted({*first, *second})
    assert [item for item in both if item in first] == first
    new = [item for item in second if item not in first]
    for one, other in zip(second, second[1:]):
        if one in new and other in new:
            assert both.index(one) + 1 == both.index(other)
    for item in new:
        before = [other for other in second[: second.index(item)] if other in first]
        assert all(both.index(other) < both.index(item) for other in before[-1:])


@given(numbers)
def test_one_pass_is_used_in_the_opposite_order_of_arrival(arrivals):
    assert order_of_use(arrivals) == arrivals[::-1]
    assert order_of_use(arrivals + arrivals) == arrivals[::-1]


def test_ranks_that_used_different_blocks_get_one_order():
    first_use = FirstUse()
    first_use.agree([[0, 1, 4], [0, 2, 4]], count=5)
    assert first_use.order == [0, 2, 1, 4]
    assert first_use.cohorts[1] != first_use.cohorts[2] != first_use.cohorts[0]
    assert first_use.arrivals == []  # 3 was never used: go on measuring
    first_use.arrivals += [4, 3, 0]
    assert first_use.end_step()
    first_use.agree([first_use.measured, []], count=5)
    assert first_use.order == [0, 2, 1, 3, 4] or first_use.order == [0, 3, 2, 1, 4]
    assert first_use.arrivals is None


# ---- cutting


def gradients_of(sizes, dtype=torch.float32):
    return [Gradient(nn.Parameter(torch.zeros(size, dtype=dtype)), str(i), i) for i, size in enumerate(sizes)]


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 10, 1000, 16384, 16385, 50000]), max_size=60), st.randoms())
def test_groups_hold_every_gradient_once_within_their_capacity(sizes, random):
    gradients = gradients_of(sizes)
    cohorts = {gradient.number: random.choice("ab") for gradient in gradients}
    apart = {gradient.number for gradient in gradients if gradient.parameter.nbytes > SMALL_NBYTES}
    groups = members_of_groups(gradients, cohorts, apart)
    assert sorted(g.number for group in groups for g in group) == list(range(len(sizes)))
    assert [group[0].number for group in groups] == sorted(group[0].number for group in groups)
    for group in groups:
        assert [g.number for g in group] == sorted(g.number for g in group)
        assert len(group) == 1 or not apart & {g.number for g in group}
        assert len({cohorts[g.number] for g in group}) == 1
        assert len(group) <= LADDER[-1].tensors
        assert sum(g.parameter.nbytes for g in group[:-1]) < LADDER[-1].nbytes


def test_what_is_needed_first_shares_with_few():
    sizes = [len(group) for group in members_of_groups(gradients_of([10] * 200), {}, ())]
    assert sizes == [4, 16, 64, 116]


def test_a_group_spans_no_dtypes():
    gradients = gradients_of([10] * 3) + gradients_of([10] * 3, torch.float64)
    groups = members_of_groups(gradients, {}, ())
    assert [{g.parameter.dtype for g in group} for group in groups] == [{torch.float32}, {torch.float64}]


# ---- the order of a model


class Switched(nn.Module):
    """Blocks registered in the opposite order of use; which one is used is chosen at run time."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.stem = nn.Linear(6, 8)
        self.choice = 0

    def forward(self, x):
        return self.head(torch.tanh(self.blocks[self.choice](torch.tanh(self.stem(x)))))


def test_blocks_chosen_at_run_time_find_their_place():
    model, communicator = make(Switched), DoubleCommunicator()
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, model, ladder=LADDER)
    train(model, optimizer, batches(1, rows=4))
    assert order_of(optimizer) == ["stem", "blocks.0", "head", "blocks.1", "blocks.2"]
    model.choice = 2
    train(model, optimizer, batches(1, rows=4))
    assert order_of(optimizer)[-1] == "blocks.2"  # noticed, and told with this step's gradients
    train(model, optimizer, batches(1, rows=4))
    order = order_of(optimizer)
    assert order == ["stem", *sorted(order[1:3]), "head", "blocks.1"] and "blocks.2" in order[1:3]
    # What is used at different steps travels apart, so that nothing waits for gradients that do not come.
    for group in groups_of(optimizer):
        assert len({name.rpartition(".")[0] for name in group if "blocks" in name} | {"other"}) <= 2
        assert not ({"stem.weight", "head.weight"} & set(group) and any("blocks" in name for name in group))


class Shuffled(nn.Module):
    """Blocks that are all used in every step, in an order that is chosen at run time."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.order = [0, 1, 2]

    def forward(self, x):
        for index in self.order:
            x = torch.tanh(self.blocks[index](x))
        return x[:, :3]


@pytest.mark.parametrize("form", ["model", "named_parameters"])
def test_blocks_that_change_places_for_good_are_measured_again(form):
    model, communicator = make(Shuffled), DoubleCommunicator()
    source = {"model": model} if form == "model" else {"named_parameters": model.named_parameters()}
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, **source)
    train(model, optimizer, batches(3, rows=4))
    assert order_of(optimizer) == ["blocks.0", "blocks.1", "blocks.2"]
    model.order = [2, 0, 1]
    train(model, optimizer, batches(1, rows=4))
    model.order = [0, 1, 2]
    train(model, optimizer, batches(6, rows=4))
    assert order_of(optimizer) == ["blocks.0", "blocks.1", "blocks.2"]  # once is not for good
    model.order = [2, 0, 1]
    train(model, optimizer, batches(6, rows=4))
    assert order_of(optimizer) == ["blocks.2", "blocks.0", "blocks.1"]
    assert optimizer._commlib.exchange.first_use.arrivals is None  # measured, and no longer


def test_a_model_that_changes_all_the_time_is_left_in_peace():
    first_use = FirstUse()
    first_use.agree([[0, 1, 2]], count=3)
    measured = []
    for step in range(200):
        order = [[2, 1, 0], [1, 2, 0]][step // 5 % 2]  # each stays for five steps
        first_use.sent += order
        if first_use.arrivals is not None:
            first_use.arrivals += order
        first_use.watch()
        if first_use.end_step():
            measured.append(step)
            first_use.agree([first_use.measured], count=3)
    assert len(measured) == 2  # after two steps of the new order, after four; eight never come


def test_groups_change_only_at_agreed_steps():
    model, communicator = make(Switched), DoubleCommunicator()
    exchanges = []

    def exchange(payload, *, name, without_joined=False):
        if "measured" in json.loads(payload):
            exchanges.append(name)
        return [payload] * 2

    communicator.exchange = exchange
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, model, ladder=LADDER)
    counts = []
    for choice in (0, 0, 0, 1, 1, 1, 0, 2, 2, 2):
        model.choice = choice
        train(model, optimizer, batches(1, rows=4))
        counts.append(len(exchanges))
    assert counts == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]  # the first step, and one after a block was new


def test_frozen_layers_leave_their_groups_and_come_back():
    model, communicator = make(Plain), DoubleCommunicator()
    model.first.requires_grad_(False)
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, model, ladder=LADDER)
    train(model, optimizer, batches(2, rows=4))
    assert order_of(optimizer) == ["middle", "last", "first"]
    assert not any("first.weight" in group for group in groups_of(optimizer))
    model.first.requires_grad_(True)
    model.middle.requires_grad_(False)
    before = weights(model)
    train(model, optimizer, batches(4, rows=4))
    assert [name for name in order_of(optimizer) if name != "middle"] == ["first", "last"]
    members = {name for group in groups_of(optimizer) for name in group}
    assert members == {"first.weight", "first.bias", "last.weight", "last.bias"}
    after = weights(model)
    assert not torch.equal(before["first.weight"], after["first.weight"])
    assert torch.equal(before["middle.weight"], after["middle.weight"])


def test_weights_made_anew_keep_their_place():
    model, communicator = make(Net), DoubleCommunicator()
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, model, ladder=LADDER)
    train(model, optimizer, batches(2, rows=4))
    order = order_of(optimizer)
    nn.init.normal_(model.first.weight)
    model.last.weight.data = torch.zeros(3, 8)
    train(model, optimizer, batches(2, rows=4))
    assert order_of(optimizer) == order == ["first", "norm", "scale", "last"]


@pytest.mark.parametrize("with_model", [True, False])
def test_a_model_moved_to_another_dtype_is_grouped_anew(with_model):
    model, communicator = make(Plain), DoubleCommunicator()
    names = None if with_model else model.named_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = distribute(optimizer, communicator, model if with_model else None, names, ladder=LADDER)
    plain = make(Plain)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for one, its_optimizer in ((model, optimizer), (plain, plain_optimizer)):
        train(one, its_optimizer, batches(2, rows=4))
        one.double()
        train(one, its_optimizer, batches(4, rows=4, dtype=torch.float64))
    assert max(len(group) for group in groups_of(optimizer)) == 4
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(model)[name]), name


# ---- what travels in groups is what the optimizer sees


class Remembering(torch.optim.SGD):
    """Keeps the last gradients, as they are, and steps along the difference."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    parameter.data -= 0.1 * (parameter.grad - state.get("last", 0.0))
                    state["last"] = parameter.grad if self.keep_itself else parameter.grad.detach()


@pytest.mark.parametrize("counts", [True, False], ids=["torch counts", "nobody counts"])
@pytest.mark.parametrize("keep_itself", [True, False])
@pytest.mark.parametrize("ladder", [LADDER, (Capacity(2, 1 << 20),), None])
def test_optimizers_that_keep_gradients(monkeypatch, ladder, keep_itself, counts):
    if not counts:  # a torch without that private function
        monkeypatch.setattr("commlib.torch.private._use_count", None)
    data, results = batches(6, rows=4), []
    for wrapped in (False, True):
        model = make(Net)
        optimizer = Remembering(model.parameters(), lr=0.1)
        optimizer.keep_itself = keep_itself
        if wrapped:
            optimizer = distribute(optimizer, DoubleCommunicator(), model, ladder=ladder)
        train(model, optimizer, data)
        results.append(weights(model))
    assert optimizer.report()["overlap"] == "backward and forward", optimizer.report()["fallbacks"]
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("with_model", [True, False])
def test_p_grad_stays_the_tensor_that_autograd_made(with_model):
    model = make(Plain)
    names = None if with_model else model.named_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = distribute(optimizer, DoubleCommunicator(), model if with_model else None, names, ladder=LADDER)
    train(model, optimizer, batches(2, rows=4))
    optimizer.zero_grad()
    seen = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad}))
    model(torch.ones(4, 6)).sum().backward()
    optimizer.synchronize()
    assert {name: id(p.grad) for name, p in model.named_parameters()} == {name: id(g) for name, g in seen.items()}


def test_a_group_without_all_its_gradients_leaves_at_step():
    model, communicator = make(Switched), DoubleCommunicator()
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, model, ladder=LADDER)
    train(model, optimizer, batches(2, rows=4))
    communicator.submitted.clear()
    model.blocks[0](torch.ones(2, 8)).sum().backward()  # shares a group with the stem
    assert communicator.submitted == []
    before = weights(model)
    optimizer.step()
    assert len(communicator.submitted) == len(groups_of(optimizer)) + 1  # and the counts
    after = weights(model)
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(before["blocks.0.weight"], after["blocks.0.weight"])


# ---- bytes are copied where that is the same as to copy tensors


def transposed(gradient):
    return gradient.clone().t().contiguous().t() if gradient.dim() == 2 else gradient


def negated(gradient):
    return torch._neg_view(gradient.neg())  # as complex numbers leave behind


@pytest.mark.parametrize("form", ["model", "horovod"])
@pytest.mark.parametrize("change", [transposed, negated])
def test_gradients_of_any_layout(change, form):
    """p.grad as backward or a user may have left it; it is accumulated into, or sent as it is."""
    results = []
    for wrapped in (False, True):
        model = make(Plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if wrapped:
            named = model.named_parameters() if form == "horovod" else None
            optimizer = distribute(optimizer, DoubleCommunicator(), None if named else model, named, ladder=LADDER)
        for step, (x, target) in enumerate(batches(6, rows=4)):
            optimizer.zero_grad()
            if step % 2:
                for parameter in model.parameters():
                    parameter.grad = change(torch.full_like(parameter, 0.25, requires_grad=False))
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
        results.append(weights(model))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_a_parameter_that_gets_another_size_leaves_its_group():
    results = []
    for wrapped in (False, True):
        model = make(Plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if wrapped:
            optimizer = distribute(optimizer, DoubleCommunicator(), model, ladder=LADDER)
        train(model, optimizer, batches(3, rows=4))
        model.last.bias.data = torch.ones(1)  # broadcast where it is added
        train(model, optimizer, batches(3, rows=4, seed=5))
        results.append(weights(model))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
