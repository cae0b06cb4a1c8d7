"""Recursive doubling all-reduce: pairs exchange everything, at distances 1, 2, 4, ...

Paper: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", Int. J. High
Perform. Comput. Appl. 19 (2005).

After the round at distance d a rank holds the sum over its aligned block of 2 d ranks. With 4 ranks:

                 rank 0    rank 1    rank 2    rank 3
    start        a         b         c         d
    distance 1   a+b       b+a       c+d       d+c           0 <-> 1, 2 <-> 3
    distance 2   ab+cd     ba+dc     cd+ab     dc+ba         0 <-> 2, 1 <-> 3

Addition of two floats commutes, so all ranks hold the same bits although they name the operands in another order.
With p = 2^k + r ranks, the r odd ranks among the first 2 r take in their left neighbour's data before, and send it the
result after; with 5 ranks: 0 -> 1, then 1, 2, 3, 4 as above, then 1 -> 0.

Rounds: lg p (two more if p is no power of two). Bytes sent per rank: n lg p.
Limits: none on p; for small messages. A rank sends a chunk and reduces into it in the same round, so the receive must
be able to arrive before that send has left: one staging slot.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, Terms, flat
from ..plan import Shape, Step, recv_reduce, send
from . import fold


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return 1


def exchange(rank: int, size: int) -> Iterator[Step]:
    """All rounds for a power of two."""
    distance = 1
    while distance < size:
        yield send(rank ^ distance, 0, 1)
        yield recv_reduce(rank ^ distance, 0, 1)
        distance *= 2


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from fold.folded(exchange, rank, shape.size, nchunks(shape))


def terms(shape: Shape) -> LinkTerms:
    rounds = fold.rounds(shape.size)
    return flat(shape, Terms(alpha=rounds, beta=rounds, gamma=rounds) + fold.terms(shape.size))
