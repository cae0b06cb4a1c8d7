"""What step() puts off, who waits for it, and what is refused: on a double, so that every wait is seen."""

import copy
import json
import pickle

import pytest
import torch
from double import DoubleCommunicator, distribute
from models import NET_ORDER, Net, Plain, batches, make, train, weights
from torch import nn

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam_tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def pending_net(communicator=None, net=Net, optimizer="sgd", steps=2):
    """A model and its optimizer right after a step() that put everything off."""
    communicator = communicator or DoubleCommunicator()
    model = make(net)
    optimizer = distribute(OPTIMIZERS[optimizer](model.parameters()), communicator, model)
    train(model, optimizer, batches(steps, rows=4))
    communicator.waited.clear()
    return model, optimizer, communicator


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_those_of_the_plain_optimizer_bit_by_bit(name):
    data = batches(steps=6, rows=4)
    plain, overlapped, waiting = make(Net), make(Net), make(Net)
    train(plain, OPTIMIZERS[name](plain.parameters()), data)
    optimizer = distribute(OPTIMIZERS[name](overlapped.parameters()), DoubleCommunicator(), overlapped)
    train(overlapped, optimizer, data)
    assert optimizer.report()["overlap"] == "backward and forward", optimizer.report()["fallbacks"]
    assert_same(weights(plain), weights(overlapped))
    optimizer = distribute(OPTIMIZERS[name](waiting.parameters()), DoubleCommunicator(), waiting, overlap_forward=False)
    train(waiting, optimizer, data)
    assert optimizer.report()["overlap"] == "backward"
    assert_same(weights(plain), weights(waiting))


def test_step_waits_for_nothing_and_forward_for_its_own_parameters():
    model, optimizer, communicator = pending_net()
    assert communicator.waited == []
    model.first(torch.zeros(2, 6))
    assert communicator.waited == ["first.weight", "first.bias"]
    model.norm(torch.zeros(2, 8))
    assert communicator.waited[2:] == ["norm.weight", "norm.bias"]


def test_reading_an_attribute_opens_its_gate_only():
    model, optimizer, communicator = pending_net()
    assert model.scale.weight.shape == (8, 8)
    assert communicator.waited == ["scale.weight"]


def test_zero_grad_of_model_and_optimizer_wait_for_nothing():
    model, optimizer, communicator = pending_net()
    communicator.forbidden = True
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        model.zero_grad(set_to_none)
    communicator.forbidden = False


@pytest.mark.parametrize("read", [
    lambda model, optimizer: model.state_dict(),
    lambda model, optimizer: list(model.parameters()),
    lambda model, optimizer: dict(model.named_parameters()),
    lambda model, optimizer: optimizer.state_dict(),
    lambda model, optimizer: optimizer.state,
    lambda model, optimizer: optimizer.synchronize(),
    lambda model, optimizer: copy.deepcopy(model),
    lambda model, optimizer: pickle.dumps(model),
    lambda model, optimizer: copy.deepcopy(optimizer),
    lambda model, optimizer: model.double(),
    lambda model, optimizer: model.load_state_dict(make(Net).state_dict()),
])  # fmt: skip
def test_readers_of_all_weights_see_finished_ones(read):
    model, optimizer, communicator = pending_net()
    read(model, optimizer)
    assert sorted(communicator.waited) == sorted(NET_ORDER)


def test_copies_of_a_model_have_no_gates():
    model, optimizer, communicator = pending_net()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    train(model, optimizer, batches(1, rows=4))
    communicator.forbidden = True
    for other in copies:
        other(torch.zeros(2, 6))
        other.zero_grad()
        assert type(other.first._parameters) is dict
        assert not any("commlib" in type(p).__module__ for p in other.parameters())
    communicator.forbidden = False


def test_a_copy_of_the_optimizer_is_the_users_own():
    model, optimizer, communicator = pending_net()
    other = copy.deepcopy(optimizer)
    assert type(other) is torch.optim.SGD
    assert json.dumps(other.param_groups[0]["lr"]) == "0.1"


