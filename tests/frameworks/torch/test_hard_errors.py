"""What cannot be done right says so: errors that name the parameter and what to do, and training on after them."""

import copy
import pickle

import pytest
import torch
from double import DoubleCommunicator, distribute
from models import NET_ORDER, Net, Plain, batches, make, train, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

DATA = batches(4, rows=4)


def wrapped(model=None, communicator=None, **options):
    model = model or make(Plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, distribute(optimizer, communicator or DoubleCommunicator(), model, **options)


class Repeated(nn.Module):
    """One layer in several reentrant checkpoints: backward within backward gives it its gradient in as many pieces."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x, times):
        for _ in range(times):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x


def test_a_layer_in_more_reentrant_checkpoints_than_ever_is_refused_once():
    results = []
    for is_wrapped in (False, True):
        model = make(Repeated)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if is_wrapped:
            optimizer = distribute(optimizer, DoubleCommunicator(), model)
        for times in (2, 1, 2, 3, 3):  # one at a time: the fourth comes while the gradient is on its way
            loss = model(torch.ones(2, 6, requires_grad=True), times).sum()
            if is_wrapped and times == 3 and len(results) == 1:
                results.append(None)
                with pytest.raises(AssertionError, match="more than backward_passes_per_step times.*'layer"):
                    loss.backward()
                optimizer.synchronize()
                optimizer.zero_grad()
                loss = model(torch.ones(2, 6, requires_grad=True), times).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    for name in results[0]:
        assert torch.equal(results[0][name], results[-1][name]), name


def test_parameters_that_came_without_add_param_group_are_refused():
    model, optimizer = wrapped()
    train(model, optimizer, DATA[:2])
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RuntimeError, match="7 parameters, but 6 are known.*optimizer.add_param_group"):
        train(model, optimizer, DATA[:1])


def test_a_gradient_read_within_backward_while_it_is_reduced_is_refused():
    model, optimizer = wrapped()
    train(model, optimizer, DATA[:2])
    late = model.first.weight

    def look(_):
        assert model.last.weight.grad is not None

    late.register_post_accumulate_grad_hook(look)
    loss = nn.functional.cross_entropy(model(DATA[0][0]), DATA[0][1])
    optimizer._commlib._guard()  # as after a first part of backward
    with pytest.raises(RuntimeError, match="was read within backward, while it was being reduced"):
        loss.backward()


def test_training_goes_on_after_an_error_in_forward_and_in_backward():
    data = batches(6, rows=4)
    results = []
    for is_wrapped in (False, True):
        model = make(Plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if is_wrapped:
            optimizer = distribute(optimizer, DoubleCommunicator(), model)
        for step, (x, target) in enumerate(data):
            optimizer.zero_grad()
            try:
                loss = nn.functional.cross_entropy(model(x[:, :5] if step == 2 else x), target)
                if step == 3:
                    model.middle.bias.register_hook(_fail_once())
                loss.backward()
                optimizer.step()
            except (RuntimeError, ArithmeticError):
                if is_wrapped:
                    optimizer.synchronize()
        results.append(weights(model))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def _fail_once():
    calls = []

    def hook(gradient):
        calls.append(1)
        if len(calls) == 1:
            raise ArithmeticError("in a hook")

    return hook


def test_zero_grad_right_after_an_error_in_backward_says_what_to_do():
    model, optimizer = wrapped()
    model.middle.bias.register_hook(_fail_once())
    with pytest.raises(ArithmeticError):
        model(DATA[0][0]).sum().backward()
    with pytest.raises(AssertionError, match="before optimizer.step.. or optimizer.synchronize"):
        optimizer.zero_grad()
    optimizer.synchronize()
    optimizer.zero_grad()
    train(model, optimizer, DATA)


def test_guards_are_gone_once_nothing_is_pending():
    model, optimizer = wrapped(make(Net))
    train(model, optimizer, DATA)
    captured = [dict.__getitem__(model._modules[name.split(".")[0]]._parameters, name.split(".")[1]) for name in NET_ORDER]
    assert all(type(p) is not nn.Parameter and isinstance(p, nn.Parameter) for p in captured)
    assert all(type(p).__name__ == "Parameter" and "Parameter" in str(type(p)) for p in captured)
    optimizer.synchronize()
    assert all(type(p) is nn.Parameter for p in captured)


@pytest.mark.parametrize("copy_it", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_of_a_guarded_parameter_are_ordinary(copy_it):
    communicator = DoubleCommunicator()
    model, optimizer = wrapped(make(Net), communicator)
    captured = list(model.parameters())
    train(model, optimizer, DATA)
    communicator.waited.clear()
    copied = copy_it(captured[0])
    assert type(copied) is nn.Parameter
    assert communicator.waited == ["last.weight"]
    assert torch.equal(copied, captured[0])


def test_hyper_parameters_of_a_group_can_be_read_and_written_without_waiting():
    communicator = DoubleCommunicator()
    model, optimizer = wrapped(make(Net), communicator)
    train(model, optimizer, DATA)
    communicator.forbidden = True
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] / 2
        assert [p.shape for p in group["params"]] and all(p.requires_grad for p in group["params"])
        assert sum(p.numel() for p in group["params"]) > 0
        for p in group["params"]:
            p.grad = None
    optimizer.zero_grad()
    communicator.forbidden = False
