"""Ring all-reduce: reduce-scatter around a ring, then all-gather around it.

Paper: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", J. Parallel Distrib.
Comput. 69 (2009).

The buffer is cut into one chunk per rank. In each round every rank sends one chunk to its right neighbour and takes one
from its left. Chunk c starts at rank c + 1, collects a contribution at every hop and is complete at rank c. With 4
ranks (a number is a chunk, arrows are what a rank sends):

    reduce-scatter   rank 0   rank 1   rank 2   rank 3        all-gather   rank 0   rank 1   rank 2   rank 3
      round 0          3->      0->      1->      2->           round 3      0->      1->      2->      3->
      round 1          2->      3->      0->      1->           round 4      3->      0->      1->      2->
      round 2          1->      2->      3->      0->           round 5      2->      3->      0->      1->
      complete         0        1        2        3

Rounds: 2 (p - 1). Bytes sent per rank: 2 (p - 1)/p n, which is the least possible.
Limits: none on p; latency grows with p, so it is for large messages.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, Terms, flat
from ..plan import Shape, Step, recv, recv_reduce, send


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return shape.size


def reduce_scatter(rank: int, size: int) -> Iterator[Step]:
    """The first half: chunk r ends complete at rank r."""
    right, left = (rank + 1) % size, (rank - 1) % size
    for round_number in range(size - 1):
        outgoing = (rank - 1 - round_number) % size
        incoming = (rank - 2 - round_number) % size
        yield send(right, outgoing, outgoing + 1)
        yield recv_reduce(left, incoming, incoming + 1)


def all_gather(rank: int, size: int) -> Iterator[Step]:
    """The second half: chunk r, known at rank r, comes to everyone."""
    right, left = (rank + 1) % size, (rank - 1) % size
    for round_number in range(size - 1):
        outgoing = (rank - round_number) % size
        incoming = (rank - 1 - round_number) % size
        yield send(right, outgoing, outgoing + 1)
        yield recv(left, incoming, incoming + 1)


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from reduce_scatter(rank, shape.size)
    yield from all_gather(rank, shape.size)


def reduce_scatter_terms(size: int) -> Terms:
    """Cost of the first half, for n bytes in the whole buffer."""
    return Terms(alpha=size - 1, beta=(size - 1) / size, gamma=(size - 1) / size)


def all_gather_terms(size: int) -> Terms:
    """Cost of the second half."""
    return Terms(alpha=size - 1, beta=(size - 1) / size)


def terms(shape: Shape) -> LinkTerms:
    return flat(shape, reduce_scatter_terms(shape.size) + all_gather_terms(shape.size))
