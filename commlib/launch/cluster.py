"""A job on several hosts: one host.py on each, started together, told where the ranks meet, stopped together.

The ranks meet in a store that the first host serves, so that hosts must reach each other but need not reach this one. A
single loop waits for what the hosts say; the first failure decides the exit code and stops all.
"""
from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import time
from typing import Dict, List, Optional, Sequence, Tuple

from commlib.launch import environment, network, processes
from commlib.launch.caller import Caller
from commlib.launch.hostlinks import LINK_FAILED, Failed, HostLinks
from commlib.launch.hosts import Place
from commlib.launch.job import TIMED_OUT
from commlib.launch.link import Link
from commlib.launch.loop import Loop
from commlib.launch.output import Terminal, say, terminal_of
from commlib.launch.ranks import firmly, gently
from commlib.rendezvous_wire import Message
from commlib.secret import VARIABLE, new_secret

_COMPARE_S = 0.3     # a rank that was killed may be reported a little later than those that fail because of it
_CALL_NBYTES = 1 << 20
_SLACK_S = 5.0       # beyond the time that ranks have to end, for a host to say that they have


class Cluster:
    """Runs once, in the main thread.

    Args:
        options: commrun's.
        places: hosts and their ranks.
        environ: commrun's own environment, with the variables of its options.
        caller: who called `commlib.run`, if that is what this is.
    """

    def __init__(self, options: argparse.Namespace, places: Sequence[Place], environ: Dict[str, str],
                 caller: Optional[Caller] = None):
        self._options, self._places, self._environ, self._caller = options, places, environ, caller
        self._size = options.size
        self._result: Optional[int] = None                 # exit code, once a failure has decided it
        self._failures: List[Tuple[bool, float, str, int, int]] = []  # (not killed, when, text, exit code, rank)
        self._terminals: Dict[Tuple[int, str], Terminal] = {}
        self._timeout_at = time.monotonic() + options.timeout
        self._give_up_at = float("inf")
        self._job = secrets.token_hex(16)

    def run(self) -> int:
        """Starts the job and waits until nothing of it is left on any host. Returns the exit code."""
        handlers = {"output": self._output, "started": self._started, "ended": self._ended}
        names = [place.host for place in self._places]
        # Ctrl-Z would stop us and not the hosts, who would then take us for dead
        with Loop(self._interrupt, ignored=(signal.SIGTSTP,)) as loop:
            with HostLinks(loop, names, self._options, self._environ, self._fail, handlers) as self._links:
                if self._caller is not None:
                    self._caller.watch(loop, lambda: self._stop(LINK_FAILED, firmly()))
                try:
                    self._links.greet(self._tend)
                    self._prepare()
                    self._start(self._meeting_places())
                    self._watch()
                except Failed:  # before any rank was started
                    pass
                for link in self._links.alive:
                    link.send({"op": "leave"})
        for terminal in self._terminals.values():
            terminal.close()
        return self._result or 0

    # ---- start ----

    def _prepare(self) -> None:
        options = self._options
        environ = {**environment.forwarded(self._environ, options.variables), VARIABLE: new_secret()}
        header = {"op": "job", "cwd": options.wdir or os.getcwd(), "command": options.command, "binds": options.bind_to_cores,
                  "lost_s": self._links.lost_s, "calls": self._caller is not None}
        for link in self._links.all:
            for start in range(0, len(self._caller.call) if self._caller else 0, _CALL_NBYTES):
                link.send({"op": "call"}, self._caller.call[start:start + _CALL_NBYTES])
            link.send(header, json.dumps(environ).encode())
        self._links.wait(self._links.all, "ready", "make itself ready", self._tend)

    def _meeting_places(self) -> List[str]:
        """The store's address as each host sees it."""
        first, *others = self._links.all
        first.send({"op": "serve", "job": self._job, "alone": not others, "ports": self._options.port_range or "",
                    "interfaces": self._options.network_interfaces or ""})
        serving = self._links.wait([first], "serving", "open a port", self._tend)[first]
        if not others:
            return [serving["store"]]
        question = {"op": "reach", "addresses": serving["addresses"], "port": serving["port"],
                    "identity": self._links.hellos[first]["identity"]}
        for link in others:
            link.send(question)
        answers = self._links.wait(others, "reached", f"try to reach {first.host}", self._tend)
        for link, answer in answers.items():
            if answer["address"] is None:
                self._fail(LINK_FAILED, f"host {link.host} cannot reach host {first.host}, where the ranks meet, at port "
                                        f"{serving['port']} ({answer['reason']}): open ports between the hosts, or name their "
                                        "common network with --network-interfaces; `commrun --check` tests every pair")
                raise Failed
        reached = [network.join_address(answers[link]["address"], serving["port"]) for link in others]
        # ranks publish the address by which they reach the store: one that other hosts can use
        hellos = self._links.hellos
        own = next((address for link, address in zip(others, reached) if hellos[link]["identity"] != hellos[first]["identity"]),
                   reached[0])
        return [own, *reached]

    def _start(self, stores: Sequence[str]) -> None:
        try:
            self._terminals.update(((rank, name), terminal_of(self._options, rank, self._size, name))
                                   for rank in range(self._size) for name in ("stdout", "stderr"))
        except OSError as error:
            self._fail(LINK_FAILED, f"--output-filename {self._options.output_filename}: {error}; give it a folder with room, and "
                                    "raise ulimit -n for many ranks")
            raise Failed from None
        for link, place, store in zip(self._links.all, self._places, stores):
            if self._options.verbose:
                say(f"host {link.host}: ranks {place.ranks[0]}-{place.ranks[-1]} meet at {store}")
            link.send({"op": "start", "ranks": list(place.ranks), "size": self._size, "index": place.index,
                       "hosts": len(self._places), "store": store, "job": self._job})

    # ---- watch ----

    def _watch(self) -> None:
        """Until every host has said that nothing of the job is left there, or has had time enough to say it."""
        while not all(map(self._links.settle, self._links.all)):
            deadline = self._tend(raises=False)
            if time.monotonic() >= self._give_up_at:
                late = [link for link in self._links.alive if not self._links.settle(link)]
                say(f"host {', '.join(link.host for link in late)} did not say that its ranks have ended: they end when it "
                    f"misses commrun's signs of life, {self._links.lost_s:g} s from now at the latest, if it still runs at all")
                return
            self._links.turn(min(deadline, self._give_up_at))
        self._decide()

    def _tend(self, raises: bool = True) -> float:
        """Acts on what has been heard; returns when to do so again."""
        now = time.monotonic()
        if self._failures and self._result is None:
            decide_at = self._failures[0][1] + _COMPARE_S
            if now < decide_at:
                return min(decide_at, self._timeout_at)
            self._decide()
        if now >= self._timeout_at:
            self._timeout_at = float("inf")
            if self._result is None:
                say(f"stopping: the job still runs after {self._options.timeout:g} s (--timeout)")
                self._stop(TIMED_OUT, firmly())
        if raises and self._result is not None:
            raise Failed
        return self._timeout_at

    def _decide(self) -> None:
        """Of the ranks that failed at about the same time, the one that was killed is the cause, else the first."""
        if self._failures and self._result is None:
            _, _, text, code, rank = min(self._failures)
            self._fail(code, text, rank)

    def _fail(self, code: int, text: str, rank: Optional[int] = None) -> None:
        """Says what is wrong, and stops the job if this is the first such thing."""
        say(text)
        if self._result is None:
            if self._caller is not None:
                self._caller.failed(text, rank)
            self._stop(code, gently())

    def _stop(self, code: int, signals: List[Tuple[int, float]]) -> None:
        """Decides the exit code, and which signals the ranks get when, in seconds from now."""
        self._result = code
        self._give_up_at = time.monotonic() + max(after_s for _, after_s in signals) + _SLACK_S
        for link in self._links.alive:
            link.send({"op": "stop", "signals": signals})

    def _interrupt(self, number: int) -> None:
        """Passes Ctrl-C and the like on to the ranks. Each further one takes the next, harder step at once."""
        if self._result is not None:
            for link in self._links.alive:
                link.send({"op": "hurry"})
            return
        say(f"stopping on {signal.Signals(number).name}")
        self._stop(128 + number, gently(number))

    # ---- what hosts say ----

    def _started(self, link: Link, message: Message) -> None:
        if self._options.verbose:
            rank, pid = message.header["rank"], message.header["pid"]
            say(f"rank {rank} is pid {pid} on {link.host}: {' '.join(self._options.command)}")

    def _ended(self, link: Link, message: Message) -> None:
        rank, pid, status = (message.header[name] for name in ("rank", "pid", "status"))
        text = f"rank {rank} (pid {pid} on {link.host}) {processes.describe(status)}"
        self._links.all[0].send({"op": "ended", "rank": rank, "text": text})
        if status != 0 and self._result is None:
            self._failures.append((not os.WIFSIGNALED(status), time.monotonic(), text, processes.exit_code(status), rank))
        elif self._options.verbose:
            say(text)

    def _output(self, _link: Link, message: Message) -> None:
        rank, name = message.header["rank"], message.header["stream"]
        if name == "result":
            self._caller.take(rank, message.payload)
            return
        try:
            self._terminals[rank, name].write(message.payload)
        except OSError:  # commrun ... | head: the reader has what it wants
            if self._result is None:
                self._stop(128 + signal.SIGPIPE, firmly())
