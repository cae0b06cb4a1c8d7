"""The rank processes of one host: started, watched, stopped step by step, and gone to the last descendant.

Every way to stop them is a list of signals still to be sent, each at its time. Knows nothing of other hosts, nor of
where output goes.
"""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from commlib.launch import processes
from commlib.launch.loop import Loop
from commlib.launch.output import ENDED, Stream

GRACE_S = 5.0         # for ranks to end by themselves after a failure or Ctrl-C: a lost peer is noticed within that
TERMINATE_S = 3.0     # from SIGTERM to SIGKILL


class Ranks:
    """Must be made in the main thread of a process that has no other children.

    Args:
        loop: whose turns this object is part of.
        ended: called with (rank, pid, wait status) of each rank that has ended.
    """

    def __init__(self, loop: Loop, ended: Callable[[int, int, int], None]):
        processes.adopt_orphans()
        self.running: Dict[int, int] = {}              # pid -> rank
        self._loop, self._ended = loop, ended
        self._groups: List[int] = []                   # process groups of all ranks ever started
        self._streams: List[Stream] = []
        self._escalation: List[Tuple[float, int]] = []  # (when, signal), in order of time
        self._guard = processes.start_guard()

    def start(self, rank: int, command: Sequence[str], environ: Dict[str, str], stdin,
              sinks: Sequence[Tuple[int, Callable[[bytes], None], Callable[[], None]]], cores: Sequence[int] = ()) -> int:
        """Starts one rank; returns its pid.

        Args:
            sinks: (descriptor in the rank, write, close) of each output that shall be read here; see `Stream`.
            cores: that the rank is bound to; none: it is not.
        Raises:
            OSError: the system has no room for another process.
        """
        writers: Dict[int, int] = {}
        try:
            for descriptor, write, close in sinks:
                reader, writers[descriptor] = os.pipe()
                self._watch(Stream(reader, write, close))
            pid = processes.start(command, environ, stdin, writers, cores)
        finally:
            for writer in writers.values():
                os.close(writer)
        self.running[pid] = rank
        self._groups.append(pid)
        with contextlib.suppress(BrokenPipeError):  # without a guard the ranks still die with us
            self._guard.stdin.write(b"%d\n" % pid)
            self._guard.stdin.flush()
        return pid

    # ---- while they run ----

    def tend(self) -> None:
        """To be called after each turn of the loop: hears who has ended, sends signals that are due."""
        # several that ended before we looked: whoever was killed has hardly failed because of the others
        for pid, status in sorted(processes.reap(), key=lambda ended: not os.WIFSIGNALED(ended[1])):
            rank = self.running.pop(pid, None)
            if rank is not None:
                self._ended(rank, pid, status)
        while self._escalation and self._escalation[0][0] <= time.monotonic():
            _, number = self._escalation.pop(0)
            for group in self._groups:
                processes.signal_group(group, number)

    @property
    def deadline(self) -> float:
        """When `tend` has something to do even if nothing happens."""
        return self._escalation[0][0] if self._escalation else float("inf")

    def pause_output(self, paused: bool) -> None:
        """Leaves what ranks print in their pipes, or reads it again."""
        for stream in self._streams:
            if paused:
                self._loop.unwatch(stream.pipe)
            else:
                self._loop.watch(stream.pipe, self._pump(stream))

    def stop(self, signals: Sequence[Tuple[int, float]]) -> None:
        """Decides which signals the ranks get when, in seconds from now, in place of what was decided before."""
        now = time.monotonic()
        self._escalation = [(now + after_s, number) for number, after_s in signals]

    def hurry(self) -> None:
        """Sends the next signal at once."""
        if self._escalation:
            self._escalation[0] = (time.monotonic(), self._escalation[0][1])

    # ---- the end ----

    def finish(self) -> None:
        """Ends what the ranks have left behind: orphans are our children now, so without children nothing is left."""
        for stream in list(self._streams):
            while stream.pump() > 0:
                pass
            self._close(stream)
        self._guard.kill()
        self._guard.wait()
        self._guard.stdin.close()
        number, deadline = signal.SIGTERM, time.monotonic() + TERMINATE_S
        left = processes.children()
        while left:
            for pid in left:
                processes.signal_process(pid, number)
            self._loop.turn(time.monotonic() + 0.1)  # SIGCHLD ends it early
            for _ in processes.reap():
                pass
            if time.monotonic() >= deadline:
                number = signal.SIGKILL
            left = processes.children()

    def _watch(self, stream: Stream) -> None:
        self._streams.append(stream)
        self._loop.watch(stream.pipe, self._pump(stream))

    def _pump(self, stream: Stream) -> Callable[[int], None]:
        def pump(_events: int) -> None:
            if stream.pump() == ENDED:
                self._close(stream)
        return pump

    def _close(self, stream: Stream) -> None:
        self._loop.unwatch(stream.pipe)
        self._streams.remove(stream)
        stream.close()


def gently(number: Optional[int] = None) -> List[Tuple[int, float]]:
    """The signals of an orderly stop, with their times in seconds; `number` at once, if it is given."""
    first = [] if number is None else [(int(number), 0.0)]
    return first + [(int(signal.SIGTERM), GRACE_S), (int(signal.SIGKILL), GRACE_S + TERMINATE_S)]


def firmly() -> List[Tuple[int, float]]:
    """The signals for ranks that nobody waits for any more."""
    return [(int(signal.SIGTERM), 0.0), (int(signal.SIGKILL), TERMINATE_S)]
