"""What an algorithm costs: a closed form in alpha, beta and gamma, and the time line of its plans to check it by.

This file knows chunks, link classes and seconds. It must not know algorithms by name, and measures nothing itself.

The model. A message of m bytes from a to b
  1. is sent when the steps that its send depends on are done, b has granted it, the messages to b listed before it
     have gone, and a's sending port is free; of several such sends of a rank, the first in its list goes first;
  2. is granted by b when all receives that its receive depends on are on their way, and all sends that it depends on,
     and all sends to a that are listed before it, have what they depend on. Grants take no time: small messages go
     without, and large ones do not feel them;
  3. keeps a's sending port busy for m beta, and begins to arrive alpha after it was sent;
  4. keeps b's receiving port busy for m beta, and for m gamma more if it is reduced; messages take the port in order
     of arrival, once the receives that they depend on are done.
So a rank sends one message at a time and receives one at a time, both at once; latency keeps no port busy. Every pair
of ranks has a link of its own: ranks that share a host's network card must have its share in their beta.

Under this model, the closed form of every algorithm equals the end of its time line, for bytes that the chunks divide,
if all links are of one class. That of hierarchical algorithms is exact with two classes too, and an upper bound if
hosts differ in size; others are charged the slower class for all links: an estimate, mostly from above.
"""
from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Deque, Dict, Iterable, List, NamedTuple, Sequence, Tuple

from .plan import RECV_REDUCE, SEND, Plan, Shape, Step, StepId, matches


@dataclass(frozen=True)
class Link:
    """The cost of one class of link.

    Args:
        alpha_s: seconds from sending the first byte to its arrival.
        beta_s_per_byte: seconds per byte, 1 / bandwidth.
        gamma_s_per_byte: seconds per byte for reducing what has come.
    """

    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float = 0.0


@dataclass(frozen=True)
class Machine:
    """The links inside hosts and those between hosts.

    Args:
        inside, between: the two classes.
        message_s: what a message costs whatever its size where the ranks of a host share processors, and so wait for each
            other's turns. Only `cost_s` looks at it, on one host.
    """

    inside: Link
    between: Link
    message_s: float = 0.0

    def link(self, shape: Shape, rank: int, peer: int) -> Link:
        """The class of the link between two ranks."""
        return self.inside if shape.host_of(rank) == shape.host_of(peer) else self.between


@dataclass(frozen=True)
class Terms:
    """Coefficients of a closed form: A alpha + n (B beta + C gamma) seconds for n bytes.

    Args:
        alpha: A, the latencies on the critical path.
        beta: B, the bytes sent on the critical path, per byte of the operation.
        gamma: C, the bytes reduced on the critical path, per byte of the operation.
    """

    alpha: float = 0.0
    beta: float = 0.0
    gamma: float = 0.0

    def __add__(self, other: Terms) -> Terms:
        return Terms(self.alpha + other.alpha, self.beta + other.beta, self.gamma + other.gamma)

    def of_part(self, fraction: float) -> Terms:
        """The terms of the same algorithm on `fraction` of the bytes, per byte of the whole."""
        return Terms(self.alpha, self.beta * fraction, self.gamma * fraction)

    def cost_s(self, nbytes: float, link: Link) -> float:
        """Seconds on this class of link."""
        per_byte = self.beta * link.beta_s_per_byte + self.gamma * link.gamma_s_per_byte
        return self.alpha * link.alpha_s + nbytes * per_byte


@dataclass(frozen=True)
class LinkTerms:
    """The terms paid on links inside hosts and on links between them."""

    inside: Terms = Terms()
    between: Terms = Terms()


def flat(shape: Shape, terms: Terms) -> LinkTerms:
    """The terms of an algorithm that does not look at hosts: all on the slowest class of link that the shape has.

    With one host, or one rank per host, this is exact; otherwise some hops stay inside hosts and it is an estimate.
    """
    return LinkTerms(inside=terms) if shape.hosts == 1 else LinkTerms(between=terms)


