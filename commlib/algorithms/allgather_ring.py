"""Ring all-gather: every part travels around the ring. Chunk r is rank r's part, of any size.

Paper: Thakur, Rabenseifner and Gropp, 2005.

It is the second half of the ring all-reduce. With 4 ranks (a number is the chunk that a rank sends to its right):

    round     rank 0   rank 1   rank 2   rank 3
      0         0->      1->      2->      3->
      1         3->      0->      1->      2->
      2         2->      3->      0->      1->

Rounds: p - 1. Bytes sent per rank: (p - 1)/p n, for n bytes of result; the least possible.
Limits: none on p. Steps move single chunks, so uneven parts can be cut into segments; a round takes as long as its
largest part.
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
    yield from ring.all_gather(rank, shape.size)


def terms(shape: Shape) -> LinkTerms:
    return flat(shape, ring.all_gather_terms(shape.size))
