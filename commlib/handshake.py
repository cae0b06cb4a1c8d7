"""Sockets between ranks, opened and checked: both sides prove (proof.py) that they belong to the job and who they are.

Works alike for TCP and for Unix sockets, where each side may send descriptors once the other has proven itself. Strangers
that reach a listener are closed and disturb nobody; they learn nothing. Knows no store keys and no addresses; who connects to
whom is the caller's choice.

    caller -> listener   greeting
    listener -> caller   challenge
    caller -> listener   the rest of the proof
    listener -> caller   answer, and its descriptors
    caller -> listener   one byte, and its descriptors
"""
from __future__ import annotations

import array
import os
import selectors
import socket
import time
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from commlib.bootstrap import StartError
from commlib.dial import OUT_OF_DESCRIPTORS, Unreachable
from commlib.proof import ANSWER_NBYTES, NONCE_NBYTES, PROOF_NBYTES, REFUSAL, Calling, Claim, Listening, Strangers
from commlib.rendezvous_wire import spell_ranks

_ASK_S = 0.1   # between two looks at a store that wakes nobody
NEWS_S = 2.0  # how long the store gets to say why a peer hung up, before this rank guesses
_CONFIRMATION = b"+"
_MAX_DESCRIPTORS = 8
_SILENT_S = 5.0   # after that a peer is called again, elsewhere if it has more addresses: something else may listen there
_REDIAL_S = 0.05  # a listener that is flooded by strangers may have closed us for one of them

Dial = Callable[[], socket.socket]


class Shaken(NamedTuple):
    """A checked connection and the descriptors that came with it; all owned by the receiver."""

    sock: socket.socket
    descriptors: List[int]

    def close(self) -> None:
        self.sock.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


class _Half:
    """A connection that is not checked yet: `hear` takes the next message, which has `wanted` bytes."""

    wanted = 0

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.received = b""
        self.descriptors: List[int] = []

    def close(self) -> None:
        Shaken(self.sock, self.descriptors).close()


class _Outgoing(_Half):
    """We called `peer`."""

    def __init__(self, sock: socket.socket, key: bytes, claim: Claim):
        super().__init__(sock)
        self.peer, self.calling = claim.listener, Calling(key, claim)
        self.silent_until = time.monotonic() + _SILENT_S
        self.wanted, self.hear = NONCE_NBYTES, self.hear_challenge

    def hear_challenge(self, shaking: _Shaking, challenge: bytes) -> None:
        shaking.say(self, self.calling.prove(challenge))
        self.wanted, self.hear = ANSWER_NBYTES, self.hear_answer

    def hear_answer(self, shaking: _Shaking, answer: bytes) -> None:
        if not self.calling.accepts(answer):
            shaking.lose(self, "what answers at its address is no rank of this job, or has another secret")
        elif shaking.say(self, _CONFIRMATION, shaking.descriptors):
            shaking.finish(self)

    def ended(self, shaking: _Shaking, reason: str) -> None:
        shaking.hang_up(self.peer, reason)


class _Incoming(_Half):
    """We were called. `peer` is None until the caller has proven who it is."""

    def __init__(self, sock: socket.socket, address: object, key: bytes):
        super().__init__(sock)
        self.address, self.listening = address, Listening(key)
        self.peer: Optional[int] = None
        self.wanted, self.hear = PROOF_NBYTES, self.hear_proof

    def hear_proof(self, shaking: _Shaking, proof: bytes) -> None:
        claim = self.listening.judge(proof)
        if claim is None or claim.listener != shaking.store.rank or claim.caller not in shaking.incoming:
            shaking.say(self, REFUSAL)
            shaking.lose(self, "it is no rank of this job, or has another secret")
            return
        shaking.prove(self, claim.caller)
        shaking.say(self, self.listening.answer, shaking.descriptors)
        self.wanted, self.hear = len(_CONFIRMATION), self.hear_confirmation

    def hear_confirmation(self, shaking: _Shaking, confirmation: bytes) -> None:
        shaking.finish(self)

    def ended(self, shaking: _Shaking, reason: str) -> None:
        if self.peer is None:
            shaking.strangers.refuse(self.address, reason)


