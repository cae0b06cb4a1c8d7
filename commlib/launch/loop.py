"""One loop that waits for descriptors, signals and a moment, and calls who is registered. Nothing here polls."""
from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from typing import Callable, Set

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the user, or the system, wants the job to end


class Loop:
    """A context manager, in the main thread: inside it signals interrupt nothing, they are told to `interrupted`.

    Args:
        interrupted: gets the number of each of STOPPING that came.
        ignored: signals that shall have no effect meanwhile.
    """

    def __init__(self, interrupted: Callable[[int], None], ignored: tuple = ()):
        self._interrupted, self._ignored = interrupted, ignored
        self._selector = selectors.DefaultSelector()
        self._previous: dict = {}

    def __enter__(self) -> "Loop":
        self._reader, self._writer = socket.socketpair()
        for sock in (self._reader, self._writer):
            sock.setblocking(False)
        self._selector.register(self._reader, READ)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, *STOPPING, *self._ignored):  # SIG_IGN would be inherited by programs that we start
            self._previous[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._selector.close()
        for sock in (self._reader, self._writer):
            sock.close()

    def watch(self, source, handler: Callable[[int], None], events: int = READ) -> None:
        """Calls handler(events) whenever `source` (a descriptor, or what has one) is ready; again: changes the events."""
        try:
            self._selector.modify(source, events, handler)
        except KeyError:
            self._selector.register(source, events, handler)

    def unwatch(self, source) -> None:
        """Forgets a source; one that is not watched is nothing to complain of."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(source)

    def turn(self, deadline: float) -> Set[int]:
        """Waits, until the deadline on time.monotonic(), for one batch of events and handles it; returns signals that came."""
        timeout_s = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        signals: Set[int] = set()
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._reader:
                signals |= set(self._drain())
            else:
                key.data(events)
        for number in STOPPING:
            if number in signals:
                self._interrupted(number)
        return signals

    def _drain(self) -> bytes:
        try:
            return self._reader.recv(4096)
        except BlockingIOError:
            return b""
