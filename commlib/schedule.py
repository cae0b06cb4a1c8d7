"""The ideal schedule of a training step: the bound that overlapped communication is measured by.

This file knows layers, seconds and one link; no algorithms, ranks, latency or segments: it is what could be reached if
preemption were free and messages could be cut at will.

    second      1  2  3  4  5  6  7  8  9 10 11 12
    backward    2  2  1  1  0  0                            gradient i is released when the backward of i ends
    link              2  2  1  1  0  0  0  1  2             always the released gradient that is needed first
    forward                                   0  1  2       the forward of i waits for gradient i and forward i - 1

All layers' forward passes wait for their gradients, so nothing is left to send when the next backward pass begins.
Hence every step (but the first, which has nothing to wait for) takes the same time, and one is enough to compute: from
the beginning of its backward pass to the end of the forward pass that follows.
"""
from __future__ import annotations

from typing import List, NamedTuple, Sequence, Tuple


class LayerTime(NamedTuple):
    """Seconds that one layer keeps the processor and the link busy in a step. Layers are listed in forward order."""

    forward_s: float
    backward_s: float
    communication_s: float


class StepTime(NamedTuple):
    """A step in steady state: its length, and how long the forward pass of each layer is kept waiting."""

    step_s: float
    waits_s: Tuple[float, ...]


def ideal_step_time(layers: Sequence[LayerTime]) -> StepTime:
    """Both passes overlapped: every layer's forward waits for its own gradient only.

    With c_i the end of communication of layer i under the preemptive order "needed first", the forward of layer i ends
    at e_i = max(e_(i-1), c_i) + f_i, where e_(-1) = sum b; the step takes e_(L-1). No order of the link makes it
    shorter: needed first is earliest deadline first.

    Args:
        layers: in the order of the forward pass; the link carries one gradient at a time.

    Raises:
        ValueError: no layers, or a time that is negative or not finite.

    Example:
        >>> ideal_step_time([LayerTime(1, 2, 3), LayerTime(1, 2, 3)])
        StepTime(step_s=9, waits_s=(3, 0))

    References:
        Peng et al., "A generic communication scheduler for distributed DNN training acceleration" (ByteScheduler), SOSP
        2019; Horn, "Some simple scheduling algorithms", Naval Research Logistics Quarterly 21 (1974).
    """
    _check(layers)
    arrived_s = _arrivals(layers)
    end_s = sum(layer.backward_s for layer in layers)
    waits_s = []
    for layer, ready_s in zip(layers, arrived_s):
        waits_s.append(max(0, ready_s - end_s))
        end_s += waits_s[-1] + layer.forward_s
    return StepTime(end_s, tuple(waits_s))


def backward_overlap_step_time(layers: Sequence[LayerTime]) -> StepTime:
    """Backward overlapped, as by optimizers that wait in step(): forward begins when all gradients are there.

    Args and Raises as for `ideal_step_time`. The order of the link makes no difference.

    Example:
        >>> backward_overlap_step_time([LayerTime(1, 2, 3), LayerTime(1, 2, 3)])
        StepTime(step_s=10, waits_s=(4, 0))
    """
    _check(layers)
    backward_s = sum(layer.backward_s for layer in layers)
    return _with_first_wait(layers, max(0, max(_arrivals(layers)) - backward_s))


def no_overlap_step_time(layers: Sequence[LayerTime]) -> StepTime:
    """Nothing overlapped: backward, then all communication, then forward.

    Args and Raises as for `ideal_step_time`.

    Example:
        >>> no_overlap_step_time([LayerTime(1, 2, 3), LayerTime(1, 2, 3)])
        StepTime(step_s=12, waits_s=(6, 0))
    """
    _check(layers)
    return _with_first_wait(layers, sum(layer.communication_s for layer in layers))


def _check(layers: Sequence[LayerTime]) -> None:
    if not layers:
        raise ValueError("a step needs at least one layer")
    for index, layer in enumerate(layers):
        if not all(0 <= time_s < float("inf") for time_s in layer):
            raise ValueError(f"layer {index} has a time that is not a non-negative number of seconds: {layer}")


def _with_first_wait(layers: Sequence[LayerTime], wait_s: float) -> StepTime:
    compute_s = sum(layer.backward_s for layer in layers) + sum(layer.forward_s for layer in layers)
    return StepTime(compute_s + wait_s, (wait_s,) + (0,) * (len(layers) - 1))


def _arrivals(layers: Sequence[LayerTime]) -> List[float]:
    """When each gradient has come, in seconds since backward began.

    Backward releases the gradients from the last to the first, and each is needed before all that came earlier: the
    gradients that wait for the link form a stack.
    """
    arrived_s: List[float] = [0] * len(layers)
    left_s = [layer.communication_s for layer in layers]
    waiting: List[int] = []
    now_s: float = 0

    def serve_until(end_s: float) -> None:
        nonlocal now_s
        while waiting and now_s + left_s[waiting[-1]] <= end_s:
            now_s += left_s[waiting[-1]]
            arrived_s[waiting.pop()] = now_s
        if waiting:
            left_s[waiting[-1]] -= end_s - now_s
        now_s = end_s

    released_s: float = 0
    for index in reversed(range(len(layers))):
        released_s += layers[index].backward_s
        serve_until(released_s)
        waiting.append(index)
    serve_until(float("inf"))
    return arrived_s
