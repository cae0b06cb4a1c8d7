"""Becomes one rank: asks the kernel to kill it when commrun dies, then executes the rank's command in its place.

A program of its own (run by path, isolated, without site), because what it does must happen between fork and exec,
where a Python process with threads may not safely run code. Usage: child.py COMMRUN_PID MOVES CORES COMMAND
[ARGUMENT ...], MOVES being "" or descriptors to rename, such as "7:3", and CORES "" or those to run on, such as "0,1".
"""
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> int:
    commrun_pid, moves, cores, command = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != commrun_pid:
        return 128 + signal.SIGKILL  # commrun died before the kernel was asked
    for ours, theirs in (map(int, move.split(":")) for move in moves.split(",") if move):
        if ours != theirs:
            os.dup2(ours, theirs)
            os.close(ours)
        else:
            os.set_inheritable(ours, True)
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores these, and exec would pass that on
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"commrun: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
