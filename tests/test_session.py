"""The life of a process with commlib: init and shutdown again and again, exit at any moment, forks, idleness, handles."""

import gc
import os
import resource
import signal
import time

import numpy as np
import pytest
from support import Ranks, run_script

import commlib


def census():
    """What a leak would increase: descriptors, threads, mappings."""
    gc.collect()
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
        mappings = sum(1 for _ in file)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), mappings


def cycle(times):
    for _ in range(times):
        communicator = commlib.init(timeout_s=30)
        assert communicator.allreduce(np.ones(3), op=commlib.Sum).tolist() == [communicator.size] * 3
        commlib.shutdown()
        assert not commlib.is_initialized()


def cycle_and_count(times, batches=5):
    cycle(10)
    counts = [census()]
    for _ in range(batches):
        cycle(times // batches)
        counts.append(census())
    return counts


@pytest.mark.parametrize("size, times, transport", [(1, 300, "auto"), (2, 300, "shm"), (2, 60, "tcp")])
def test_cycles_leak_nothing(size, times, transport):
    with Ranks(size, initialize=False, transport=transport) as ranks:
        for counts in ranks.call(cycle_and_count, times, deadline_s=120):
            assert len({count[:2] for count in counts}) == 1, f"descriptors, threads: {counts}"
            mappings = [count[2] for count in counts]  # the allocator adds heaps for threads until it has enough; a leak goes on
            assert any(after <= before for before, after in zip(mappings, mappings[1:])), f"mappings: {mappings}"


def resident_nbytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def operations_and_memory(times):
    """Every kind, waited for and dropped: what the engine allocates for them must come back."""
    communicator = commlib.communicator()
    array = np.ones(50_000, np.float32)
    growth = []
    for _ in range(3):
        before = resident_nbytes()
        for i in range(times):
            communicator.allgather(array, name="gathered")
            communicator.reducescatter(array)
            communicator.alltoall(array)
            communicator.allreduce_async(array, name=f"dropped {i % 5}" if i % 2 else None)
            communicator.exchange(b"x" * 10_000, name="bytes")
            communicator.barrier()
        growth.append(resident_nbytes() - before)
    return min(growth)


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_operations_leak_no_memory(ranks_of, transport):
    """200 rounds hand out 200 MB."""
    assert max(ranks_of(2, transport=transport).call(operations_and_memory, 200)) < 20e6


def second_init():
    communicator = commlib.init()
    assert commlib.init() is communicator is commlib.communicator()
    assert (commlib.rank(), commlib.size()) == (communicator.rank, communicator.size)
    assert (commlib.local_rank(), commlib.local_size()) == (communicator.rank, communicator.size)
    assert (commlib.cross_rank(), commlib.cross_size(), commlib.is_homogeneous()) == (0, 1, True)
    settings = communicator.settings
    return settings.to_json(), settings.hash, commlib.Settings.from_json(settings.to_json()) == settings


def test_second_init_returns_the_same(ranks_of):
    first, second = ranks_of(2, transport="shm").call(second_init)
    assert first == second and first[2]


# ---- idleness ----------------------------------------------------------------------------------------------------


def idle_cpu_s(seconds):
    commlib.communicator().barrier()
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    commlib.communicator().barrier()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def blocked_cpu_s(seconds):
    """Rank 1 comes late: what rank 0 burns while it waits."""
    communicator = commlib.communicator()
    communicator.barrier()
    before = resource.getrusage(resource.RUSAGE_SELF)
    if communicator.rank == 1:
        time.sleep(seconds)
    communicator.allreduce(np.ones(100))
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_idle_and_waiting_ranks_use_no_cpu(ranks_of, transport):
    ranks = ranks_of(2, transport=transport)
    assert max(ranks.call(idle_cpu_s, 1.0)) < 0.02
    assert max(ranks.call(blocked_cpu_s, 1.0)) < 0.05


# ---- handles -----------------------------------------------------------------------------------------------------


def drop_handles():
    """Memory whose handle and array are dropped must stay until the engine is done with it."""
    communicator = commlib.communicator()
    for i in range(50):
        if communicator.rank == i % communicator.size:
            time.sleep(0.001)
        communicator.allreduce_async_(np.ones(50_000, np.float32), op=commlib.Sum)
        communicator.allgather_async(np.ones(1000))
        gc.collect()
        scribble = [np.full(50_000, 7.0, np.float32) for _ in range(3)]
        del scribble
    communicator.barrier()
    total = communicator.allreduce(np.ones(4), op=commlib.Sum)
    assert total.tolist() == [communicator.size] * 4
    for _ in range(200):
        communicator.allreduce_async(np.ones(10))
    for _ in range(300):
        communicator.allreduce(np.ones(1))
    return communicator.stats()["in_flight"]


def test_dropped_handles(ranks_of):
    assert max(ranks_of(2, transport="shm").call(drop_handles)) <= 1


def time_out_and_go_on():
    communicator = commlib.communicator()
    array = np.full(100_000, 1.0, np.float32)
    if communicator.rank == 0:
        handle = communicator.allreduce_async_(array, name="late", op=commlib.Sum)
        begin_s = time.monotonic()
        with pytest.raises(TimeoutError, match="'late' is not done after 0.2 s"):
            handle.wait(0.2)
        assert 0.19 < time.monotonic() - begin_s < 1.0
        with pytest.raises(TimeoutError):
            handle.wait(0)
        assert not handle.done()
        communicator.exchange(b"", name="go")
    else:
        communicator.exchange(b"", name="go")
        handle = communicator.allreduce_async_(array, name="late", op=commlib.Sum)
    assert handle.wait(20) is array and handle.wait() is array and handle.done()
    assert (array == communicator.size).all()
    submitted_s, started_s, done_s = handle.times
    assert 0 < submitted_s <= started_s <= done_s <= time.monotonic()


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_timed_out_waits(ranks_of, transport):
    ranks_of(2, transport=transport).call(time_out_and_go_on)


def results_outlive_everything():
    communicator = commlib.communicator()
    gathered = [communicator.allgather(np.full(1000, communicator.rank + i)) for i in range(20)]
    gc.collect()
    commlib.shutdown()
    gc.collect()
    for i, array in enumerate(gathered):
        assert array.reshape(communicator.size, -1)[1].tolist() == [1 + i] * 1000
        array += 1  # it is the caller's own


def test_results_outlive_the_communicator():
    with Ranks(2) as ranks:
        ranks.call(results_outlive_everything)


# ---- signals and exits -------------------------------------------------------------------------------------------


def interrupted_wait():
    communicator = commlib.communicator()
    if communicator.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        begin_s = time.monotonic()
        array = np.ones(1000)
        try:
            communicator.allreduce_(array, name="never alone", op=commlib.Sum)
        except KeyboardInterrupt:
            assert time.monotonic() - begin_s < 1.5
        else:
            raise AssertionError("Ctrl-C did not come through")
        communicator.exchange(b"", name="go")
    else:
        communicator.exchange(b"", name="go")
        communicator.allreduce(np.ones(1000), name="never alone", op=commlib.Sum)
    communicator.barrier(timeout_s=20)


def test_ctrl_c_ends_a_wait(ranks_of):
    ranks_of(2, transport="shm").call(interrupted_wait)


EXITS = {
    # name: (program, exit code of rank 0, what it prints)
    "at the end": ("import commlib; commlib.init()", 0, ""),
    "exception in flight": (
        "import commlib, numpy; c = commlib.init()\n"
        "h = [c.allreduce_async(numpy.ones(1000000)) for _ in range(10)]\n"
        "if c.rank == 0: raise SystemExit(7)\n", 7, ""),
    "error in flight": (
        "import commlib, numpy; c = commlib.init()\n"
        "h = c.allreduce_async(numpy.ones(10))\n"
        "if c.rank == 0: raise KeyError('mine')\n"
        "c.barrier()", 1, "KeyError: 'mine'"),
    "never waited": (
        "import commlib, numpy; c = commlib.init()\n"
        "h = [c.allreduce_async(numpy.ones(1000), name=str(i)) for i in range(300)]", 0, ""),
}  # fmt: skip


@pytest.mark.parametrize("transport", ("shm", "tcp"))
@pytest.mark.parametrize("name", sorted(EXITS))
def test_exits(name, transport):
    program, code, printed = EXITS[name]
    begin_s = time.monotonic()
    results = run_script(program, 2, deadline_s=30, transport=transport)
    assert results[0][0] == code, results
    assert printed in results[0][1] and (printed or results[0][1] == ""), results[0][1]
    assert time.monotonic() - begin_s < 15
    if name == "error in flight":
        assert results[1][0] == 1 and "PeerLeftError" in results[1][1] and "rank 0" in results[1][1]
    elif name != "exception in flight":
        assert results[1] == (0, "")


# ---- forks -------------------------------------------------------------------------------------------------------


def in_a_child(body):
    """Runs body in a forked child and returns what it returned, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            os.write(writer, str(body()).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    return text


def fork_in_the_middle():
    communicator = commlib.communicator()
    in_flight = communicator.allreduce_async(np.ones(1000), name="over the fork", op=commlib.Sum)
    calls = [
        lambda: communicator.allreduce(np.ones(3)), lambda: communicator.barrier(), lambda: commlib.init(),
        lambda: in_flight.wait(), lambda: communicator.exchange(b"", name="x"), lambda: communicator.stats(),
    ]  # fmt: skip
    for call in calls:
        text = in_a_child(call)
        assert text.startswith("ForkedError") and "spawn" in text, text
    assert in_a_child(lambda: (commlib.rank(), commlib.size())) == str((communicator.rank, communicator.size))
    assert in_a_child(lambda: commlib.shutdown() or "quiet") == "quiet"

    def drop_everything():
        nonlocal in_flight, communicator
        in_flight = communicator = None
        commlib.shutdown()
        gc.collect()
        return "quiet"

    assert in_a_child(drop_everything) == "quiet"
    assert in_flight.wait(20).tolist() == [communicator.size] * 1000
    communicator.barrier(timeout_s=20)


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_fork(ranks_of, transport):
    ranks_of(2, transport=transport).call(fork_in_the_middle)


def fork_pool():
    import multiprocessing

    communicator = commlib.communicator()
    handle = communicator.allreduce_async(np.ones(300_000), op=commlib.Sum)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, 2, -3]) == [1, 2, 3]
        assert handle.wait(20)[0] == communicator.size
    communicator.barrier(timeout_s=20)


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_worker_processes(ranks_of, transport):
    ranks_of(2, transport=transport).call(fork_pool)
