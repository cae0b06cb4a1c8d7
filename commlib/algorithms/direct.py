"""Direct (two-shot) all-reduce: everyone sends everyone its share, everyone sends everyone its result.

Used by: the CPU all-reduce kernels of DeepSpeed and vLLM (two-shot), gloo's and MPICH's pairwise reduce-scatter.

The buffer is cut into one chunk per rank. Rank r collects all contributions to chunk r and then gives the sum away. To
keep every pair busy with a different partner, in round k rank r sends to r + k and receives from r - k. With 4 ranks:

    reduce-scatter    rank 0              rank 1              rank 2              rank 3
      round 1         sends 1 to 1        sends 2 to 2        sends 3 to 3        sends 0 to 0
      round 2         sends 2 to 2        sends 3 to 3        sends 0 to 0        sends 1 to 1
      round 3         sends 3 to 3        sends 0 to 0        sends 1 to 1        sends 2 to 2
    all-gather: in round k rank r sends its chunk r to r + k and receives chunk r - k from there.

Rounds do not wait for each other, so latency is paid once in each half.
Rounds: 2. Messages sent per rank: 2 (p - 1). Bytes sent per rank: 2 (p - 1)/p n.
Limits: one host. Between hosts everyone would send to everyone through one port at once: messages of different
operations queue up behind each other there, and in simulation (32 ranks, 10 Gbit/s) a pipelined step took 1.5 times the
ring's time; the closed form, which knows one undisturbed operation, cannot see that.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms, Terms, flat
from ..plan import Shape, Step, recv, recv_reduce, send


def applicable(shape: Shape) -> bool:
    return shape.hosts == 1


def nchunks(shape: Shape) -> int:
    return shape.size


def reduce_scatter(rank: int, size: int, owners: int) -> Iterator[Step]:
    """The first half: chunk r ends complete at rank r, for the ranks below `owners`; the others only give."""
    for distance in range(1, size):
        target, source = (rank + distance) % size, (rank - distance) % size
        if target < owners:
            yield send(target, target, target + 1)
        if rank < owners:
            yield recv_reduce(source, rank, rank + 1)


def all_gather(rank: int, size: int, owners: int) -> Iterator[Step]:
    """The second half: chunk r, known at rank r < owners, comes to everyone."""
    for distance in range(1, size):
        target, source = (rank + distance) % size, (rank - distance) % size
        if rank < owners:
            yield send(target, rank, rank + 1)
        if source < owners:
            yield recv(source, source, source + 1)


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from reduce_scatter(rank, shape.size, owners=shape.size)
    yield from all_gather(rank, shape.size, owners=shape.size)


def reduce_scatter_terms(size: int, owners: int) -> Terms:
    """Cost of the first half, for n bytes in the whole buffer."""
    share = (size - 1) / owners
    return Terms(alpha=1, beta=share, gamma=share) if size > 1 else Terms()


def all_gather_terms(size: int, owners: int) -> Terms:
    """Cost of the second half."""
    return Terms(alpha=1, beta=(size - 1) / owners) if size > 1 else Terms()


def terms(shape: Shape) -> LinkTerms:
    return flat(shape, reduce_scatter_terms(shape.size, shape.size) + all_gather_terms(shape.size, shape.size))
