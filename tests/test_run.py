"""commlib.run: results in rank order, a rank's own exception, deaths, and nothing that outlives the call."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy
import pytest
from support_launch import mark_of, marked, wait_for

import commlib

LOCAL = {"num_proc": 2}


@pytest.fixture(name="mark", autouse=True)
def make_mark(request, monkeypatch):
    for mark in mark_of(request):
        monkeypatch.setenv("MARK", mark)
        yield mark


@pytest.fixture(name="ways", params=["this host", "two hosts"])
def make_ways(request, tmp_path):
    """Arguments of commlib.run for two ranks."""
    if request.param == "this host":
        return dict(LOCAL)
    agent = tmp_path / "agent"
    agent.write_text('#!/bin/sh\nshift\nexec "$@"\n')
    agent.chmod(0o755)
    return {"hosts": "a,b", "launch_agent": str(agent)}


def total_of(array, factor=1.0):
    commlib.init()
    return commlib.rank(), commlib.allreduce(array, op=commlib.Sum) * factor


def test_results_come_in_rank_order(ways):
    array = numpy.arange(4.0)
    results = commlib.run(total_of, (array,), {"factor": 0.5}, **ways)
    assert [rank for rank, _ in results] == [0, 1]
    for _, total in results:
        numpy.testing.assert_array_equal(total, array)


class OddError(Exception):
    """Its constructor wants more than its args hold: it cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(one)


def fail_on_rank_1(error, *args):
    commlib.init()
    if commlib.rank() == 1:
        raise error(*args)
    commlib.allreduce(numpy.ones(3))


@pytest.mark.parametrize("error, args, cause", [(KeyError, ("weight",), KeyError), (OddError, (1, 2), None)])
def test_the_exception_of_a_rank_comes_back(ways, error, args, cause):
    """Not that of rank 0, which fails because rank 1 did."""
    with pytest.raises(commlib.RunError, match="(?s)rank 1 raised:.*Traceback.*raise error") as caught:
        commlib.run(fail_on_rank_1, (error, *args), **ways)
    assert caught.value.rank == 1
    assert caught.value.__cause__ is None if cause is None else isinstance(caught.value.__cause__, cause)


def kill_rank_1():
    commlib.init()
    if commlib.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    commlib.allreduce(numpy.ones(3))


def test_a_killed_rank_is_named(ways):
    with pytest.raises(commlib.RunError, match=r"rank 1 \(pid \d+.* was killed by signal 9") as caught:
        commlib.run(kill_rank_1, **ways)
    assert caught.value.rank == 1


def give(nbytes):
    return b"x" * nbytes


def test_large_arguments_and_results(ways):
    nbytes = 5 << 20
    assert commlib.run(len, (give(nbytes),), **ways) == [nbytes] * 2
    assert [len(result) for result in commlib.run(give, (nbytes,), **ways)] == [nbytes] * 2


def give_lock():
    import threading

    return threading.Lock()


def test_what_cannot_be_pickled_is_an_error():
    with pytest.raises(commlib.RunError, match="(?s)rank 0 raised:.*pickle"):
        commlib.run(give_lock, num_proc=1)
    with pytest.raises(ValueError, match="cloudpickle"):
        commlib.run(len, (give_lock(),), num_proc=1)
    with pytest.raises(ValueError, match="num_proc"):
        commlib.run(len)


def test_environment_and_mistakes():
    assert commlib.run(os.getenv, ("WORD",), num_proc=2, env={"WORD": "5"}) == ["5", "5"]
    with pytest.raises(commlib.RunError, match="-i /no/such/key"):
        commlib.run(len, ([],), num_proc=1, ssh_identity_file="/no/such/key")


def test_functions_of_main_need_cloudpickle():
    pytest.importorskip("cloudpickle")
    program = "import commlib\ndef twice(x): return 2 * x\n" \
              "print(commlib.run(twice, (4,), num_proc=2), commlib.run(lambda: 5, num_proc=1))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == "[8, 8] [5]\n", ran.stderr


CALLER = textwrap.dedent("""
    import commlib, time
    print("up", flush=True)
    commlib.run(time.sleep, (1000,), num_proc=2)
""")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_caller(mark, number):
    process = subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len([pid for pid in marked(mark) if command_of(pid)[1:3] == [b"-m", b"commlib.launch.task"]]) == 2, "no ranks")
    time.sleep(0.2)  # past their imports
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (-number, 1), err
    assert number == signal.SIGKILL or "KeyboardInterrupt" in err
    wait_for(lambda: not marked(mark), "ranks outlive their caller")


def command_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []
