"""Emulated training: a model's real layer table, accelerators that are timed waits, and real messages in between.

An accelerator works through the layers, forward and backward, on a clock of its own; the host sleeps until a gradient is
due and then hands it over. What moves gradients is given as an object (`movers`), when they move by a schedule and together
with which others by its messages (`commlib.messages`, as `commlib simulate` has them). This file knows layers and clocks; it
knows no library and no network.
"""

import time
from typing import List


class Training:
    """The training loop of one rank.

    Args:
        counts: elements of each tensor of each layer, in forward order.
        times: a commlib.schedule.LayerTime per layer; communication_s is not looked at.
        schedule: of commlib.messages.SCHEDULES.
        mover: has `array(count)`, `start(array, name, priority)`, which returns a function that waits, and `barrier()`.
        name: of this training, equal on all ranks.
        shrink: see `commlib.messages.buckets`.
    """

    def __init__(self, counts, times, schedule, mover, name, shrink=1):
        self.times, self.schedule, self.mover = times, schedule, mover
        self.messages = schedule.messages(counts, shrink)
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
