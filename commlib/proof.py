"""How two processes prove to each other that they hold the same key, without showing it. Bytes in, bytes out; no sockets.

    caller -> listener   greeting    32 random bytes (the nonce), from, to
    listener -> caller   challenge   32 random bytes
    caller -> listener   code        HMAC-SHA256(key, "caller" | challenge | nonce | from | to); greeting + code: the proof
    listener -> caller   answer      HMAC-SHA256(key, "listener" | challenge | nonce | from | to)

The greeting does not wait for the challenge: a connection that arrived while a listener closed can be open on the caller's
side only (Linux drops the other half without a word), and only to bytes sent into it does the kernel answer with a reset.

Nobody can replay what he heard, since either side's random bytes are in both codes; nor send it back, since the codes name
the role and who speaks to whom; nor learn anything by calling, since a listener says nothing but random bytes until the
caller has proven himself. The shape is that of ISO/IEC 9798-4 (mutual authentication, three passes).

Here too: how many callers that have proven nothing may be waiting, and for how long.
"""
from __future__ import annotations

import hmac
import logging
import secrets
import struct
import time
from typing import Callable, Dict, Hashable, List, NamedTuple, Optional

NONCE_NBYTES = 32
ANSWER_NBYTES = 32
_CLAIM = struct.Struct("!II")
PROOF_NBYTES = NONCE_NBYTES + _CLAIM.size + ANSWER_NBYTES
REFUSAL = bytes(ANSWER_NBYTES)  # in place of an answer: another secret, or another job

THE_STORE = 0xFFFFFFFF  # stands for the rendezvous store where a rank would stand

_LONGEST_S = 10.0  # to prove oneself: a slow start, a process that was stopped for seconds
_MOST = 256        # callers that have proven nothing, beyond those that are expected
_LOGGED = 10       # refusals told one by one; what a port scanner does must not fill a log

_log = logging.getLogger("commlib")


class Claim(NamedTuple):
    """Who calls whom: ranks, or THE_STORE."""

    caller: int
    listener: int


def _code(key: bytes, role: bytes, challenge: bytes, greeting: bytes) -> bytes:
    return hmac.digest(key, role + challenge + greeting, "sha256")


class Listening:
    """The side that was called.

    Example:
        >>> key = bytes(32)
        >>> listening, calling = Listening(key), Calling(key, Claim(3, 0))
        >>> listening.judge(calling.greeting + calling.prove(listening.challenge))
        Claim(caller=3, listener=0)
        >>> calling.accepts(listening.answer)
        True
    """

    def __init__(self, key: bytes):
        self._key = key
        self.challenge = secrets.token_bytes(NONCE_NBYTES)
        self.answer = REFUSAL

    def judge(self, proof: bytes) -> Optional[Claim]:
        """What the caller has proven, None if nothing. `answer` is what it must be told."""
        greeting, code = proof[:-ANSWER_NBYTES], proof[-ANSWER_NBYTES:]
        if len(proof) != PROOF_NBYTES or not hmac.compare_digest(code, _code(self._key, b"caller", self.challenge, greeting)):
            return None
        self.answer = _code(self._key, b"listener", self.challenge, greeting)
        return Claim(*_CLAIM.unpack(greeting[NONCE_NBYTES:]))


class Calling:
    """The side that calls, as `claim.caller`, what it takes for `claim.listener`."""

    def __init__(self, key: bytes, claim: Claim):
        self._key, self._challenge = key, b""
        self.greeting = secrets.token_bytes(NONCE_NBYTES) + _CLAIM.pack(*claim)

    def prove(self, challenge: bytes) -> bytes:
        """What completes the proof, now that the challenge is known."""
        self._challenge = challenge
        return _code(self._key, b"caller", challenge, self.greeting)

    def accepts(self, answer: bytes) -> bool:
        """Whether the listener has proven itself too."""
        return hmac.compare_digest(answer, _code(self._key, b"listener", self._challenge, self.greeting))


class Strangers:
    """Callers that have proven nothing yet. They are few and stay a short time, however many come.

    Args:
        where: what they call, for the log.
        expected: how many callers are awaited.
        clock: seconds.
    """

    def __init__(self, where: str, expected: int = 0, clock: Callable[[], float] = time.monotonic):
        self._where, self._most, self._clock = where, _MOST + expected, clock
        self._since: Dict[Hashable, float] = {}  # in order of arrival
        self._refused = 0

    def admit(self, caller: Hashable) -> List[Hashable]:
        """Takes note of a new caller. Returns those to be closed for it: the oldest, which has had the most time."""
        self._since[caller] = self._clock()
        return [self._evict() for _ in range(len(self._since) - self._most)]

    def _evict(self) -> Hashable:
        oldest = next(iter(self._since))
        del self._since[oldest]
        return oldest

    def forget(self, caller: Hashable) -> None:
        """The caller has proven itself, or is gone."""
        self._since.pop(caller, None)

    def oldest(self) -> Optional[Hashable]:
        """The caller to close when descriptors run out, None if there is none."""
        return next(iter(self._since), None)

    def expired(self) -> List[Hashable]:
        """Those whose time is over; they are forgotten."""
        limit = self._clock() - _LONGEST_S
        late = [caller for caller, since in self._since.items() if since <= limit]
        for caller in late:
            del self._since[caller]
        return late

    def next_deadline(self) -> float:
        """When `expired` has something to say."""
        return min(self._since.values(), default=float("inf")) + _LONGEST_S

    def refuse(self, address: object, reason: str) -> None:
        """Logs a refusal, unless there were many."""
        self._refused += 1
        if self._refused <= _LOGGED:
            _log.warning("%s refused a connection from %s: %s", self._where, _spell(address), reason)
        if self._refused == _LOGGED:
            _log.warning("%s will refuse more connections without a word", self._where)


def _spell(address: object) -> str:
    """A socket's address for people."""
    if isinstance(address, tuple):
        return f"{address[0]} port {address[1]}"
    return "this host"
