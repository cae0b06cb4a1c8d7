"""Plans: what one rank sends, receives and reduces, as a list of steps over chunks.

This file knows ranks, chunks and the order that steps impose on each other. It must not know bytes, dtypes, pointers,
links or time: one plan serves every message size, and four readers (verify, cost, engine, simulator) read it.
"""
from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple


class StepKind(enum.IntEnum):
    """What a step does; the values are those of cl_step_kind in native/commlib.h."""

    SEND = 0
    RECV = 1
    RECV_REDUCE = 2


SEND, RECV, RECV_REDUCE = StepKind.SEND, StepKind.RECV, StepKind.RECV_REDUCE


class Step(NamedTuple):
    """One move of the chunks [first_chunk, end_chunk) to or from a peer."""

    kind: StepKind
    peer: int
    first_chunk: int
    end_chunk: int

    @property
    def width(self) -> int:
        """Number of chunks moved."""
        return self.end_chunk - self.first_chunk

    def __str__(self) -> str:
        preposition = "to" if self.kind == SEND else "from"
        return f"{self.kind.name} [{self.first_chunk}, {self.end_chunk}) {preposition} rank {self.peer}"


def send(peer: int, first_chunk: int, end_chunk: int) -> Step:
    """The chunks [first_chunk, end_chunk) go to `peer`."""
    return Step(SEND, peer, first_chunk, end_chunk)


def recv(peer: int, first_chunk: int, end_chunk: int) -> Step:
    """The chunks [first_chunk, end_chunk) are overwritten by what `peer` sends."""
    return Step(RECV, peer, first_chunk, end_chunk)


def recv_reduce(peer: int, first_chunk: int, end_chunk: int) -> Step:
    """What `peer` sends is reduced into the chunks [first_chunk, end_chunk)."""
    return Step(RECV_REDUCE, peer, first_chunk, end_chunk)


@dataclass(frozen=True)
class Shape:
    """How the ranks of a group lie on hosts, and who is the root.

    Ranks are numbered host by host: with ranks_per_host (2, 3), ranks 0 and 1 share a host, and 2, 3 and 4 share one.
    A group whose real ranks lie otherwise plans over such virtual ranks and relabels (`Plan.relabelled`).

    Args:
        ranks_per_host: number of ranks on each host, all positive.
        root: the rank whose data a broadcast carries.

    Raises:
        ValueError: no hosts, a host without ranks, or a root outside the group.

    Example:
        >>> shape = Shape((2, 3))
        >>> shape.size, shape.host_of(2), list(shape.ranks_of(1))
        (5, 1, [2, 3, 4])
    """

    ranks_per_host: Tuple[int, ...]
    root: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks_per_host", tuple(self.ranks_per_host))
        if not self.ranks_per_host or min(self.ranks_per_host) < 1:
            raise ValueError(f"ranks_per_host must name at least one rank on every host, got {self.ranks_per_host}")
        if not 0 <= self.root < self.size:
            raise ValueError(f"root must be in [0, {self.size}), got {self.root}")

    @cached_property
    def size(self) -> int:
        """Number of ranks."""
        return sum(self.ranks_per_host)

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return len(self.ranks_per_host)

    @cached_property
    def _host_by_rank(self) -> Tuple[int, ...]:
        return tuple(host for host, count in enumerate(self.ranks_per_host) for _ in range(count))

    def host_of(self, rank: int) -> int:
        """The host on which `rank` lives."""
        return self._host_by_rank[rank]

    def ranks_of(self, host: int) -> range:
        """The ranks that live on `host`."""
        first = sum(self.ranks_per_host[:host])
        return range(first, first + self.ranks_per_host[host])

    def local_rank(self, rank: int) -> int:
        """The position of `rank` on its host."""
        return rank - self.ranks_of(self.host_of(rank)).start


@dataclass(frozen=True)
class Plan:
    """One rank's steps. The i-th send of rank a to rank b is the i-th receive of b from a.

    A rank has one buffer, cut into `nchunks` chunks, on which all steps work in place. Only all-to-all has two: chunks
    [0, inputs) are the input, which is only read, and the rest is the output.

    Args:
        rank: whose steps these are.
        nchunks: chunks of the buffer, at least 1.
        inputs: how many of them are only read; 0 for in-place algorithms.
        steps: in the order in which conflicting steps must happen; a lower step is also the more urgent one.
    """

    rank: int
    nchunks: int
    inputs: int
    steps: Tuple[Step, ...]

    @cached_property
    def dependencies(self) -> Tuple[Tuple[int, ...], ...]:
        """For each step, the earlier steps that must be done before it.

        Step j depends on the earlier step i if their chunk ranges overlap and at least one of them writes. Listed are
        only the nearest ones (per chunk: the last write, and for a writing step also the reads since); the others
        follow, because those depend on them in turn.
        """
        last_write: Dict[int, int] = {}
        reads_since: Dict[int, List[int]] = {}
        result = []
        for index, step in enumerate(self.steps):
            needed = set()
            for chunk in range(step.first_chunk, step.end_chunk):
                if chunk in last_write:
                    needed.add(last_write[chunk])
                if step.kind == SEND:
                    reads_since.setdefault(chunk, []).append(index)
                else:
                    needed.update(reads_since.pop(chunk, ()))
                    last_write[chunk] = index
            result.append(tuple(sorted(needed)))
        return tuple(result)

    def relabelled(self, ranks: Sequence[int]) -> Plan:
        """The same plan for a group whose virtual rank v is the real rank ranks[v]."""
        return Plan(ranks[self.rank], self.nchunks, self.inputs, tuple(placed(self.steps, ranks)))

    def pack(self) -> bytes:
        """The steps as cl_step: quadruples (kind, peer, first_chunk, end_chunk) of native int32."""
        numbers = [number for step in self.steps for number in step]
        return struct.pack(f"={len(numbers)}i", *numbers)


def placed(steps: Iterable[Step], ranks: Sequence[int], first_chunk: int = 0, width: int = 1) -> Iterator[Step]:
    """Moves the steps of a subgroup into the whole: an algorithm is used as a part of a larger one.

    Args:
        steps: of the subgroup, over its own virtual ranks and chunks.
        ranks: ranks[v] is the rank that virtual rank v stands for.
        first_chunk: where the subgroup's chunk 0 begins.
        width: how many chunks of the whole make one chunk of the subgroup.
    """
    for step in steps:
        first, end = first_chunk + step.first_chunk * width, first_chunk + step.end_chunk * width
        yield Step(step.kind, ranks[step.peer], first, end)


class StepId(NamedTuple):
    """A step of a set of plans: position `index` in the list of rank `rank`."""

    rank: int
    index: int


def matches(plans: Sequence[Plan]) -> Dict[StepId, StepId]:
    """Pairs every send with its receive, both ways: the i-th send of a to b is the i-th receive of b from a.

    Steps that find no partner are missing from the result; `verify` reports them.

    Args:
        plans: plans[r] belongs to rank r.
    """
    sends: Dict[Tuple[int, int], List[StepId]] = {}
    receives: Dict[Tuple[int, int], List[StepId]] = {}
    for plan in plans:
        for index, step in enumerate(plan.steps):
            if step.kind == SEND:
                sends.setdefault((plan.rank, step.peer), []).append(StepId(plan.rank, index))
            else:
                receives.setdefault((step.peer, plan.rank), []).append(StepId(plan.rank, index))
    partner: Dict[StepId, StepId] = {}
    for link, sent in sends.items():
        for sending, receiving in zip(sent, receives.get(link, ())):
            partner[sending] = receiving
            partner[receiving] = sending
    return partner
