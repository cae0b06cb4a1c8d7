"""A timeline as a model: which spans count to which layer, and what is no timeline of layers."""

import doctest
import json

import pytest

from commlib import traced
from commlib.workload import Workload

SIZES = {"a": [10, 2], "b": [], "c": [5]}


def span(category, name, begin_s, length_s, pid=0):
    arguments = {"layer": name, "tensors": SIZES[name]} if category in ("forward", "backward") else {}
    return {"name": f"{category} {name}", "cat": category, "ph": "X", "ts": 1e6 * begin_s, "dur": 1e6 * length_s, "pid": pid,
            "tid": 1000, "args": arguments}  # fmt: skip


def step(begin_s, pid=0, wait_s=0.0, slower=1.0):
    """Forward a, b, c of 1, 2 and 3 s with 0.5 s after each, then backward c, b, a of 2, 4 and 6."""
    events, at_s = [], begin_s
    for name, length_s in zip("abc", (1, 2, 3)):
        events.append(span("forward", name, at_s, slower * length_s + wait_s, pid))
        if wait_s:
            events.append(span("wait", name, at_s, wait_s, pid))
        at_s += slower * length_s + wait_s + 0.5
    for name, length_s in zip("cba", (2, 4, 6)):
        events.append(span("backward", name, at_s, length_s, pid))
        at_s += length_s
    return events, at_s


def recording(*steps, **options):
    """Steps one after the other, each followed by 9 s of something else."""
    events, at_s = [{"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {}}], 100.0
    for each in steps:
        more, at_s = step(at_s, **{**options, **each})
        events += more
        at_s += 9
    return events


def times(events):
    return [(layer.name, layer.counts, round(layer.forward_s, 6), round(layer.backward_s, 6)) for layer in traced.layers_of(events)]


EXPECTED = [("a", (10, 2), 1.5, 6.0), ("b", (), 2.5, 4.0), ("c", (5,), 3.5, 2.0)]


def test_layers_have_their_times_and_sizes():
    assert times(recording({}, {}, {})) == EXPECTED


def test_the_order_of_events_in_the_file_does_not_matter():
    assert times(recording({}, {})[::-1]) == EXPECTED


def test_waiting_for_communication_is_no_compute():
    assert times(recording({}, {"wait_s": 0.7}, {"wait_s": 0.7})) == EXPECTED


def test_medians_of_all_steps_but_the_first_count():
    slow_first = recording({"slower": 50}, {}, {"slower": 2}, {})
    assert times(slow_first) == EXPECTED


def test_one_step_is_enough_and_one_that_is_cut_off_does_not_matter():
    assert times(recording({})) == EXPECTED
    assert times(recording({}, {}, {})[:-1]) == EXPECTED


def test_the_lowest_rank_with_layers_counts():
    others = recording({"pid": 3, "slower": 9}, {"pid": 3, "slower": 9})
    assert times(recording({"pid": 1}, {"pid": 1}) + others) == EXPECTED


def test_a_validation_between_steps_is_no_step():
    events = recording({}, {}, {})
    forwards, at_s = [event for event in step(500.0, slower=7)[0] if event["cat"] == "forward"], 600.0
    more, _ = step(at_s)
    layers = times(events + forwards + more)
    assert [layer[:2] for layer in layers] == [layer[:2] for layer in EXPECTED] and layers[1:] == EXPECTED[1:]


def test_both_forms_of_a_trace_are_read(tmp_path):
    for number, table in enumerate([recording({}, {}), {"traceEvents": recording({}, {}), "displayTimeUnit": "ms"}]):
        path = tmp_path / f"timeline{number}.json"
        path.write_text(json.dumps(table))
        workload = Workload.load(str(path))
        assert workload.name == path.name and workload.compute_s == pytest.approx(19.5) and workload.parameters == 17


@pytest.mark.parametrize("table, complaint", [
    ([], "no layers with the sizes"),
    ({"traceEvents": 3}, "no layers with the sizes"),
    ([1, "a", None, {"ph": "X"}], "no layers with the sizes"),
    ([{**span("forward", "a", 0, 1), "args": {}}], "no layers with the sizes"),
    ([span("forward", "a", 0, 1)], "no layers with the sizes"),
    ([span("forward", "b", 0, 1), span("backward", "b", 1, 1)], "no layer of this timeline has gradients"),
    ([{**span("forward", "a", 0, 1), "args": {"layer": "a", "tensors": [-1]}}], "'tensors' must be a list"),
    ([{**span("forward", "a", 0, 1), "ts": "now"}], "no layers with the sizes"),
])  # fmt: skip
def test_what_is_no_timeline_of_layers_is_refused(tmp_path, table, complaint):
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"timeline.json: .*{complaint}"):
        Workload.load(str(path))


def test_examples():
    assert doctest.testmod(traced).failed == 0