def test_updates_use_the_hyper_parameters_of_their_step():
    data = batches(4, rows=4)
    plain, overlapped = make(Net), make(Net)
    for model, wrapped in ((plain, False), (overlapped, True)):
        optimizer = OPTIMIZERS["adam_tensor_lr"](model.parameters())
        if wrapped:
            optimizer = distribute(optimizer, DoubleCommunicator(), model)

        def halve():
            for group in optimizer.param_groups:
                group["lr"].mul_(0.5)  # noqa: B023 (used at once)
                group["weight_decay"] = group["weight_decay"] + 0.01

        train(model, optimizer, data, halve)
    assert_same(weights(plain), weights(overlapped))


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_made_before_and_after_wrapping(before, recwarn):
    data = batches(5, rows=4)
    results = []
    for wrapped in (False, True):
        model = make(Net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1) if before else None
        if wrapped:
            communicator = DoubleCommunicator()
            optimizer = distribute(optimizer, communicator, model)
        scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        train(model, optimizer, data, scheduler.step)
        results.append(weights(model))
    assert communicator.submitted
    assert optimizer.report()["overlap"] == "backward and forward"
    assert_same(*results)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_clipping_through_the_model_sees_reduced_gradients():
    data = batches(4, rows=4)
    plain, overlapped = make(Net), make(Net)
    communicator = DoubleCommunicator()
    for model, wrapped in ((plain, False), (overlapped, True)):
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        if wrapped:
            optimizer = distribute(optimizer, communicator, model)
        for x, target in data:
            model.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            communicator.waited.clear()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if wrapped:
                assert set(NET_ORDER) <= set(communicator.waited)
            optimizer.step()
    assert_same(weights(plain), weights(overlapped))


def test_gradients_changed_in_flight_are_refused():
    model = make(Net)
    captured = list(model.parameters())
    optimizer = torch.optim.SGD(captured, lr=0.1)
    optimizer = distribute(optimizer, DoubleCommunicator(), named_parameters=model.named_parameters())
    model(torch.ones(4, 6)).sum().backward()
    nn.utils.clip_grad_norm_(captured, 1.0)
    with pytest.raises(RuntimeError, match="was changed while it was being reduced: call optimizer.synchronize"):
        optimizer.step()


def test_gradients_read_through_a_captured_list_are_waited_for():
    model = make(Net)
    communicator = DoubleCommunicator()
    captured = list(model.parameters())
    optimizer = distribute(torch.optim.SGD(captured, lr=0.1), communicator, model)
    model(torch.ones(4, 6)).sum().backward()
    assert captured[0].shape and captured[0].requires_grad and communicator.waited == []
    assert captured[0].grad is not None
    assert set(NET_ORDER) <= set(communicator.waited)
    assert type(captured[0]) is nn.Parameter
    optimizer.step()


@pytest.mark.parametrize("with_model", [True, False])
def test_zero_grad_before_step_is_refused(with_model):
    model = make(Net)
    names = None if with_model else model.named_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = distribute(optimizer, DoubleCommunicator(), model if with_model else None, names)
    model(torch.ones(4, 6)).sum().backward()
    with pytest.raises(AssertionError, match="zero_grad.. was called after loss.backward"):
        optimizer.zero_grad(set_to_none=False)
    model.zero_grad()
    with pytest.raises(AssertionError, match="zero_grad.. was called after loss.backward"):
        optimizer.step()


def test_a_parameter_captured_before_is_waited_for_at_its_use():
    model, optimizer, communicator = pending_net(net=Plain)
    # The hook of a real forward is passed by: nobody opens the gate.
    captured = dict.__getitem__(model.middle._parameters, "weight")
    assert captured.shape == (8, 8) and captured.grad is None and communicator.waited == []
    captured.sum()
    assert communicator.waited == ["middle.weight"]


def test_a_gradient_that_comes_too_early_is_refused_and_named():
    model, optimizer, communicator = pending_net(net=Plain)
    captured = dict.__getitem__(model.middle._parameters, "weight")
    with torch._C.DisableTorchFunctionSubclass():  # as code that torch cannot see would use it
        loss = captured.sum()
    with pytest.raises(RuntimeError, match="'middle.weight', whose update from the last step.. is still pending"):
        loss.backward()


def test_priorities_are_the_order_of_first_use():
    model = make(Net)
    communicator = DoubleCommunicator()
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, model)
    train(model, optimizer, batches(1, rows=4))
    order = sorted(optimizer.priorities, key=optimizer.priorities.get)
    # Gradients of one operation, such as a norm's weight and bias, come at the same time.
    assert [name.split(".")[0] for name in order] == [name.split(".")[0] for name in NET_ORDER]
    communicator.submitted.clear()
    train(model, optimizer, batches(1, rows=4))
    assert dict(communicator.submitted)["first.weight"] == 0
    assert dict(communicator.submitted)["last.weight"] >= 5


