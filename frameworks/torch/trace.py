"""Compute in the timeline: each layer's forward and backward as spans beside the communication.

This file watches modules through hooks and writes to the communicator's timeline while one is being recorded; it
changes nothing that is computed.
"""

import time

import torch

import commlib


def trace_layers(model):
    """Shows every layer's forward and backward of `model` in the timeline, if one is being recorded.

    A layer is a module without children; what parameters other modules have of their own count to the first layer inside. Each
    span says how many elements each of the layer's gradients has, so that `commlib simulate --model` can take the timeline
    for a model. A layer's backward is drawn from the moment at which the gradient of its output
    exists to that at which the next layer's does, or its own parameters' gradients do, whichever is later.

    Args:
        model: an nn.Module.

    Returns:
        A function that takes the hooks away again.

    Example:
        >>> import torch, commlib.torch as comm
        >>> comm.init()
        >>> remove = comm.trace_layers(torch.nn.Linear(2, 1))
        >>> remove()
        >>> comm.shutdown()
    """
    handles, backward, seen, above = [], _Backward(), set(), []
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad and parameter not in seen]
        seen.update(own)  # tied weights belong to the first that has them
        above += [parameter.numel() for parameter in own]
        if next(module.children(), None) is None:
            layer = _Layer(name or type(model).__name__, backward, above)
            above = []
            handles.append(module.register_forward_pre_hook(layer.forward_begins))
            handles.append(module.register_forward_hook(layer.forward_ends))
            handles += [
                parameter.register_post_accumulate_grad_hook(layer.gradient_arrives)
                for parameter in module.parameters()
                if parameter.requires_grad
            ]
    return lambda: [handle.remove() for handle in handles]


def _span(category, layer, begin_s, end_s):
    timeline = commlib.communicator().timeline
    if timeline is not None:
        arguments = {"layer": layer.name, "tensors": layer.tensors}
        timeline.span(f"{category} {layer.name}", category, begin_s, end_s, arguments=arguments)


class _Backward:
    """The layer whose backward is running. One begins when another ends, so spans never cross."""

    def __init__(self):
        self.layer = None
        self.begin_s = 0.0
        self.seen_s = None  # when the last gradient of its parameters came

    def enter(self, layer):
        now_s = time.monotonic()
        self.leave(now_s)
        self.layer, self.begin_s, self.seen_s = layer, now_s, None

    def leave(self, now_s):
        """Draws the open span; it ended when its last gradient came, if no other layer has followed."""
        if self.layer is not None:
            _span("backward", self.layer, self.begin_s, now_s)
        self.layer = None


class _Layer:
    """One layer's hooks."""

    def __init__(self, name, backward, tensors):
        self.name = name
        self.tensors = tensors  # elements of each gradient
        self._backward = backward
        self._begin_s = 0.0

    def forward_begins(self, module, arguments):
        if self._backward.layer is not None:
            # The last layer of the last backward pass: nothing followed it but its own gradients.
            self._backward.leave(self._backward.seen_s or self._backward.begin_s)
        self._begin_s = time.monotonic()

    def forward_ends(self, module, arguments, result):
        _span("forward", self, self._begin_s, time.monotonic())
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.register_hook(self.backward_begins)

    def backward_begins(self, gradient):
        self._backward.enter(self)

    def gradient_arrives(self, parameter):
        if self._backward.layer is self:
            self._backward.seen_s = time.monotonic()
