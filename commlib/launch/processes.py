"""Child processes as Linux knows them: started in sessions of their own, reaped, found, killed to the last one."""
from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from typing import Iterator, List, Mapping, Optional, Sequence, Tuple

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_HERE = os.path.dirname(os.path.abspath(__file__))
# isolated and without site: starts in some 10 ms, whatever the user has installed
_PROGRAM = [sys.executable, "-I", "-S"]


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans, so that `reap` and `children` miss nobody."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(command: Sequence[str], environ: Mapping[str, str], stdin, outputs: Mapping[int, int],
          cores: Sequence[int] = ()) -> int:
    """Starts a command that dies with this process, leading a session of its own; returns its pid.

    Args:
        stdin: as subprocess takes it.
        outputs: descriptor of the command -> our descriptor that it shall be; 1 and 2 are inherited if they are not here.
        cores: that it is bound to; none: it may run on all of ours.
    Raises:
        OSError: the system has no room for another process.
    """
    extra = {theirs: ours for theirs, ours in outputs.items() if theirs > 2}
    moves = ",".join(f"{ours}:{theirs}" for theirs, ours in extra.items())
    wrapper = [*_PROGRAM, os.path.join(_HERE, "child.py"), str(os.getpid()), moves, ",".join(map(str, cores))]
    process = subprocess.Popen([*wrapper, *command], env=environ, stdin=stdin, stdout=outputs.get(1), stderr=outputs.get(2),
                               start_new_session=True, pass_fds=tuple(extra.values()))
    process.returncode = 0  # `reap` waits for it, not subprocess
    return process.pid


def start_guard() -> subprocess.Popen:
    """Starts guard.py, which kills the groups written to its stdin when this process dies without a word."""
    return subprocess.Popen(_PROGRAM + [os.path.join(_HERE, "guard.py")], stdin=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, start_new_session=True)


def reap() -> Iterator[Tuple[int, int]]:
    """(pid, wait status) of every child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def children() -> List[int]:
    """Pids of all children of this process, adopted ones too."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                # the command's name, in parentheses, may hold anything; state and parent follow it
                parent = int(stat.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it has just ended
        if parent == os.getpid():
            found.append(int(name))
    return found


def signal_group(group: int, number: int) -> None:
    """Sends a signal to a process group that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def signal_process(pid: int, number: int) -> None:
    """Sends a signal to a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def describe(status: int) -> str:
    """How a process ended, from its wait status.

    Example:
        >>> describe(9)
        'was killed by signal 9 (SIGKILL)'
    """
    if not os.WIFSIGNALED(status):
        return f"exited with code {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    return f"was killed by signal {number} ({_signal_name(number)})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "real-time signal"


def exit_code(status: int) -> int:
    """The shells' convention: a process's own code, or 128 + the signal that killed it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


NOT_EXECUTABLE, NOT_FOUND = 126, 127  # what shells answer


def unusable(program: str, path: Optional[str]) -> Optional[Tuple[int, str]]:
    """(exit code, text) if a command cannot be started, None if it can."""
    if shutil.which(program, path=path) is not None:
        return None
    if not os.path.isfile(program):
        return NOT_FOUND, f"{program}: command not found; give a program on PATH or a path to one"
    advice = f"python {program}" if program.endswith(".py") else f"chmod +x {program}"
    return NOT_EXECUTABLE, f"{program}: not executable, or given without a path; try: {advice}"
