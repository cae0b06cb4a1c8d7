"""Direct all-gather: everyone sends its part to everyone. Chunk r is rank r's part, of any size.

Used by: MPI libraries as "linear" all-gather, and the two-shot all-reduce as its second shot.

In round k rank r sends to r + k and receives from r - k. With 4 ranks:

    round 1    0 -> 1    1 -> 2    2 -> 3    3 -> 0
    round 2    0 -> 2    1 -> 3    2 -> 0    3 -> 1
    round 3    0 -> 3    1 -> 0    2 -> 1    3 -> 2

Rounds: 1, because rounds do not wait for each other. Messages sent per rank: p - 1.
Bytes sent per rank: (p - 1) times its own part.
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
    yield from direct.all_gather(rank, shape.size, owners=shape.size)


def terms(shape: Shape) -> LinkTerms:
    return flat(shape, direct.all_gather_terms(shape.size, shape.size))
