"""The engine over the simulated network: right sums whatever the order and the budgets, priorities that hold, deaths told.

Everything here is deterministic: one seed, one run.
"""

import random

import numpy as np
import pytest

from commlib import algorithms, models
from commlib.cluster import Processor
from commlib.cost import Link, Machine, cost_s
from commlib.plan import Shape
from commlib.schedule import ideal_step_time
from commlib.selection import Choice
from commlib.settings import Settings
from commlib.messages import SCHEDULES, each
from commlib.simulated_training import TrainingLayer, simulate_training
from commlib.simulation import EventKind, Simulation

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

    messages = each([layer.counts for layer in layers])

    def step_s(name):
        simulation = Simulation(Shape((1,) * 4), NETWORK, NETWORK, settings_for())
        return simulate_training(layers, simulation, 4, SCHEDULES[name], messages)[-1]

    ours, unordered, backward, none = (step_s(name) for name in ("ours", "unordered", "backward", "none"))
    assert ours < unordered <= backward < none


@pytest.mark.parametrize("model", ["alexnet", "vgg16", "resnet50", "bert_base"])
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


def allreduce_s(shape, nbytes, link=NETWORK, choice=Choice("ring", 0), inside=Link(0, 0), **network):
    simulation = Simulation(shape, inside, link, settings_for(), **network)
    for rank in range(shape.size):
        simulation.allreduce(rank, 1, nbytes // 4, choice=choice)
    took_s = max(run_to_end(simulation).values())
    simulation.close()
    return took_s


NO_LATENCY = Link(0, BETA_S_PER_BYTE)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_a_port_share_its_bandwidth(ranks):
    shape, choice = Shape((ranks, ranks)), Choice("hierarchical", 0)
    nbytes = 4 << 20
    alone_s, shared_s = (allreduce_s(shape, nbytes, NO_LATENCY, choice, shares_port=shares) for shares in (False, True))
    # Each rank exchanges its shard, a part in `ranks` of the bytes, in two halves with its twin on the other host.
    assert alone_s == pytest.approx(nbytes / ranks * BETA_S_PER_BYTE)
    assert shared_s == pytest.approx(ranks * alone_s, rel=1 / 8)


def test_a_shared_port_makes_no_difference_to_hosts_of_one_rank():
    assert allreduce_s(Shape((1,) * 4), 1 << 20, shares_port=True) == allreduce_s(Shape((1,) * 4), 1 << 20)


@pytest.mark.parametrize("times_too_slow", [2, 8])
def test_a_slow_switch_is_what_all_hosts_together_wait_for(times_too_slow):
    size, nbytes = 4, 4 << 20
    switch = times_too_slow * BETA_S_PER_BYTE / size  # four ports in all are so many times faster than the switch
    took_s = allreduce_s(Shape((1,) * size), nbytes, NO_LATENCY, switch_beta_s_per_byte=switch)
    through_switch_s = 2 * (size - 1) * nbytes * switch  # a ring moves 2 (p - 1) / p of the bytes of each of p ranks
    assert through_switch_s <= took_s <= 1.2 * through_switch_s


def test_a_switch_with_room_for_all_ports_does_not_slow_them():
    for link in (NO_LATENCY, NETWORK):
        without_s = allreduce_s(Shape((1,) * 4), 4 << 20, link)
        with_s = allreduce_s(Shape((1,) * 4), 4 << 20, link, switch_beta_s_per_byte=BETA_S_PER_BYTE / 4)
        assert without_s <= with_s <= 1.05 * without_s


def test_a_switch_does_not_touch_what_stays_inside_a_host():
    simulation = Simulation(Shape((4,)), NETWORK, NETWORK, settings_for(), switch_beta_s_per_byte=1.0)
    for rank in range(4):
        simulation.allreduce(rank, 1, 1000)
    assert max(run_to_end(simulation).values()) < 1e-3


def test_jitter_only_delays_and_follows_its_seed():
    shape, jitter_s = Shape((1,) * 8), 50e-6
    calm_s = allreduce_s(shape, 64 << 10)
    seeds_s = [allreduce_s(shape, 64 << 10, jitter_s=jitter_s, seed=seed) for seed in range(8)]
    assert len(set(seeds_s)) == len(seeds_s) and min(seeds_s) > calm_s
    assert seeds_s[3] == allreduce_s(shape, 64 << 10, jitter_s=jitter_s, seed=3)
    steps = 14  # of the ring: each waits for one message at least
    assert np.mean(seeds_s) > calm_s + steps * jitter_s


def test_sums_are_right_whatever_the_jitter_and_the_switch_do_to_the_order():
    for seed in range(5):
        simulation = Simulation(Shape((2, 2, 1)), NETWORK, NETWORK, settings_for(**TINY), shares_port=True, seed=seed,
                                jitter_s=100e-6, switch_beta_s_per_byte=BETA_S_PER_BYTE)  # fmt: skip
        memory = [[np.full(count, rank + 1.0, np.float32) for count in (5, 3000, 700, 64)] for rank in range(5)]
        for rank in range(5):
            for key in random.Random(f"{seed} {rank}").sample(range(4), 4):
                simulation.allreduce(rank, key, len(memory[rank][key]), priority=key, memory=memory[rank][key])
        assert len(run_to_end(simulation)) == 5 * 4
        assert all((array == 15).all() for arrays in memory for array in arrays)
        simulation.close()


def test_a_rank_adds_one_message_at_a_time_whatever_links_they_came_on():
    size, nbytes = 8, 4 << 20
    took_s = allreduce_s(Shape((size,)), nbytes, choice=Choice("direct", 0), inside=Link(0, 0, gamma_s_per_byte=1e-10))
    assert took_s == pytest.approx((size - 1) / size * nbytes * 1e-10)


def test_one_rank_that_reduces_slowly_delays_all():
    shape, nbytes, link = Shape((1, 1)), 4 << 20, Link(0, 0, gamma_s_per_byte=1e-10)
    even_s = allreduce_s(shape, nbytes, link)
    assert even_s == pytest.approx(nbytes / 2 * 1e-10)  # each of the two reduces half
    assert allreduce_s(shape, nbytes, link, slowness=[1, 5]) == pytest.approx(5 * even_s)
    with pytest.raises(ValueError, match="slowness"):
        allreduce_s(shape, nbytes, link, slowness=[1])


def processed(size, processor, count=1 << 20, **changes):
    """When the last rank has the sum; one message of a few bytes costs as much as its way, and of many bytes more."""
    simulation = Simulation(Shape((1,) * size), NETWORK, NETWORK, settings_for(**changes), processor=processor)
    memory = [np.full(count, rank, np.float32) for rank in range(size)]
    for rank in range(size):
        simulation.allreduce(rank, 1, count, memory=memory[rank])
    last_s = max(run_to_end(simulation).values())
    assert all((array == size * (size - 1) / 2).all() for array in memory)
    simulation.close()
    return last_s


def test_a_message_takes_both_sides_processors_time():
    """One of a few bytes each way between two ranks: sent, on its way, received."""
    assert processed(2, Processor(), 1) == pytest.approx(ALPHA_S, rel=0.01)
    assert processed(2, Processor(1, 1, 5e-6, 0), 1) == pytest.approx(ALPHA_S + 10e-6, rel=0.01)


def test_hosts_that_share_a_core_wait_for_each_other():
    own, shared, two = (processed(2, Processor(cores, hosts, 5e-6, 0), 1) for cores, hosts in ((1, 1), (1, 2), (2, 2)))
    assert own == pytest.approx(two)
    assert shared == pytest.approx(own + 5e-6, rel=0.01)  # the second leaves later, and comes as the first is taken in


def test_bytes_are_moved_beside_their_way_unless_that_takes_longer():
    free, fast, slow = (processed(2, Processor(1, 1, 0, busy)) for busy in (0, BETA_S_PER_BYTE / 10, 2 * BETA_S_PER_BYTE))
    assert fast == pytest.approx(free, rel=0.1)
    assert slow > 3.5 * free  # out and in, through one core


@pytest.mark.parametrize("processor", [Processor(-1), Processor(1, -1), Processor(1, 1, -1e-6), Processor(1, 1, 0, float("nan"))])
def test_a_processor_that_is_none_is_refused(processor):
    with pytest.raises((ValueError, MemoryError)):
        Simulation(Shape((1, 1)), NETWORK, NETWORK, settings_for(), processor=processor)


def test_the_death_of_a_rank_is_told_to_those_that_were_never_linked_to_it():
    shape = Shape((1,) * 16)
    simulation = Simulation(shape, NETWORK, NETWORK, settings_for(lost_ms=1000, heartbeat_ms=200))
    for rank in range(16):
        simulation.allreduce(rank, 1, 64 * MEGABYTE, choice=Choice("halving_doubling", 1 << 20))
    simulation.timer(0, 0.02)
    assert simulation.next().kind is EventKind.TIMER
    simulation.kill(5)
    assert set(run_to_end(simulation)) == {(rank, 1) for rank in range(16) if rank != 5}


def test_a_slow_rank_makes_the_steps_of_all_as_long_as_its_own():
    layers = [TrainingLayer(2e-3, 4e-3, (1000,)) for _ in range(4)]
    simulation = Simulation(Shape((1,) * 4), NETWORK, NETWORK, settings_for())
    step_s = simulate_training(layers, simulation, 4, slowness=[1, 1, 1.5, 1])[-1]
    assert 1.5 * 24e-3 <= step_s < 1.6 * 24e-3
