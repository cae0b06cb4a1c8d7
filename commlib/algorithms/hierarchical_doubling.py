"""Hierarchical all-reduce with recursive doubling across hosts: for small messages on several hosts.

Paper: Thakur, Rabenseifner and Gropp, 2005, for the exchange; see hierarchical for the phases.

The same three phases as hierarchical, but the owners of a shard exchange all of it, at distances 1, 2, 4, ... hosts.
With hosts of 3 and 2 ranks (shards A and B):

      1. inside    0: B -> 1        1: A -> 0       2: A -> 0, B -> 1            3: B -> 4       4: A -> 3
      2. across    0 <-> 3 exchange A, 1 <-> 4 exchange B
      3. inside    0: A -> 1, 2     1: B -> 0, 2                                 3: A -> 4       4: B -> 3

Rounds: 2 inside, lg h across h hosts (two more if h is no power of two).
Bytes sent per rank: inside at most 2 (g - 1)/s n, across lg h n/s, for g ranks on the largest and s on the smallest
host.
Limits: those of hierarchical; bandwidth across hosts grows with lg h.
"""
from __future__ import annotations

from typing import Iterator

from ..cost import LinkTerms
from ..plan import Shape, Step
from . import hierarchical, recursive_doubling


def applicable(shape: Shape) -> bool:
    return True


def nchunks(shape: Shape) -> int:
    return hierarchical.compose_nchunks(shape, recursive_doubling)


def steps(rank: int, shape: Shape) -> Iterator[Step]:
    yield from hierarchical.compose(rank, shape, recursive_doubling)


def terms(shape: Shape) -> LinkTerms:
    return hierarchical.compose_terms(shape, recursive_doubling)
