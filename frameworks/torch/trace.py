"""Compute in the timeline: each layer's forward and backward as spans beside the communication.

This file watches modules through hooks and writes to the communicator's timeline while one is being recorded; it changes
nothing that is computed.
"""

import time

import commlib


def trace_layers(model):
    """Shows every layer's forward and backward of `model` in the timeline, if one is being recorded.

    A layer is a module without children. Forward is drawn from the layer's first hook to its last; backward from the
    moment at which the gradient of its output exists to that at which the gradient of its input does.

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
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            layer = _Layer(name or type(model).__name__)
            handles += [
                module.register_forward_pre_hook(layer.forward_begins),
                module.register_forward_hook(layer.forward_ends),
                module.register_full_backward_pre_hook(layer.backward_begins),
                module.register_full_backward_hook(layer.backward_ends),
            ]
    return lambda: [handle.remove() for handle in handles]


class _Layer:
    """One layer's hooks."""

    def __init__(self, name):
        self.name = name
        self._begin_s = {}

    def forward_begins(self, module, arguments):
        self._begin_s["forward"] = time.monotonic()

    def forward_ends(self, module, arguments, result):
        self._end("forward")

    def backward_begins(self, module, gradients):
        self._begin_s["backward"] = time.monotonic()

    def backward_ends(self, module, input_gradients, output_gradients):
        self._end("backward")

    def _end(self, kind):
        begin_s = self._begin_s.pop(kind, None)
        timeline = commlib.communicator().timeline
        if timeline is not None and begin_s is not None:
            timeline.span(f"{kind} {self.name}", kind, begin_s, time.monotonic())
