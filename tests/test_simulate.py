"""The engine over the simulated network: right sums whatever the order and the budgets, priorities that hold, deaths told.

Everything here is deterministic: one seed, one run.
"""

import random

import numpy as np
import pytest

from commlib import algorithms, models
from commlib.cost import Link, Machine, cost_s
from commlib.plan import Shape
from commlib.schedule import ideal_step_time
from commlib.selection import Choice
from commlib.settings import Settings
from commlib.simulate import EventKind, Overlap, Simulation, TrainingLayer, simulate_training

ALPHA_S = 20e-6
BETA_S_PER_BYTE = 8e-10  # 10 Gbit/s
NETWORK = Link(alpha_s=ALPHA_S, beta_s_per_byte=BETA_S_PER_BYTE)
MEGABYTE = 1 << 18  # elements of float32


def settings_for(link=NETWORK, **changes):
    """The settings that calibration would give on these links."""
    return Settings(alpha_inside_s=link.alpha_s, beta_inside_s_per_byte=link.beta_s_per_byte, alpha_between_s=link.alpha_s,
                    beta_between_s_per_byte=link.beta_s_per_byte, gamma_s_per_byte=1e-10,
                    **changes)  # fmt: skip


def run_to_end(simulation):
    """Every completion as {(rank, key): time}."""
    done = {}
    while (event := simulation.next()).kind is not EventKind.IDLE:
        assert (event.rank, event.token) not in done, "an operation completed twice"
        done[event.rank, event.token] = simulation.now_s
    return done


TINY = {"eager_nbytes": 600, "eager_budget_nbytes": 700, "inflight_nbytes": 1, "segment_nbytes": 2048}


@pytest.mark.parametrize("budgets", [{}, TINY], ids=["ordinary", "tiny"])
@pytest.mark.parametrize("algorithm", sorted(algorithms.KINDS["allreduce"]))
def test_every_rank_gets_the_sum_in_any_order_of_submission(algorithm, budgets):
    shapes = [Shape((1,) * size) for size in (2, 3, 4, 5, 7, 8)] + [Shape((5,)), Shape((3, 2, 1)), Shape((2, 2))]
    for shape in shapes:
        if not algorithms.algorithm("allreduce", algorithm).applicable(shape):
            continue
        generator = random.Random(f"{algorithm} {shape}")
        simulation = Simulation(shape, NETWORK, NETWORK, settings_for(algorithms=(("allreduce", algorithm),), **budgets))
        counts = [generator.choice((1, 3, 64, 100, 1000, 5000)) for _ in range(40)]
        memory = [[np.arange(count, dtype=np.float32) + rank for count in counts] for rank in range(shape.size)]
        for rank in range(shape.size):
            order = list(range(len(counts)))
            generator.shuffle(order)
            for key in order:
                simulation.allreduce(rank, key, counts[key], priority=key % 5, memory=memory[rank][key])
        done = run_to_end(simulation)
        assert len(done) == shape.size * len(counts), f"{shape}: some operations never completed"
        for key, count in enumerate(counts):
            want = shape.size * np.arange(count) + shape.size * (shape.size - 1) / 2
            for rank in range(shape.size):
                np.testing.assert_array_equal(memory[rank][key], want.astype(np.float32))
        simulation.close()


@pytest.mark.parametrize("algorithm", sorted(algorithms.KINDS["allreduce"]))
def test_an_undisturbed_allreduce_takes_what_its_closed_form_says(algorithm):
    module = algorithms.algorithm("allreduce", algorithm)
    for shape in (Shape((1, 1)), Shape((1,) * 4), Shape((1,) * 8), Shape((8,))):
        if not module.applicable(shape):
            continue
        count = 64 * shape.size * 2000
        simulation = Simulation(shape, NETWORK, NETWORK, settings_for())
        for rank in range(shape.size):
            simulation.allreduce(rank, 1, count, choice=Choice(algorithm, 0))
        took_s = max(run_to_end(simulation).values())
        want_s = cost_s(module, shape, 4 * count, Machine(NETWORK, NETWORK))
        # The closed form charges nothing for grants: at worst one latency for each message, sent or received.
        latencies = len(algorithms.plan_for("allreduce", algorithm, 0, shape).steps)
        assert want_s * (1 - 1e-9) <= took_s <= want_s + latencies * ALPHA_S
        simulation.close()


