"""Pairwise all-to-all: in round k everyone sends to the rank k to the right and receives from the rank k to the left.

Paper: Thakur, Rabenseifner and Gropp, 2005.

Chunks 0 to p - 1 are the input (chunk j goes to rank j) and chunks p to 2 p - 1 the output (chunk p + i comes from rank
i), each of any size. A rank's own chunk is copied outside the plan. With 4 ranks:

    round 1    0 -> 1    1 -> 2    2 -> 3    3 -> 0
    round 2    0 -> 2    1 -> 3    2 -> 0    3 -> 1
    round 3    0 -> 3    1 -> 0    2 -> 1    3 -> 2

Rounds: 1, because rounds do not wait for each other. Messages sent per rank: p - 1.
Bytes sent per rank: (p - 1)/p n, for n bytes of input; the least possible without forwarding.
Limits: none on p; with uneven parts a round is as long as its largest part.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, Terms, flat
from ..plan import Shape, Step, recv, send


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return 2 * shape.size


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    size = shape.size
    for distance in range(1, size):
        target, source = (rank + distance) % size, (rank - distance) % size
        yield send(target, target, target + 1)
        yield recv(source, size + source, size + source + 1)


def terms(shape: Shape) -> LinkTerms:
    size = shape.size
    return flat(shape, Terms(alpha=1, beta=(size - 1) / size) if size > 1 else Terms())
