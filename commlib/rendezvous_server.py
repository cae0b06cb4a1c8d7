"""The rendezvous store: a key-value server where the ranks of a job meet, one room per initialisation.

Runs as a thread of commrun or of rank 0, and lives only as long as ranks start. It knows sockets and who has come; it
does not know what the values mean. Its second duty is bad news: once something is wrong in a room (a rank lost, two
versions, two processes with one rank), everybody who is in it or comes later is told the same sentence.
"""
from __future__ import annotations

import collections
import contextlib
import errno
import hmac
import os
import selectors
import socket
import struct
import threading
import time
from typing import Callable, Optional

from commlib.rendezvous_wire import (
    MAX_HEADER_NBYTES, MAX_HELLO_NBYTES, MAX_VALUE_NBYTES, PROTOCOL, Decoder, Hello, Message, WireError, encode,
    hello_of, spell_ranks,
)  # fmt: skip

MAX_KEYS = 1 << 20  # of one room: some 16 per rank are used
_READ_NBYTES = 1 << 16

# What all ranks must agree in: field, what it is, what to do about it.
_AGREE = (
    ("protocol", "rendezvous protocol", "install the same commlib on every host"),
    ("version", "commlib version", "install the same commlib on every host"),
    ("size", "number of ranks", "start all ranks with one launcher command"),
)


class _Connection:
    """One client: its socket, what it has said so far, and who it is once it has said hello."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.decoder = Decoder(MAX_HELLO_NBYTES)
        self.outbox = bytearray()
        self.hello: Optional[Hello] = None
        self.room: Optional[_Room] = None
        self.closing = False  # to be closed as soon as the outbox is empty

    def tell(self, header: dict, payload: bytes = b"") -> None:
        self.outbox += encode(header, payload)


class _Wait:
    """A client's unanswered request for keys."""

    def __init__(self, connection: _Connection, keys: list, timeout_s: float):
        self.connection = connection
        self.keys = keys
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s


class _Room:
    """One generation: who has come, what was set, who waits. Knows no sockets."""

    def __init__(self, first: Hello):
        self.first = first
        self.size = first.size
        self.present: dict = {}   # rank -> connection
        self.came: dict = {}      # rank -> hello; never forgotten
        self.left: set = set()
        self.told: set = set()    # ranks that know of the failure
        self.values: dict = {}
        self.waits: list = []
        self.suspects: dict = {}  # rank -> when its broken connection counts as its death
        self.failure: Optional[dict] = None

    @property
    def finished(self) -> bool:
        return len(self.left) == self.size

    @property
    def settled(self) -> bool:
        """Nobody who still has to be told anything can come."""
        return self.finished or (self.failure is not None and len(self.told) == self.size)

    def enter(self, hello: Hello, connection: _Connection) -> None:
        self.complain_of(hello)
        if self.failure is None:
            self.came[hello.rank] = hello
            self.present[hello.rank] = connection
        else:
            self.told.add(hello.rank)
            connection.tell(self.failure)

    def complain_of(self, hello: Hello) -> None:
        """Fails the room if this newcomer does not fit to those who came before."""
        for name, noun, advice in _AGREE:
            theirs, ours = getattr(hello, name), getattr(self.first, name)
            if theirs != ours:
                self.fail(None, f"the ranks differ in {noun}: {self.first.who()} has {ours}, {hello.who()} has "
                                f"{theirs}; {advice}")
                return
        other = self.came.get(hello.rank)
        if other is not None:
            self.fail(hello.rank, f"two processes say that they are rank {hello.rank} of {hello.size}: pid {other.pid} "
                                  f"on {other.host} and pid {hello.pid} on {hello.host}; start every rank once")

    def fail(self, rank: Optional[int], text: str) -> None:
        """The first failure is the one that everybody hears."""
        if self.failure is not None:
            return
        self.failure = {"op": "failed", "rank": rank, "text": text}
        self.waits.clear()
        self.told.update(self.came)
        if rank is not None:
            self.told.add(rank)
        for connection in self.present.values():
            connection.tell(self.failure)

    def set(self, key: str, value: bytes) -> None:
        if len(self.values) >= MAX_KEYS and key not in self.values:
            raise WireError(f"more than {MAX_KEYS} keys")
        self.values[key] = value
        self.waits = [wait for wait in self.waits if not self.answer(wait)]

    def answer(self, wait: _Wait) -> bool:
        """Answers a request if all its keys are there."""
        if any(key not in self.values for key in wait.keys):
            return False
        values = [self.values[key] for key in wait.keys]
        wait.connection.tell({"op": "values", "lengths": [len(value) for value in values]}, b"".join(values))
        return True

    def expire(self, now: float) -> None:
        """Answers requests that have waited too long, and believes broken connections that nobody has explained."""
        for wait in [wait for wait in self.waits if wait.deadline <= now]:
            self.waits.remove(wait)
            wait.connection.tell({"op": "late", "rank": self._blame(), "text": self._late(wait)})
        for rank in [rank for rank, deadline in self.suspects.items() if deadline <= now]:
            del self.suspects[rank]
            self.fail(rank, f"{self.came[rank].who()} was lost while the job started: its connection closed, so it "
                            "died or was killed; see its own output")

    def next_deadline(self) -> float:
        return min([wait.deadline for wait in self.waits] + list(self.suspects.values()), default=float("inf"))

    def _missing(self) -> list:
        return [rank for rank in range(self.size) if rank not in self.came]

    def _blame(self) -> Optional[int]:
        missing = self._missing()
        return missing[0] if len(missing) == 1 else None

    def _late(self, wait: _Wait) -> str:
        missing = self._missing()
        if missing:
            return (
                f"waited {wait.timeout_s:.3g} s, and rank {spell_ranks(missing)} of {self.size} has not come: it was "
                "not started, died before it called init(), or cannot reach this host; give slow starts more time with "
                "COMMLIB_START_TIMEOUT_S"
            )
        keys = [key for key in wait.keys if key not in self.values]
        return f"waited {wait.timeout_s:.3g} s for {', '.join(keys[:4])}: all ranks came, but one is stuck before it"


