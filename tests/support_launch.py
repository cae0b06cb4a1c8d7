"""commrun as tests start it: with a deadline, and with a mark in the environment by which everything it started is found."""

import os
import signal
import subprocess
import sys
import time

TIMEOUT_S = 20.0
COMMRUN = [sys.executable, "-m", "commlib.launch"]

# does not give ranks seconds to end by themselves
IMPATIENT = [sys.executable, "-c", "import sys; from commlib.launch import ranks, main\n"
                                   "ranks.GRACE_S = ranks.TERMINATE_S = 0.2; sys.exit(main())"]


def start(*arguments, commrun=None, **options):
    options = dict(dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), **options)
    return subprocess.Popen((commrun or COMMRUN) + list(map(str, arguments)), **options)


def run(*arguments, deadline_s=TIMEOUT_S, **options):
    """Runs commrun to its end; the process, with `out` and `err`."""
    process = start(*arguments, **options)
    try:
        process.out, process.err = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.out, process.err = process.communicate()
        raise AssertionError(f"commrun did not end:\n{process.out}\n{process.err}") from None
    return process


def environ_with(mark, **more):
    return dict(os.environ, MARK=mark, **more)


def marked(mark):
    """Pids of living processes whose environment holds MARK=mark: everything a job has started."""
    wanted, found = f"MARK={mark}".encode(), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as environ, open(f"/proc/{name}/stat", "rb") as stat:
                if wanted in environ.read().split(b"\0") and b") Z" not in stat.read():
                    found.append(int(name))
        except OSError:
            continue
    return found


def wait_for(condition, what):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def mark_of(request):
    """Body of a fixture: a mark for one test, and the check that nothing with it is left."""
    mark = f"{os.getpid()}-{request.node.name}"
    yield mark
    left = marked(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes outlive the job"
