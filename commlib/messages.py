"""Which gradients travel together, when they are sent and what waits for them: the schedules of training that are compared.

    name          sent                       awaited                               messages
    none          after backward             all, before the next step             buckets of 25 MB, one after the other
    backward      when complete, backward    all, before the next forward          buckets of 25 MB, as DDP's
    unordered     when complete, backward    each before its own layer's forward   groups, first come first served
    ours          when complete, backward    each before its own layer's forward   groups, first needed first served

This file knows counts of elements and positions of layers; it knows no clock, no engine and no framework.
"""
from __future__ import annotations

from types import MappingProxyType
from typing import List, Mapping, NamedTuple, Sequence, Tuple

FLOAT32_NBYTES = 4

# As torch's DistributedDataParallel: the first bucket is small, so that something begins early.
FIRST_BUCKET_NBYTES, BUCKET_NBYTES = 1 << 20, 25 << 20

# Small neighbours travel as one operation: what PyTorch's adapter begins with, for gradients of up to SMALL_NBYTES.
SMALL_NBYTES, GROUP_NBYTES = 64 << 10, 256 << 10


class Message(NamedTuple):
    """Gradients that travel as one operation.

    Args:
        count: elements (float32).
        ready: the layer whose backward makes the last of them.
        needed: the layer whose forward needs the first of them.
    """

    count: int
    ready: int
    needed: int


class Schedule(NamedTuple):
    """See the table above."""

    overlaps_backward: bool
    overlaps_forward: bool
    has_priorities: bool

    def messages(self, counts: Sequence[Sequence[int]], shrink: int = 1) -> List[Message]:
        """What travels: see `groups` and `buckets`."""
        return groups(counts) if self.overlaps_forward else buckets(counts, shrink)


SCHEDULES: Mapping[str, Schedule] = MappingProxyType({
    "none": Schedule(False, False, False),
    "backward": Schedule(True, False, False),
    "unordered": Schedule(True, True, False),
    "ours": Schedule(True, True, True),
})


def each(counts: Sequence[Sequence[int]]) -> List[Message]:
    """Every gradient by itself, in the order of need.

    Args:
        counts: elements of each tensor of each layer, in forward order.

    Example:
        >>> each([[3, 1], [2]])[2]
        Message(count=2, ready=1, needed=1)
    """
    return [Message(count, layer, layer) for layer, tensors in enumerate(counts) for count in tensors]


def buckets(counts: Sequence[Sequence[int]], shrink: int = 1) -> List[Message]:
    """Gradients in the order in which backward makes them, cut into buckets.

    Args:
        counts: elements of each tensor of each layer, in forward order.
        shrink: the counts are one in so many of the real ones; buckets shrink with them.

    Example:
        >>> [message.count for message in buckets([[1 << 20], [1 << 19], [1 << 20]])]
        [1048576, 1572864]
    """
    messages: List[Message] = []
    held = 0
    for layer in reversed(range(len(counts))):
        for count in reversed(counts[layer]):
            held += count
            limit = BUCKET_NBYTES if messages else FIRST_BUCKET_NBYTES
            if held * FLOAT32_NBYTES * shrink >= limit:
                messages.append(Message(held, layer, layer))
                held = 0
    if held:
        messages.append(Message(held, 0, 0))
    return messages


def groups(counts: Sequence[Sequence[int]]) -> List[Message]:
    """Gradients in the order of need: small neighbours together, each large one by itself.

    Args:
        counts: elements of each tensor of each layer, in forward order.

    Example:
        >>> groups([[100_000, 10], [20], [100_000]])
        [Message(count=100000, ready=0, needed=0), Message(count=30, ready=0, needed=0), Message(count=100000, ready=2, needed=2)]
    """
    messages: List[Message] = []
    held: List[Tuple[int, int]] = []  # (layer, elements)

    def close() -> None:
        if held:
            messages.append(Message(sum(count for _, count in held), held[0][0], held[0][0]))
            held.clear()

    for layer, tensors in enumerate(counts):
        for count in tensors:
            if count * FLOAT32_NBYTES > SMALL_NBYTES:
                messages.append(Message(count, layer, layer))
                continue
            held.append((layer, count))
            if sum(small for _, small in held) * FLOAT32_NBYTES >= GROUP_NBYTES:
                close()
    close()
    return sorted(messages, key=lambda message: message.needed)
