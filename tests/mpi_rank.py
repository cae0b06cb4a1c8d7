"""What each rank of test_mpi.py runs under mpirun: the parts named on the command line, one after the other."""

import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

import commlib
from commlib.process_sets import ProcessSet, add_process_set, add_process_sets, remove_process_set

finalize = MPI.Finalize  # the library's own, whatever is put in its place

WORLD = MPI.COMM_WORLD
RANK = WORLD.rank
SIZES = (1, 17, 4000, 5000, 70_000, 1_500_000)  # within a message, at its border, of several pieces


def expect_raises(kind, words, function, *args, **kwargs):
    """The exception, whose text holds the words."""
    try:
        function(*args, **kwargs)
    except kind as error:
        assert words in str(error), f"{words!r} is not in: {error}"
        return error
    raise AssertionError(f"no {kind.__name__}")


def contribution(rank, count, dtype):
    return (np.arange(count) % 7 + rank).astype(dtype)


def all_kinds(communicator):
    rank, size = communicator.rank, communicator.size
    for count in SIZES:
        for dtype in ("float32", "int64", "float16"):
            expected = sum(contribution(r, count, "float64") for r in range(size))
            result = communicator.allreduce(contribution(rank, count, dtype), op=commlib.Sum)
            assert result.dtype == dtype and (result == expected).all(), (count, dtype)
        sent = np.full(count, rank + 1, "int32")
        assert (communicator.broadcast(sent, size - 1) == size).all()
        parts = communicator.allgather(np.full(count + rank, rank, "int32"))
        assert (parts == np.concatenate([np.full(count + r, r, "int32") for r in range(size)])).all()
        exchanged = communicator.alltoall(np.repeat(np.arange(size), count) + 10 * rank)
        assert (exchanged == np.repeat(10 * np.arange(size), count) + rank).all()
    communicator.barrier()


def overlapped(communicator):
    arrays = [np.full(300_000, communicator.rank + n, "float32") for n in range(12)]
    order = list(range(12))
    if communicator.rank % 2:
        order.reverse()  # ranks submit in different orders
    handles = {n: communicator.allreduce_async_(arrays[n], name=f"layer{n}", op=commlib.Sum, priority=n, overlapped=True)
               for n in order}  # fmt: skip
    ranks = sum(range(communicator.size))
    for n, handle in handles.items():
        assert (handle.wait(30) == ranks + n * communicator.size).all()


def collectives():
    """Everything, while a receive of the program's own waits for any message at all."""
    greedy = WORLD.Irecv(bytearray(100), MPI.ANY_SOURCE, MPI.ANY_TAG)
    communicator = commlib.init(comm=WORLD)
    assert (communicator.rank, communicator.size) == (WORLD.rank, WORLD.size)
    all_kinds(communicator)
    overlapped(communicator)
    assert not greedy.Test()
    WORLD.Send(b"mine", WORLD.rank)
    greedy.Wait()
    commlib.shutdown()


def own_collectives():
    """Small ones by the engine, large ones by MPI, all in flight at once; half precision always by the engine."""
    line = ("allreduce", (WORLD.size,), None, "mpi")
    settings = commlib.Settings(table=((*line[:2], 4096, "recursive_doubling"), line))
    communicator = commlib.init(comm=WORLD, settings=settings)
    assert communicator.algorithm("allreduce", 4096) == "recursive_doubling"
    assert communicator.algorithm("allreduce", 4097) == "mpi"
    all_kinds(communicator)
    overlapped(communicator)
    for op, expected in ((commlib.Min, False), (commlib.Max, True), (commlib.Sum, True), (commlib.Product, False)):
        truth = np.full(10_000, RANK == 0)
        assert (communicator.allreduce(truth, op=op) == expected).all()
    assert (communicator.allreduce(np.full(10_000, RANK), name="n", op=commlib.Average) == (WORLD.size - 1) // 2).all()
    assert communicator.allreduce(np.ones(10), name="n", op=commlib.Sum)[0] == WORLD.size, "the same name, natively"
    prepared = communicator.prepare_allreduce_(np.ones(10_000), name="prepared", op=commlib.Sum)
    assert prepared()[0] == WORLD.size
    expect_raises(commlib.MismatchError, "rank", communicator.allreduce, np.ones(10_000 + RANK), name="same")
    assert communicator.allreduce(np.ones(10_000), op=commlib.Sum)[0] == WORLD.size, "usable afterwards"
    commlib.shutdown()
    commlib.init(comm=WORLD).settings = settings
    expect_raises(ValueError, "MPI's own all-reduce", commlib.allreduce, np.ones(10_000))
    commlib.shutdown()


def mismatches():
    communicator = commlib.init(comm=WORLD)
    for count in (3, 300_000):
        expect_raises(commlib.MismatchError, "rank", communicator.allreduce, np.ones(count + WORLD.rank), name="same")
        assert communicator.allreduce(np.ones(count), op=commlib.Sum)[0] == WORLD.size, "usable afterwards"
    commlib.shutdown()
    settings = commlib.Settings(segment_nbytes=65536 * (1 + WORLD.rank % 2))
    expect_raises(commlib.MismatchError, "segment_nbytes", commlib.init, comm=WORLD, settings=settings)


def cycles():
    for _ in range(20):
        assert commlib.init(comm=WORLD).allreduce(np.ones(100_000), op=commlib.Sum)[0] == WORLD.size
        commlib.shutdown()


def subcommunicators():
    half = WORLD.Split(WORLD.rank % 2, -WORLD.rank)  # ranks turned round
    communicator = commlib.init(comm=half)
    assert (communicator.rank, communicator.size) == (half.rank, half.size)
    assert communicator.allreduce(np.array([WORLD.rank]), op=commlib.Max)[0] % 2 == WORLD.rank % 2
    commlib.shutdown()
    half.Free()
    if WORLD.rank != 0:
        rest = commlib.init(comm=list(range(1, WORLD.size)))
        assert (rest.rank, rest.size) == (WORLD.rank - 1, WORLD.size - 1)
        assert rest.allreduce(np.ones(5000), op=commlib.Sum)[0] == WORLD.size - 1
        commlib.shutdown()
    else:
        expect_raises(ValueError, "only the listed ranks", commlib.init, comm=list(range(1, WORLD.size)))
    expect_raises(ValueError, "different ranks", commlib.init, comm=[0, 0])
    expect_raises(TypeError, "mpi4py communicator", commlib.init, comm="world")


def process_sets():
    """Sets made of communicators: one for each color of a split, one that leaves ranks out; beside one of ranks."""
    commlib.init(comm=WORLD)
    split = WORLD.Split(WORLD.rank % 2, -WORLD.rank)  # ranks turned round
    given = split if WORLD.size > 3 or WORLD.rank % 2 == 0 else MPI.COMM_NULL
    mine, first = ProcessSet(given), ProcessSet([0] if WORLD.size < 4 else [0, 1, 2])
    assert mine.ranks is None and mine.included() is None
    if WORLD.size > 3:
        add_process_sets([mine, first])
        assert mine.process_set_id == 1 + WORLD.rank % 2 and first.process_set_id == 3
    else:
        add_process_set(mine)
    if mine.included():
        ranks = list(range(WORLD.rank % 2, WORLD.size, 2))
        assert mine.ranks == ranks and mine.mpi_comm is given and mine.communicator().size == len(ranks)
        assert mine.communicator().allreduce(np.array([WORLD.rank]), op=commlib.Sum)[0] == sum(ranks)
    expect_raises(ValueError, "is there already", add_process_set, ProcessSet(given))
    assert remove_process_set(mine) and mine.process_set_id is None or given == MPI.COMM_NULL
    add_process_set(mine)
    expect_raises(ValueError, "want different", add_process_set, [0] if WORLD.rank else [1])
    commlib.shutdown()


def early_leaver():
    """One rank leaves while the others work on; they learn it, and no one waits for long."""
    communicator = commlib.init(comm=WORLD)
    communicator.barrier()
    if WORLD.rank == 0:
        began_s = time.monotonic()
        commlib.shutdown()
        assert time.monotonic() - began_s < 1.5, "leaving took as long as it may"
    else:
        expect_raises(commlib.PeerLeftError, "rank 0", communicator.allreduce, np.ones(500_000))
        commlib.shutdown()


def mpi_ends_first(end=None):
    commlib.init(comm=WORLD)
    commlib.shutdown()
    assert MPI.Finalize is finalize, "what was put in its place is taken back"
    communicator = commlib.init(comm=WORLD)
    assert communicator.allreduce(np.ones(100_000), op=commlib.Sum)[0] == WORLD.size
    (end or MPI.Finalize)()
    expect_raises(commlib.ShutdownError, "closed", communicator.barrier)
    assert MPI.Finalize is finalize


def mpi_ends_unseen():
    mpi_ends_first(finalize)


def somebody_is_missing():
    if WORLD.rank != 0:
        error = expect_raises(commlib.StartError, "do all of them call init()", commlib.init, comm=WORLD, timeout_s=0.5)
        print(f"rank {WORLD.rank}: {error}", flush=True)
        os._exit(0)  # MPI would wait for the rest of a communicator that is never made
    time.sleep(1.5)
    os._exit(0)


def stalled():
    """The last rank does not do what the others do until they have failed: MPI's barrier is a wait that nobody looks at."""
    communicator, last = commlib.init(comm=WORLD), WORLD.size - 1
    for turn in (RANK != last, RANK == last):
        if turn:
            error = expect_raises(commlib.StalledError, f"rank {last} d", communicator.allreduce, np.ones(5), name="x")
            assert error.rank == last
        WORLD.Barrier()
        communicator.alltoall(np.ones(WORLD.size))  # what the others said before has come, too
    assert (communicator.allreduce(np.ones(5), op=commlib.Sum) == WORLD.size).all()
    commlib.shutdown()


def killed():
    """The last rank dies in the middle of a large operation; the launcher is told to leave the others alone."""
    communicator = commlib.init(comm=WORLD, settings=commlib.Settings(transport="mpi", lost_ms=1000, heartbeat_ms=100))
    array = np.ones(4_000_000, "float32")
    communicator.allreduce(array)
    if WORLD.rank == WORLD.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    error = expect_raises(commlib.PeerLostError, "rank", communicator.allreduce, array, timeout_s=20)
    print(f"rank {WORLD.rank} was told: {error}", flush=True)
    os._exit(0)


for part in sys.argv[1:]:
    globals()[part]()
    print(f"rank {RANK}: {part}", flush=True)
