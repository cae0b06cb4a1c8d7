"""Kills what is left of a job when commrun was killed and could not do it.

The kernel kills the ranks themselves then (see child.py), but not their children: a shell script's python, a
DataLoader's workers. This program reads process group ids from its standard input, one per line, until commrun's end of
the pipe closes, and kills these groups. A commrun that ends in order stops the guard first.
"""
import contextlib
import os
import signal
import sys


def main() -> None:
    groups = [int(line) for line in sys.stdin]
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
