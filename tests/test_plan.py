"""Plans: dependencies, matching, relabelling, packing; and the properties that every algorithm's plans share."""
import doctest
import importlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commlib.algorithms import KINDS, algorithm, plan_for
from commlib.plan import RECV, RECV_REDUCE, SEND, Plan, Shape, Step, StepId, StepKind, matches, placed, recv, send

ALGORITHMS = [(kind, name) for kind, table in KINDS.items() for name in table]


def conflicting(earlier: Step, later: Step) -> bool:
    """The definition of a dependency, in the words of the contract."""
    overlap = earlier.first_chunk < later.end_chunk and later.first_chunk < earlier.end_chunk
    return overlap and (earlier.kind != SEND or later.kind != SEND)


def closure(direct):
    """For each step all steps that must come before it, however far back."""
    result = []
    for needed in direct:
        result.append(set(needed).union(*(result[index] for index in needed)))
    return result


steps_of_any_kind = st.builds(
    lambda kind, peer, first, width: Step(kind, peer, first, first + width),
    st.sampled_from(StepKind), st.integers(1, 3), st.integers(0, 5), st.integers(1, 3),
)


@given(st.lists(steps_of_any_kind, max_size=12))
def test_dependencies_order_exactly_the_conflicting_steps(steps):
    plan = Plan(0, 8, 0, tuple(steps))
    every_conflict = [[i for i in range(j) if conflicting(steps[i], steps[j])] for j in range(len(steps))]
    assert closure(plan.dependencies) == closure(every_conflict)


def test_dependencies_name_only_earlier_conflicting_steps():
    plan = Plan(0, 2, 0, (send(1, 0, 2), recv(1, 0, 1), send(2, 1, 2), recv(1, 0, 2), send(1, 0, 2)))
    assert plan.dependencies == ((), (0,), (), (0, 1, 2), (3,))


def test_step_kinds_have_the_values_of_the_engine():
    assert (SEND, RECV, RECV_REDUCE) == (0, 1, 2)


def test_a_step_reads_well_in_messages():
    assert str(send(1, 0, 2)) == "SEND [0, 2) to rank 1"
    assert str(recv(3, 0, 1)) == "RECV [0, 1) from rank 3"


def test_pack_writes_quadruples():
    plan = Plan(0, 3, 0, (send(1, 0, 2), recv(2, 1, 3)))
    assert struct.unpack("=8i", plan.pack()) == (0, 1, 0, 2, 1, 2, 1, 3)
    assert Plan(0, 1, 0, ()).pack() == b""


def test_relabelled_changes_rank_and_peers_only():
    plan = plan_for("allreduce", "ring", 1, Shape((3,))).relabelled([7, 5, 9])
    assert plan.rank == 5
    assert {step.peer for step in plan.steps} == {7, 9}
    assert plan.nchunks == 3


def test_placed_moves_ranks_and_chunks():
    assert list(placed([send(1, 0, 2)], ranks=[4, 6], first_chunk=3, width=5)) == [send(6, 3, 13)]


def test_matches_pairs_the_ith_send_with_the_ith_receive():
    plans = (
        Plan(0, 2, 0, (send(1, 0, 1), send(1, 1, 2), recv(1, 0, 1))),
        Plan(1, 2, 0, (recv(0, 0, 1), send(0, 0, 1), recv(0, 1, 2))),
    )
    partner = matches(plans)
    assert partner[StepId(0, 0)] == StepId(1, 0)
    assert partner[StepId(0, 1)] == StepId(1, 2)
    assert partner[StepId(1, 1)] == StepId(0, 2)
    assert all(partner[partner[step]] == step for step in partner)


def test_shape_knows_hosts():
    shape = Shape((4, 4, 3), root=2)
    assert (shape.size, shape.hosts) == (11, 3)
    assert [shape.host_of(rank) for rank in range(11)] == [0] * 4 + [1] * 4 + [2] * 3
    assert [shape.local_rank(rank) for rank in range(11)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert list(shape.ranks_of(2)) == [8, 9, 10]
    assert Shape([2, 2]) == Shape((2, 2)) and hash(Shape((2, 2))) == hash(Shape((2, 2)))


@pytest.mark.parametrize("ranks_per_host, root", [((), 0), ((2, 0), 0), ((2,), 2), ((2,), -1)])
def test_shape_refuses_nonsense(ranks_per_host, root):
    with pytest.raises(ValueError):
        Shape(ranks_per_host, root)


def test_unknown_names_are_refused_with_a_list():
    with pytest.raises(ValueError, match="there are: .*allreduce"):
        algorithm("reduce", "ring")
    with pytest.raises(ValueError, match="there are: .*ring"):
        algorithm("allreduce", "rings")
    with pytest.raises(ValueError, match="rank"):
        plan_for("allreduce", "ring", 2, Shape((2,)))


def test_a_plan_is_made_once():
    assert plan_for("allreduce", "ring", 0, Shape((3,))) is plan_for("allreduce", "ring", 0, Shape((3,)))


@pytest.mark.parametrize("kind, name", ALGORITHMS)
def test_one_rank_alone_has_nothing_to_do(kind, name):
    plan = plan_for(kind, name, 0, Shape((1,)))
    assert plan.steps == () and plan.nchunks >= 1


@pytest.mark.parametrize("kind, name", ALGORITHMS)
def test_every_algorithm_describes_itself(kind, name):
    text = algorithm(kind, name).__doc__
    for word in ("Rounds:", "Bytes sent per rank:", "Limits:"):
        assert word in text, f"{kind} {name}: its docstring has no {word!r}"


@pytest.mark.parametrize("name", ["plan", "verify", "cost", "schedule", "models", "algorithms"])
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(f"commlib.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_the_documentation_names_every_algorithm():
    text = (Path(__file__).parent.parent / "docs" / "algorithms.md").read_text()
    missing = [name for _, name in ALGORITHMS if f"`{name}`" not in text]
    assert not missing, f"docs/algorithms.md does not describe {missing}"
