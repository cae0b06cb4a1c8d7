"""A room of the rendezvous store: one initialisation of a job; who has come, what was set, who waits for what.

Knows no sockets and no clock but the one that deadlines are on. Its second duty is bad news: once something is wrong (a rank
lost, two versions, two processes with one rank), everybody who is in the room or comes later is told the same sentence.
"""
from __future__ import annotations

import time
from typing import Optional

from commlib.rendezvous_wire import MAX_PAYLOAD_NBYTES, Hello, WireError, spell_ranks

MAX_KEYS = 1 << 20  # of one room: some 16 per rank are used

# What all ranks must agree in: field, what it is, what to do about it.
_AGREE = (
    ("protocol", "rendezvous protocol", "install the same commlib on every host"),
    ("version", "commlib version", "install the same commlib on every host"),
    ("size", "number of ranks", "start all ranks with one launcher command"),
)


class Wait:
    """A client's unanswered request for keys."""

    def __init__(self, connection: _Connection, keys: list, timeout_s: float):
        self.connection = connection
        self.keys = keys
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s


class Room:
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

    def answer(self, wait: Wait) -> bool:
        """Answers a request if all its keys are there."""
        if any(key not in self.values for key in wait.keys):
            return False
        if sum(len(self.values[key]) for key in wait.keys) > MAX_PAYLOAD_NBYTES:
            wait.connection.tell({"op": "late", "rank": None, "text": f"asked for more than {MAX_PAYLOAD_NBYTES} bytes at once"})
            return True
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

    def _late(self, wait: Wait) -> str:
        missing = self._missing()
        if missing:
            return (
                f"waited {wait.timeout_s:.3g} s, and rank {spell_ranks(missing)} of {self.size} has not come: it was "
                "not started, died before it called init(), or cannot reach this host; give slow starts more time with "
                "COMMLIB_START_TIMEOUT_S"
            )
        keys = [key for key in wait.keys if key not in self.values]
        return f"waited {wait.timeout_s:.3g} s for {', '.join(keys[:4])}: all ranks came, but one is stuck before it"
