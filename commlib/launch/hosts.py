"""Which hosts, how many ranks on each: what -H and --hostfile say, and where every rank goes. No sockets, no processes."""
from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence

_HERE = frozenset(("localhost", "127.0.0.1", "::1"))  # other loopback addresses may be a container's port, or a test's
_FORMAT = "write HOST:SLOTS, such as node1:4, with a comma between hosts; IPv6 addresses as [fe80::1]:4"


class HostsError(ValueError):
    """What was said about hosts makes no sense; the text says what to do."""


@dataclass(frozen=True)
class Place:
    """One host of a job.

    Args:
        host: its name, as ssh takes it.
        ranks: those that run there.
        index: among the hosts of the job (cross rank).
    """

    host: str
    ranks: Sequence[int]
    index: int


def parse_hosts(text: str) -> Dict[str, int]:
    """Slots of each host, in order, of "a:4,b:4"; a host without a number has one slot, one named twice has the sum.

    Example:
        >>> parse_hosts("a:4,[fe80::1]:2,b,b")
        {'a': 4, 'fe80::1': 2, 'b': 2}
    """
    slots: Dict[str, int] = {}
    for item in text.split(","):
        _add(slots, item.strip(), f"-H {text}")
    return slots


def read_hostfile(path: str) -> Dict[str, int]:
    """Slots of each host of a file: lines "host slots=4" (Horovod, Open MPI), "host:4" (MPICH) or "host" (PBS, once per slot).

    Raises:
        HostsError: it cannot be read, names no host, or has a line that is none of these.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HostsError(f"--hostfile {path}: {error}") from None
    slots: Dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        count = [word[len("slots="):] for word in words[1:] if word.startswith("slots=")]
        unknown = [word for word in words[1:] if not re.match(r"(slots|max[-_]slots)=", word)]
        if unknown or len(count) > 1:
            raise HostsError(f'--hostfile {path}, line {number}: {line.strip()!r} is not understood: write "HOST slots=N"')
        _add(slots, words[0] + (f":{count[0]}" if count else ""), f"--hostfile {path}, line {number}")
    if not slots:
        raise HostsError(f'--hostfile {path} names no host: write one "HOST slots=N" per line')
    return slots


def _add(slots: Dict[str, int], item: str, where: str) -> None:
    """Reads one HOST, HOST:SLOTS or [IPv6]:SLOTS into `slots`."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\],]+))(?::(\d{1,6}))?", item)
    if match is None or match.group(3) is not None and int(match.group(3)) == 0:
        raise HostsError(f"{where}: {item!r} is no host with a positive number of slots: {_FORMAT}")
    host = match.group(1) or match.group(2)
    if host.startswith("-"):
        raise HostsError(f"{where}: {item!r} would be an option of ssh: {_FORMAT}")
    slots[host] = slots.get(host, 0) + int(match.group(3) or 1)


def place(slots: Dict[str, int], size: int) -> List[Place]:
    """Fills the hosts in order, each up to its slots; hosts that get no rank are left out.

    Raises:
        HostsError: there are fewer slots than ranks.
    Example:
        >>> [tuple(place.ranks) for place in place({"a": 2, "b": 2, "c": 1}, 3)]
        [(0, 1), (2,)]
    """
    total = sum(slots.values())
    if size > total:
        shown = ",".join(f"{host}:{count}" for host, count in slots.items())
        raise HostsError(f"-np {size} asks for more ranks than the {total} slots of {shown}: give a host more slots, "
                         "name more hosts, or start fewer ranks")
    places: List[Place] = []
    first = 0
    for host, count in slots.items():
        ranks = range(first, min(size, first + count))
        if ranks:
            places.append(Place(host, ranks, len(places)))
        first += count
    return places


def is_here(host: str) -> bool:
    """Whether a name means this host for certain, so that no ssh is needed."""
    return host in _HERE or host == socket.gethostname()  # no further names: asking for them can take seconds


def only_here(slots: Optional[Dict[str, int]]) -> bool:
    """Whether all ranks belong on this host."""
    return slots is None or all(is_here(host) for host in slots)
