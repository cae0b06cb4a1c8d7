"""A job on this host: N rank processes, the store where they meet, and what happens when one of them fails.

A single loop waits for signals and output; nothing polls.
"""
from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import time
from typing import Dict, List, Optional, Tuple

from commlib.launch import environment, processes
from commlib.launch.caller import DESCRIPTOR, Caller, file_of
from commlib.launch.cores import share
from commlib.launch.loop import Loop
from commlib.launch.output import say, terminal_of
from commlib.launch.ranks import Ranks, firmly, gently
from commlib.rendezvous import listen
from commlib.rendezvous_server import Server
from commlib.secret import VARIABLE, Secret, new_secret

EXPLAIN_S = 0.5       # the store waits this long for the reason why a rank's connection broke
TIMED_OUT = 124       # exit code of timeout(1)


class Job:
    """Runs once. Must be made in the main thread of a process that has no other children."""

    def __init__(self, options: argparse.Namespace, environ: Dict[str, str], caller: Optional[Caller] = None):
        self._options, self._environ, self._caller = options, environ, caller
        self._size = options.size
        self._secret = new_secret()
        self._result: Optional[int] = None             # exit code, once a failure has decided it
        self._timeout_at = time.monotonic() + options.timeout
        self._server: Optional[Server] = None

    def run(self) -> int:
        """Starts the ranks and waits until nothing of them is left. Returns the exit code."""
        with Loop(self._interrupt) as loop:
            name, job = f"unix:@commlib-{os.getpid()}-{secrets.token_hex(8)}", secrets.token_hex(16)
            self._server = Server(listen(name), job, "commrun", explain_s=EXPLAIN_S, secret=Secret(self._secret))
            try:
                self._ranks = Ranks(loop, self._ended)
                if self._caller is not None:
                    self._caller.watch(loop, lambda: self._stop(1, firmly()))
                self._start_all(name, job)
                while self._ranks.running:
                    loop.turn(min(self._timeout_at, self._ranks.deadline))
                    self._ranks.tend()
                    self._look_at_the_clock()
                self._ranks.finish()
            finally:
                self._server.close()
        return self._result or 0

    # ---- start ----

    def _start_all(self, store: str, job: str) -> None:
        for rank in range(self._size):
            environ = {**environment.of_rank(self._environ, rank, self._size, rank, self._size, 0, 1, store, job, self._captures),
                       VARIABLE: self._secret}
            stdin = self._stdin(rank)
            cores = share(os.sched_getaffinity(0), rank, self._size) if self._options.bind_to_cores else ()
            try:
                pid = self._ranks.start(rank, self._options.command, environ, stdin, self._sinks(rank), cores)
            except OSError as error:
                say(f"cannot start rank {rank}: {error}; start fewer ranks, or raise ulimit -u and ulimit -n")
                self._stop(1, [(signal.SIGKILL, 0.0)])
                return
            finally:
                if self._caller is not None:
                    os.close(stdin)
            if self._options.verbose:
                say(f"rank {rank} is pid {pid}: {' '.join(self._options.command)}")

    @property
    def _captures(self) -> bool:
        """Whether output passes through commrun; otherwise ranks have its stdout and stderr themselves."""
        options = self._options
        return options.prefix_output or options.prefix_output_with_timestamp or options.output_filename is not None

    def _stdin(self, rank: int):
        if self._caller is not None:
            return file_of(self._caller.call)
        return None if rank == 0 else subprocess.DEVNULL

    def _sinks(self, rank: int) -> List[Tuple]:
        sinks: List[Tuple] = []
        if self._captures:
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                terminal = terminal_of(self._options, rank, self._size, name)
                sinks.append((descriptor, terminal.write, terminal.close))
        if self._caller is not None:
            sinks.append((DESCRIPTOR, lambda data: self._caller.take(rank, data), lambda: None))
        return sinks

    # ---- watch ----

    def _ended(self, rank: int, pid: int, status: int) -> None:
        text = f"rank {rank} (pid {pid}) {processes.describe(status)}"
        self._server.rank_ended(rank, text)
        if status != 0 and self._result is None:
            say(text)
            if self._caller is not None:
                self._caller.failed(text, rank)
            self._stop(processes.exit_code(status), gently())
        elif self._options.verbose:
            say(text)

    def _interrupt(self, number: int) -> None:
        """Passes Ctrl-C and the like on to the ranks. Each further one takes the next, harder step at once."""
        if self._result is not None and self._ranks.deadline < float("inf"):
            self._ranks.hurry()
            return
        say(f"stopping on {signal.Signals(number).name}")
        self._stop(128 + number, gently(number))

    def _stop(self, code: int, signals: List[Tuple[int, float]]) -> None:
        """Decides the exit code, and which signals the ranks get when, in seconds from now."""
        self._result = code
        self._ranks.stop(signals)

    def _look_at_the_clock(self) -> None:
        if time.monotonic() < self._timeout_at:
            return
        self._timeout_at = float("inf")
        if self._result is None:
            say(f"stopping: the job still runs after {self._options.timeout:g} s (--timeout)")
            self._stop(TIMED_OUT, firmly())
