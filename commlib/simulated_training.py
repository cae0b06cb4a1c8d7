"""A data-parallel training loop over a simulated network: how long a step takes under a schedule.

Every rank is a state machine that goes through its layers, forward and backward, on the simulation's clock. This file knows
layers, messages and schedules; what moves the messages is the simulation's business.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

from commlib.messages import SCHEDULES, Message, Schedule, each
from commlib.simulation import EventKind, Simulation

# Room for a message's number beside the step in which it is sent.
_MESSAGES_PER_STEP = 1 << 32


@dataclass(frozen=True)
class TrainingLayer:
    """What one layer does in a step.

    Args:
        forward_s, backward_s: compute on one rank, in seconds.
        counts: elements of each of its gradient tensors (float32), in order of first use.
        name: for people.
    """

    forward_s: float
    backward_s: float
    counts: Tuple[int, ...] = ()
    name: str = ""


def simulate_training(
    layers: Sequence[TrainingLayer],
    simulation: Simulation,
    steps: int,
    schedule: Schedule = SCHEDULES["ours"],
    messages: Optional[Sequence[Message]] = None,
    slowness: Optional[Sequence[float]] = None,
    progress: Callable[[float], None] = lambda share: None,
) -> List[float]:
    """Runs `steps` training steps on every rank and returns their lengths.

    Args:
        layers: in order of forward use.
        simulation: a fresh Simulation.
        steps: at least 2.
        schedule: when messages are sent and what waits for them.
        messages: the gradients, grouped, the most urgent first; None: every tensor by itself.
        slowness: per rank, by what its compute is multiplied; None: 1.
        progress: told now and then which share of the work is done.

    Returns:
        A list of steps - 1 floats, in seconds: from the end of each backward pass to the end of the next, median of ranks.

    Raises:
        ValueError: fewer than 2 steps.
        RuntimeError: the ranks wait for each other for ever (which would be a fault of the engine).

    Example:
        >>> from commlib.cost import Link
        >>> from commlib.plan import Shape
        >>> from commlib.settings import Settings
        >>> network = Simulation(Shape((1, 1)), Link(0, 0), Link(20e-6, 8e-10), Settings())
        >>> [round(step_s, 6) for step_s in simulate_training([TrainingLayer(1e-3, 2e-3, (250_000,))], network, 3)]
        [0.00384, 0.00384]
    """
    if steps < 2:
        raise ValueError("a step's length shows only between two steps: simulate at least 2")
    size = simulation.shape.size
    sent = each([layer.counts for layer in layers]) if messages is None else list(messages)
    legs = _legs(layers, sent, schedule)
    ranks = [_Rank(rank, legs, sent, simulation, steps, schedule, slowness[rank] if slowness else 1.0) for rank in range(size)]
    for rank in ranks:
        rank.go_on()
    done, told = 0, max(1, size * steps * len(legs) // 200)
    while (event := simulation.next()).kind is not EventKind.IDLE:
        if event.kind is EventKind.TIMER:
            ranks[event.rank].computed()
            done += 1
            if done % told == 0:
                progress(done / (size * steps * len(legs)))
        else:
            ranks[event.rank].reduced(event.token % _MESSAGES_PER_STEP)
    stuck = [rank.rank for rank in ranks if rank.steps_left]
    if stuck:
        raise RuntimeError(f"the simulated ranks {stuck} wait for ever")
    ends = [statistics.median(times) for times in zip(*(rank.step_ends for rank in ranks))]
    return [after - before for before, after in zip(ends, ends[1:])]


class _Leg(NamedTuple):
    """Layers that are computed in one go: nothing in between waits or sends."""

    compute_s: float
    waits: Tuple[int, ...]  # for these messages of the step before
    sends: Tuple[int, ...]


def _legs(layers, messages, schedule) -> List[_Leg]:
    """One step: forward up the layers, backward down."""
    needed: List[List[int]] = [[] for _ in layers]
    ready: List[List[int]] = [[] for _ in layers]
    for number, message in enumerate(messages):
        needed[message.needed if schedule.overlaps_forward else 0].append(number)
        ready[message.ready if schedule.overlaps_backward else 0].append(number)
    parts = [(layer.forward_s, needed[index], ()) for index, layer in enumerate(layers)]
    parts += [(layer.backward_s, (), ready[index]) for index, layer in reversed(list(enumerate(layers)))]
    legs: List[_Leg] = []
    for compute_s, waits, sends in parts:
        if legs and not waits and not legs[-1].sends:
            legs[-1] = _Leg(legs[-1].compute_s + compute_s, legs[-1].waits, tuple(sends))
        else:
            legs.append(_Leg(compute_s, tuple(waits), tuple(sends)))
    return legs


class _Rank:
    """The training loop of one rank, as a state machine."""

    def __init__(self, rank, legs, messages, simulation, steps, schedule, slowness):
        self.rank = rank
        self.legs = legs
        self.messages = messages
        self.simulation = simulation
        self.steps_left = steps
        self.schedule = schedule
        self.slowness = slowness
        self.step = 0
        self.position = 0
        self.computing = False
        self.step_ends = []
        self.under_way = [False] * len(messages)
        self.queue = []  # without overlap: what is sent when the one before has landed, last first

    def go_on(self):
        """Starts the next leg unless it has to wait."""
        if self.computing or self.steps_left == 0:
            return
        leg = self.legs[self.position]
        for number in leg.waits:
            if self.under_way[number]:
                return
        self.computing = True
        self.simulation.timer(self.rank, self.simulation.now_s + leg.compute_s * self.slowness)

    def computed(self):
        """A leg is over."""
        self.computing = False
        sends, self.position = self.legs[self.position].sends, self.position + 1
        if self.schedule.overlaps_backward:
            for number in sends:
                self._send(number)
        if self.position == len(self.legs):
            self._end_step()
        self.go_on()

    def reduced(self, number):
        """A message has landed."""
        self.under_way[number] = False
        if self.queue:
            self._send(self.queue.pop())
        self.go_on()

    def _end_step(self):
        self.step_ends.append(self.simulation.now_s)
        self.step += 1
        if not self.schedule.overlaps_backward and self.messages:
            self.under_way = [True] * len(self.messages)
            self.queue = list(reversed(range(len(self.messages))))
            self._send(self.queue.pop())
        self.position = 0
        self.steps_left -= 1

    def _send(self, number):
        self.under_way[number] = True
        priority = number if self.schedule.has_priorities else 0
        key = self.step * _MESSAGES_PER_STEP + number
        self.simulation.allreduce(self.rank, key, self.messages[number].count, priority)
