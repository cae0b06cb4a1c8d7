"""The links to all hosts of a job or a check: opened together, kept alive, waited for phase by phase, closed.

The first thing that goes wrong is kept as `failure`, and ends every wait.
"""
from __future__ import annotations

import argparse
import threading
import time
from typing import Callable, Dict, List, Mapping, Optional, Sequence

from commlib.bootstrap import START_TIMEOUT_S
from commlib.launch.link import CLOSE_S, Link
from commlib.launch.words import LOST_S, beat_s
from commlib.launch.loop import Loop
from commlib.rendezvous_wire import Message
from commlib.version import VERSION

LINK_FAILED = 1   # exit code


class Failed(Exception):
    """A wait has ended because the job has failed."""


class HostLinks:
    """A context manager.

    Args:
        loop: whose turns this object is part of.
        names: of the hosts.
        options: commrun's.
        environ: of commrun; only PYTHONPATH of it is used here.
        fail: called with (exit code, text) when something is wrong; sets `failed`.
        handlers: op -> called with (link, message), for messages that nobody waits for.
    """

    def __init__(self, loop: Loop, names: Sequence[str], options: argparse.Namespace, environ: Mapping[str, str],
                 fail: Callable[[int, str], None], handlers: Mapping[str, Callable[[Link, Message], None]]):
        self._loop, self._fail, self._handlers = loop, fail, handlers
        self.lost_s = LOST_S if options.heartbeat_timeout is None else options.heartbeat_timeout
        self._start_s = START_TIMEOUT_S if options.start_timeout is None else options.start_timeout
        self._deadline = time.monotonic() + self._start_s
        self.hellos: Dict[Link, dict] = {}   # what each host said of itself
        self._answers: Dict[Link, Dict[str, dict]] = {}
        self._closing = False
        self._end = threading.Event()
        self.all: List[Link] = [Link(loop, name, options, environ, self._heard, self._lost) for name in names]
        self._pulse = threading.Thread(target=self._beat, name="commrun-pulse", daemon=True)

    def __enter__(self) -> "HostLinks":
        self._pulse.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._pulse.join()
        self._closing = True
        for link in self.all:
            link.hang_up()
        deadline = time.monotonic() + CLOSE_S
        for link in self.all:
            link.reap(deadline)

    @property
    def alive(self) -> List[Link]:
        return [link for link in self.all if link.is_open]

    @property
    def _begun(self) -> List[Link]:
        """Hosts that have said something and must go on to; before that the start time-out holds."""
        return [link for link in self.alive if link in self._answers]

    def greet(self, tend: Callable[[], float]) -> None:
        """Waits until every host has answered, with the right version."""
        self.hellos = self.wait(self.all, "hello", "answer", tend)
        for link, hello in self.hellos.items():
            if hello["version"] != VERSION:
                self._fail(LINK_FAILED, f"host {link.host} has commlib {hello['version']} in {hello['executable']}, this host has "
                                        f"{VERSION}: install the same version on both, or name another interpreter with --python")
                raise Failed

    def wait(self, links: Sequence[Link], op: str, what: str, tend: Callable[[], float],
             timeout_s: float = 0.0) -> Dict[Link, dict]:
        """The next message with this op of each of these links.

        Args:
            what: what the hosts are to do, for the error message. Links that are lost meanwhile are left out.
            tend: called after every turn; returns when it wants to be called again. Raises Failed to end the wait.
            timeout_s: how long to wait; 0: to the end of the start time-out.
        Raises:
            Failed: the job has failed, perhaps by this wait's time-out.
        """
        deadline = time.monotonic() + timeout_s if timeout_s else self._deadline
        while True:
            act_at = tend()
            missing = [link for link in links if link.is_open and op not in self._answers.get(link, {})]
            if not missing:
                return {link: self._answers[link].pop(op) for link in links if op in self._answers.get(link, {})}
            if time.monotonic() >= deadline:
                after_s = timeout_s or self._start_s
                told = "; ".join(f"{link.host}{link.printed()}" for link in missing[:4])
                self._fail(LINK_FAILED, f"host {', '.join(link.host for link in missing)} did not {what} within {after_s:g} s"
                                        f"{' (' + told + ')' if any(link.printed() for link in missing) else ''}: is it up, and "
                                        "quick enough? Give slow hosts more time with --start-timeout")
                raise Failed
            self.turn(min(deadline, act_at))

    def turn(self, deadline: float) -> None:
        """One turn of the loop, with an eye on hosts that have gone silent."""
        silent_at = min((link.heard_at for link in self._begun), default=float("inf")) + self.lost_s
        looked_at = time.monotonic()
        self._loop.turn(min(deadline, silent_at))
        for link in self._begun:
            # Only what a look after that time did not find was not said: we may have been stopped ourselves, or waiting
            # for the user's terminal.
            if looked_at >= link.heard_at + self.lost_s:
                link.close()
                self._lost(link, f"it has been silent for {self.lost_s:g} s, so it, its network or ssh is gone; its ranks end "
                                 "themselves when they notice the same")

    def settle(self, link: Link) -> bool:
        """Whether this host has said that nothing of the job is left there, or cannot say it any more."""
        return not link.is_open or "done" in self._answers.get(link, {})

    def _heard(self, link: Link, message: Message) -> None:
        op = message.header["op"]
        self._answers.setdefault(link, {})
        if op == "refused":
            self._fail(LINK_FAILED, f"host {link.host} {message.header['text']}")
        elif op in self._handlers:
            self._handlers[op](link, message)
        else:
            self._answers[link][op] = message.header

    def _lost(self, link: Link, text: str) -> None:
        if not self._closing:
            self._fail(LINK_FAILED, f"host {link.host}: {text}")

    def _beat(self) -> None:
        while not self._end.wait(beat_s(self.lost_s)):
            for link in self.all:
                link.pulse()
