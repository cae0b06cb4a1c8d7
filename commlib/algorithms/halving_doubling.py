"""Halving-doubling all-reduce: reduce-scatter by recursive halving, then all-gather by recursive doubling.

Paper: Rabenseifner, "Optimization of collective reduction operations", ICCS 2004; Thakur, Rabenseifner and Gropp, 2005.

Pairs exchange halves of what they still hold, at distances 1, 2, 4, ..., and then the way back. With 4 ranks and 4
chunks (the chunks that a rank still reduces, later knows):

                    rank 0     rank 1     rank 2     rank 3
    start           0 1 2 3    0 1 2 3    0 1 2 3    0 1 2 3
    distance 1      0 1        2 3        0 1        2 3          0 <-> 1, 2 <-> 3 with 2 chunks
    distance 2      0          2          1          3            0 <-> 2, 1 <-> 3 with 1 chunk: now each is complete
    distance 2      0 1        2 3        0 1        2 3          the way back: receives overwrite
    distance 1      0 1 2 3    0 1 2 3    0 1 2 3    0 1 2 3

The biggest messages go to the nearest rank, most likely on the same host. With p = 2^k + r ranks, r ranks are folded in
and out, as in recursive doubling; with 5 ranks: 0 -> 1, then 1, 2, 3, 4 as above, then 1 -> 0.

Rounds: 2 lg p (two more if p is no power of two).
Bytes sent per rank: 2 (p - 1)/p n, the least possible, for powers of two; folding adds up to 2 n to the critical path.
Limits: none on p; best for powers of two.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, Terms, flat
from ..plan import Shape, Step, recv, recv_reduce, send
from . import fold


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return 1 << fold.rounds(shape.size)


def exchange(rank: int, size: int) -> Iterator[Step]:
    """All rounds for a power of two, with as many chunks as ranks."""
    first, end = 0, size
    way_back = []
    distance = 1
    while distance < size:
        peer, middle = rank ^ distance, (first + end) // 2
        lower, upper = (first, middle), (middle, end)
        kept, given = (upper, lower) if rank & distance else (lower, upper)
        yield send(peer, *given)
        yield recv_reduce(peer, *kept)
        way_back.append((peer, kept, given))
        first, end = kept
        distance *= 2
    for peer, kept, given in reversed(way_back):
        yield send(peer, *kept)
        yield recv(peer, *given)


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from fold.folded(exchange, rank, shape.size, nchunks(shape))


def terms(shape: Shape) -> LinkTerms:
    core = nchunks(shape)
    share = (core - 1) / core
    return flat(shape, Terms(2 * fold.rounds(shape.size), 2 * share, share) + fold.terms(shape.size))
