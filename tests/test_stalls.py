"""The stall inspector on real ranks: who has not submitted what is told in the log, and fails on every rank after a limit.

The last rank does not take part until the others have failed, so nothing here depends on how long anything takes.
"""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import Ranks

import commlib
from commlib.launch import environment, options

WARNING_S, SHUTDOWN_S = 0.1, 3.0


def _collectives(communicator):
    array = np.ones((communicator.size, 2), np.float32)
    return {
        "allreduce": lambda: communicator.allreduce(array, name="x", op=commlib.Sum),
        "allreduce long": lambda: communicator.allreduce(np.ones(300_000), name="long", op=commlib.Sum),
        "broadcast": lambda: communicator.broadcast(array, communicator.size - 1, name="x"),
        "allgather": lambda: communicator.allgather(array, name="x"),
        "reducescatter": lambda: communicator.reducescatter(array, name="x", op=commlib.Max),
        "alltoall": lambda: communicator.alltoall(array, name="x"),
        "barrier": communicator.barrier,
        "exchange": lambda: communicator.exchange(b"x", name="x"),
    }


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def call_all():
    """Every kind at once. Returns {kind: (text, blamed rank)}."""
    def failure_of(call):
        with pytest.raises(commlib.StalledError) as caught:
            call()
        return str(caught.value), caught.value.rank

    calls = _collectives(commlib.communicator())
    with ThreadPoolExecutor(len(calls)) as pool:
        return dict(zip(calls, pool.map(failure_of, calls.values())))


def call_before_the_last():
    """All ranks but the last, which does nothing."""
    communicator = commlib.communicator()
    return {} if communicator.rank == communicator.size - 1 else call_all()


def call_late():
    """The last rank, for which it is too late."""
    communicator = commlib.communicator()
    return call_all() if communicator.rank == communicator.size - 1 else {}


def all_is_well():
    """Every rank hears of every other directly, so all that they said before has come, too."""
    communicator = commlib.communicator()
    return communicator.alltoall(np.full(communicator.size, communicator.rank)).tolist()


@pytest.mark.parametrize("size, transport", [(2, "shm"), (4, "shm"), (3, "tcp")])
def test_what_a_rank_never_submits_fails_on_every_rank(size, transport):
    last = size - 1
    # Ranks have a part of the shorter limit to answer in: without warnings, long enough for a crowded machine.
    with Ranks(size, transport=transport, stall_warning_s=0, stall_shutdown_s=SHUTDOWN_S) as ranks:
        told = ranks.call(call_before_the_last)
        assert ranks.call(all_is_well) == [list(range(size))] * size
        told[last] = ranks.call(call_late)[last]
        assert ranks.call(all_is_well) == [list(range(size))] * size
    for failures in told:
        assert len(failures) == 8
        for kind, (text, blamed) in failures.items():
            assert kind.split()[0] in text and f"but rank {last} did not" in text, text
            assert blamed == last


def names_all(line, name, size):
    """Whether a warning says of one of the two operations who waits for whom; an early one may come before all have begun."""
    last, others = size - 1, "rank 0" if size == 2 else "ranks 0, 1"
    both = (f"allreduce '{name}' float64 (4,) sum waits: {others} submitted it", f"but rank {last} did not; rank {last} waits for")
    theirs = (f"allreduce '{name} of rank {last}' float64 (4,) sum waits: rank {last} submitted it", f"but {others} did not")
    return any(all(part in line for part in parts) for parts in (both, theirs))


def warn(name):
    """Some rank's log tells of it, and then it ends well."""
    communicator, lines = commlib.communicator(), _Lines()
    logging.getLogger("commlib").addHandler(lines)
    last = communicator.size - 1
    array = np.full(4, communicator.rank + 1.0)
    own = communicator.allreduce_async(array, name=f"{name} of rank {communicator.rank}" if communicator.rank == last else name,
                                       op=commlib.Sum)  # fmt: skip
    told = 0
    while not told:  # until somebody was told
        mine = sum(names_all(line, name, communicator.size) for line in list(lines.lines))
        told = communicator.allreduce(np.array([mine]), name="told", op=commlib.Sum)[0]
        time.sleep(0.01)
    missing = name if communicator.rank == last else f"{name} of rank {last}"
    other = communicator.allreduce_async(array, name=missing, op=commlib.Sum)
    logging.getLogger("commlib").removeHandler(lines)
    return lines.lines, own.wait()[0], other.wait()[0]


@pytest.mark.parametrize("size, transport", [(2, "shm"), (3, "tcp")])
def test_a_warning_names_operation_and_ranks(size, transport):
    with Ranks(size, transport=transport, stall_warning_s=WARNING_S) as ranks:
        results = ranks.call(warn, "weight")
    lines = [line for told, _, _ in results for line in told]
    assert any(names_all(line, "weight", size) for line in lines), lines
    assert {value for _, own, other in results for value in (own, other)} == {size * (size + 1) / 2}


def test_nobody_looks_if_both_times_are_zero():
    with Ranks(2, transport="shm", stall_warning_s=0, stall_shutdown_s=0) as ranks:
        assert ranks.call(threads_of_stalls) == [0, 0]
    with Ranks(2, transport="shm") as ranks:
        assert ranks.call(threads_of_stalls) == [1, 1]


def threads_of_stalls():
    return sum(thread.name == "commlib-stalls" for thread in threading.enumerate())


def test_options_of_the_launcher():
    def told(*words):
        variables = environment.of_options(options.parse(["-np", "2", *words, "true"]))
        return variables.get("COMMLIB_STALL_WARNING_S"), variables.get("COMMLIB_STALL_SHUTDOWN_S")

    assert told() == (None, None)
    assert told("--stall-check") == (None, None)
    assert told("--no-stall-check") == ("0", "0")
    assert told("--stall-check-warning-time-seconds", "30", "--stall-check-shutdown-time-seconds", "90") == ("30.0", "90.0")
    assert told("--stall-check-shutdown-time-seconds", "0") == (None, "0.0")