@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_an_urgent_tensor_waits_for_one_segment_at_most(size):
    shape = Shape((1,) * size)
    settings = settings_for()

    def time_of_urgent(busy):
        simulation = Simulation(shape, NETWORK, NETWORK, settings)
        for rank in range(size):
            if busy:
                simulation.allreduce(rank, 1, 64 * MEGABYTE, priority=100)
            simulation.timer(rank, 0.01)
        begin_s = {}
        while (event := simulation.next()).kind is not EventKind.IDLE:
            if event.kind is EventKind.TIMER:
                begin_s[event.rank] = simulation.now_s
                simulation.allreduce(event.rank, 2, 100_000, priority=0)
            elif event.token == 2:
                end_s = simulation.now_s
        simulation.close()
        return end_s - min(begin_s.values())

    def time_of_one_segment():
        simulation = Simulation(shape, NETWORK, NETWORK, settings)
        for rank in range(size):
            simulation.allreduce(rank, 1, settings.segment_nbytes // 4)
        took_s = max(run_to_end(simulation).values())
        simulation.close()
        return took_s

    assert time_of_urgent(busy=True) <= time_of_urgent(busy=False) + time_of_one_segment()


def test_the_same_run_twice_takes_the_same_time_to_the_bit():
    def run():
        simulation = Simulation(Shape((2, 2)), Link(1e-6, 1e-10), NETWORK, settings_for())
        for rank in range(4):
            for key in range(20):
                simulation.allreduce(rank, key, 1000 * (key + 1), priority=-key)
        return run_to_end(simulation)

    assert run() == run()


def test_a_dead_rank_fails_what_is_in_flight_on_all_others():
    shape = Shape((1,) * 4)
    simulation = Simulation(shape, NETWORK, NETWORK, settings_for(lost_ms=1000, heartbeat_ms=200))
    for rank in range(4):
        simulation.allreduce(rank, 1, 64 * MEGABYTE)
    simulation.timer(0, 0.02)
    assert simulation.next().kind is EventKind.TIMER
    simulation.kill(2)
    done = run_to_end(simulation)
    assert set(done) == {(rank, 1) for rank in (0, 1, 3)}
    assert max(done.values()) < 0.02 + 1.0 + 0.01


def test_a_timer_in_the_past_is_refused():
    simulation = Simulation(Shape((1, 1)), NETWORK, NETWORK, settings_for())
    simulation.timer(0, 0.5)
    simulation.next()
    with pytest.raises(ValueError, match="in the past"):
        simulation.timer(0, 0.4)


def test_a_training_step_without_communication_lasts_as_long_as_its_compute():
    layers = [TrainingLayer(1e-3, 2e-3), TrainingLayer(3e-3, 4e-3)]
    simulation = Simulation(Shape((1, 1)), NETWORK, NETWORK, settings_for())
    assert simulate_training(layers, simulation, 3) == pytest.approx([10e-3, 10e-3])


def test_each_kind_of_overlap_is_at_least_as_fast_as_the_next():
    layers = [TrainingLayer(2e-3, 4e-3, (8 * MEGABYTE,)) for _ in range(4)]

    def step_s(overlap):
        simulation = Simulation(Shape((1,) * 4), NETWORK, NETWORK, settings_for())
        return simulate_training(layers, simulation, 4, overlap)[-1]

    both, backward, none = (step_s(overlap) for overlap in (Overlap.BOTH, Overlap.BACKWARD, Overlap.NONE))
    assert both < backward < none


@pytest.mark.parametrize("model", sorted(models.MODELS))
@pytest.mark.parametrize("size", [2, 8, 32])
def test_the_overlapped_step_comes_near_the_ideal_schedule(model, size):
    layers = models.MODELS[model]()
    communication_s = 2 * (size - 1) / size * 4 * models.parameters(layers) * BETA_S_PER_BYTE
    for ratio in (0.5, 1, 2):  # communication to compute
        times = models.layer_times(layers, communication_s / ratio, communication_s)
        work = [TrainingLayer(time.forward_s, time.backward_s, tuple(tensor.parameters for tensor in layer.tensors))
                for time, layer in zip(times, layers)]  # fmt: skip
        simulation = Simulation(Shape((1,) * size), NETWORK, NETWORK, settings_for())
        steady_s = simulate_training(work, simulation, 4)[-1]
        ideal_s = ideal_step_time(times).step_s
        # Above: the bound of our own making. Below: nothing beats the ideal, or the simulation gives time away.
        assert 0.999 * ideal_s <= steady_s <= 1.05 * ideal_s, f"{steady_s / ideal_s:.3f} of the ideal at ratio {ratio}"
        simulation.close()
