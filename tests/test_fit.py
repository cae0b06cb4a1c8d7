"""Fitting: constants come back from exact times of the model and of the simulated engine, and from noisy ones nearly so."""

import random

import pytest

from commlib import algorithms
from commlib.cost import Link, LinkTerms, Machine, Terms, cost_s, messages
from commlib.fit import Sample, fit
from commlib.plan import Shape
from commlib.selection import Choice
from commlib.settings import Settings
from commlib.simulation import EventKind, Simulation

INSIDE = Link(alpha_s=1.5e-6, beta_s_per_byte=2.1e-10, gamma_s_per_byte=0.9e-10)
BETWEEN = Link(alpha_s=21e-6, beta_s_per_byte=8.3e-10, gamma_s_per_byte=0.9e-10)
WANTED = {
    "alpha_inside_s": INSIDE.alpha_s, "beta_inside_s_per_byte": INSIDE.beta_s_per_byte,
    "alpha_between_s": BETWEEN.alpha_s, "beta_between_s_per_byte": BETWEEN.beta_s_per_byte,
    "gamma_s_per_byte": INSIDE.gamma_s_per_byte,
}  # fmt: skip
MESSAGE_S = 9e-6
SIZES = [8 * 4**power for power in range(12)]


def samples_of(shape, call_s=0.0, noise=0.0):
    generator = random.Random(7)
    for module in algorithms.applicable("allreduce", shape).values():
        for nbytes in SIZES:
            seconds = call_s + cost_s(module, shape, nbytes, Machine(INSIDE, BETWEEN))
            yield Sample(module.terms(shape), nbytes, seconds * (1 + generator.uniform(-noise, noise)))


@pytest.mark.parametrize("hosts", [(2,), (3,), (8,), (1, 1, 1), (4, 4), (2, 2, 2), (3, 2)])
@pytest.mark.parametrize("call_s", [0.0, 4e-6])
def test_model_times_give_the_constants_back(hosts, call_s):
    found = fit(list(samples_of(Shape(hosts), call_s)))
    assert found.pop("call_s") == pytest.approx(call_s, abs=1e-10)
    classes = [place for place, exists in (("inside", max(hosts) > 1), ("between", len(hosts) > 1)) if exists]
    assert set(found) == {name for name in WANTED if "gamma" in name or any(place in name for place in classes)}
    for name, value in found.items():
        assert value == pytest.approx(WANTED[name], rel=1e-6), name


@pytest.mark.parametrize("ranks", [3, 4, 8, 9])
def test_what_messages_cost_comes_back(ranks):
    shape, machine = Shape((ranks,)), Machine(INSIDE, BETWEEN, MESSAGE_S)
    samples = [Sample(module.terms(shape), nbytes, 4e-6 + cost_s(module, shape, nbytes, machine), messages(module, shape))
               for module in algorithms.applicable("allreduce", shape).values() for nbytes in SIZES]  # fmt: skip
    found = fit(samples)
    assert found["message_s"] == pytest.approx(MESSAGE_S, rel=1e-6)
    assert found["alpha_inside_s"] == pytest.approx(INSIDE.alpha_s, rel=1e-5)


@pytest.mark.parametrize("hosts", [(1, 1), (1,) * 4, (1,) * 8, (2,)])
def test_the_simulated_engine_gives_the_constants_back(hosts):
    """The real engine on the virtual clock; eager throughout, since the closed forms do not count grants.

    Powers of two, and no direct exchange of more than two: there eager messages overtake what the closed forms wait for.
    """
    shape, eager = Shape(hosts), 1 << 30
    settings = Settings(eager_nbytes=eager, eager_budget_nbytes=eager, inflight_nbytes=eager)
    samples = []
    for name, module in algorithms.applicable("allreduce", shape).items():
        for count in (64 * shape.size, 6400 * shape.size, 640_000 * shape.size):
            simulation = Simulation(shape, INSIDE, BETWEEN, settings)
            for rank in range(shape.size):
                simulation.allreduce(rank, 1, count, choice=Choice(name, 0))
            while simulation.next().kind is not EventKind.IDLE:
                end_s = simulation.now_s
            simulation.close()
            samples.append(Sample(module.terms(shape), 4 * count, end_s))
    found = fit(samples)
    assert found.pop("call_s") < 1e-9
    assert len(found) == 3
    for name, value in found.items():
        assert value == pytest.approx(WANTED[name], rel=1e-6), name


def test_noise_moves_the_constants_little():
    found = fit(list(samples_of(Shape((8,)), noise=0.05)))
    assert found["alpha_inside_s"] == pytest.approx(INSIDE.alpha_s, rel=0.1)
    assert found["beta_inside_s_per_byte"] == pytest.approx(INSIDE.beta_s_per_byte, rel=0.1)


def test_no_constant_is_zero_or_below():
    """Times that fall with size would want a negative beta; 0 would mean "not measured" in a record."""
    terms = LinkTerms(Terms(1, 1, 1))
    found = fit([Sample(terms, 8, 2e-6), Sample(terms, 1000, 1e-6)])
    assert all(value > 0 for name, value in found.items() if name != "call_s")
