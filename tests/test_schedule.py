"""The ideal schedule: by hand, against every other order of the link, and against its bounds."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commlib.schedule import (
    LayerTime,
    StepTime,
    backward_overlap_step_time,
    ideal_step_time,
    no_overlap_step_time,
)

BOUNDS = [ideal_step_time, backward_overlap_step_time, no_overlap_step_time]
whole = st.integers(0, 6)  # whole seconds: exact sums, and a schedule that can be played second by second
layers_of_whole_seconds = st.lists(st.builds(LayerTime, whole, whole, whole), min_size=1, max_size=6)
seconds = st.floats(0, 1e3)
layers_of_seconds = st.lists(st.builds(LayerTime, seconds, seconds, seconds), min_size=1, max_size=12)


def total(layers, field):
    return sum(getattr(layer, field) for layer in layers)


def test_one_layer_hides_nothing():
    layers = [LayerTime(forward_s=1, backward_s=2, communication_s=5)]
    for bound in BOUNDS:
        assert bound(layers) == StepTime(8, (5,))


def test_two_equal_layers():
    """Backward 4 s; gradient 1 goes at 2, yields at 4 to gradient 0, which has come at 7; the rest of 1 comes at 8."""
    layers = [LayerTime(1, 2, 3)] * 2
    assert ideal_step_time(layers) == StepTime(9, (3, 0))
    assert backward_overlap_step_time(layers) == StepTime(10, (4, 0))
    assert no_overlap_step_time(layers) == StepTime(12, (6, 0))


def test_three_equal_layers_as_drawn_in_the_docstring():
    assert ideal_step_time([LayerTime(1, 2, 3)] * 3) == StepTime(12, (3, 0, 0))


def test_the_bulk_at_the_end_hides_behind_both_passes():
    """As in AlexNet: gradient 2 (20 s) begins at 2, is interrupted from 4 to 5 and from 6 to 7, and comes at 24."""
    layers = [LayerTime(4, 2, 1), LayerTime(4, 2, 1), LayerTime(4, 2, 20)]
    assert ideal_step_time(layers) == StepTime(28, (1, 0, 9))
    assert backward_overlap_step_time(layers) == StepTime(24 + 12, (18, 0, 0))


def test_layers_without_communication_do_not_wait():
    layers = [LayerTime(1, 1, 0), LayerTime(1, 1, 4), LayerTime(1, 1, 0)]
    assert ideal_step_time(layers) == StepTime(8, (0, 2, 0))


def test_hidden_communication_costs_nothing():
    layers = [LayerTime(5, 10, 0.25), LayerTime(5, 10, 4)]
    assert ideal_step_time(layers) == StepTime(30.25, (0.25, 0))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("layers", [[], [LayerTime(1, -1, 1)], [LayerTime(1, 1, float("inf"))],
                                    [LayerTime(float("nan"), 1, 1)]])
def test_nonsense_is_refused(bound, layers):
    with pytest.raises(ValueError):
        bound(layers)


@given(layers_of_seconds)
def test_bounds_are_in_order(layers):
    ideal, backward, none = (bound(layers).step_s for bound in BOUNDS)
    slack = 1e-9 * (1 + none)
    assert ideal <= backward + slack
    assert backward <= none + slack
    compute_s = total(layers, "forward_s") + total(layers, "backward_s")
    communication_s = total(layers, "communication_s")
    assert ideal >= max(compute_s, communication_s + layers[-1].backward_s) - slack
    assert none == pytest.approx(compute_s + communication_s)


@given(layers_of_seconds)
def test_a_step_is_compute_and_waits(layers):
    for bound in BOUNDS:
        result = bound(layers)
        assert min(result.waits_s) >= 0 and len(result.waits_s) == len(layers)
        compute_s = total(layers, "forward_s") + total(layers, "backward_s")
        assert result.step_s == pytest.approx(compute_s + sum(result.waits_s))


@given(layers_of_seconds, st.data())
def test_less_work_is_never_slower(layers, data):
    index = data.draw(st.integers(0, len(layers) - 1))
    field = data.draw(st.sampled_from(LayerTime._fields))
    less = list(layers)
    less[index] = layers[index]._replace(**{field: getattr(layers[index], field) / 2})
    for bound in BOUNDS:
        assert bound(less).step_s <= bound(layers).step_s * (1 + 1e-9) + 1e-9


def played(layers, choose):
    """The step with the link served second by second: choose(waiting layers) says which one goes in the next second."""
    release_s = [total(layers[index:], "backward_s") for index in range(len(layers))]
    left_s = [layer.communication_s for layer in layers]
    arrived_s = list(release_s)
    now_s = 0
    while any(left_s):
        waiting = [index for index, left in enumerate(left_s) if left and release_s[index] <= now_s]
        now_s += 1
        if waiting:
            index = choose(waiting)
            left_s[index] -= 1
            arrived_s[index] = now_s
    end_s = total(layers, "backward_s")
    for layer, arrived in zip(layers, arrived_s):
        end_s = max(end_s, arrived) + layer.forward_s
    return end_s


@given(layers_of_whole_seconds)
def test_ideal_is_the_link_carrying_what_is_needed_first(layers):
    assert ideal_step_time(layers).step_s == played(layers, min)


@given(layers_of_whole_seconds, st.randoms())
def test_no_other_order_is_better(layers, chance):
    assert ideal_step_time(layers).step_s <= played(layers, chance.choice)


@given(layers_of_whole_seconds, st.randoms())
def test_backward_overlap_does_not_depend_on_the_order(layers, chance):
    """With a forward pass that begins when the last gradient has come."""
    gathered = [layer._replace(forward_s=0) for layer in layers]
    forward_s = total(layers, "forward_s")
    assert backward_overlap_step_time(layers).step_s == played(gathered, chance.choice) + forward_s
