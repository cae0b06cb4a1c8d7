"""Connecting to a process that may have several addresses, of which some may lead nowhere.

All addresses are tried in order; a slow one is not waited for before the next is tried beside it (RFC 8305, "happy
eyeballs"), and the first that connects is taken. Knows sockets, and nothing of ranks.
"""
from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)  # of errors: this process cannot go on, and trying again would not help

_PATIENCE_S = 0.25  # RFC 8305, section 8: the recommended Connection Attempt Delay
_LONGEST_S = 10.0   # for one address: Linux sends the third SYN after 3 s, the fourth after 7 s


class Place(NamedTuple):
    """A socket address: family and what connect() takes."""

    family: int
    address: tuple

    def __str__(self) -> str:
        return f"{self.address[0]} port {self.address[1]}"


class Unreachable(OSError):
    """No address answers; the text names each that was tried, and what happened."""


def resolve(host: str, port: int) -> List[Place]:
    """The addresses of a name, in the system's order of preference (RFC 6724). Raises OSError if it has none.

    Args:
        host: a name, an IPv4 or IPv6 address; link-local ones with their interface, ``fe80::1%eth0``.
    Example:
        >>> str(resolve("127.0.0.1", 80)[0])
        '127.0.0.1 port 80'
    """
    return list(dict.fromkeys(Place(family, where) for family, _, _, _, where in
                              socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


def dial(places: Sequence[Place], deadline: float, news: Optional[object] = None,
         on_news: Callable[[], None] = lambda: None) -> socket.socket:
    """Connects to the first place that answers.

    Args:
        places: where to try, best first.
        deadline: on time.monotonic(); one place gets at most 10 s.
        news: something with a fileno (or -1 for none) that may become readable meanwhile.
        on_news: called then; what it raises ends the attempt.
    Returns:
        A connected, non-blocking socket with TCP_NODELAY.
    Raises:
        Unreachable: none answers.
    """
    dialling = _Dialling(places, deadline)
    try:
        if news is not None and news.fileno() >= 0:
            dialling.selector.register(news, selectors.EVENT_READ)
        while dialling.connected is None:
            dialling.turn(on_news)
        return dialling.connected
    finally:
        dialling.close()


class _Dialling:
    def __init__(self, places: Sequence[Place], deadline: float):
        self.waiting, self.deadline = list(places), deadline
        self.trying: Dict[socket.socket, Tuple[Place, float]] = {}
        self.reasons: List[str] = []
        self.connected: Optional[socket.socket] = None
        self.next_at = time.monotonic()
        self.selector = selectors.DefaultSelector()

    def turn(self, on_news: Callable[[], None]) -> None:
        """Begins what is due, gives up what is late, and waits for the next event."""
        now = time.monotonic()
        if self.waiting and (now >= self.next_at or not self.trying):
            self.begin(self.waiting.pop(0), now)
        for sock in [sock for sock, (_, late) in self.trying.items() if now >= late]:
            self.give_up(sock, "no answer")
        if not self.trying:
            if not self.waiting:
                raise Unreachable("; ".join(self.reasons) or "it has no address")
            return
        until = min([late for _, late in self.trying.values()] + [self.next_at] * bool(self.waiting))
        for key, _ in self.selector.select(max(0.0, until - now)):
            if key.fileobj in self.trying:
                self.finish(key.fileobj)
            else:
                on_news()

    def begin(self, place: Place, now: float) -> None:
        self.next_at = now + _PATIENCE_S
        try:
            sock = socket.socket(place.family, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                raise
            self.reasons.append(f"{place}: {error.strerror}")
            return
        sock.setblocking(False)
        self.trying[sock] = place, max(now, min(self.deadline, now + _LONGEST_S))
        self.selector.register(sock, selectors.EVENT_WRITE)
        code = sock.connect_ex(place.address)
        if code not in (0, errno.EINPROGRESS):
            self.give_up(sock, os.strerror(code))

    def finish(self, sock: socket.socket) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.give_up(sock, os.strerror(code))
        elif sock.getsockname() == sock.getpeername():
            self.give_up(sock, "nobody listens there")  # a free local port of the ephemeral range can find itself
        elif self.connected is None:
            self.selector.unregister(sock)
            del self.trying[sock]
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connected = sock

    def give_up(self, sock: socket.socket, reason: str) -> None:
        place, _ = self.trying.pop(sock)
        self.reasons.append(f"{place}: {reason}")
        self.selector.unregister(sock)
        sock.close()
        self.next_at = 0.0

    def close(self) -> None:
        self.selector.close()
        for sock in self.trying:
            sock.close()
