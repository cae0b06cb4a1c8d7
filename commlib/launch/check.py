"""commrun --check: are these hosts fit for a job? Asks each (survey.py), compares, and prints tables and what to do."""
from __future__ import annotations

import argparse
import secrets
import signal
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from commlib.launch.hostlinks import Failed, HostLinks
from commlib.launch.link import Link
from commlib.launch.loop import Loop
from commlib.launch.output import say
from commlib.version import VERSION

ALL_PAIRS = 8            # hosts; of more, each is measured with its neighbours only
_MEMLOCK_NBYTES = 64 << 20  # below it, MPI over InfiniBand cannot register buffers
_MEASURE_S = 30.0


class Check:
    """Runs once, in the main thread.

    Args:
        options: commrun's.
        names: hosts.
        environ: commrun's own environment.
    """

    def __init__(self, options: argparse.Namespace, names: Sequence[str], environ: Mapping[str, str]):
        self._options, self._names, self._environ = options, names, environ
        self._problems: List[str] = []
        self._notes: List[str] = []
        self._interrupted: Optional[int] = None

    def run(self) -> int:
        """Prints what was found; returns 0 if nothing is wrong, 1 if something is, 128 + signal when interrupted."""
        with Loop(self._interrupt) as loop:
            with HostLinks(loop, self._names, self._options, self._environ, self._fail, {}) as self._links:
                try:
                    self._compare()
                    self._measure()
                except Failed:
                    pass
                for link in self._links.alive:
                    link.send({"op": "leave"})
        if self._interrupted is not None:
            return 128 + self._interrupted
        for text in self._notes:
            print(f"note: {text}")
        for text in self._problems:
            say(text)
        print(f"{len(self._names)} hosts checked: " + (f"{len(self._problems)} problems" if self._problems else "fit for a job"))
        return 1 if self._problems else 0

    def _fail(self, _code: int, text: str) -> None:
        self._problems.append(text)

    def _interrupt(self, number: int) -> None:
        say(f"stopping on {signal.Signals(number).name}")
        self._interrupted = number

    def _tend(self) -> float:
        if self._interrupted is not None:
            raise Failed
        return float("inf")

    def _ask(self, links: Sequence[Link], question: dict) -> Dict[Link, dict]:
        for link in links:
            link.send({"op": "survey", **question})
        return self._links.wait(links, "surveyed", "answer", self._tend, _MEASURE_S)

    # ---- each host ----

    def _compare(self) -> None:
        hellos = self._links.wait(self._links.all, "hello", "answer", self._tend)
        limits = self._ask(list(hellos), {"what": "limits"})
        rows = [[link.host, hello["name"], hello["version"], hello["python"], str(limits[link]["cores"]),
                 _size(limits[link]["memlock_nbytes"]), limits[link]["shared"] or "ok"]
                for link, hello in hellos.items() if link in limits]  # fmt: skip
        table("hosts", ["host", "its own name", "commlib", "Python", "cores", "memlock", "shared memory"], rows)
        self._hellos = {link: hello for link, hello in hellos.items() if link in limits}
        minors = {tuple(limits[link]["python_minor"]) for link in self._hellos}
        for link, hello in self._hellos.items():
            if hello["version"] != VERSION:
                self._problems.append(f"host {link.host} has commlib {hello['version']}, this host has {VERSION}: install the "
                                      "same version on all")
            if limits[link]["shared"]:
                self._problems.append(f"host {link.host} gives no shared memory ({limits[link]['shared']}): raise the "
                                      "container's memory limit, or run with COMMLIB_TRANSPORT=tcp")
            if limits[link]["memlock_nbytes"] is not None and limits[link]["memlock_nbytes"] < _MEMLOCK_NBYTES:
                self._notes.append(f"host {link.host} lets processes lock {_size(limits[link]['memlock_nbytes'])} of memory: "
                                   "enough for shm and tcp; MPI over InfiniBand wants ulimit -l unlimited")
        if len(minors) > 1:
            versions = ", ".join(f"{link.host} has {hello['python']}" for link, hello in self._hellos.items())
            self._problems.append(f"the hosts differ in Python ({versions}): install the same, or pickled objects may not be "
                                  "understood")

    # ---- each pair ----

    def _measure(self) -> None:
        links = list(self._hellos)
        if len(links) < 2:
            return
        token = secrets.token_hex(16)
        doors = self._ask(links, {"what": "listen", "ports": self._options.port_range or "", "token": token,
                                  "interfaces": self._options.network_interfaces or ""})  # fmt: skip
        for link, door in doors.items():
            if door["port"] is None:
                self._problems.append(f"host {link.host} opens no port: {door['text']}")
        rows = []
        for one, other in pairs(links):
            if doors.get(other, {}).get("port") is None or not one.is_open:
                continue
            question = {"what": "measure", "token": token, "port": doors[other]["port"], "addresses": doors[other]["addresses"],
                        "identity": self._hellos[other]["identity"]}
            found = self._ask([one], question).get(one)
            if found is not None:
                rows.append(self._row(one, other, doors[other]["port"], found))
        table("links", ["from", "to", "address", "latency us", "Gbit/s"], rows)

    def _row(self, one: Link, other: Link, port: int, found: dict) -> List[str]:
        if found["address"] is None:
            self._problems.append(f"host {one.host} cannot reach host {other.host} at port {port} ({found['reason']}):"
                                  " open the ports between them, or name their common network with --network-interfaces")
            return [one.host, other.host, "none", "", ""]
        return [one.host, other.host, found["address"], f"{found['latency_s'] * 1e6:,.0f}", f"{found['bytes_per_s'] * 8e-9:,.2f}"]


def pairs(items: Sequence) -> Iterator[Tuple]:
    """All ordered pairs of few items; of many, those of neighbours in a ring, both ways.

    Example:
        >>> list(pairs("ab"))
        [('a', 'b'), ('b', 'a')]
    """
    count = len(items)
    for i in range(count):
        for j in range(count):
            if i != j and (count <= ALL_PAIRS or (i - j) % count in (1, count - 1)):
                yield items[i], items[j]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """By rich on a terminal, if it is installed; else aligned by hand: other programs read whole lines."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        console = None
    else:
        console = Console()
    if console is None or not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(columns, *rows)]
        print(title)
        for row in [columns, *rows]:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        return
    drawn = Table(title=title)
    for column in columns:
        drawn.add_column(column)
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)


def _size(nbytes: Optional[int]) -> str:
    return "unlimited" if nbytes is None else f"{nbytes / (1 << 20):,.0f} MiB"
