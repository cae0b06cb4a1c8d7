"""Dissemination barrier: after round k everyone has heard, directly or not, of the 2^(k + 1) ranks to its left.

Paper: Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", Int. J. Parallel Program. 17 (1988).

In round k rank r sends to r + 2^k and receives from r - 2^k. With 5 ranks:

    round 0    0 -> 1    1 -> 2    2 -> 3    3 -> 4    4 -> 0
    round 1    0 -> 2    1 -> 3    2 -> 4    3 -> 0    4 -> 1
    round 2    0 -> 4    1 -> 0    2 -> 1    3 -> 2    4 -> 3

One chunk is sent and reduced, with a reduction that may take in the same contribution twice (Max): a rank may hear of
another by two ways when p is no power of two. One byte is enough; what counts is that it depends on all ranks.

Rounds: lg p, rounded up. Bytes sent per rank: n lg p, rounded up, with n = 1.
Limits: none on p; wrong for Sum. As in recursive doubling, a rank sends and reduces the same chunk in one round: one
staging slot.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, Terms, flat
from ..plan import Shape, Step, recv_reduce, send


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return 1


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    distance = 1
    while distance < shape.size:
        yield send((rank + distance) % shape.size, 0, 1)
        yield recv_reduce((rank - distance) % shape.size, 0, 1)
        distance *= 2


def terms(shape: Shape) -> LinkTerms:
    rounds = (shape.size - 1).bit_length()
    return flat(shape, Terms(alpha=rounds, beta=rounds, gamma=rounds))
