"""gloo cannot be interrupted; still every death, exit, fork and failure ends as on the native engine: named, soon, and clean."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from starting import start
from support import run_script
from test_faults import NOTICED_S, children_of
from test_session import census

import commlib
import commlib.torch as comm
from commlib.torch.gloo import GlooMover

INIT = "import commlib, numpy, torch; import commlib.torch as comm; comm.init(backend='gloo')\n"


@pytest.mark.parametrize("size, transport, count, victim", [(2, "shm", 10, 0), (3, "shm", 300_000, 2), (3, "tcp", 300_000, 1)])
def test_killed_rank_is_named(size, transport, count, victim):
    """With a forked child that still holds its sockets, gloo's too: only the engine knows of the death."""
    with start(size, backend="gloo", transport=transport) as ranks:
        process = ranks.processes[victim]
        ranks.begin("test_faults:reduce_until_lost", count, victim)
        end_s = time.monotonic() + 20.0
        while not children_of(process.pid):  # until it has forked
            assert time.monotonic() < end_s
            time.sleep(0.01)
        children = children_of(process.pid)
        process.kill()
        killed_s = time.monotonic()
        try:
            outcomes = {rank: ranks._outcome(rank, killed_s + 30.0) for rank in range(size) if rank != victim}
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
        for rank, outcome in outcomes.items():
            blamed, text, noticed_s, health = outcome
            assert blamed == victim and f"rank {victim}" in text, f"rank {rank}: {text}"
            assert noticed_s - killed_s < NOTICED_S
            assert health == "PeerLostError"
        codes = ranks.close()
        assert [code for rank, code in enumerate(codes) if rank != victim] == [0] * (size - 1)


def test_a_stopped_rank_is_named():
    """It holds its sockets and says nothing; the others end without it, and exit."""
    with start(3, backend="gloo", transport="tcp", lost_ms=1000, heartbeat_ms=200) as ranks:
        ranks.begin("test_faults:reduce_until_lost", 300_000, -1)
        ranks.processes[2].send_signal(signal.SIGSTOP)
        stopped_s = time.monotonic()
        for rank in (0, 1):
            blamed, text, noticed_s, _ = ranks._outcome(rank, stopped_s + 30.0)
            assert blamed == 2, text
            assert noticed_s - stopped_s < NOTICED_S
        for rank in (0, 1):
            ranks.processes[rank].stdin.close()
            assert ranks.processes[rank].wait(10) == 0
        ranks.processes[2].kill()


@pytest.mark.parametrize("function", ["leave_early", "shutdown_in_flight"])
def test_leaving(function):
    with start(2, backend="gloo") as ranks:
        ranks.call(f"test_faults:{function}")
        assert ranks.close() == [0, 0]


@pytest.mark.parametrize("count", [1, 300_000])
def test_leaving_flushes(count):
    with start(3, backend="gloo") as ranks:
        assert ranks.call("test_faults:finish_after_the_other", count) == [True] * 3


