"""Direct reduce-scatter: everyone sends everyone its share. Chunk r is rank r's result.

Used by: MPICH as "pairwise exchange" (Thakur, Rabenseifner and Gropp, 2005), and the two-shot all-reduce.

In round k rank r sends chunk r + k to its owner r + k, and reduces what comes from r - k into chunk r. With 4 ranks:

    round 1    0 -> 1    1 -> 2    2 -> 3    3 -> 0        (the chunk has its receiver's number)
    round 2    0 -> 2    1 -> 3    2 -> 0    3 -> 1
    round 3    0 -> 3    1 -> 0    2 -> 1    3 -> 2

Rounds: 1, because rounds do not wait for each other. Messages sent per rank: p - 1.
Bytes sent per rank: (p - 1)/p n, the least possible.
Limits: none on p. Steps move single chunks, so uneven parts can be cut into segments; p^2 small messages at once.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, flat
from ..plan import Shape, Step
from . import direct


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return shape.size


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from direct.reduce_scatter(rank, shape.size, owners=shape.size)


def terms(shape: Shape) -> LinkTerms:
    return flat(shape, direct.reduce_scatter_terms(shape.size, shape.size))
