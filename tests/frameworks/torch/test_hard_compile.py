"""torch.compile: one gate at the entry of a compiled region, compiled code that really runs, and the right weights.

The compiler's own front runs; behind it a backend that counts graphs takes the place of the one that needs minutes.
"""

import copy

import pytest
import torch
from double import DoubleCommunicator, distribute
from models import Net, Plain, batches, make, train, weights
from torch import nn

DATA = batches(6, rows=4)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain_weights(model_class):
    model = make(model_class)
    train(model, sgd(model), DATA)
    return weights(model)


class Counting:
    """A backend for torch.compile that runs graphs as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


def whole(model, backend):
    """torch.compile(model), and the compiled one is passed on."""
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return compiled, compiled


def in_place(model, backend):
    """model.compile()."""
    model.compile(backend=backend, fullgraph=True)
    return model, model


def part(model, backend):
    """One layer is compiled."""
    model.last = torch.compile(model.last, backend=backend, fullgraph=True)
    return model, model


@pytest.mark.parametrize("compile_it", [whole, in_place, part])
@pytest.mark.parametrize("model_class", [Net, Plain])
@pytest.mark.parametrize("overlap_forward", [True, False])
def test_compiled_code_runs_as_one_graph(backend, compile_it, model_class, overlap_forward):
    model = make(model_class)
    called, passed = compile_it(model, backend)
    optimizer = distribute(sgd(model), DoubleCommunicator(), passed, overlap_forward=overlap_forward)
    train(called, optimizer, DATA)
    assert len(backend.graphs) == 1
    assert optimizer.report()["overlap"] == ("backward and forward" if overlap_forward else "backward")
    expected = plain_weights(model_class)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, expected[name.replace("_orig_mod.", "")]), name


def test_the_entry_waits_for_all_parameters_inside_and_no_others(backend):
    model = make(Plain)
    model.middle.compile(backend=backend)
    communicator = DoubleCommunicator()
    train(model, distribute(sgd(model), communicator, model), DATA)
    communicator.waited.clear()
    model.middle(torch.zeros(2, 8))
    assert sorted(communicator.waited) == ["middle.bias", "middle.weight"]


def original(model, backend):
    """The model was compiled before, and the original is passed on."""
    return torch.compile(model, backend=backend), model


def function(model, backend):
    """A function that calls the model is compiled."""
    return torch.compile(lambda x: model(x), backend=backend), model


@pytest.mark.parametrize("compile_it", [original, function])
def test_gates_inside_of_compiled_code_are_told_and_the_weights_are_right(backend, compile_it):
    model = make(Plain)
    called, passed = compile_it(model, backend)
    optimizer = distribute(sgd(model), DoubleCommunicator(), passed)
    with pytest.warns(UserWarning, match="compile the model first, and pass the compiled one"):
        for x, target in DATA:
            optimizer.zero_grad()
            nn.functional.cross_entropy(called(x), target).backward()
            optimizer.step()
    expected = plain_weights(Plain)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, expected[name]), name


def test_copies_of_a_compiled_model_have_no_gates(backend):
    model = make(Plain)
    model.first.compile(backend=backend)
    communicator = DoubleCommunicator()
    train(model, distribute(sgd(model), communicator, model), DATA[:2])
    other = copy.deepcopy(model)
    communicator.forbidden = True
    other(torch.zeros(2, 6))
    communicator.forbidden = False


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parameters_of_scripted_modules_are_waited_for():
    models = [nn.Sequential(torch.jit.script(make(Plain)), nn.Identity()) for _ in range(2)]
    train(models[0], sgd(models[0]), DATA)
    optimizer = distribute(sgd(models[1]), DoubleCommunicator(), models[1])
    train(models[1], optimizer, DATA)
    expected = weights(models[0])
    for name, tensor in weights(models[1]).items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name  # torch.jit itself does not repeat its bits
    assert "torch.jit compiled the code that uses these: 0.last.weight" in optimizer.report()["fallbacks"][0]
