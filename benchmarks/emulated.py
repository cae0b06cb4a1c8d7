"""Emulated training: a model's real layer table, accelerators that are timed waits, and real messages in between.

An accelerator works through the layers, forward and backward, on a clock of its own; the host sleeps until a gradient is
due and then hands it over. What moves gradients is given as an object (`movers`), and when they move by a schedule:

    name          sent                       awaited                               sizes
    none          after backward             all, before the next step             buckets of 25 MB, one after the other
    backward      when complete, backward    all, before the next forward          buckets of 25 MB, as DDP's
    unordered     when complete, backward    each before its own layer's forward   groups, first come first served
    ours          when complete, backward    each before its own layer's forward   groups, first needed first served

This file knows layers, clocks and schedules; it knows no library and no network.
"""

import time
from typing import List, NamedTuple, Sequence, Tuple

FLOAT32_NBYTES = 4
# As torch's DistributedDataParallel: the first bucket is small, so that something begins early.
FIRST_BUCKET_NBYTES, BUCKET_NBYTES = 1 << 20, 25 << 20
# Small neighbours travel as one operation.
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


SCHEDULES = {
    "none": Schedule(False, False, False),
    "backward": Schedule(True, False, False),
    "unordered": Schedule(True, True, False),
    "ours": Schedule(True, True, True),
}


def buckets(counts: Sequence[Sequence[int]], shrink: int = 1) -> List[Message]:
    """Gradients in the order in which backward makes them, cut into buckets.

    Args:
        counts: elements of each tensor of each layer, in forward order.
        shrink: the counts are one in so many of the real ones; buckets shrink with them.
    """
    messages: List[Message] = []
    held, last = 0, len(counts) - 1
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
    """Gradients in the order of need: small neighbours together, each large one by itself."""
    messages: List[Message] = []
    held: List[Tuple[int, int]] = []  # (layer, elements)

    def close():
        if held:
            messages.append(Message(sum(count for _, count in held), held[0][0], held[0][0]))
            held.clear()

    for layer, tensors in enumerate(counts):
        for count in tensors:
            if count * FLOAT32_NBYTES > SMALL_NBYTES:
                messages.append(Message(count, layer, layer))
                continue
            held.append((layer, count))
            if sum(n for _, n in held) * FLOAT32_NBYTES >= GROUP_NBYTES:
                close()
    close()
    return sorted(messages, key=lambda message: message.needed)


class Training:
    """The training loop of one rank.

    Args:
        counts: elements of each tensor of each layer, in forward order.
        times: a commlib.schedule.LayerTime per layer; communication_s is not looked at.
        schedule: of SCHEDULES.
        mover: has `array(count)`, `start(array, name, priority)`, which returns a function that waits, and `barrier()`.
        name: of this training, equal on all ranks.
        shrink: see `buckets`.
    """

    def __init__(self, counts, times, schedule, mover, name, shrink=1):
        self.times, self.schedule, self.mover = times, schedule, mover
        self.messages = groups(counts) if schedule.overlaps_forward else buckets(counts, shrink)
        self.arrays = [mover.array(message.count) for message in self.messages]
        self.names = [f"{name} {number}" for number in range(len(self.messages))]
        self.ready_at = self._by_layer(lambda message: message.ready)
        self.needed_at = self._by_layer(lambda message: message.needed if schedule.overlaps_forward else 0)
        self.waits = [None] * len(self.messages)

    def run(self, steps: int) -> List[float]:
        """Trains for that many steps. Returns the seconds between the ends of their backward passes, steps - 1 of them."""
        self.mover.barrier()
        self.clock_s = time.monotonic()  # when the accelerator will have done all that it was given
        ends_s = []
        for _ in range(steps):
            self._forward()
            self._backward()
            ends_s.append(self.clock_s)
            if not self.schedule.overlaps_backward:
                self._send_all()
        for number in range(len(self.messages)):
            self._wait(number)
        return [end_s - begin_s for begin_s, end_s in zip(ends_s, ends_s[1:])]

    def _forward(self):
        for layer, layer_time in enumerate(self.times):
            for number in self.needed_at[layer]:
                self._wait(number)
            self.clock_s += layer_time.forward_s

    def _backward(self):
        for layer in reversed(range(len(self.times))):
            self.clock_s += self.times[layer].backward_s
            if self.ready_at[layer] and self.schedule.overlaps_backward:
                _sleep_until(self.clock_s)
                for number in self.ready_at[layer]:
                    self._start(number)
        _sleep_until(self.clock_s)

    def _send_all(self):
        for number in range(len(self.messages)):
            self._start(number)
            self._wait(number)

    def _start(self, number):
        priority = number if self.schedule.has_priorities else 0
        self.waits[number] = self.mover.start(self.arrays[number], self.names[number], priority)

    def _wait(self, number):
        wait, self.waits[number] = self.waits[number], None
        if wait is not None:
            wait()
            self.clock_s = max(self.clock_s, time.monotonic())

    def _by_layer(self, layer_of):
        table = [[] for _ in self.times]
        for number, message in enumerate(self.messages):
            table[layer_of(message)].append(number)
        return table


def _sleep_until(clock_s):
    left_s = clock_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)
