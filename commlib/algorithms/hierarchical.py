"""Hierarchical all-reduce: reduce-scatter inside hosts, all-reduce across hosts, all-gather inside hosts.

Used by: Horovod (NCCL hierarchical), BlueConnect (Cho et al., 2019), and most MPI libraries in some form.

The buffer is cut into one shard per rank of the smallest host. On every host, local rank s owns shard s: it collects
its host's contributions, all-reduces them with the owners of shard s on the other hosts, and gives the result to its
host. With hosts of 3 and 2 ranks (shards A and B; a rank sends to the owners of its host):

    host 0:  rank 0 owns A   rank 1 owns B   rank 2 owns nothing        host 1:  rank 3 owns A   rank 4 owns B
      1. inside    0: B -> 1        1: A -> 0       2: A -> 0, B -> 1            3: B -> 4       4: A -> 3
      2. across    0 <-> 3 all-reduce A, 1 <-> 4 all-reduce B
      3. inside    0: A -> 1, 2     1: B -> 0, 2                                 3: A -> 4       4: B -> 3

The halves inside are those of the direct algorithm; across hosts it is halving-doubling for a power of two of them,
else the ring, because folding would cost bandwidth there.

Rounds: 2 inside; 2 lg h or 2 (h - 1) across h hosts.
Bytes sent per rank: inside at most 2 (g - 1)/s n, across 2 (h - 1)/h n/s, for g ranks on the largest and s on the
smallest host.
Limits: none; a host with one rank makes that rank carry everything, and all other hosts follow it. The closed form lets
every host wait for the largest at each phase: exact for hosts of equal size, else an upper bound.
"""
from __future__ import annotations

from types import ModuleType
from typing import Iterator

from ..cost import LinkTerms
from ..plan import Shape, Step, placed
from . import direct, halving_doubling, ring


def applicable(shape: Shape) -> bool:
    return True


def shards(shape: Shape) -> int:
    """As many as the smallest host has ranks."""
    return min(shape.ranks_per_host)


def one_rank_per_host(shape: Shape) -> Shape:
    """How the owners of one shard see the group."""
    return Shape((1,) * shape.hosts)


def across(shape: Shape) -> ModuleType:
    """The all-reduce between the owners of one shard."""
    return halving_doubling if shape.hosts & (shape.hosts - 1) == 0 else ring


def compose_nchunks(shape: Shape, across_hosts: ModuleType) -> int:
    """Chunks of the whole: every shard has those of the all-reduce across hosts."""
    return shards(shape) * across_hosts.nchunks(one_rank_per_host(shape))


def compose(rank: int, shape: Shape, across_hosts: ModuleType) -> Iterator[Step]:
    """The three phases, with a given all-reduce across hosts."""
    host, local_rank, owners = shape.host_of(rank), shape.local_rank(rank), shards(shape)
    neighbours = shape.ranks_of(host)
    width = across_hosts.nchunks(one_rank_per_host(shape))
    yield from placed(direct.reduce_scatter(local_rank, len(neighbours), owners), neighbours, width=width)
    if local_rank < owners:
        co_owners = [shape.ranks_of(other)[local_rank] for other in range(shape.hosts)]
        all_reduce = across_hosts.steps(host, one_rank_per_host(shape))
        yield from placed(all_reduce, co_owners, first_chunk=local_rank * width)
    yield from placed(direct.all_gather(local_rank, len(neighbours), owners), neighbours, width=width)


def compose_terms(shape: Shape, across_hosts: ModuleType) -> LinkTerms:
    """The sum of the phases, each as long as on the largest host."""
    largest, owners = max(shape.ranks_per_host), shards(shape)
    inside = direct.reduce_scatter_terms(largest, owners) + direct.all_gather_terms(largest, owners)
    whole = across_hosts.terms(one_rank_per_host(shape))
    return LinkTerms(inside=inside, between=whole.between.of_part(1 / owners))


def nchunks(shape: Shape) -> int:
    return compose_nchunks(shape, across(shape))


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from compose(rank, shape, across(shape))


def terms(shape: Shape) -> LinkTerms:
    return compose_terms(shape, across(shape))
