"""One job of commrun: N rank processes, the store where they meet, and what happens when one of them fails.

A single loop waits for signals and output; nothing polls. Every way out (a failed rank, Ctrl-C, a time-out) is a list
of signals still to be sent, each at its time.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import Dict, List, Optional, Tuple

from commlib.launch import processes
from commlib.launch.output import ENDED, Stream
from commlib.rendezvous import listen
from commlib.rendezvous_server import Server
from commlib.secret import Secret, new_secret

GRACE_S = 5.0         # for ranks to end by themselves after a failure or Ctrl-C: a lost peer is noticed within that
TERMINATE_S = 3.0     # from SIGTERM to SIGKILL
EXPLAIN_S = 0.5       # the store waits this long for the reason why a rank's connection broke
TIMED_OUT = 124       # exit code of timeout(1)

_HANDLED = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Job:
    """Runs once. Must be made in the main thread of a process that has no other children."""

    def __init__(self, options: argparse.Namespace, environ: Dict[str, str]):
        self._options, self._environ = options, environ
        self._size = options.size
        self._secret = new_secret()
        self._ranks: Dict[int, int] = {}               # pid -> rank, of those still running
        self._groups: List[int] = []                   # process groups of all ranks ever started
        self._streams: List[Stream] = []
        self._escalation: List[Tuple[float, int]] = []  # (when, signal), in order of time
        self._result: Optional[int] = None             # exit code, once a failure has decided it
        self._selector = selectors.DefaultSelector()
        self._timeout_at = time.monotonic() + options.timeout

    def run(self) -> int:
        """Starts the ranks and waits until nothing of them is left. Returns the exit code."""
        processes.adopt_orphans()
        reader, writer = socket.socketpair()
        for sock in (reader, writer):
            sock.setblocking(False)
        self._selector.register(reader, selectors.EVENT_READ)
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        previous = {number: signal.signal(number, lambda *_: None) for number in _HANDLED}
        name, job = f"unix:@commlib-{os.getpid()}-{secrets.token_hex(8)}", secrets.token_hex(16)
        server = Server(listen(name), job, "commrun", explain_s=EXPLAIN_S, secret=Secret(self._secret))
        guard = processes.start_guard()
        try:
            self._start_all(name, job, guard)
            while self._ranks:
                self._turn(reader, server)
            self._sweep(reader, guard)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            server.close()
            self._selector.close()
            for sock in (reader, writer):
                sock.close()
        return self._result or 0

    # ---- start ----

    def _start_all(self, store: str, job: str, guard: subprocess.Popen) -> None:
        for rank in range(self._size):
            try:
                pid = self._start(rank, self._variables(rank, store, job))
            except OSError as error:
                self._say(f"cannot start rank {rank}: {error}; start fewer ranks, or raise ulimit -u and ulimit -n")
                self._stop(1, (signal.SIGKILL, 0.0))
                return
            self._ranks[pid] = rank
            self._groups.append(pid)
            with contextlib.suppress(BrokenPipeError):  # without a guard the ranks still die with us
                guard.stdin.write(b"%d\n" % pid)
                guard.stdin.flush()
            if self._options.verbose:
                self._say(f"rank {rank} is pid {pid}: {' '.join(self._options.command)}")

    def _variables(self, rank: int, store: str, job: str) -> Dict[str, str]:
        """The environment of a rank."""
        cores = len(os.sched_getaffinity(0))
        environ = {"OMP_NUM_THREADS": str(max(1, cores // self._size))}
        if self._captures:
            environ["PYTHONUNBUFFERED"] = "1"
        environ.update(self._environ)
        if self._options.start_timeout is not None:
            environ["COMMLIB_START_TIMEOUT_S"] = repr(self._options.start_timeout)
        if self._options.settings is not None:
            environ["COMMLIB_SETTINGS"] = os.path.abspath(self._options.settings)
        placement = {"RANK": rank, "SIZE": self._size, "LOCAL_RANK": rank, "LOCAL_SIZE": self._size, "CROSS_RANK": 0,
                     "CROSS_SIZE": 1, "STORE": store, "STORE_OWNER": "commrun", "JOB": job, "SECRET": self._secret}
        environ.update({f"COMMLIB_{name}": str(value) for name, value in placement.items()})
        return environ

    @property
    def _labels(self) -> bool:
        return self._options.prefix_output or self._options.prefix_output_with_timestamp

    @property
    def _captures(self) -> bool:
        """Whether output passes through commrun; otherwise ranks have its stdout and stderr themselves."""
        return self._labels or self._options.output_filename is not None

    def _start(self, rank: int, environ: Dict[str, str]) -> int:
        stdin = None if rank == 0 else subprocess.DEVNULL
        if not self._captures:
            return processes.start(self._options.command, environ, stdin, None, None)
        writers = [self._capture(rank, name, terminal.buffer)
                   for name, terminal in (("stdout", sys.stdout), ("stderr", sys.stderr))]
        try:
            return processes.start(self._options.command, environ, stdin, *writers)
        finally:
            for writer in writers:
                os.close(writer)

    def _capture(self, rank: int, name: str, terminal) -> int:
        """Opens a pipe for one of a rank's outputs; returns its write end."""
        copy = None
        if self._options.output_filename is not None:
            folder = os.path.join(self._options.output_filename, f"rank.{rank:0{len(str(self._size - 1))}d}")
            os.makedirs(folder, exist_ok=True)
            copy = open(os.path.join(folder, name), "wb", buffering=0)
        reader, writer = os.pipe()
        label = f"[{rank}] " if self._labels else ""
        stream = Stream(reader, label, self._options.prefix_output_with_timestamp, terminal, copy)
        self._streams.append(stream)
        self._selector.register(reader, selectors.EVENT_READ, stream)
        return writer

    # ---- watch ----

    def _turn(self, reader: socket.socket, server: Optional[Server]) -> None:
        """Waits for one batch of signals, output or deadlines, and handles it."""
        deadline = min([self._timeout_at] + [when for when, _ in self._escalation[:1]])
        timeout_s = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        signals = set()
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is reader:
                signals |= set(reader.recv(4096))
            elif key.data.pump() == ENDED:
                self._close(key.data)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number in signals:
                self._interrupt(number)
        self._reap(server)
        self._escalate()

    def _reap(self, server: Optional[Server]) -> None:
        # several that ended before we looked: whoever was killed has hardly failed because of the others
        for pid, status in sorted(processes.reap(), key=lambda ended: not os.WIFSIGNALED(ended[1])):
            rank = self._ranks.pop(pid, None)
            if rank is not None:
                self._ended(rank, pid, status, server)

    def _ended(self, rank: int, pid: int, status: int, server: Optional[Server]) -> None:
        text = f"rank {rank} (pid {pid}) {processes.describe(status)}"
        if server is not None:
            server.rank_ended(rank, text)
        if status != 0 and self._result is None:
            self._say(text)
            self._stop(processes.exit_code(status), (signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S + TERMINATE_S))
        elif self._options.verbose:
            self._say(text)

    def _interrupt(self, number: int) -> None:
        """Passes Ctrl-C and the like on to the ranks. Each further one takes the next, harder step at once."""
        if self._result is not None and self._escalation:
            self._escalation = [(time.monotonic(), self._escalation[0][1])] + self._escalation[1:]
            return
        self._say(f"stopping on {signal.Signals(number).name}")
        self._stop(128 + number, (number, 0.0), (signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S + TERMINATE_S))

    def _stop(self, code: int, *signals: Tuple[int, float]) -> None:
        """Decides the exit code, and which signals the ranks get when, in seconds from now."""
        self._result = code
        now = time.monotonic()
        self._escalation = [(now + after_s, number) for number, after_s in signals]

    def _escalate(self) -> None:
        now = time.monotonic()
        if now >= self._timeout_at:
            self._timeout_at = float("inf")
            if self._result is None:
                self._say(f"stopping: the job still runs after {self._options.timeout:g} s (--timeout)")
                self._stop(TIMED_OUT, (signal.SIGTERM, 0.0), (signal.SIGKILL, TERMINATE_S))
        while self._escalation and self._escalation[0][0] <= now:
            _, number = self._escalation.pop(0)
            for group in self._groups:
                processes.signal_group(group, number)

    # ---- end ----

    def _sweep(self, reader: socket.socket, guard: subprocess.Popen) -> None:
        """Ends what the ranks have left behind: orphans are our children now, so without children nothing is left."""
        for stream in list(self._streams):
            while stream.pump() > 0:
                pass
            self._close(stream)
        guard.kill()
        guard.wait()
        guard.stdin.close()
        number, deadline = signal.SIGTERM, time.monotonic() + TERMINATE_S
        left = processes.children()
        while left:
            for pid in left:
                processes.signal_process(pid, number)
            self._selector.select(0.1)  # SIGCHLD ends it early
            _drain(reader)
            for _ in processes.reap():
                pass
            if time.monotonic() >= deadline:
                number = signal.SIGKILL
            left = processes.children()

    def _close(self, stream: Stream) -> None:
        self._selector.unregister(stream.pipe)
        self._streams.remove(stream)
        stream.close()

    def _say(self, text: str) -> None:
        print(f"commrun: {text}", file=sys.stderr, flush=True)


def _drain(reader: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        reader.recv(4096)