def test_rank_0_decides_the_priorities():
    model = make(Net)
    communicator = DoubleCommunicator(rank_0_says=b'{"measured": [6, 5, 4, 3, 2, 1, 0], "apart": [], "frozen": []}')
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, model)
    train(model, optimizer, batches(1, rows=4))
    assert list(optimizer.priorities.values()) == [6, 5, 4, 3, 2, 1, 0]


def test_a_parameter_that_nobody_used_is_sent_and_not_moved():
    model = make(Plain)
    communicator = DoubleCommunicator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer = distribute(optimizer, communicator, model)
    before = weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        model.first(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    after = weights(model)
    assert ("last.weight", 0) in communicator.submitted
    assert torch.equal(before["last.weight"], after["last.weight"])
    assert not torch.equal(before["first.weight"], after["first.weight"])
    assert model.last.weight not in optimizer.state


def test_horovods_form_moves_what_nobody_used():
    model = make(Plain)
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), DoubleCommunicator(),
                           named_parameters=model.named_parameters())  # fmt: skip
    before = weights(model)
    model.first(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert not torch.equal(before["last.weight"], weights(model)["last.weight"])


def test_accumulation_sends_after_the_last_pass():
    model = make(Plain)
    communicator = DoubleCommunicator()
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, model, passes=2)
    assert optimizer.backward_passes_per_step == 2
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        assert communicator.submitted == []  # the first step measures how often a gradient arrives in one pass
    optimizer.step()
    communicator.submitted.clear()
    model(torch.ones(2, 6)).sum().backward()
    assert communicator.submitted == []
    model(torch.ones(2, 6)).sum().backward()
    assert len(communicator.submitted) == 6
    with pytest.raises(AssertionError, match="more than backward_passes_per_step times"):
        model(torch.ones(2, 6)).sum().backward()


def test_step_after_synchronize_warns_and_skip_synchronize_does_not(recwarn):
    model = make(Plain)
    communicator = DoubleCommunicator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = distribute(optimizer, communicator, named_parameters=model.named_parameters())
    for skip in (True, False):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        optimizer.synchronize()
        communicator.waited.clear()
        if skip:
            with optimizer.skip_synchronize():
                optimizer.step()
            assert not recwarn.list
        else:
            with pytest.warns(UserWarning, match="called without optimizer.skip_synchronize"):
                optimizer.step()
        assert communicator.waited == []


def test_updates_in_inference_mode_leave_ordinary_state():
    model, optimizer, communicator = pending_net(optimizer="adam", steps=1)
    with torch.inference_mode():
        model(torch.ones(2, 6))
    train(model, optimizer, batches(2, rows=4))
    assert not any(t.is_inference() for state in optimizer.state.values() for t in state.values())


def test_a_second_wrap_takes_over_and_the_first_says_so():
    model, first, _ = pending_net()
    communicator = DoubleCommunicator()
    second = distribute(torch.optim.SGD(model.parameters(), lr=0.1), communicator, model)
    train(model, second, batches(2, rows=4))
    assert sum(name == "first.weight" for name, _ in communicator.submitted) == 2
    with pytest.raises(RuntimeError, match="given to a newer DistributedOptimizer"):
        first.step()


def test_two_optimizers_over_disjoint_modules_of_one_model():
    data = batches(4, rows=4)
    plain, overlapped = make(Plain), make(Plain)
    communicator = DoubleCommunicator()
    for model, wrapped in ((plain, False), (overlapped, True)):
        parts = [list(model.first.parameters()), [*model.middle.parameters(), *model.last.parameters()]]
        optimizers = [OPTIMIZERS["sgd"](part) for part in parts]
        if wrapped:
            optimizers = [distribute(optimizer, communicator, model) for optimizer in optimizers]
        for x, target in data:
            for optimizer in optimizers:
                optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert_same(weights(plain), weights(overlapped))


def test_report_adds_up():
    model, optimizer, communicator = pending_net(steps=3)
    model(torch.ones(4, 6))
    report = optimizer.report()
    assert report["steps"] == 3
    assert report["communication_s"] == 2.0  # of two steps, from 1.0 to 2.0 on the double's clock
    assert report["hidden_s"] == report["communication_s"] - report["exposed_s"]
    assert report["tensors"]["scale.weight"]["nbytes"] == 256
    assert [group["priority"] for group in report["groups"]] == list(range(7))
    assert report["tensors"]["scale.weight"]["group"] == "scale.weight"
    assert "scale.weight" in str(report) and "hidden" in str(report)
