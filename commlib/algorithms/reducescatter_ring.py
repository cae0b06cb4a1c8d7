"""Ring reduce-scatter: every chunk travels around the ring and ends, complete, at its owner. Chunk r is rank r's
result.

Paper: Patarasuk and Yuan, 2009.

It is the first half of the ring all-reduce. With 4 ranks (a number is the chunk that a rank sends to its right):

    round     rank 0   rank 1   rank 2   rank 3
      0         3->      0->      1->      2->
      1         2->      3->      0->      1->
      2         1->      2->      3->      0->
    complete    0        1        2        3

Rounds: p - 1. Bytes sent per rank: (p - 1)/p n, the least possible.
Limits: none on p. Steps move single chunks, so uneven parts can be cut into segments; a round takes as long as its
largest part. The buffer is worked on in place: all chunks but the rank's own hold partial sums at the end.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, flat
from ..plan import Shape, Step
from . import ring


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return shape.size


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from ring.reduce_scatter(rank, shape.size)


def terms(shape: Shape) -> LinkTerms:
    return flat(shape, ring.reduce_scatter_terms(shape.size))
