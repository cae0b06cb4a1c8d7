"""Binomial broadcast: everyone who has the data passes it on, so the number who have it doubles.

Paper: Thakur, Rabenseifner and Gropp, 2005; the tree is older than MPI.

Virtual rank v (the root is 0) gets the data from v without its lowest bit set, and passes it to v + d for every power
of two d below that bit, the farthest first: it has the most work left. With 5 ranks:

    round 0    0 -> 4
    round 1    0 -> 2
    round 2    0 -> 1    2 -> 3

Rounds: lg p, rounded up. Bytes sent per rank: at most n lg p (the root).
Latency is on the critical path at most lg p, rounded down, times: the last sends of the root wait for its port, not
for a message. Limits: none on p; for small messages.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, Terms, flat
from ..plan import Shape, Step, placed, recv, send


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return 1


def rounds(size: int) -> int:
    """lg of the size, rounded up."""
    return (size - 1).bit_length()


def reach(rank: int, size: int) -> int:
    """The ranks [rank, rank + reach) hang below `rank` in the tree: its lowest bit; for rank 0 all."""
    return rank & -rank if rank else 1 << rounds(size)


def children(rank: int, size: int) -> Iterator[int]:
    """To whom `rank` passes the data on, the farthest first."""
    distance = reach(rank, size) // 2
    while distance:
        if rank + distance < size:
            yield rank + distance
        distance //= 2


def from_root(shape: Shape) -> list:
    """The real rank of each virtual rank, such that the root is virtual rank 0."""
    return [(shape.root + virtual) % shape.size for virtual in range(shape.size)]


def pass_on(rank: int, size: int) -> Iterator[Step]:
    """The steps for root 0."""
    if rank:
        yield recv(rank - reach(rank, size), 0, 1)
    for child in children(rank, size):
        yield send(child, 0, 1)


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from placed(pass_on((rank - shape.root) % shape.size, shape.size), from_root(shape))


def terms(shape: Shape) -> LinkTerms:
    return flat(shape, Terms(alpha=shape.size.bit_length() - 1, beta=rounds(shape.size)))
