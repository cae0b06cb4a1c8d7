"""A model recorded for the simulator: which layers, in which order, with whose gradients and times; and nothing else changed."""

import json
import pathlib
import subprocess
import sys
import time

import pytest
import torch

import commlib.torch as comm
from commlib import commands
from commlib.workload import Workload


class Waits(torch.nn.Module):
    """A layer that takes its time, in forward and in backward."""

    class _Wait(torch.autograd.Function):
        @staticmethod
        def forward(context, x, weight, forward_s, backward_s):
            context.backward_s = backward_s
            context.save_for_backward(x, weight)
            time.sleep(forward_s)
            return x * weight

        @staticmethod
        def backward(context, gradient):
            x, weight = context.saved_tensors
            time.sleep(context.backward_s)
            return gradient * weight, (gradient * x).sum(0), None, None

    def __init__(self, width, forward_s, backward_s):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x):
        return self._Wait.apply(x, self.weight, self.forward_s, self.backward_s)


def record(tmp_path, model, *inputs, **options):
    workload = comm.record_model(str(tmp_path / "model.json"), model, *inputs, **options)
    assert Workload.load(str(tmp_path / "model.json")) == workload
    return workload


def test_layers_are_in_the_order_of_use_with_their_own_times(tmp_path):
    model = torch.nn.ModuleDict({"late": Waits(3, 0.01, 0.04), "early": Waits(3, 0.03, 0.02)})
    model.forward = lambda x: model["late"](model["early"](x))
    layers = record(tmp_path, model, torch.ones(2, 3), steps=3).layers
    assert [(layer.name, layer.counts) for layer in layers] == [("early", (3,)), ("late", (3,))]
    # A sleep is never shorter than asked for; a neighbour's would be.
    assert 0.03 <= layers[0].forward_s and 0.02 <= layers[0].backward_s
    assert 0.01 <= layers[1].forward_s and 0.04 <= layers[1].backward_s


TRAINING = """
import sys, torch, commlib.torch as comm
from test_recording import Waits
comm.init()
model = torch.nn.Sequential(Waits(3, 0.01, 0.03), torch.nn.ReLU(), Waits(3, 0.02, 0.01), torch.nn.Linear(3, 5))
optimizer = comm.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model=model)
comm.start_timeline(sys.argv[1])
comm.trace_layers(model)
for step in range(4):
    optimizer.zero_grad()
    model(torch.ones(2, 3, requires_grad=True)).sum().backward()
    optimizer.step()
optimizer.synchronize()
comm.stop_timeline()
comm.shutdown()
"""


def test_a_timeline_of_training_is_a_model_to_simulate(tmp_path, capsys):
    timeline, cluster = tmp_path / "training.json", tmp_path / "cluster.json"
    program = [sys.executable, "-c", TRAINING, str(timeline)]
    done = subprocess.run(program, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    layers = Workload.load(str(timeline)).layers
    assert [(layer.name, layer.counts) for layer in layers] == [("0", (3,)), ("1", ()), ("2", (3,)), ("3", (15, 5))]
    assert 0.01 <= layers[0].forward_s and 0.03 <= layers[0].backward_s  # a sleep is never shorter than asked for
    assert 0.02 <= layers[2].forward_s and 0.01 <= layers[2].backward_s
    cluster.write_text(json.dumps({"ranks_per_host": 1, "between": {"latency_us": 20, "gbit_per_s": 10}}))
    assert commands.main(["simulate", "--model", str(timeline), "--cluster", str(cluster), "--ranks", "2", "--no-advice"]) == 0
    assert capsys.readouterr().out.startswith("training.json: 0.0 M parameters")


def test_what_has_no_parameters_counts_to_the_layer_before(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(inplace=True), torch.nn.Linear(8, 1))
    layers = record(tmp_path, model, torch.ones(16, 4)).layers
    assert [layer.name for layer in layers] == ["0", "2"]
    assert sorted(layers[0].counts) == [8, 32] and sorted(layers[1].counts) == [1, 8]
    assert all(layer.forward_s > 0 and layer.backward_s > 0 for layer in layers)


def test_frozen_and_tied_parameters_travel_never_and_once(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 5, bias=False), torch.nn.Linear(5, 5, bias=False), torch.nn.Linear(5, 5))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    assert [layer.counts for layer in record(tmp_path, model, torch.ones(2, 5)).layers] == [(25,), (), (5,)]


def test_nothing_else_is_changed(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    gradient = model[0].weight.grad = torch.full((4, 4), 7.0)
    before, seed = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    record(tmp_path, model, torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    assert model[0].weight.grad is gradient and bool((gradient == 7).all()) and model[0].bias.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_losses_and_results_of_other_shapes(tmp_path):
    model = torch.nn.Linear(4, 4)
    model.forward = lambda x, scale: {"out": torch.nn.functional.linear(x, model.weight) * scale, "ids": [torch.zeros(2).long()]}
    assert record(tmp_path, model, torch.ones(2, 4), scale=2.0).parameters == 16
    assert record(tmp_path, model, torch.ones(2, 4), 2.0, loss=lambda result: result["out"].mean()).parameters == 16


def test_what_cannot_be_recorded_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="steps"):
        record(tmp_path, torch.nn.Linear(1, 1), torch.ones(1, 1), steps=0)
    with pytest.raises(ValueError, match="give a loss"):
        record(tmp_path, torch.nn.Linear(1, 1).requires_grad_(False), torch.ones(1, 1))
    assert not list(tmp_path.iterdir())