def cost_s(algorithm: ModuleType, shape: Shape, nbytes: float, machine: Machine) -> float:
    """The closed form: seconds from the start on all ranks to the end on the last one.

    Args:
        algorithm: a module of commlib.algorithms, or anything with `terms(shape)`.
        shape: the group.
        nbytes: bytes of the whole operation: of the buffer, of the all-gathered result, of one rank's all-to-all input.
        machine: the cost of the links.

    Example:
        >>> from commlib.algorithms import algorithm
        >>> link = Link(alpha_s=1e-5, beta_s_per_byte=1e-9)
        >>> round(cost_s(algorithm("allreduce", "ring"), Shape((4,)), 1_000_000, Machine(link, link)), 9)
        0.00156
    """
    terms = algorithm.terms(shape)
    cost = terms.inside.cost_s(nbytes, machine.inside) + terms.between.cost_s(nbytes, machine.between)
    if machine.message_s > 0 and shape.hosts == 1:
        cost += machine.message_s * messages(algorithm, shape)
    return cost


@lru_cache(maxsize=256)
def messages(algorithm: ModuleType, shape: Shape) -> int:
    """What the busiest rank sends.

    Example:
        >>> from commlib.algorithms import algorithm
        >>> [messages(algorithm("allreduce", name), Shape((8,))) for name in ("direct", "recursive_doubling")]
        [14, 3]
    """
    return max(sum(step.kind == SEND for step in algorithm.steps(rank, shape)) for rank in range(shape.size))


def simulated_s(plans: Sequence[Plan], shape: Shape, nbytes: float, machine: Machine) -> float:
    """The end of the plans' time line under the model above.

    Args:
        plans: of all ranks; they must pass `verify`.
        shape: the group.
        nbytes: as for `cost_s`; the chunks are equal parts of it.
        machine: the cost of the links.

    Raises:
        ValueError: the plans do not finish under the model.
    """
    time_line = _TimeLine(plans, shape, nbytes, machine)
    end_s = time_line.run()
    if time_line.unfinished():
        raise ValueError(f"the plans never finish: {time_line.unfinished()} steps are left; do they pass verify?")
    return end_s


# What can be said of a step, once.
_READY = 0     # a send: what it depends on is done
_FREE = 1      # a send: it is ready and granted, and what goes before it to its receiver has gone
_BEGUN = 2     # a send: its message is on its way
_ARRIVED = 3   # a receive: its message is at the port
_TAKEABLE = 4  # a receive: and the receives that it depends on are done
_LANDED = 5    # a receive: its message has passed the port
_ADDABLE = 6   # a receive: and all that it depends on is done
_DONE = 7


class _Fact(NamedTuple):
    what: int
    step: StepId


