"""Groups of ranks: every collective within every subset against NumPy, and what their members and others learn of failures."""

import itertools

import numpy as np
import pytest
from test_collectives import check, numbers, reduced

import commlib

SUBSETS = {2: [(0,), (1,), (0, 1), (1, 0)], 3: [(0, 2), (2, 1), (1,), (2, 0, 1)]}
DTYPES = ("uint8", "int64", "float16", "float32", "float64", "bool")
SHAPES = [(), (0,), (5,), (130, 3)]


@pytest.fixture(params=[(2, "shm"), (3, "shm"), (3, "tcp")], ids=lambda pair: f"{pair[1]}-{pair[0]}")
def ranks(request, ranks_of):
    size, transport = request.param
    return ranks_of(size, transport=transport)


def my_groups():
    """The groups of this rank, all of them at once."""
    world = commlib.communicator()
    return [world.group(ranks) for ranks in SUBSETS[world.size] if world.rank in ranks]


def collective_cases():
    for group in my_groups():
        me, size, members = group.rank, group.size, group.ranks
        assert members[me] == commlib.rank() and size == len(members)
        for dtype, op, shape in itertools.product(DTYPES, commlib.ReduceOp, SHAPES):
            if op is commlib.Adasum or (dtype == "bool" and op is commlib.Average):
                continue  # Adasum is of floats alone, and has a reference of its own in its tests
            case = ("group", members, dtype, op.word, shape)
            inputs = [numbers(case, r, shape, dtype) for r in members]
            check(case, group.allreduce(inputs[me], op=op, timeout_s=20), reduced(op, inputs, dtype))
        for dtype, op in itertools.product(("int32", "float32"), (commlib.Average, commlib.Sum)):
            case = ("reducescatter", members, dtype, op.word)
            inputs = [numbers(case, r, (7, 2), dtype) for r in members]
            check(case, group.reducescatter(inputs[me], op=op), np.array_split(reduced(op, inputs, dtype), size)[me])
        for dtype, root in itertools.product(DTYPES, range(size)):
            case = ("one for each", members, dtype, root)
            inputs = [numbers(case, r, (r + root, 2), dtype) for r in members]
            check(case, group.allgather(inputs[me]), np.concatenate(inputs))
            inputs = [numbers(case, r, (9,), dtype) for r in members]
            check(case, group.broadcast(inputs[me], root), inputs[root])
        inputs = [numbers("alltoall", r, (sum(range(size + 1)), 2), "int32") for r in members]
        rows, received = group.alltoall(inputs[me], splits=list(range(1, size + 1)))
        first = sum(range(1, me + 1))
        check(members, rows, np.concatenate([x[first : first + me + 1] for x in inputs]))
        assert received.tolist() == [me + 1] * size
        assert group.exchange(bytes([me]), name="bytes") == [bytes([r]) for r in range(size)]
        group.barrier(timeout_s=20)
        with pytest.raises(ValueError, match="root_rank"):
            group.broadcast(np.zeros(1), size)


def test_every_collective_within_every_subset(ranks):
    ranks.call(collective_cases)


def at_once():
    """The same names in overlapping groups and in all ranks, begun in another order on each rank."""
    world = commlib.communicator()
    groups = [*my_groups(), world]
    handles = {}
    for group in groups if world.rank % 2 else groups[::-1]:
        handles[group] = group.allreduce_async(np.full(3, 10.0**world.rank), name="x", op=commlib.Sum)
    for group, handle in handles.items():
        assert handle.wait(20).tolist() == [sum(10.0**rank for rank in group.ranks)] * 3


def test_groups_that_overlap_do_not_meet(ranks):
    ranks.call(at_once)


def failing():
    """A mismatch within ranks 0 and 2: what the error says on each, and how many bytes have reached this rank meanwhile."""
    world = commlib.communicator()
    world.barrier(timeout_s=20)
    message, before = None, world.stats()["received_nbytes"]
    if world.rank != 1:
        group = world.group((0, 2))
        handle = group.allreduce_async(np.zeros(2 + world.rank), name="m")
        with pytest.raises(commlib.MismatchError) as raised:
            handle.wait(20)
        message = str(raised.value)
        assert group.allreduce(np.ones(1), op=commlib.Sum).tolist() == [2.0]
    world.barrier(timeout_s=20)
    return message, world.stats()["received_nbytes"] - before


def test_failures_are_told_within_the_group(ranks_of):
    (first, _), (none, nbytes), (last, _) = ranks_of(3, transport="shm").call(failing)
    reason = "rank 0 submitted allreduce 'm' float64 (2,) average among 0, 2, but rank 2 submitted"
    assert reason in first and reason in last and none is None
    assert nbytes < len(reason)  # of the barrier


def outside(ranks):
    try:
        commlib.communicator().group(ranks)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def test_who_is_not_in_a_group_does_not_make_it(ranks_of):
    ranks = ranks_of(2, transport="shm")
    none, message = ranks.call(outside, [0])
    assert none is None and "rank 1 is not in the group of ranks [0]" in message
    for wrong in ([], [0, 0], [2], [-1], "a"):
        assert all(message for message in ranks.call(outside, wrong))


def closing():
    world = commlib.init()
    group = world.group(range(world.size))
    left = []
    group.on_close(lambda: left.append(group.allreduce(np.ones(1), op=commlib.Sum).tolist()))
    group.close()
    commlib.shutdown()
    with pytest.raises(commlib.ShutdownError):
        group.allreduce(np.ones(1))
    commlib.init()
    return left


def test_groups_end_with_the_communicator(ranks_of):
    ranks = ranks_of(2, transport="shm")
    assert ranks.call(closing) == [[[2.0]]] * 2
