"""Sockets between ranks, opened and checked: both sides say who they are and prove that they belong to the job.

Works alike for TCP and for Unix sockets, where each side may send descriptors with its hello. Strangers that reach the
listener are closed and disturb nobody. Knows no store keys and no addresses; who connects to whom is the caller's
choice.
"""
from __future__ import annotations

import array
import os
import selectors
import socket
import struct
import time
from typing import Dict, List, NamedTuple, Sequence, Set

from commlib.bootstrap import StartError
from commlib.rendezvous_wire import spell_ranks

TOKEN_NBYTES = 16
NEWS_S = 2.0  # how long the store gets to say why a peer hung up, before this rank guesses
_MAGIC = b"clhs"
_HELLO = struct.Struct(f"!4s{TOKEN_NBYTES}sII")  # magic, the job's token, from rank, to rank
_MAX_DESCRIPTORS = 8


class Shaken(NamedTuple):
    """A checked connection and the descriptors that came with the peer's hello; all owned by the receiver."""

    sock: socket.socket
    descriptors: List[int]

    def close(self) -> None:
        self.sock.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


class _Half:
    """A connection whose hello has not come in full. `peer` is -1 until a caller has said who it is."""

    def __init__(self, sock: socket.socket, peer: int = -1):
        self.sock, self.peer = sock, peer
        self.received = b""
        self.descriptors: List[int] = []

    def close(self) -> None:
        Shaken(self.sock, self.descriptors).close()


def shake(store, token: bytes, listener, outgoing: Dict[int, socket.socket], incoming: Set[int], deadline: float,
          descriptors: Sequence[int] = ()) -> Dict[int, Shaken]:
    """Exchanges hellos with every peer.

    Args:
        store: its news end the wait at once.
        token: secret of the job, `TOKEN_NBYTES` long.
        listener: where the `incoming` peers connect; stays the caller's.
        outgoing: sockets connected to peers that listen; ownership passes to this function.
        incoming: peers that will connect to the listener.
        deadline: on time.monotonic().
        descriptors: sent along to every peer (Unix sockets only).
    Returns:
        A connection for every peer, non-blocking.
    Raises:
        StartError: a peer was lost, or did not come until the deadline. Everything is closed then.
    """
    shaking = _Shaking(store, token, listener, set(incoming), descriptors)
    try:
        for peer in list(outgoing):
            shaking.begin(_Half(outgoing.pop(peer), peer))
        store.check()  # bad news may have been read already, together with an answer: no selector reports that
        while shaking.waiting:
            shaking.turn(deadline)
    except BaseException:
        shaking.close_all()
        raise
    finally:
        for sock in outgoing.values():
            sock.close()
        shaking.close()
    return shaking.done


class _Shaking:
    def __init__(self, store, token: bytes, listener, incoming: Set[int], descriptors: Sequence[int]):
        self.store, self.token, self.descriptors = store, token, list(descriptors)
        self.listener, self.incoming = listener, incoming
        self.calling: Set[int] = set()  # peers that we connected to and that have not answered
        self.done: Dict[int, Shaken] = {}
        self.halves: Set[_Half] = set()
        self.hung_up = ""
        self.news_deadline = float("inf")
        self.selector = selectors.DefaultSelector()
        if store.fileno() >= 0:
            self.selector.register(store, selectors.EVENT_READ)
        if incoming:
            listener.setblocking(False)
            self.selector.register(listener, selectors.EVENT_READ)

    @property
    def waiting(self) -> bool:
        return bool(self.calling or self.incoming)

    def begin(self, half: _Half) -> None:
        self.halves.add(half)
        half.sock.setblocking(False)
        self.selector.register(half.sock, selectors.EVENT_READ, half)
        if half.peer >= 0:
            self.calling.add(half.peer)
            self.greet(half)

    def greet(self, half: _Half) -> None:
        """Says hello. It is far smaller than any socket's buffer, so it cannot block."""
        hello = _HELLO.pack(_MAGIC, self.token, self.store.rank, half.peer)
        try:
            if self.descriptors:
                socket.send_fds(half.sock, [hello], self.descriptors)
            else:
                half.sock.send(hello)
        except OSError as error:
            self.lose(half, str(error))

    def turn(self, deadline: float) -> None:
        """Waits for one batch of events and handles it."""
        now = time.monotonic()
        if now >= min(deadline, self.news_deadline):
            missing = sorted(self.calling | self.incoming)
            reason = self.hung_up or "no answer until the time-out"
            text = f"rank {self.store.rank} could not connect to rank {spell_ranks(missing)}: {reason}"
            raise StartError(text, rank=missing[0])
        for key, _ in self.selector.select(min(deadline, self.news_deadline) - now):
            if key.fileobj is self.store:
                self.store.check()
            elif key.fileobj is self.listener:
                self.accept()
            else:
                self.read(key.data)

    def accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        self.begin(_Half(sock))

    def read(self, half: _Half) -> None:
        try:
            data = self.receive(half)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.lose(half, str(error))
            return
        half.received += data
        if not data:
            self.lose(half, "it closed the connection")
        elif len(half.received) == _HELLO.size:
            self.judge(half)

    def receive(self, half: _Half) -> bytes:
        """The next bytes of the hello and not one more: what follows belongs to the connection's owner."""
        nbytes = _HELLO.size - len(half.received)
        if half.sock.family != socket.AF_UNIX:
            return half.sock.recv(nbytes)
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        data, ancillary, _, _ = half.sock.recvmsg(nbytes, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[:len(content) - len(content) % numbers.itemsize])
                half.descriptors += numbers
        return data

    def judge(self, half: _Half) -> None:
        magic, token, sender, target = _HELLO.unpack(half.received)
        genuine = magic == _MAGIC and token == self.token and target == self.store.rank
        called = half.peer >= 0
        if not genuine or (sender != half.peer if called else sender not in self.incoming):
            self.lose(half, "something that is not this job's rank answers at its address")
            return
        (self.calling if called else self.incoming).discard(sender)
        self.selector.unregister(half.sock)
        self.halves.discard(half)
        self.done[sender] = Shaken(half.sock, half.descriptors)
        if not called:
            half.peer = sender
            self.greet(half)

    def lose(self, half: _Half, reason: str) -> None:
        """A stranger is forgotten. A peer's death the store knows better, so it gets a moment to tell."""
        if half in self.halves:
            self.selector.unregister(half.sock)
            self.halves.discard(half)
            half.close()
        if half.peer >= 0:
            self.hung_up = self.hung_up or reason
            self.news_deadline = min(self.news_deadline, time.monotonic() + NEWS_S)

    def close_all(self) -> None:
        for connection in self.done.values():
            connection.close()

    def close(self) -> None:
        self.selector.close()
        for half in self.halves:
            half.close()