def shake(store, key: bytes, listeners: Sequence[socket.socket], dials: Dict[int, Dial], incoming: Set[int], deadline: float,
          descriptors: Sequence[int] = ()) -> Dict[int, Shaken]:
    """Connects to peers, is called by others, and checks them all.

    Args:
        store: its news end the wait at once.
        key: what all ranks of the job hold, and nobody else.
        listeners: where the `incoming` peers connect; stay the caller's.
        dials: for each peer that listens, what connects to it; may raise dial.Unreachable. Called again if the peer closes
            the connection before it has proven itself.
        incoming: peers that will connect to a listener.
        deadline: on time.monotonic().
        descriptors: sent along to every peer (Unix sockets only).
    Returns:
        A connection for every peer, non-blocking.
    Raises:
        StartError: a peer was lost, or did not come until the deadline. Everything is closed then.
    """
    shaking = _Shaking(store, key, listeners, dials, set(incoming), descriptors)
    try:
        for peer in dials:
            shaking.call(peer)
        store.check()  # bad news may have been read already, together with an answer: no selector reports that
        while shaking.waiting:
            shaking.turn(deadline)
    except BaseException:
        shaking.close_all()
        raise
    finally:
        shaking.close()
    return shaking.done


class _Shaking:
    def __init__(self, store, key: bytes, listeners: Sequence[socket.socket], dials: Dict[int, Dial], incoming: Set[int],
                 descriptors: Sequence[int]):
        self.store, self.key, self.descriptors, self.dials = store, key, list(descriptors), dials
        self.listeners, self.incoming = listeners, incoming
        self.calling: Set[int] = set()            # peers that we call and that have not proven themselves
        self.redials: Dict[int, float] = {}       # peer that hung up -> when to call it again
        self.hung_up: Dict[int, Tuple[str, float]] = {}  # peer -> why, and until when somebody may explain it better
        self.halves: Set[_Half] = set()
        self.outgoing: Set[_Outgoing] = set()     # those of the halves that we called
        self.done: Dict[int, Shaken] = {}
        self.strangers = Strangers(f"rank {store.rank}", len(incoming))
        self.selector = selectors.DefaultSelector()
        if store.fileno() >= 0:
            self.selector.register(store, selectors.EVENT_READ)
        for listener in listeners if incoming else ():
            listener.setblocking(False)
            self.selector.register(listener, selectors.EVENT_READ)

    @property
    def waiting(self) -> bool:
        return bool(self.calling or self.incoming)

    # ---- events ----

    def turn(self, deadline: float) -> None:
        """Waits for one batch of events and handles it."""
        limit = min([deadline] + [until for _, until in self.hung_up.values()])
        if time.monotonic() >= limit:
            missing = sorted(self.hung_up or self.calling | self.incoming)
            reason = self.hung_up[missing[0]][0] if self.hung_up else "no answer until the time-out"
            text = f"rank {self.store.rank} could not connect to rank {spell_ranks(missing)}: {reason}"
            raise StartError(text, rank=missing[0])
        until = min([limit, self.strangers.next_deadline(), *self.redials.values(),
                     *(half.silent_until for half in self.outgoing)])
        if self.store.fileno() < 0:  # it has nothing to sleep on: its news must be asked for
            self.store.check()
            until = min(until, time.monotonic() + _ASK_S)
        for key, _ in self.selector.select(max(0.0, until - time.monotonic())):
            if key.fileobj is self.store:
                self.store.check()
            elif key.fileobj in self.listeners:
                self.accept(key.fileobj)
            elif key.data in self.halves:  # not closed by an event before this
                self.read(key.data)
        for stranger in self.strangers.expired():
            self.lose(stranger, "it has not proven in time that it belongs to the job")
        now = time.monotonic()
        for half in [half for half in self.outgoing if half.silent_until <= now]:
            self.drop(half)
            self.redials[half.peer] = now
        for peer in [peer for peer, when in self.redials.items() if when <= now]:
            del self.redials[peer]
            self.call(peer)

    def call(self, peer: int) -> None:
        self.calling.add(peer)
        try:
            sock = self.dials[peer]()
        except Unreachable as error:
            self.store.check(NEWS_S)
            raise StartError(
                f"rank {self.store.rank} cannot connect to rank {peer} ({error}): open the firewall between the hosts, or "
                "name a network that leads from each to each with COMMLIB_NETWORK_INTERFACES on every rank", peer
            ) from None
        half = _Outgoing(sock, self.key, Claim(self.store.rank, peer))
        self.outgoing.add(half)
        self.begin(half)
        self.say(half, half.calling.greeting)

    def accept(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            if error.errno not in OUT_OF_DESCRIPTORS or self.strangers.oldest() is None:
                raise
            self.lose(self.strangers.oldest(), "out of descriptors")  # the caller waits in the queue until then
            return
        half = _Incoming(sock, address, self.key)
        self.begin(half)
        for stranger in self.strangers.admit(half):
            self.lose(stranger, "too many callers have proven nothing")
        self.say(half, half.listening.challenge)

    def begin(self, half: _Half) -> None:
        half.sock.setblocking(False)
        self.halves.add(half)
        self.selector.register(half.sock, selectors.EVENT_READ, half)

    def read(self, half: _Half) -> None:
        try:
            data = self.receive(half)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                raise
            self.lose(half, str(error))
            return
        half.received += data
        if not data:
            self.lose(half, "it closed the connection")
        elif len(half.received) == half.wanted:
            message, half.received = half.received, b""
            half.hear(self, message)

    def receive(self, half: _Half) -> bytes:
        """The next bytes of the message and not one more: what follows belongs to the connection's owner."""
        nbytes = half.wanted - len(half.received)
        if half.sock.family != socket.AF_UNIX:
            return half.sock.recv(nbytes)
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        data, ancillary, flags, _ = half.sock.recvmsg(nbytes, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[:len(content) - len(content) % numbers.itemsize])
                half.descriptors += numbers
        if flags & socket.MSG_CTRUNC:
            os.close(os.dup(half.sock.fileno()))  # raises if this process can have no more; else the peer sent too many
        return data

    # ---- what a half does when it has heard something ----

    def say(self, half: _Half, message: bytes, descriptors: Sequence[int] = ()) -> bool:
        """Sends a message, far smaller than any socket's buffer, so that it cannot block. Returns whether it went."""
        try:
            if descriptors:
                socket.send_fds(half.sock, [message], descriptors)
            else:
                half.sock.send(message)
        except OSError as error:
            self.lose(half, str(error))
            return False
        return True

    def prove(self, half: _Incoming, peer: int) -> None:
        """A caller has proven to be `peer`. One that calls twice had its first connection cut on the way."""
        self.strangers.forget(half)
        for other in [other for other in self.halves if isinstance(other, _Incoming) and other.peer == peer]:
            self.lose(other, "")
        half.peer = peer

    def finish(self, half: _Half) -> None:
        """Both sides have proven themselves."""
        for waiting in (self.calling, self.incoming):
            waiting.discard(half.peer)
        self.hung_up.pop(half.peer, None)
        self.forget(half)
        self.done[half.peer] = Shaken(half.sock, half.descriptors)

    def lose(self, half: _Half, reason: str) -> None:
        if half in self.halves:
            self.drop(half)
            half.ended(self, reason)

    def drop(self, half: _Half) -> None:
        self.forget(half)
        half.close()

    def forget(self, half: _Half) -> None:
        self.strangers.forget(half)
        self.selector.unregister(half.sock)
        self.halves.discard(half)
        self.outgoing.discard(half)

    def hang_up(self, peer: int, reason: str) -> None:
        """A peer's death the store knows better, so it gets a moment to tell; if it lives, it is called again meanwhile."""
        now = time.monotonic()
        self.hung_up.setdefault(peer, (reason, now + NEWS_S))
        self.redials[peer] = now + _REDIAL_S

    # ---- the end ----

    def close_all(self) -> None:
        for connection in self.done.values():
            connection.close()

    def close(self) -> None:
        self.selector.close()
        for half in self.halves:
            half.close()