def initialize_until(name, victim):
    """Initializes; the victim kills itself when gloo is to begin."""
    if int(os.environ["COMMLIB_RANK"]) == victim:
        setattr(GlooMover, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    comm.init()
    comm.allreduce(torch.ones(3))


@pytest.mark.parametrize("name", ["open", "allreduce"])
def test_killed_while_gloo_begins(name):
    with start(3, initialize=False, backend="gloo") as ranks:
        ranks.begin("test_gloo_faults:initialize_until", name, 1)
        assert ranks.processes[1].wait(30) == -signal.SIGKILL
        killed_s = time.monotonic()
        outcomes = ranks.collect(deadline_s=30.0)
        assert time.monotonic() - killed_s < NOTICED_S
        for rank in (0, 2):
            assert "rank 1" in str(outcomes[rank].error), outcomes[rank].text


def fail_on_one_rank():
    """gloo fails on rank 1 by itself: nobody died, but nobody can go on either."""

    def fail(*args):
        raise RuntimeError("no more wires")

    if comm.rank() == 1:
        GlooMover.allreduce = fail
    handles = [comm.allreduce_async_(torch.ones(100), name=f"{i}") for i in range(5)]
    for handle in handles:
        with pytest.raises(commlib.PeerLostError, match="rank 1 was lost: gloo failed: no more wires") as caught:
            handle.wait(20)
        assert caught.value.rank == 1


def test_gloo_that_fails_is_told_to_all():
    with start(3, backend="gloo", lost_ms=500, heartbeat_ms=100) as ranks:
        ranks.call("test_gloo_faults:fail_on_one_rank")
        assert ranks.close() == [0] * 3


def mismatch_and_go_on():
    for i in range(3):
        with pytest.raises(commlib.MismatchError) as caught:
            comm.allreduce(torch.ones(3 + comm.rank()), name=f"x{i}")
        assert "(3,)" in str(caught.value) and "(4,)" in str(caught.value)
        assert comm.allreduce(torch.ones(1), op=comm.Sum).item() == comm.size()


def duplicates_and_drops():
    first = comm.allreduce_async_(torch.ones(1_000_000), name="x")
    with pytest.raises(ValueError, match="'x' is still in flight"):
        while True:  # until it was caught in flight; a wait makes the name free
            comm.allreduce_async_(torch.ones(1_000_000), name="x")
    first.wait(20)
    for i in range(50):
        comm.allreduce_async(torch.ones(10_000))
    comm.barrier()


@pytest.mark.parametrize("function", [mismatch_and_go_on, duplicates_and_drops])
def test_mistakes(function):
    with start(2, backend="gloo") as ranks:
        ranks.call(function)


EXITS = {
    # name: (program, exit code of rank 0)
    "at the end": ("", 0),
    "in flight": ("h = [comm.allreduce_async(torch.ones(1000000)) for _ in range(10)]\nif comm.rank() == 0: exit(7)\n", 7),
    "never waited": ("h = [comm.allreduce_async(torch.ones(1000), name=str(i)) for i in range(300)]", 0),
    "thread left behind": ("comm.allreduce(torch.ones(3)); import os; os.kill(os.getpid(), 2)", -signal.SIGINT),
}  # fmt: skip


@pytest.mark.parametrize("name", EXITS)
def test_exits(name):
    program, code = EXITS[name]
    begin_s = time.monotonic()
    results = run_script(INIT + program, 2, deadline_s=40)
    assert results[0][0] == code, results
    assert "terminate called" not in results[0][1] + results[1][1] and time.monotonic() - begin_s < 20


FORK = INIT + """
import os
handle = comm.allreduce_async(torch.ones(100000), name="over the fork", op=comm.Sum)
pid = os.fork()
if pid == 0:
    try:
        comm.allreduce(torch.ones(3))
    except commlib.ForkedError:
        exit(5)  # by the interpreter's whole finalization
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
assert handle.wait(20)[0] == 2
comm.barrier()
"""


def test_a_forked_child_ends_by_itself():
    assert run_script(FORK, 2) == [(0, ""), (0, "")]


def cycle(times):
    for i in range(times):
        comm.init()
        assert comm.allreduce(torch.ones(3), op=comm.Sum).tolist() == [comm.size()] * 3
        if i % 3 == 0:
            comm.allreduce_async(torch.ones(100_000))  # in flight at the end
        comm.shutdown()


def cycle_and_count(times):
    cycle(9)
    before = census()
    cycle(times)
    return before, census()


def test_cycles_leak_nothing():
    with start(2, initialize=False, backend="gloo") as ranks:
        for before, after in ranks.call(cycle_and_count, 45):
            assert after[:2] == before[:2], "descriptors, threads"


def test_numpy_goes_through_gloo_too():
    program = INIT + "assert commlib.allreduce(numpy.ones(3), op=commlib.Sum).tolist() == [2.0] * 3"
    assert run_script(program, 2) == [(0, ""), (0, "")]
    assert np.ones(1)[0] == 1


def test_what_a_rank_never_submits_fails_on_every_rank():
    """As on the native engine, with the same calls; and gloo goes on."""
    with start(2, backend="gloo", stall_warning_s=0.1, stall_shutdown_s=5.0) as ranks:
        told = ranks.call("test_stalls:call_before_the_last")
        assert ranks.call("test_stalls:all_is_well") == [[0, 1]] * 2
        told[1] = ranks.call("test_stalls:call_late")[1]
        assert ranks.call("test_stalls:all_is_well") == [[0, 1]] * 2
    for failures in told:
        assert len(failures) == 8
        for kind, (text, blamed) in failures.items():
            assert kind.split()[0] in text and "rank 1 d" in text, text  # "did not", or "does not answer" where it is slow
            assert blamed == 1