class _TimeLine:
    """Facts that wait for other facts, and two ports per rank that take time."""

    def __init__(self, plans: Sequence[Plan], shape: Shape, nbytes: float, machine: Machine) -> None:
        self._plans, self._shape, self._machine = plans, shape, machine
        self._chunk_nbytes = nbytes / (plans[0].inputs or plans[0].nchunks)
        self._partner = matches(plans)
        self._missing: Dict[_Fact, int] = {}
        self._later: Dict[_Fact, List[_Fact]] = {}
        self._events: List[Tuple[float, int, _Fact]] = []  # (when, order of making, what becomes true)
        self._order = itertools.count()
        self._now_s: float = 0
        self._to_send: List[List[int]] = [[] for _ in plans]           # granted sends: heaps of places in the list
        self._to_take: List[Deque[StepId]] = [deque() for _ in plans]  # in order of arrival
        self._sending: List[bool] = [False for _ in plans]
        self._receiving: List[bool] = [False for _ in plans]
        self._left = sum(len(plan.steps) for plan in plans)
        for plan in plans:
            self._add_plan(plan)

    def unfinished(self) -> int:
        """How many steps are not done."""
        return self._left

    def run(self) -> float:
        """Lets everything happen; returns when the last thing did."""
        for fact in [fact for fact, count in self._missing.items() if count == 0 and fact.what == _READY]:
            self._establish(fact)
        self._use_ports()
        while self._events:
            self._now_s = self._events[0][0]
            while self._events and self._events[0][0] == self._now_s:
                self._establish(heapq.heappop(self._events)[2])
            self._use_ports()
        return self._now_s

    # -- which facts wait for which

    def _add_plan(self, plan: Plan) -> None:
        sends_to: Dict[int, List[StepId]] = {}
        for index, step in enumerate(plan.steps):
            here = StepId(plan.rank, index)
            needed = [StepId(plan.rank, earlier) for earlier in plan.dependencies[index]]
            done = [_Fact(_DONE, earlier) for earlier in needed]
            if step.kind == SEND:
                self._wait(_Fact(_READY, here), done)
                to_peer = sends_to.setdefault(step.peer, [])
                self._wait(_Fact(_FREE, here), [_Fact(_READY, here), *(_Fact(_BEGUN, last) for last in to_peer[-1:])])
                to_peer.append(here)
                continue
            sends = [earlier for earlier in needed if self._step(earlier).kind == SEND]
            receives = [earlier for earlier in needed if self._step(earlier).kind != SEND]
            self._wait(_Fact(_FREE, self._partner[here]), [
                *(_Fact(_READY, earlier) for earlier in set(sends).union(sends_to.get(step.peer, ()))),
                *(_Fact(_BEGUN, self._partner[earlier]) for earlier in receives),
            ])
            come = [_Fact(_DONE, earlier) for earlier in receives]
            self._wait(_Fact(_TAKEABLE, here), [_Fact(_ARRIVED, here), *come])
            self._wait(_Fact(_ADDABLE, here), [_Fact(_LANDED, here), *done])

    def _wait(self, fact: _Fact, needed: Iterable[_Fact]) -> None:
        self._missing.setdefault(fact, 0)
        for earlier in needed:
            self._later.setdefault(earlier, []).append(fact)
            self._missing[fact] += 1

    def _step(self, here: StepId) -> Step:
        return self._plans[here.rank].steps[here.index]

    # -- what follows from a fact

    def _establish(self, fact: _Fact) -> None:
        here = fact.step
        if fact.what == _FREE:
            heapq.heappush(self._to_send[here.rank], here.index)
        elif fact.what == _TAKEABLE:
            self._to_take[here.rank].append(here)
        elif fact.what == _ADDABLE:
            adds = self._step(here).kind == RECV_REDUCE
            self._at(self._nbytes(here) * self._link(here).gamma_s_per_byte if adds else 0, _Fact(_DONE, here))
        elif fact.what == _DONE:
            self._left -= 1
            port = self._sending if self._step(here).kind == SEND else self._receiving
            port[here.rank] = False
        for later in self._later.get(fact, ()):
            self._missing[later] -= 1
            if self._missing[later] == 0:
                self._establish(later)

    def _use_ports(self) -> None:
        for rank in range(len(self._plans)):
            if self._to_send[rank] and not self._sending[rank]:
                self._sending[rank] = True
                self._send(StepId(rank, heapq.heappop(self._to_send[rank])))
        for rank in range(len(self._plans)):
            if self._to_take[rank] and not self._receiving[rank]:
                self._receiving[rank] = True
                here = self._to_take[rank].popleft()
                self._at(self._nbytes(here) * self._link(here).beta_s_per_byte, _Fact(_LANDED, here))

    def _send(self, here: StepId) -> None:
        link = self._link(here)
        self._at(self._nbytes(here) * link.beta_s_per_byte, _Fact(_DONE, here))
        self._at(link.alpha_s, _Fact(_ARRIVED, self._partner[here]))
        self._establish(_Fact(_BEGUN, here))

    def _at(self, delay_s: float, fact: _Fact) -> None:
        heapq.heappush(self._events, (self._now_s + delay_s, next(self._order), fact))

    def _nbytes(self, here: StepId) -> float:
        return self._step(here).width * self._chunk_nbytes

    def _link(self, here: StepId) -> Link:
        return self._machine.link(self._shape, here.rank, self._step(here).peer)
