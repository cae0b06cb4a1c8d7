"""Any number of ranks for all-reduces that are written for powers of two: fold in before, fold out after.

This is no algorithm by itself. With p = 2^k + r ranks, the first 2 r ranks form r pairs. In a pair, the even rank gives
its data to the odd one, sits out, and is given the result. The odd ranks and all ranks from 2 r on are the core of 2^k.

    p = 5:   rank 0 -> rank 1        core: ranks 1, 2, 3, 4 as 0, 1, 2, 3        rank 1 -> rank 0
"""
from __future__ import annotations

from typing import Callable, Iterator, List

from ..cost import Terms
from ..plan import Step, placed, recv, recv_reduce, send


def rounds(size: int) -> int:
    """lg of the core's size: the largest k with 2^k <= size."""
    return size.bit_length() - 1


def core(size: int) -> List[int]:
    """The ranks that take part between folding in and folding out, in order."""
    pairs = size - (1 << rounds(size))
    return list(range(1, 2 * pairs, 2)) + list(range(2 * pairs, size))


def folded(
    exchange: Callable[[int, int], Iterator[Step]], rank: int, size: int, nchunks: int
) -> Iterator[Step]:
    """The steps of `exchange(core rank, core size)`, between folding in and folding out."""
    members = core(size)
    pairs = size - len(members)
    if rank < 2 * pairs and rank % 2 == 0:
        yield send(rank + 1, 0, nchunks)
        yield recv(rank + 1, 0, nchunks)
        return
    if rank < 2 * pairs:
        yield recv_reduce(rank - 1, 0, nchunks)
    yield from placed(exchange(members.index(rank), len(members)), members)
    if rank < 2 * pairs:
        yield send(rank - 1, 0, nchunks)


def terms(size: int) -> Terms:
    """What folding adds: the whole buffer in, with a reduction, and out."""
    return Terms() if size == 1 << rounds(size) else Terms(alpha=2, beta=2, gamma=1)
