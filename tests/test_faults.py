"""Deaths: a rank is killed at some moment, with a forked child that still holds its descriptors. The others must say so.

Every set of ranks here is used up by its test. Moments are chosen by a printed seed.
"""

import glob
import os
import random
import signal
import time

import numpy as np
import pytest
from support import Died, Ranks

import commlib
import commlib.session

NOTICED_S = 5.0


def reduce_until_lost(count, child_of):
    """All-reduces for ever; rank `child_of` has a forked child, as a DataLoader does. Returns how it ended."""
    communicator = commlib.communicator()
    child = 0
    if communicator.rank == child_of:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # the test is over by then
            while True:
                signal.pause()
    array = np.ones(count, np.float32)
    try:
        while True:
            handles = [communicator.allreduce_async_(array, op=commlib.Max, priority=p) for p in range(4)]
            for handle in handles:
                handle.wait()
    except commlib.PeerLostError as error:
        noticed_s = time.monotonic()
        health = communicator.health
        with pytest.raises(commlib.PeerLostError):
            communicator.barrier()
        return error.rank, str(error), noticed_s, type(health).__name__
    finally:
        if child:
            os.kill(child, signal.SIGKILL)


def leftovers():
    return sorted(glob.glob("/dev/shm/*commlib*") + glob.glob("/tmp/*commlib*"))


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.parametrize("size, transport, count", [(2, "shm", 10), (3, "shm", 300_000), (3, "tcp", 10), (2, "tcp", 300_000)])
def test_killed_rank_is_named(size, transport, count):
    seed = random.SystemRandom().randrange(1 << 30)
    rng = random.Random(seed)
    victim, delay_s = rng.randrange(size), rng.uniform(0.0, 0.5)
    print(f"seed {seed}: rank {victim} is killed after {delay_s:.3f} s")
    before = leftovers()
    with Ranks(size, transport=transport) as ranks:
        process = ranks.processes[victim]
        ranks.begin(reduce_until_lost, count, victim)
        end_s = time.monotonic() + 20.0
        while not children_of(process.pid):  # until it has forked
            assert time.monotonic() < end_s
        process_end_s = time.monotonic() + delay_s
        while time.monotonic() < process_end_s:
            time.sleep(0.01)
        children = children_of(process.pid)
        process.kill()
        killed_s = time.monotonic()
        assert os.path.exists(f"/proc/{children[0]}"), "the child must outlive the rank, or this tests less than it says"
        # The child holds the pipe of the answers: the outcome of the dead rank would never end.
        try:
            end_s = time.monotonic() + 30.0
            outcomes = {rank: ranks._outcome(rank, end_s) for rank in range(size) if rank != victim}
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
        for rank, outcome in outcomes.items():
            blamed, text, noticed_s, health = outcome
            assert blamed == victim and f"rank {victim}" in text, f"rank {rank}: {text}"
            assert noticed_s - killed_s < NOTICED_S
            assert health == "PeerLostError"
    assert leftovers() == before


def initialize_until(stage, victim):
    """Initializes; the victim kills itself when it comes to a stage of it."""
    if int(os.environ["COMMLIB_RANK"]) == victim:
        holder, name = STAGES[stage]
        setattr(holder(), name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    commlib.init()
    commlib.barrier()


# Where the next thing to be called lives, in the order in which init calls them.
STAGES = {
    "before it met the others": (lambda: commlib.session.rendezvous, "join"),
    "before it agreed": (lambda: commlib.session, "_mismatch"),
    "before it was linked": (lambda: commlib.session, "connect"),
    "half linked": (lambda: commlib.session.Engine, "attach_shared"),
    "before it started": (lambda: commlib.session.Engine, "start"),
    "before it measured": (lambda: commlib.session, "calibrated"),
    "before it had the settings": (lambda: commlib.control.Control, "broadcast_bytes"),
    "before its first operation": (lambda: commlib, "barrier"),
}


@pytest.mark.parametrize("victim", (0, 1))
@pytest.mark.parametrize("stage", STAGES)
def test_killed_during_init(stage, victim):
    """A rank that never came is missed at the start time-out; whoever has come and dies is noticed at once."""
    # Rank 0 serves the store: if it dies before the others have come, they find nobody.
    absent = stage == "before it met the others" or (stage, victim) == ("before it agreed", 0)
    with Ranks(3, initialize=False, start_timeout_s=2 if absent else 30) as ranks:
        ranks.begin(initialize_until, stage, victim)
        assert ranks.processes[victim].wait(30) == -signal.SIGKILL
        killed_s = time.monotonic()
        outcomes = ranks.collect(deadline_s=20.0)
        assert time.monotonic() - killed_s < NOTICED_S + (3.0 if absent else 0.0)
        for rank in set(range(3)) - {victim}:
            assert f"rank {victim}" in str(outcomes[rank].error), f"rank {rank}: {outcomes[rank].text}"


# ---- leaving on purpose ------------------------------------------------------------------------------------------


def leave_early():
    communicator = commlib.communicator()
    if communicator.rank == 1:
        commlib.shutdown()
        return "left"
    with pytest.raises(commlib.PeerLeftError) as caught:
        communicator.allreduce(np.ones(100_000), timeout_s=20)
    assert caught.value.rank == 1 and "rank 1" in str(caught.value)
    return "told"


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_a_rank_that_left_is_named(transport):
    with Ranks(3, transport=transport) as ranks:
        assert ranks.call(leave_early) == ["told", "left", "told"]


def shutdown_in_flight():
    communicator = commlib.communicator()
    communicator.barrier()
    arrays = [np.ones(1_000_000, np.float32) for _ in range(8)]
    handles = [communicator.allreduce_async_(array) for array in arrays]
    if communicator.rank == 0:
        commlib.shutdown()
        for handle in handles:
            assert handle.done()
            try:
                handle.wait()
            except commlib.ShutdownError:
                pass
        with pytest.raises(commlib.ShutdownError, match=r"call commlib.init\(\)"):
            communicator.allreduce(np.ones(3))
        return "closed"
    for handle in handles:
        try:
            handle.wait(20)
        except commlib.PeerLeftError as error:
            assert error.rank == 0
            return "told"
    return "finished before"


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_shutdown_with_work_in_flight(transport):
    with Ranks(2, transport=transport) as ranks:
        results = ranks.call(shutdown_in_flight)
        assert results[0] == "closed" and results[1] in ("told", "finished before")


def finish_after_the_other(count):
    """A rank that has what it wants may leave at once; what it still owes the others is flushed."""
    communicator = commlib.communicator()
    root = communicator.size - 1
    array = np.full(count, communicator.rank, np.float32)
    if communicator.rank == root:
        communicator.broadcast_(array, root)
        commlib.shutdown()
    else:
        assert (communicator.broadcast_(array, root, timeout_s=20) == root).all()
    return True


@pytest.mark.parametrize("transport", ("shm", "tcp"))
@pytest.mark.parametrize("count", (1, 1000, 300_000))
def test_leaving_flushes(transport, count):
    with Ranks(3, transport=transport) as ranks:
        assert ranks.call(finish_after_the_other, count) == [True] * 3