class Server:
    """The store, listening and answering in a thread of its own from the moment it is made.

    Args:
        listener: a listening socket; the server owns it from here on.
        job: clients of another job are refused.
        owner: in whose process the server runs ("commrun", "rank 0"), for messages.
        generation: the only generation that is served; None: all of them, each in its own room.
        explain_s: how long a broken connection waits for `rank_ended` to say why, before it counts as a death.
    """

    def __init__(self, listener: socket.socket, job: str, owner: str, generation: Optional[int] = None,
                 explain_s: float = 0.0):
        self._job, self._owner, self._generation, self._explain_s = job, owner, generation, explain_s
        self._listener = listener
        self._rooms: dict = {}   # generation -> room
        self._finished = 0       # all generations up to here are over: ranks leave one before they enter the next
        self._ended: dict = {}   # rank -> why its process is gone
        self._orders: collections.deque = collections.deque()
        self._running = True
        self.settled = threading.Event()  # a room is over: all have left it, or all know why it failed
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        self._selector = selectors.DefaultSelector()
        for sock in (listener, self._wake_reader):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="commlib-rendezvous", daemon=True)
        self._thread.start()

    def rank_ended(self, rank: int, why: str) -> None:
        """Tells every rank that still starts, now or later, that this one's process is gone: "exited with code 3"."""
        self._order(lambda: self._rank_ended(rank, why))

    def close(self) -> None:
        """Stops at once and closes every connection. Idempotent."""
        if self._thread.is_alive():
            self._order(self._stop)
            self._thread.join()
        self._wake_writer.close()

    def _order(self, order: Callable) -> None:
        self._orders.append(order)
        with contextlib.suppress(OSError):  # the thread has ended, or has been woken often enough already
            self._wake_writer.send(b"x")

    # ---- the server's own thread ----

    def _stop(self) -> None:
        self._running = False

    def _rank_ended(self, rank: int, why: str) -> None:
        self._ended[rank] = why
        for room in self._rooms.values():
            connection = room.present.get(rank)
            while connection is not None and self._read(connection):
                pass  # its last words, perhaps a goodbye, may still lie in the socket
            self._blame_ended(room)

    def _blame_ended(self, room: _Room) -> None:
        for rank, why in self._ended.items():
            if rank not in room.left:
                room.suspects.pop(rank, None)
                room.fail(rank, f"{why} while the job started")

    def _run(self) -> None:
        try:
            while self._running:
                self._turn()
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()
            self._selector.close()
            self.settled.set()

    def _turn(self) -> None:
        deadline = min((room.next_deadline() for room in self._rooms.values()), default=float("inf"))
        timeout_s = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wake_reader:
                self._wake_reader.recv(_READ_NBYTES)
                while self._orders:
                    self._orders.popleft()()
            elif events & selectors.EVENT_READ:
                self._read(key.data)
        for room in self._rooms.values():
            room.expire(time.monotonic())
        self._flush()
        self._forget_settled()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # the client stays in the queue; without descriptors there is nothing better to do
            return
        if sock.family == socket.AF_UNIX and _peer_uid(sock) not in (0, os.getuid()):
            sock.close()  # another user: abstract sockets have no file permissions
            return
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, _Connection(sock))

    def _read(self, connection: _Connection) -> bool:
        """Hears what has come. Returns False if nothing has, or the connection is closed."""
        try:
            data = connection.sock.recv(_READ_NBYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return False
        connection.decoder.feed(data)
        try:
            message = connection.decoder.next()
            while message is not None and not connection.closing:
                self._hear(connection, message)
                message = connection.decoder.next()
        except WireError as error:
            connection.tell({"op": "refused", "text": f"not understood by the store of {self._owner}: {error}"})
            connection.closing = True
        return not connection.closing

    def _hear(self, connection: _Connection, message: Message) -> None:
        if connection.hello is None:
            self._greet(connection, hello_of(message.header))
            return
        handlers = {"set": self._set, "get": self._get, "fail": self._fail, "bye": self._bye}
        handler = handlers.get(message.header["op"])
        if handler is None:
            raise WireError(f"unknown op {message.header['op'][:32]!r}")
        if connection.room.failure is None or handler is self._bye:
            handler(connection, message)

    def _greet(self, connection: _Connection, hello: Hello) -> None:
        reply = self._door(hello)
        connection.tell(reply)
        if reply["op"] != "welcome":
            connection.closing = True
            return
        connection.hello = hello
        connection.decoder.max_nbytes = MAX_HEADER_NBYTES + MAX_VALUE_NBYTES
        room = connection.room = self._rooms.setdefault(hello.generation, _Room(hello))
        room.enter(hello, connection)
        self._blame_ended(room)

    def _door(self, hello: Hello) -> dict:
        """The answer to a hello: welcome, retry (too early) or refused."""
        if not hmac.compare_digest(hello.job.encode(), self._job.encode()):
            return {"op": "refused", "text": f"this is the store of another job (it belongs to {self._owner})"}
        wanted = hello.generation
        if self._generation is not None and wanted > self._generation:
            return {"op": "retry", "text": f"{self._owner} is still at initialisation {self._generation}"}
        if wanted <= self._finished or (self._generation is not None and wanted < self._generation):
            text = f"initialisation {wanted} of this job is over, and {hello.who()} comes now: "
            return {"op": "refused", "text": text + "every rank must call init() and shutdown() equally often"}
        return {"op": "welcome", "protocol": PROTOCOL, "owner": self._owner}

    def _set(self, connection: _Connection, message: Message) -> None:
        connection.room.set(_key(message.header.get("key")), message.payload)

    def _get(self, connection: _Connection, message: Message) -> None:
        keys, timeout_s = message.header.get("keys"), message.header.get("timeout_s")
        if not isinstance(keys, list) or not isinstance(timeout_s, (int, float)):
            raise WireError("a get without keys or timeout_s")
        wait = _Wait(connection, [_key(key) for key in keys], timeout_s)
        if not connection.room.answer(wait):
            connection.room.waits.append(wait)

    def _fail(self, connection: _Connection, message: Message) -> None:
        connection.room.fail(connection.hello.rank, f"{connection.hello.who()} could not start: "
                                                    f"{str(message.header.get('text'))[:4000]}")

    def _bye(self, connection: _Connection, message: Message) -> None:
        connection.room.left.add(connection.hello.rank)
        self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        """Closes a connection; one that broke without a goodbye makes its rank a suspect."""
        if connection.sock.fileno() < 0:
            return
        self._selector.unregister(connection.sock)
        connection.sock.close()
        connection.closing = True
        room = connection.room
        if room is None or room.present.get(connection.hello.rank) is not connection:
            return
        rank = connection.hello.rank
        del room.present[rank]
        room.waits = [wait for wait in room.waits if wait.connection is not connection]
        if rank not in room.left:
            room.suspects[rank] = time.monotonic() + self._explain_s

    def _flush(self) -> None:
        connections = [key.data for key in self._selector.get_map().values() if key.data is not None]
        for connection in connections:
            try:
                if connection.outbox:
                    del connection.outbox[:connection.sock.send(connection.outbox)]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self._drop(connection)
                continue
            if connection.closing and not connection.outbox:
                self._drop(connection)
                continue
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outbox else 0)
            self._selector.modify(connection.sock, wanted, connection)

    def _forget_settled(self) -> None:
        for generation, room in list(self._rooms.items()):
            if room.settled and not room.present:
                self._finished = max(self._finished, generation)
                del self._rooms[generation]
                self.settled.set()


def _key(key: object) -> str:
    if not isinstance(key, str) or not 0 < len(key) <= 256:
        raise WireError("a key must be a text of 1 to 256 characters")
    return key


def _peer_uid(sock: socket.socket) -> int:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]
