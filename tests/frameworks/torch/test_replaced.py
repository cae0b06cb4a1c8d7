"""Parameters that are replaced in a wrapped model: trained if the optimizer knows the new ones, refused if nobody does."""

import pytest
import torch
from double import DoubleCommunicator, distribute
from models import Plain, batches, make, train, weights
from torch import nn
from torch.nn.utils import parametrizations, prune

DATA = batches(8, rows=4)


def assigned_state(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def assigned_parameter(model):
    model.middle.weight = nn.Parameter(torch.ones(8, 8))


def deleted_and_made_again(model):
    del model.middle.bias
    model.middle.bias = nn.Parameter(torch.zeros(8))


def weight_norm(model):
    parametrizations.weight_norm(model.middle)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def old_weight_norm(model):
    nn.utils.weight_norm(model.middle)


def converted(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("overlap_forward", [True, False])
@pytest.mark.parametrize("replace", [assigned_state, assigned_parameter, deleted_and_made_again, weight_norm, old_weight_norm,
                                     converted])  # fmt: skip
def test_new_parameters_that_nobody_trains_are_refused(replace, overlap_forward):
    model = make(Plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = distribute(optimizer, DoubleCommunicator(), model, overlap_forward=overlap_forward)
    train(model, optimizer, DATA[:3])
    replace(model)
    nn.functional.cross_entropy(model(DATA[3][0]), DATA[3][1]).backward()
    for _ in range(2):  # and not only once
        with pytest.raises(RuntimeError, match="which the optimizer trains, is no longer in the model.*trained by nobody"):
            optimizer.step()
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), DoubleCommunicator(), model)
    before = weights(model)
    train(model, optimizer, DATA[3:])
    after = weights(model)
    assert all(not torch.equal(before[name], after[name]) for name in after)


def spectral_norm(model, optimizer):
    torch.manual_seed(5)
    parametrizations.spectral_norm(model.middle)


def pruned(model, optimizer):
    prune.l1_unstructured(model.middle, "weight", 0.5)


def swapped(model, optimizer):
    torch.func.functional_call(model, {name: 2 * p.detach() for name, p in model.named_parameters()}, (torch.ones(1, 6),))


def added(model, optimizer):
    model.middle.weight = nn.Parameter(torch.ones(8, 8))
    optimizer.add_param_group({"params": [model.middle.weight]})


def frozen(model, optimizer):
    model.middle.weight = nn.Parameter(torch.ones(8, 8), requires_grad=False)


def new_layer(model, optimizer):
    torch.manual_seed(6)
    model.last = nn.Linear(8, 3)
    optimizer.add_param_group({"params": model.last.parameters()})


@pytest.mark.parametrize("replace", [spectral_norm, pruned, swapped, added, frozen, new_layer])
def test_what_is_trained_on_is_trained_right(replace):
    results = []
    for is_wrapped in (False, True):
        model = make(Plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if is_wrapped:
            optimizer = distribute(optimizer, DoubleCommunicator(), model)
        train(model, optimizer, DATA[:3])
        replace(model, optimizer)
        train(model, optimizer, DATA[3:])
        results.append(weights(model))
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="meta device and has no values: model.to_empty"):
        distribute(torch.optim.SGD(model.parameters(), lr=0.1), DoubleCommunicator(), model)
