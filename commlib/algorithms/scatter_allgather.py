"""Scatter and all-gather broadcast: the root scatters chunks down a tree, then a ring gathers them everywhere.

Paper: Barnett, Gupta, Payne, Shuler, van de Geijn and Watts, "Interprocessor collective communication library
(InterCom)", 1994; known as van de Geijn's algorithm.

One chunk per rank. In the binomial tree, a rank gets the chunks of all ranks below it. The ring then works as in the
ring all-gather, but nobody is sent a chunk again that the scatter brought (so the root receives nothing). With 4
ranks:

    scatter    0 -> 2: chunks 2 3     then 0 -> 1: chunk 1, and 2 -> 3: chunk 3
    ring       0 -> 1: chunks 0 3 2        1 -> 2: chunks 1 0        2 -> 3: chunks 2 1 0

Rounds: lg p + p - 1, but the root's ring begins before the scatter's last message has come, so that only p - 1
latencies are on the critical path.
Bytes sent per rank: at most 2 (p - 1)/p n (the root); binomial's root sends n lg p.
Limits: none on p; for large messages.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, Terms, flat
from ..plan import SEND, Shape, Step, placed, recv, send
from . import binomial, ring


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return shape.size


def held(rank: int, size: int) -> range:
    """The chunks that the scatter brings to `rank`: its own and those of the ranks below it in the tree."""
    return range(rank, min(rank + binomial.reach(rank, size), size))


def scatter(rank: int, size: int) -> Iterator[Step]:
    """From rank 0, down the tree."""
    if rank:
        chunks = held(rank, size)
        yield recv(rank - binomial.reach(rank, size), chunks.start, chunks.stop)
    for child in binomial.children(rank, size):
        chunks = held(child, size)
        yield send(child, chunks.start, chunks.stop)


def spread(rank: int, size: int) -> Iterator[Step]:
    """The steps for root 0."""
    yield from scatter(rank, size)
    for step in ring.all_gather(rank, size):
        receiver = step.peer if step.kind == SEND else rank
        if step.first_chunk not in held(receiver, size):
            yield step


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from placed(spread((rank - shape.root) % shape.size, shape.size), binomial.from_root(shape))


def terms(shape: Shape) -> LinkTerms:
    size = shape.size
    return flat(shape, Terms(alpha=size - 1, beta=2 * (size - 1) / size))
