"""commrun's command line. Names are those of horovodrun where it has the option."""
from __future__ import annotations

import argparse
import json
import math
import os
from typing import Any, Dict, List, Optional

from commlib.bootstrap import START_TIMEOUT_S, StartError
from commlib.interfaces import parse_ports
from commlib.launch.hosts import HostsError, only_here, parse_hosts, place, read_hostfile
from commlib.launch.words import LOST_S
from commlib.version import VERSION

LOG_LEVELS = ("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "FATAL")  # Horovod's words

_DESCRIPTION = "Starts the ranks of a program on this host or on several, and stops all of them when one fails."
_EPILOG = """\
Each rank finds its place in COMMLIB_RANK, COMMLIB_SIZE, COMMLIB_LOCAL_RANK, COMMLIB_LOCAL_SIZE, COMMLIB_CROSS_RANK and
COMMLIB_CROSS_SIZE. OMP_NUM_THREADS, TF_NUM_INTRAOP_THREADS and TF_NUM_INTEROP_THREADS are set to the number of usable
cores divided by the host's ranks unless they are set already, and PYTHONUNBUFFERED to 1 where commrun handles the
output. On one host rank 0 gets commrun's standard input; all others have none. When a rank fails, the others get 5 s to
end with messages of their own, then SIGTERM, then SIGKILL. The exit code is that of the first rank that failed, or 128
+ the signal that killed it. Nothing that a rank started outlives commrun. See docs/launching.md.

examples: commrun -np 2 python train.py
          commrun -H node1:4,node2:4 python train.py
          commrun --check -H node1,node2
"""


def parse(arguments: List[str]) -> argparse.Namespace:
    """The options, with `places` (of ranks on hosts; None: all on this one); ends the process if they make no sense."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.config_file is not None:
        parser.set_defaults(**_configured(parser, options.config_file))
        options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    options.places = None
    try:
        options.slots = _slots(options)
        if options.check_build or options.check:
            return options
        if not options.command:
            parser.error("no command to start: commrun -np 2 python train.py")
        _place(parser, options)
    except HostsError as error:
        parser.error(str(error))
    return options


def _slots(options: argparse.Namespace) -> Optional[Dict[str, int]]:
    if options.hosts is not None and options.hostfile is not None:
        raise HostsError("give -H or --hostfile, not both")
    if options.hosts is not None:
        return parse_hosts(options.hosts)
    return None if options.hostfile is None else read_hostfile(options.hostfile)


def _place(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.size is None:
        if options.slots is None:
            parser.error("how many ranks? Give -np N, or hosts with -H")
        options.size = sum(options.slots.values())
    if options.slots is not None:
        places = place(options.slots, options.size)
        if options.launch_agent is not None or not only_here(options.slots):
            options.places = places


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("commrun", usage="commrun [-np N] [-H HOST:SLOTS,...] [options] COMMAND [ARGUMENT ...]",
                                     description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, add_all in (("what and where", _add_places), ("how long", _add_times), ("how hosts are reached", _add_ways),
                           ("what ranks are told", _add_settings), ("output", _add_output), ("instead of a job", _add_other)):
        add_all(parser.add_argument_group(title).add_argument)
    parser.add_argument("--call", help=argparse.SUPPRESS)  # of commlib.run: descriptors
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the program, with its arguments")
    return parser


def _add_places(add) -> None:
    add("-np", "--num-proc", dest="size", type=_count, metavar="N", help="number of ranks; all slots of the hosts if left out")
    add("-H", "--hosts", metavar="HOST:SLOTS,...", help="hosts with the number of ranks that each may get, filled in this order")
    add("--hostfile", metavar="FILE", help='the same from a file, one "HOST slots=N" or "HOST:N" per line')
    add("--bind-to-cores", action="store_true", help="give each rank an equal share of the host's cores for itself; not where "
                                                     "several jobs share a host, as each would take the same")
    add("--config-file", metavar="FILE", help='further options from a JSON file, such as {"np": 4, "hosts": "a:4"}; '
                                              "those of the command line win")


def _add_times(add) -> None:
    add("--start-timeout", type=_seconds, metavar="S",
        help=f"seconds that hosts may take to answer, and ranks to come to init() ({START_TIMEOUT_S:g}; COMMLIB_START_TIMEOUT_S)")
    add("--timeout", type=_seconds, default=math.inf, metavar="S",
        help="stop the job after this many seconds, with exit code 124")
    add("--heartbeat-timeout", type=_seconds, metavar="S",
        help=f"a host that is silent so long is lost, and ends its ranks when it misses commrun so long ({LOST_S:g})")


def _add_ways(add) -> None:
    add("-p", "--ssh-port", type=_port, metavar="PORT", help="of sshd on the hosts")
    add("-i", "--ssh-identity-file", metavar="FILE", help="private key for ssh")
    add("--launch-agent", metavar="COMMAND", help="start programs on hosts with COMMAND HOST PROGRAM ARGUMENT ... in place of ssh")
    add("--python", metavar="PATH", help="Python with commlib on the hosts; that of commrun if left out")
    add("--wdir", metavar="DIR", help="working folder on the hosts; this one if left out")
    add("-x", dest="variables", action="append", default=[], type=_variable, metavar="NAME[=VALUE]",
        help="give ranks on other hosts this variable too; they get PATH, PYTHON*, COMMLIB_*, OMP_* and the like anyway")
    add("--network-interfaces", "--network-interface", metavar="NAME,...",
        help="what ranks on different hosts talk over: interfaces, addresses or networks, as eth0,10.1.0.0/16 "
             "(COMMLIB_NETWORK_INTERFACES)")
    add("--port-range", type=_ports, metavar="FIRST-LAST", help="ports that ranks may listen at (COMMLIB_PORT_RANGE)")


def _add_settings(add) -> None:
    add("--settings", metavar="FILE",
        help="a settings record for all ranks, as `commlib tune` writes it (COMMLIB_SETTINGS)")
    add("--timeline-filename", metavar="FILE", help="write a timeline of all ranks there, for ui.perfetto.dev (COMMLIB_TIMELINE)")
    add("--stall-check-warning-time-seconds", type=_seconds, metavar="S",
        help="say in the log which ranks an operation waits for that was submitted so long ago (60; COMMLIB_STALL_WARNING_S)")
    add("--stall-check-shutdown-time-seconds", type=_limit, metavar="S",
        help="and let it fail on every rank after so long (0: never; COMMLIB_STALL_SHUTDOWN_S)")
    add("--no-stall-check", action="store_true", help="neither")
    add("--stall-check", dest="no_stall_check", action="store_false", help="as without --no-stall-check; for Horovod's sake")
    add("--log-level", type=str.upper, choices=LOG_LEVELS, help="what commlib's log tells of itself (COMMLIB_LOG_LEVEL)")


def _add_output(add) -> None:
    add("--prefix-output", action="store_true", help="put [rank]<stdout>: or [rank]<stderr>: before each line that a rank prints")
    add("--prefix-output-with-timestamp", action="store_true", help="the same, with date and time")
    add("--output-filename", metavar="DIR", help="also write each rank's output to DIR/rank.R/stdout and stderr")
    add("--verbose", action="store_true", help="say what is started and how it ends")


def _add_other(add) -> None:
    add("--check", action="store_true", help="test the hosts: versions, ports both ways, latency and bandwidth of each pair")
    add("-cb", "--check-build", action="store_true", help="say what this commlib can do")
    add("--version", action="version", version=f"commrun {VERSION}")


# ---- values ------------------------------------------------------------------------------------------------------

def _configured(parser: argparse.ArgumentParser, path: str) -> Dict[str, Any]:
    """The options of a configuration file, checked as if they stood on the command line."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError) as error:
        parser.error(f"--config-file {path}: {error}; it must be a JSON object of long options without their dashes")
    if not isinstance(record, dict):
        parser.error(f"--config-file {path}: it must be a JSON object of long options without their dashes")
    actions = {name.lstrip("-"): action for action in parser._actions for name in action.option_strings}
    words: List[str] = []
    for name, value in record.items():
        action = actions.get(name.replace("_", "-"))
        if action is None or action.dest in ("help", "version", "config_file", "call"):
            parser.error(f"--config-file {path}: there is no option {name!r}; see commrun --help")
        for item in value if isinstance(value, list) else [value]:
            if action.nargs == 0 and not isinstance(item, bool):
                parser.error(f"--config-file {path}: {name!r} must be true or false, not {item!r}")
            words += [] if item is False else [action.option_strings[-1]] + ([] if item is True else [str(item)])
    return vars(parser.parse_args(words))


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= 65536:  # beyond it is a typing error
        raise argparse.ArgumentTypeError(f"{text} is not in [1, 65536]")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _limit(text: str) -> float:
    return 0.0 if float(text) == 0.0 else _seconds(text)


def _port(text: str) -> int:
    value = int(text)
    if not 0 < value < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not in [1, 65535]")
    return value


def _ports(text: str) -> str:
    try:
        parse_ports(text)
    except StartError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _variable(text: str) -> str:
    name, equals, _ = text.partition("=")
    if not name or not equals and name not in os.environ:
        raise argparse.ArgumentTypeError(f"{text!r}: no such variable is set here; give -x NAME=VALUE")
    return text
