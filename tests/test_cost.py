"""The closed form of every algorithm equals the end of its plans' time line.

All numbers are small integers, so sums and products are exact, and events that should meet do.
"""
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.algorithms import KINDS, algorithm, plans_for
from commlib.cost import Link, LinkTerms, Machine, Terms, cost_s, flat, simulated_s
from commlib.plan import Plan, Shape, recv, recv_reduce, send

ALGORITHMS = [(kind, name) for kind, table in KINDS.items() for name in table]
HIERARCHICAL = [("allreduce", "hierarchical"), ("allreduce", "hierarchical_doubling")]
ONE_CLASS = Machine(Link(7, 3, 1), Link(7, 3, 1))
links = st.builds(Link, st.integers(0, 60), st.integers(0, 20), st.integers(0, 20))


def nbytes_for(module, shape):
    """Two bytes per chunk."""
    return 2 * module.nchunks(shape)


def both(kind, name, shape, machine):
    module = algorithm(kind, name)
    nbytes = nbytes_for(module, shape)
    return simulated_s(plans_for(kind, name, shape), shape, nbytes, machine), cost_s(module, shape, nbytes, machine)


@pytest.mark.parametrize("size", range(2, 34))
@pytest.mark.parametrize("kind, name", ALGORITHMS)
def test_closed_form_equals_critical_path(kind, name, size):
    simulated, closed = both(kind, name, Shape((size,)), ONE_CLASS)
    assert simulated == pytest.approx(closed, rel=1e-12)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(ALGORITHMS), st.integers(2, 12), links, st.booleans())
def test_closed_form_equals_critical_path_on_any_links(kind_and_name, size, link, one_host):
    shape = Shape((size,) if one_host else (1,) * size)
    if not algorithm(*kind_and_name).applicable(shape):
        shape = Shape((size,))
    simulated, closed = both(*kind_and_name, shape, Machine(link, link))
    assert simulated == pytest.approx(closed, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(HIERARCHICAL), st.integers(1, 6), st.integers(1, 6), links, links)
def test_hierarchical_is_exact_on_two_classes_of_links(kind_and_name, hosts, ranks, inside, between):
    simulated, closed = both(*kind_and_name, Shape((ranks,) * hosts), Machine(inside, between))
    assert simulated == pytest.approx(closed, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(HIERARCHICAL), st.lists(st.integers(1, 5), min_size=1, max_size=6), links, links)
def test_hierarchical_is_bounded_on_uneven_hosts(kind_and_name, ranks_per_host, inside, between):
    simulated, closed = both(*kind_and_name, Shape(tuple(ranks_per_host)), Machine(inside, between))
    assert simulated <= closed * (1 + 1e-12)


# ---- the time line itself, by hand ----------------------------------------------------------------------------------


def plans_of(nchunks, *steps_by_rank):
    return [Plan(rank, nchunks, 0, tuple(steps)) for rank, steps in enumerate(steps_by_rank)]


def test_a_message_takes_alpha_and_beta():
    plans = plans_of(1, [send(1, 0, 1)], [recv(0, 0, 1)])
    assert simulated_s(plans, Shape((2,)), 10, ONE_CLASS) == 7 + 10 * 3


def test_a_reduction_takes_gamma():
    plans = plans_of(1, [send(1, 0, 1)], [recv_reduce(0, 0, 1)])
    assert simulated_s(plans, Shape((2,)), 10, ONE_CLASS) == 7 + 10 * 3 + 10 * 1


def test_a_rank_sends_one_message_at_a_time():
    plans = plans_of(1, [send(1, 0, 1), send(2, 0, 1)], [recv(0, 0, 1)], [recv(0, 0, 1)])
    assert simulated_s(plans, Shape((3,)), 10, ONE_CLASS) == 2 * 30 + 7


def test_a_rank_receives_and_reduces_one_message_at_a_time():
    plans = plans_of(2, [recv_reduce(1, 0, 1), recv_reduce(2, 1, 2)], [send(0, 0, 1)], [send(0, 1, 2)])
    assert simulated_s(plans, Shape((3,)), 20, ONE_CLASS) == 7 + 2 * (30 + 10)


def test_a_rank_sends_and_receives_at_once():
    plans = plans_of(2, [send(1, 0, 1), recv(1, 1, 2)], [send(0, 1, 2), recv(0, 0, 1)])
    assert simulated_s(plans, Shape((2,)), 20, ONE_CLASS) == 7 + 30


def test_dependent_steps_follow_each_other():
    plans = plans_of(1, [send(1, 0, 1)], [recv(0, 0, 1), send(2, 0, 1)], [recv(1, 0, 1)])
    machine = Machine(inside=Link(1, 2), between=Link(100, 3))
    assert simulated_s(plans, Shape((2, 1)), 10, machine) == (1 + 20) + (100 + 30)


def test_plans_that_lock_up_are_refused():
    plans = plans_of(1, [recv(2, 0, 1), send(1, 0, 1)], [recv(0, 0, 1), send(2, 0, 1)], [recv(1, 0, 1), send(0, 0, 1)])
    with pytest.raises(ValueError, match="6 steps are left"):
        simulated_s(plans, Shape((3,)), 1, ONE_CLASS)


# ---- closed forms, as the literature has them ----------------------------------------------------------------------


def test_terms_of_the_literature():
    for size in (2, 4, 8, 16, 32):
        shape, rounds, share = Shape((size,)), math.log2(size), (size - 1) / size
        expected = {
            "ring": Terms(2 * (size - 1), 2 * share, share),
            "recursive_doubling": Terms(rounds, rounds, rounds),
            "halving_doubling": Terms(2 * rounds, 2 * share, share),
        }
        for name, terms in expected.items():
            assert algorithm("allreduce", name).terms(shape) == LinkTerms(inside=terms)


def test_terms_fall_on_the_slowest_class_that_a_shape_has():
    terms = Terms(1, 2, 3)
    assert flat(Shape((4,)), terms) == LinkTerms(inside=terms)
    assert flat(Shape((2, 2)), terms) == LinkTerms(between=terms)


def test_recursive_doubling_and_halving_doubling_cross_where_they_should():
    link = Link(alpha_s=2e-5, beta_s_per_byte=8e-10)
    machine, shape, rounds = Machine(link, link), Shape((16,)), 4
    crossover = rounds * link.alpha_s / (link.beta_s_per_byte * (rounds - 2 * 15 / 16))
    costs = {name: [cost_s(algorithm("allreduce", name), shape, nbytes, machine)
                    for nbytes in (0.9 * crossover, 1.1 * crossover)]
             for name in ("recursive_doubling", "halving_doubling")}
    assert costs["recursive_doubling"][0] < costs["halving_doubling"][0]
    assert costs["recursive_doubling"][1] > costs["halving_doubling"][1]
