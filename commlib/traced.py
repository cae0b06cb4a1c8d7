"""Layers and their times out of a timeline that was recorded in training, as a model to simulate.

A timeline has spans of category "forward" and "backward" for each layer, whose arguments name the layer and the elements of its
gradients (commlib.torch's trace_layers writes them), and spans of category "wait", in which compute stands still for
communication. This file knows events of a Chrome trace; it knows no cluster and no framework.
"""
from __future__ import annotations

import bisect
import statistics
from typing import Any, Dict, List, NamedTuple, Tuple

from commlib.simulated_training import TrainingLayer

_US = 1e-6
_RECORD = "record one with start_timeline() and commlib.torch's trace_layers(model): see docs/simulate.md"


class _Span(NamedTuple):
    begin_us: float
    end_us: float
    category: str
    layer: str


def is_timeline(table: Any) -> bool:
    """A Chrome trace, in either of its two forms: an array of events, or an object with one."""
    return isinstance(table, list) or (isinstance(table, dict) and "traceEvents" in table)


def layers_of(table: Any) -> Tuple[TrainingLayer, ...]:
    """What one rank computes in a step: medians over the recorded steps, of the lowest rank that recorded layers.

    A layer's forward lasts until the next layer's forward begins, or its first backward, without the waits for communication in
    it. What follows the last backward of a step (the update of a waiting step(), reading data) is no layer's. A layer that runs
    several times in a step counts once, where it runs first. The first of several steps, which measures, is left out.

    Raises:
        ValueError: there are no layers with gradients in it; the text says how to record them.

    Example:
        >>> def span(name, category, begin, length, **arguments):
        ...     return {"ph": "X", "pid": 0, "name": name, "cat": category, "ts": begin, "dur": length, "args": arguments}
        >>> layer = {"layer": "fc", "tensors": [10]}
        >>> events = [span("forward fc", "forward", 0, 1e6, **layer), span("backward fc", "backward", 1e6, 2e6, **layer)]
        >>> layers_of(events)
        (TrainingLayer(forward_s=1.0, backward_s=2.0, counts=(10,), name='fc'),)
    """
    events = table if isinstance(table, list) else table["traceEvents"]
    spans, counts = _spans(events)
    steps = _steps(spans)
    if not counts or not steps:
        raise ValueError(f"this timeline has no layers with the sizes of their gradients; {_RECORD}")
    steps = steps[1:] or steps
    waits = [span for span in spans if span.category == "wait"]
    times = [_times(step, waits) for step in steps]
    order = list(dict.fromkeys(span.layer for span in steps[0] if span.category == "forward"))
    layers = tuple(TrainingLayer(_median(times, layer, "forward"), _median(times, layer, "backward"), counts.get(layer, ()), layer)
                   for layer in order)  # fmt: skip
    if not any(layer.counts for layer in layers):
        raise ValueError(f"no layer of this timeline has gradients; {_RECORD}")
    return layers


def _spans(events: Any) -> Tuple[List[_Span], Dict[str, Tuple[int, ...]]]:
    """In order of time, of one rank; and the elements of each layer's gradients."""
    found = [event for event in events if _is_span(event)] if isinstance(events, list) else []
    ranks = [event["pid"] for event in found if event["cat"] == "forward" and "layer" in event.get("args", {})]
    spans: List[_Span] = []
    counts: Dict[str, Tuple[int, ...]] = {}
    for event in found:
        if not ranks or event["pid"] != min(ranks):
            continue
        arguments = event.get("args", {})
        layer = str(arguments.get("layer", ""))
        if event["cat"] != "wait" and not layer:
            continue
        spans.append(_Span(event["ts"], event["ts"] + event["dur"], event["cat"], layer))
        if "tensors" in arguments:
            counts[layer] = _checked(arguments["tensors"], layer)
    return sorted(spans), counts


def _is_span(event: Any) -> bool:
    return (isinstance(event, dict) and event.get("ph") == "X" and event.get("cat") in ("forward", "backward", "wait")
            and all(type(event.get(key)) in (int, float) for key in ("ts", "dur", "pid"))
            and isinstance(event.get("args", {}), dict))  # fmt: skip


def _checked(tensors: Any, layer: str) -> Tuple[int, ...]:
    if not isinstance(tensors, list) or not all(type(count) is int and count > 0 for count in tensors):
        raise ValueError(f"the timeline's layer {layer!r}: 'tensors' must be a list of elements per gradient, not {tensors!r}")
    return tuple(tensors)


def _steps(spans: List[_Span]) -> List[List[_Span]]:
    """A forward that follows a backward begins a step; one that has no backward, such as a validation, is none."""
    steps: List[List[_Span]] = []
    before = "backward"
    for span in spans:
        if span.category == "wait":
            continue
        if span.category == "forward" and before == "backward":
            steps.append([])
        if steps:
            steps[-1].append(span)
        before = span.category
    return [step for step in steps if any(span.category == "backward" for span in step)]


def _stood_us(waits: List[_Span], begin_us: float, end_us: float) -> float:
    """How long compute waited meanwhile; waits come one after the other."""
    total_us = 0.0
    for wait in waits[max(0, bisect.bisect(waits, (begin_us,)) - 1):]:
        if wait.begin_us >= end_us:
            break
        total_us += max(0.0, min(wait.end_us, end_us) - max(wait.begin_us, begin_us))
    return total_us


def _times(step: List[_Span], waits: List[_Span]) -> Dict[Tuple[str, str], float]:
    """(layer, category) -> seconds of one step."""
    times: Dict[Tuple[str, str], float] = {}
    for span, after in zip(step, [*step[1:], None]):
        goes_on = span.category == "forward" and after is not None
        end_us = after.begin_us if goes_on and after is not None else span.end_us
        stood_us = _stood_us(waits, span.begin_us, end_us)
        key = span.layer, span.category
        times[key] = times.get(key, 0.0) + _US * max(0.0, end_us - span.begin_us - stood_us)
    return times


def _median(times: List[Dict[Tuple[str, str], float]], layer: str, category: str) -> float:
    """Of the steps that have it: the last backward of a timeline may be cut off."""
    found = [step[layer, category] for step in times if (layer, category) in step]
    return statistics.median(found) if found else 0.0
