"""Deliberately broken plans are rejected, each for its own reason: a checker that cannot fail proves nothing."""
import pytest

from commlib.algorithms import plans_for
from commlib.plan import Plan, Shape, recv, recv_reduce, send
from commlib.verify import VerificationError, verify


def plans_of(nchunks, *steps_by_rank, inputs=0):
    return tuple(Plan(rank, nchunks, inputs, tuple(steps)) for rank, steps in enumerate(steps_by_rank))


def edited(kind, name, size, rank, edit):
    """The plans of an algorithm, with the step list of one rank edited."""
    plans = list(plans_for(kind, name, Shape((size,))))
    steps = list(plans[rank].steps)
    edit(steps)
    plans[rank] = Plan(rank, plans[rank].nchunks, plans[rank].inputs, tuple(steps))
    return tuple(plans)


def swap(first, second):
    def edit(steps):
        steps[first], steps[second] = steps[second], steps[first]
    return edit


def replace(index, step):
    return lambda steps: steps.__setitem__(index, step)


def drop(index):
    return lambda steps: steps.pop(index)


BROKEN = {
    "a result is overwritten by one that nobody has scaled": (
        "allreduce", plans_of(1, [send(1, 0, 1), recv_reduce(1, 0, 1), send(1, 0, 1), recv(1, 0, 1)],
                              [send(0, 0, 1), recv_reduce(0, 0, 1), recv(0, 0, 1), send(0, 0, 1)]), "unscaled"),
    "a step is missing": (
        "allreduce", edited("allreduce", "ring", 4, 2, drop(-1)), "no matching receive"),
    "a step is there twice": (
        "allreduce", edited("allreduce", "ring", 4, 2, lambda steps: steps.append(steps[-1])), "no matching send"),
    "a message is longer than its receive": (
        "allreduce", edited("allreduce", "halving_doubling", 4, 1, replace(0, send(0, 0, 3))), "moves other chunks"),
    "a message goes into another chunk": (
        "allreduce", edited("allreduce", "ring", 3, 1, replace(1, recv_reduce(0, 0, 1))), "moves other chunks"),
    "a rank sends to itself": (
        "allreduce", edited("allreduce", "ring", 3, 1, replace(0, send(1, 0, 1))), "not another rank"),
    "a peer does not exist": (
        "allreduce", edited("allreduce", "ring", 3, 1, replace(0, send(3, 0, 1))), "not another rank"),
    "a chunk does not exist": (
        "allreduce", edited("allreduce", "ring", 3, 1, replace(0, send(2, 3, 4))), "not a range of the 3 chunks"),
    "a range is empty": (
        "allreduce", edited("allreduce", "ring", 3, 1, replace(0, send(2, 1, 1))), "not a range"),
    "the input is written": (
        "alltoall", edited("alltoall", "pairwise", 3, 0, replace(1, recv(2, 2, 3))), "writes to the input"),
    "ranks cut differently": (
        "allreduce", (Plan(0, 2, 0, ()), Plan(1, 3, 0, ())), "cuts 3 chunks"),
    "plans are given in the wrong order": (
        "allreduce", (Plan(1, 1, 0, ()), Plan(0, 1, 0, ())), "belongs to rank 1"),
    "a receive that should reduce overwrites": (
        "allreduce", edited("allreduce", "ring", 3, 1, replace(1, recv(0, 2, 3))),
        "without the contribution of rank 1"),
    "a receive that should overwrite reduces": (
        "allreduce", edited("allreduce", "direct", 3, 0, replace(5, recv_reduce(2, 2, 3))), "rank 0 is counted twice"),
    "nobody tells the result": (
        "allreduce", plans_of(1, [recv_reduce(1, 0, 1)], [send(0, 0, 1)]),
        "rank 1 ends without the contribution of rank 0"),
    "ranks add in different orders": (
        "allreduce", plans_of(1, [send(1, 0, 1), recv_reduce(1, 0, 1), recv_reduce(2, 0, 1), send(2, 0, 1)],
                              [send(0, 0, 1), recv_reduce(2, 0, 1), recv_reduce(0, 0, 1)],
                              [send(0, 0, 1), send(1, 0, 1), recv(0, 0, 1)]),
        "in different orders"),
    "a result is sent before it is complete": (
        "allreduce", edited("allreduce", "direct", 3, 0, swap(3, 4)), "without the contribution of rank 1"),
    "everyone receives before sending": (
        "allreduce", plans_of(1, [recv_reduce(2, 0, 1), send(1, 0, 1)], [recv_reduce(0, 0, 1), send(2, 0, 1)],
                              [recv_reduce(1, 0, 1), send(0, 0, 1)]), "deadlock: .*which waits for"),
    "two ranks overwrite in place what they send": (
        "broadcast", plans_of(1, [send(1, 0, 1), recv(1, 0, 1)], [send(0, 0, 1), recv(0, 0, 1)]), "deadlock"),
    "two ranks begin with a receive": (
        "allreduce", plans_of(2, [recv_reduce(1, 0, 1), send(1, 1, 2)], [recv_reduce(0, 1, 2), send(0, 0, 1)]),
        "both ranks begin with a receive"),
    "a broadcast sends before it has received": (
        "broadcast", edited("broadcast", "binomial", 4, 2, swap(0, 1)), "holds nothing"),
    "a broadcast leaves one rank out": (
        "broadcast", plans_of(1, [send(1, 0, 1)], [recv(0, 0, 1)], []), "rank 2 ends without the data of rank 0"),
    "a broadcast reduces": (
        "broadcast", plans_of(1, [send(1, 0, 1)], [recv_reduce(0, 0, 1)]), "reduces into chunk 0, which holds nothing"),
    "an all-gather forgets a part": (
        "allgather", plans_of(2, [send(1, 0, 1)], [recv(0, 0, 1)]),
        "rank 0 ends without the data of rank 1 in chunk 1"),
    "an all-gather has too few chunks": (
        "allgather", plans_of(1, [send(1, 0, 1)], [recv(0, 0, 1)]), "1 chunks for 2 ranks"),
    "a reduce-scatter forgets a contribution": (
        "reducescatter", plans_of(2, [send(1, 1, 2)], [recv_reduce(0, 1, 2)]),
        "rank 0 ends without the contribution of rank 1"),
    "an all-to-all mixes up two sources": (
        "alltoall", edited("alltoall", "pairwise", 3, 0, lambda steps: steps.__setitem__(
            slice(None), [steps[0], recv(2, 4, 5), steps[2], recv(1, 5, 6)])), "without the data of rank 1 in chunk 4"),
    "an all-to-all has too little input": (
        "alltoall", plans_of(2, [send(1, 0, 1)], [recv(0, 1, 2)], inputs=1), "2 chunks, 1 of input, for 2 ranks"),
    "a barrier lets someone through early": (
        "barrier", plans_of(1, [send(1, 0, 1)], [recv_reduce(0, 0, 1)]), "rank 0 passes .* heard of rank 1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_plans_are_rejected_for_the_right_reason(what):
    kind, plans, reason = BROKEN[what]
    with pytest.raises(VerificationError, match=reason):
        verify(kind, plans, Shape((len(plans),)))


def test_a_plan_too_few_is_rejected():
    with pytest.raises(VerificationError, match="1 plans for 2 ranks"):
        verify("allreduce", [Plan(0, 1, 0, ())], Shape((2,)))


def test_the_staging_slot_goes_in_list_order():
    """Rank 0 reserves its slot for rank 2, which waits, by way of rank 1, for what rank 0 takes second."""
    plans = plans_of(
        3,
        [recv_reduce(2, 2, 3), recv_reduce(3, 1, 2), send(1, 1, 2)],
        [recv(0, 1, 2), send(2, 1, 3)],
        [recv(1, 1, 3), send(0, 2, 3)],
        [send(0, 1, 2)],
    )
    with pytest.raises(VerificationError, match="deadlock"):
        verify("barrier", plans, Shape((4,)))
    with pytest.raises(VerificationError, match="passes the barrier"):
        verify("barrier", plans, Shape((4,)), staging=False)
