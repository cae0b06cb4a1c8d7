"""Every algorithm of the tables is verified for 2 to 33 ranks, on one host and on many."""
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.algorithms import KINDS, algorithm, plans_for
from commlib.plan import SEND, Plan, Shape
from commlib.verify import VerificationError, verify

ALGORITHMS = [(kind, name) for kind, table in KINDS.items() for name in table]
SIZES = range(2, 34)
UNEVEN = [(3,), (1, 1, 1), (2, 2), (4, 4), (4, 4, 3), (2, 3, 1, 4), (1, 5), (5, 1), (3, 2, 2, 3, 2)]
LARGE = [(8, 8, 8, 8), (16, 15, 2)]
NEED_THE_SLOT = {
    ("allreduce", "recursive_doubling"), ("allreduce", "hierarchical_doubling"), ("barrier", "dissemination"),
}


def supported(kind, name, many_ranks_per_host):
    """The shapes that the algorithm does not refuse: all of one host, at least."""
    shapes = [Shape(ranks_per_host) for ranks_per_host in many_ranks_per_host]
    result = [shape for shape in shapes if algorithm(kind, name).applicable(shape)]
    assert result or all(shape.hosts > 1 for shape in shapes)
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind, name", ALGORITHMS)
def test_algorithm_on_one_host(kind, name, size):
    shape = Shape((size,))
    verify(kind, plans_for(kind, name, shape), shape)


@pytest.mark.parametrize("kind, name", ALGORITHMS)
def test_algorithm_on_many_hosts(kind, name):
    for shape in supported(kind, name, [(1,) * size for size in SIZES] + UNEVEN + LARGE):
        verify(kind, plans_for(kind, name, shape), shape)


@pytest.mark.parametrize("name", KINDS["broadcast"])
@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 13])
def test_broadcast_from_every_root(name, size):
    for root in range(size):
        shape = Shape((size,), root)
        verify("broadcast", plans_for("broadcast", name, shape), shape)


@pytest.mark.parametrize("kind, name", ALGORITHMS)
def test_replicas_are_equal_in_a_lossy_wire_format(kind, name):
    for shape in supported(kind, name, [(2,), (3,), (8,), (11,), (4, 4, 3)]):
        verify(kind, plans_for(kind, name, shape), shape, lossy=True)


@pytest.mark.parametrize("kind, name", ALGORITHMS)
def test_which_algorithms_need_the_staging_slot(kind, name):
    shape = supported(kind, name, [(3, 3), (6,)])[0]
    plans = plans_for(kind, name, shape)
    if (kind, name) in NEED_THE_SLOT:
        with pytest.raises(VerificationError, match="deadlock"):
            verify(kind, plans, shape, staging=False)
    else:
        verify(kind, plans, shape, staging=False)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ALGORITHMS), st.sampled_from(UNEVEN), st.integers(0, 2**32))
def test_the_outcome_does_not_depend_on_timing(kind_and_name, ranks_per_host, seed):
    kind, name = kind_and_name
    shape = supported(kind, name, [ranks_per_host, (sum(ranks_per_host),)])[0]
    verify(kind, plans_for(kind, name, shape), shape, pick=random.Random(seed).randrange)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([pair for pair in ALGORITHMS if pair[0] != "barrier"]), st.integers(3, 6), st.randoms())
def test_losing_any_message_is_noticed(kind_and_name, size, chance):
    kind, name = kind_and_name
    plans = list(plans_for(kind, name, Shape((size,))))
    sender = chance.choice([plan for plan in plans if any(step.kind == SEND for step in plan.steps)])
    numbers = [index for index, step in enumerate(sender.steps) if step.kind == SEND]
    lost = chance.choice(numbers)
    receiver = plans[sender.steps[lost].peer]
    nth = [i for i in numbers if sender.steps[i].peer == receiver.rank].index(lost)
    received = [i for i, step in enumerate(receiver.steps) if step.peer == sender.rank and step.kind != SEND][nth]
    for plan, index in ((sender, lost), (receiver, received)):
        steps = plan.steps[:index] + plan.steps[index + 1:]
        plans[plan.rank] = Plan(plan.rank, plan.nchunks, plan.inputs, steps)
    with pytest.raises(VerificationError):
        verify(kind, plans, Shape((size,)))
