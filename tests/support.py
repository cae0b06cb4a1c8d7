"""Real ranks for tests: processes that run functions of the test files, every wait with a deadline.

`Ranks` keeps a set of processes for hundreds of calls, since starting them is slow; `run_ranks` is one call on a set of
its own. A function is named by module and name, so it must be importable: top level of a test file. What a rank prints
goes to a file that is shown when something fails.
"""

import contextlib
import os
import pickle
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import uuid

_HERE = os.path.dirname(os.path.abspath(__file__))
_LENGTH = struct.Struct("!Q")

DEADLINE_S = 60.0  # of one call, far beyond what it takes: two cores, shared


class RankFailed(AssertionError):
    """A rank raised, died or was late; the text has its traceback and what it printed."""


class Died:
    """What a call gives for a rank that ended without an answer."""

    def __init__(self, status):
        self.status = status

    def __repr__(self):
        return f"Died({self.status})"


class Raised:
    """What a call gives for a rank whose function raised."""

    def __init__(self, error, text):
        self.error = error
        self.text = text

    def __repr__(self):
        return f"Raised({self.error!r})"


def environment_of(rank, size, store, local_size=None, **options):
    """The environment that commrun would give a rank. Options become COMMLIB_* variables."""
    local_size = local_size or size
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COMMLIB_")}
    variables = {
        "rank": rank, "size": size, "local_rank": rank % local_size, "local_size": local_size,
        "cross_rank": rank // local_size, "cross_size": -(-size // local_size), "store": store, "job": store, **options,
    }  # fmt: skip
    environ.update({f"COMMLIB_{name.upper()}": str(value) for name, value in variables.items()})
    paths = [_HERE, os.path.dirname(_HERE), environ.get("PYTHONPATH", "")]
    environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environ["OMP_NUM_THREADS"] = "1"
    return environ


class Ranks:
    """A set of rank processes, each ready to run functions.

    Args:
        size: how many.
        initialize: call commlib.init() in each before the first function.
        per_rank: options of single ranks, as {rank: {option: value}}.
        store, local_size: where they meet, and how many live on a host; None: on this host, all of them.
        prefixes: per rank, what stands before its command line, such as ["ip", "netns", "exec", "h0"].
        **options: COMMLIB_* variables of all ranks, such as transport="tcp".
    """

    def __init__(self, size, initialize=True, per_rank=None, store=None, local_size=None, prefixes=None, **options):
        store = store or f"unix:@commlib-test-{uuid.uuid4().hex[:16]}"
        self.size = size
        self.output = tempfile.TemporaryFile(mode="w+b")
        self.processes = []
        for rank in range(size):
            environ = environment_of(rank, size, store, local_size, **{**options, **(per_rank or {}).get(rank, {})})
            arguments = [sys.executable, "-X", "faulthandler", os.path.join(_HERE, "support_rank.py")]
            arguments = (prefixes[rank] if prefixes else []) + arguments
            self.processes.append(subprocess.Popen(
                arguments, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.output,
            ))  # fmt: skip
        if initialize:
            self.call("support_rank:initialize")

    def call(self, function, *args, deadline_s=DEADLINE_S):
        """Runs a function on every rank and returns the results, in rank order; raises if any rank failed."""
        results = self.outcomes(function, *args, deadline_s=deadline_s)
        failures = [f"rank {rank}: {getattr(result, 'text', result)}" for rank, result in enumerate(results)
                    if isinstance(result, (Raised, Died))]  # fmt: skip
        if failures:
            raise RankFailed("\n".join(failures) + "\n" + self.printed())
        return results

    def outcomes(self, function, *args, deadline_s=DEADLINE_S):
        """As `call`, but with Raised and Died among the results."""
        self.begin(function, *args)
        return self.collect(deadline_s)

    def begin(self, function, *args):
        """Starts a function on every rank; `function` is a function or "module:name"."""
        if not isinstance(function, str):
            function = f"{function.__module__.rpartition('.')[2]}:{function.__name__}"
        message = pickle.dumps((function, args))
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(_LENGTH.pack(len(message)) + message)
                process.stdin.flush()

    def collect(self, deadline_s=DEADLINE_S):
        """The outcomes of what `begin` started."""
        end_s = time.monotonic() + deadline_s
        return [self._outcome(rank, end_s) for rank in range(self.size)]

    def _outcome(self, rank, end_s):
        process = self.processes[rank]
        header = self._read(rank, _LENGTH.size, end_s)
        if header is None:
            return Died(process.wait())
        return pickle.loads(self._read(rank, _LENGTH.unpack(header)[0], end_s))

    def _read(self, rank, nbytes, end_s):
        descriptor, data = self.processes[rank].stdout.fileno(), b""
        while len(data) < nbytes:
            if not select.select([descriptor], [], [], max(0.0, end_s - time.monotonic()))[0]:
                self.kill(signal.SIGABRT)  # faulthandler prints where each rank hangs
                raise RankFailed(f"rank {rank} gave no answer before the deadline\n" + self.printed())
            piece = os.read(descriptor, nbytes - len(data))
            if not piece:
                return None
            data += piece
        return data

    def kill(self, number=signal.SIGKILL):
        """Sends a signal to every rank that lives."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def printed(self):
        """What the ranks wrote to stderr so far; the end of it."""
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        self.output.seek(0)
        return self.output.read().decode(errors="replace")[-8000:]

    def close(self, deadline_s=20.0):
        """Lets the ranks end and returns their exit codes."""
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        end_s = time.monotonic() + deadline_s
        try:
            codes = [process.wait(max(0.1, end_s - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill(signal.SIGABRT)
            raise RankFailed("a rank did not end by itself\n" + self.printed()) from None
        finally:
            self.kill()
            for process in self.processes:
                process.wait()
                process.stdout.close()
        return codes

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            self.kill()
        self.close()
        self.output.close()


def run_ranks(size, function, *args, deadline_s=DEADLINE_S, **options):
    """Runs a function once on a set of initialized ranks of its own and returns the results, in rank order."""
    with Ranks(size, **options) as ranks:
        return ranks.call(function, *args, deadline_s=deadline_s)


def run_script(text, size, deadline_s=30.0, **options):
    """Runs a program as `size` ranks; returns [(exit code, output)] in rank order."""
    store = f"unix:@commlib-test-{uuid.uuid4().hex[:16]}"
    processes = [
        subprocess.Popen([sys.executable, "-c", text], env=environment_of(rank, size, store, **options),
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        for rank in range(size)
    ]
    end_s = time.monotonic() + deadline_s
    try:
        outputs = [process.communicate(timeout=max(0.1, end_s - time.monotonic()))[0] for process in processes]
    except subprocess.TimeoutExpired:
        raise RankFailed(f"a rank of this program did not end within {deadline_s} s:\n{text}") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, output.decode(errors="replace")) for process, output in zip(processes, outputs)]


def program(name):
    """Where a program is: beside this Python (a virtual environment need not be on the PATH), or on the PATH; else None."""
    folder = os.path.dirname(sys.executable)
    return shutil.which(name, path=os.pathsep.join((folder, os.environ.get("PATH", ""))))
