"""The rendezvous store: a key-value server where the ranks of a job meet, one room per initialisation.

Runs as a thread of commrun or of rank 0, and lives only as long as ranks start. It knows sockets and who is at the other
end; what happens in a room is rendezvous_room.py's. A caller proves first that it holds the job's secret (proof.py): until
then nothing that it sends is looked at, and nothing is told but random bytes.
"""
from __future__ import annotations

import collections
import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from typing import Callable, Optional

from commlib.dial import OUT_OF_DESCRIPTORS
from commlib.proof import PROOF_NBYTES, THE_STORE, Claim, Listening, Strangers
from commlib.rendezvous_room import Room, Wait
from commlib.rendezvous_wire import (
    MAX_HEADER_NBYTES, MAX_HELLO_NBYTES, MAX_VALUE_NBYTES, PROTOCOL, Decoder, Hello, Message, WireError, encode, hello_of,
)  # fmt: skip
from commlib.secret import Secret

_READ_NBYTES = 1 << 16
_LONGEST_WAIT_S = 1e8  # three years: more is no time to wait, and NaN is none either
_ACCEPTS_PER_TURN = 16  # a flood of strangers must leave room for the ranks that are there


class _Connection:
    """One client: its socket, what it has proven and said so far, and who it is once it has said hello."""

    def __init__(self, sock: socket.socket, address: object, key: bytes):
        self.sock, self.address = sock, address
        self.listening = Listening(key)
        self.proof = b""                     # as much of it as has come
        self.claim: Optional[Claim] = None   # whom it has proven to be
        self.decoder = Decoder(MAX_HELLO_NBYTES)
        self.outbox = bytearray(self.listening.challenge)
        self.hello: Optional[Hello] = None
        self.room: Optional[Room] = None
        self.closing = False  # to be closed as soon as the outbox is empty

    def tell(self, header: dict, payload: bytes = b"") -> None:
        self.outbox += encode(header, payload)


class Server:
    """The store, listening and answering in a thread of its own from the moment it is made.

    Args:
        listener: a listening socket; the server owns it from here on.
        job: its name; callers of another job are refused.
        owner: in whose process the server runs ("commrun", "rank 0"), for messages.
        generation: the only generation that is served; None: all of them, each in its own room.
        explain_s: how long a broken connection waits for `rank_ended` to say why, before it counts as a death.
        secret: the job's; callers that do not hold it are refused.
    """

    def __init__(self, listener: socket.socket, job: str, owner: str, generation: Optional[int] = None,
                 explain_s: float = 0.0, secret: Secret = Secret()):
        self._owner, self._generation, self._explain_s = owner, generation, explain_s
        self._key = store_key(secret, job)
        self._strangers = Strangers(f"the store of {owner}")
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

    def _blame_ended(self, room: Room) -> None:
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
        deadline = min([room.next_deadline() for room in self._rooms.values()] + [self._strangers.next_deadline()])
        timeout_s = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                for _ in range(_ACCEPTS_PER_TURN):
                    if not self._accept():
                        break
            elif key.fileobj is self._wake_reader:
                self._wake_reader.recv(_READ_NBYTES)
                while self._orders:
                    self._orders.popleft()()
            elif events & selectors.EVENT_READ:
                self._read(key.data)
        for room in self._rooms.values():
            room.expire(time.monotonic())
        for stranger in self._strangers.expired():
            self._refuse(stranger, "it has not proven in time that it belongs to the job")
        self._flush()
        self._forget_settled()

    def _accept(self) -> bool:
        """Takes one caller. Returns False if there is none."""
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                self._make_room()
            return False
        if sock.family == socket.AF_UNIX and peer_uid(sock) not in (0, os.getuid()):
            sock.close()  # another user: abstract sockets have no file permissions
            return True
        sock.setblocking(False)
        connection = _Connection(sock, address, self._key)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        for stranger in self._strangers.admit(connection):
            self._refuse(stranger, "too many callers have proven nothing")
        return True

    def _make_room(self) -> None:
        """Out of descriptors: the caller stays in the queue until somebody who has proven nothing has left."""
        stranger = self._strangers.oldest()
        if stranger is None:
            time.sleep(0.05)  # there is nothing better to do
        else:
            self._refuse(stranger, "out of descriptors")

    def _refuse(self, connection: _Connection, reason: str) -> None:
        self._strangers.refuse(connection.address, reason)
        self._drop(connection)

    def _read(self, connection: _Connection) -> bool:
        """Hears what has come. Returns False if nothing has, or the connection is closed."""
        proven = connection.claim is not None
        try:
            data = connection.sock.recv(_READ_NBYTES if proven else PROOF_NBYTES - len(connection.proof))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return False
        if not proven:
            self._judge(connection, data)
            return not connection.closing
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

    def _judge(self, connection: _Connection, data: bytes) -> None:
        """Takes bytes of a caller that has proven nothing yet; all that they can be is its proof."""
        connection.proof += data
        if len(connection.proof) < PROOF_NBYTES:
            return
        self._strangers.forget(connection)
        connection.claim = connection.listening.judge(connection.proof)
        connection.outbox += connection.listening.answer
        if connection.claim is None:
            self._strangers.refuse(connection.address, "it has another secret, or belongs to another job")
            connection.closing = True

    def _hear(self, connection: _Connection, message: Message) -> None:
        if connection.hello is None:
            hello = hello_of(message.header)
            if connection.claim != (hello.rank, THE_STORE):
                raise WireError(f"rank {connection.claim.caller} says that it is rank {hello.rank}")
            self._greet(connection, hello)
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
        room = connection.room = self._rooms.setdefault(hello.generation, Room(hello))
        room.enter(hello, connection)
        self._blame_ended(room)

    def _door(self, hello: Hello) -> dict:
        """The answer to a hello: welcome, retry (too early) or refused."""
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
        if not isinstance(keys, list) or type(timeout_s) not in (int, float) or not 0 <= timeout_s <= _LONGEST_WAIT_S:
            raise WireError("a get without keys, or without a sound timeout_s")
        wait = Wait(connection, [_key(key) for key in keys], timeout_s)
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
        self._strangers.forget(connection)
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


def store_key(secret: Secret, job: str) -> bytes:
    """What ranks and store of a job prove to each other to hold."""
    return secret.key("store", job)


def peer_uid(sock: socket.socket) -> int:
    """The user at the other end of a Unix socket, as it was when that end connected or listened."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]
