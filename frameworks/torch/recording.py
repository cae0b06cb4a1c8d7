"""A model as `commlib simulate` wants it: its layers' gradients and times, measured on this machine.

This file runs a few steps of the user's model by itself and writes a table; it communicates nothing, and leaves gradients,
buffers and random numbers as they were.
"""

import contextlib
import statistics
import time

import torch

from commlib.simulated_training import TrainingLayer
from commlib.workload import Workload


def record_model(path, model, *inputs, loss=None, steps=5, **keywords):
    """Measures a model's layers and writes the table that `commlib simulate --model FILE` reads.

    A layer is a module with parameters of its own, in the order in which a forward pass first uses them; what runs between
    two layers (activations, pooling) counts to the one before. A layer's backward ends when its last gradient is there. Call it
    before DistributedOptimizer takes the model, on one rank, with the batch that one accelerator will have.

    Args:
        path: the file to write (JSON).
        model: an nn.Module, in the mode (train or eval) in which it is to be measured.
        *inputs, **keywords: what its forward takes, tensors on the model's device.
        loss: makes a scalar of the model's result; None: the sum of all floating-point tensors in it.
        steps: how many are measured, after one that is not; the times are their medians.

    Returns:
        The commlib.workload.Workload that was written: `parameters` elements in all, `compute_s` seconds a step.

    Raises:
        ValueError: steps is below 1, no layer of the model got a gradient, or its result has nothing that could be summed.
        OSError: the file cannot be written.

    Example:
        >>> import os, tempfile, torch, commlib.torch as comm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.json")
        >>> comm.record_model(path, model, torch.ones(16, 4)).parameters
        49
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    watch = _Watch(model)
    with _as_it_was(model), watch:
        passes = [watch.measure(lambda: _scalar(model(*inputs, **keywords), loss)) for _ in range(steps + 1)][1:]
    layers = tuple(
        TrainingLayer(statistics.median(one[0][layer] for one in passes), statistics.median(one[1][layer] for one in passes),
                      tuple(parameter.numel() for parameter in layer.parameters), layer.name)
        for layer in watch.order
    )  # fmt: skip
    workload = Workload(type(model).__name__, layers)
    if workload.parameters == 0:
        raise ValueError("no parameter of this model got a gradient: is it frozen, or its result detached?")
    workload.save(path)
    return workload


class _Layer:
    """A module that has parameters of its own."""

    def __init__(self, name, module):
        self.name, self.module = name, module
        self.parameters = []  # those that got a gradient


class _Watch:
    """Notes when each layer's forward begins and when its last gradient has come."""

    def __init__(self, model):
        own = {name: list(module.parameters(recurse=False)) for name, module in model.named_modules()}
        modules = dict(model.named_modules())
        self.layers = [_Layer(name or type(model).__name__, modules[name]) for name in own if own[name]]
        self.order = []  # of first use
        self._on_gpu = any(parameter.is_cuda for parameter in model.parameters())
        self._began, self._came, self._handles = {}, {}, []

    def __enter__(self):
        seen = set()  # tied weights belong to the first layer that uses them
        for layer in self.layers:
            self._handles.append(layer.module.register_forward_pre_hook(self._forward(layer)))
            for parameter in layer.module.parameters(recurse=False):
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._gradient(layer)))
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()

    def now_s(self):
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _forward(self, layer):
        def begins(module, arguments):
            if layer not in self.order:
                self.order.append(layer)
            self._began.setdefault(layer, self.now_s())
        return begins

    def _gradient(self, layer):
        def comes(parameter):
            if not any(parameter is known for known in layer.parameters):
                layer.parameters.append(parameter)
            self._came[layer] = self.now_s()
        return comes

    def measure(self, forward):
        """(seconds of forward, seconds of backward) of each layer in one step."""
        self._began.clear()
        self._came.clear()
        begin_s = self.now_s()
        result = forward()
        middle_s = self.now_s()
        result.backward()
        end_s = self.now_s()
        used = [layer for layer in self.order if layer in self._began]
        # What comes before the first layer, and after the last gradient, is the first layer's.
        starts = [begin_s, *(self._began[layer] for layer in used[1:]), middle_s]
        forwards = {layer: after - before for layer, before, after in zip(used, starts, starts[1:])}
        backwards = dict.fromkeys(self.layers, 0.0)
        before_s = middle_s
        for layer, at_s in sorted(self._came.items(), key=lambda item: item[1]):
            backwards[layer] += at_s - before_s
            before_s = at_s
        if used:
            backwards[used[0]] += end_s - before_s
        return {**dict.fromkeys(self.layers, 0.0), **forwards}, backwards


def _scalar(result, loss):
    if loss is not None:
        return loss(result)
    found = []

    def look(value):
        if isinstance(value, torch.Tensor):
            found.extend([value.float().sum()] if value.is_floating_point() and value.requires_grad else [])
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for each in value:
                look(each)

    look(result)
    if not found:
        raise ValueError("the model's result has no floating-point tensor that depends on its parameters: give a loss")
    return sum(found)


@contextlib.contextmanager
def _as_it_was(model):
    """Gradients, buffers and random numbers afterwards are those of before."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({parameter.get_device() for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
