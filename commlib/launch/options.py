"""commrun's command line. Names are those of horovodrun where it has the option."""
from __future__ import annotations

import argparse
import math
from typing import List

from commlib.bootstrap import START_TIMEOUT_S
from commlib.version import VERSION

_DESCRIPTION = "Starts N ranks of a program on this host and stops all of them when one fails."
_EPILOG = """\
Each rank finds its place in COMMLIB_RANK, COMMLIB_SIZE, COMMLIB_LOCAL_RANK, COMMLIB_LOCAL_SIZE, COMMLIB_CROSS_RANK and
COMMLIB_CROSS_SIZE. OMP_NUM_THREADS is set to the number of usable cores divided by N unless it is set already, and
PYTHONUNBUFFERED to 1 where commrun handles the output. Rank 0 gets commrun's standard input, the others none.
When a rank fails, the others get 5 s to end with messages of their own, then SIGTERM, then SIGKILL. The exit code is
that of the first rank that failed, or 128 + the signal that killed it. Nothing that a rank started outlives commrun.

example: commrun -np 2 python train.py
"""


def parse(arguments: List[str]) -> argparse.Namespace:
    """The options; ends the process with a message if they make no sense."""
    parser = argparse.ArgumentParser("commrun", usage="commrun -np N [options] COMMAND [ARGUMENT ...]",
                                     description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-np", "--num-proc", dest="size", type=_count, required=True, metavar="N", help="number of ranks to start")
    add("-H", "--hosts", metavar="HOST:SLOTS", help="this host only, for now: localhost:N")
    add("--start-timeout", type=_seconds, metavar="S",
        help=f"seconds that the ranks wait for each other in init() (COMMLIB_START_TIMEOUT_S, {START_TIMEOUT_S:g})")
    add("--timeout", type=_seconds, default=math.inf, metavar="S",
        help="stop the job after this many seconds, with exit code 124")
    add("--settings", metavar="FILE",
        help="a settings record for all ranks, as `commlib tune` writes it (COMMLIB_SETTINGS)")
    add("--prefix-output", action="store_true", help="put [rank] before each line that a rank prints")
    add("--prefix-output-with-timestamp", action="store_true", help="the same, with date and time")
    add("--output-filename", metavar="DIR", help="also write each rank's output to DIR/rank.R/stdout and stderr")
    add("--version", action="version", version=f"commrun {VERSION}")
    add("--verbose", action="store_true", help="say what is started and how it ends")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the program, with its arguments")
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        parser.error("no command to start: commrun -np 2 python train.py")
    if options.hosts is not None:
        _check_hosts(parser, options)
    return options


def _check_hosts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    host, _, slots = options.hosts.partition(":")
    if host not in ("localhost", "127.0.0.1"):
        parser.error(f"-H {options.hosts}: this version starts ranks on this host only (-H localhost:{options.size}); "
                     "for several hosts start the program with torchrun, mpirun or srun")
    if slots and (not slots.isdigit() or int(slots) < options.size):
        parser.error(f"-H {options.hosts} has fewer than the {options.size} slots that -np asks for")


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= 4096:  # one host; beyond it is a typing error
        raise argparse.ArgumentTypeError(f"{text} is not in [1, 4096]")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value
