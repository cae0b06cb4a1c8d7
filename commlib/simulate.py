"""The engine under a virtual clock: many ranks in one process, the real plans, priorities and segments, a modelled network.

`Simulation` is the network and its engines; `simulate_training` drives a data-parallel training loop over it and says how
long a step takes. No payload moves unless memory is given, so that large models on many ranks cost only their events.
This file knows engines and clocks; which algorithm an operation gets is asked of `selection`, as in real runs.
"""

from __future__ import annotations

import enum
import statistics
from dataclasses import dataclass
from typing import NamedTuple, Sequence, Tuple

from commlib import algorithms
from commlib._native import ffi, lib
from commlib.cost import Link
from commlib.engine import ENGINE_SETTINGS, native_plan
from commlib.plan import Shape
from commlib.selection import ALONE, select
from commlib.settings import Settings

FLOAT32_NBYTES = 4

# Room for an operation's key beside the step in which it is used.
_TENSORS_PER_STEP = 1 << 32


class EventKind(enum.IntEnum):
    """What `Simulation.next` stopped at."""

    IDLE = lib.CL_SIM_IDLE
    TIMER = lib.CL_SIM_TIMER
    DONE = lib.CL_SIM_DONE


class Event(NamedTuple):
    """A timer (token as given) or a finished operation (token is its key) of one rank."""

    kind: EventKind
    rank: int
    token: int


class Simulation:
    """Engines of all ranks over a simulated network.

    Args:
        shape: ranks per host.
        inside, between: what links inside a host and between hosts cost. Every rank has one port of each class, which sends
            one message at a time and receives one at a time.
        settings: as for real engines; its link constants should be those of the links, as calibration would find them.

    Example:
        >>> network = Simulation(Shape((1, 1)), Link(0, 0), Link(20e-6, 8e-10), Settings())
        >>> for rank in range(2):
        ...     network.allreduce(rank, key=1, count=1000)
        >>> sorted(network.next().rank for _ in range(2)), network.next().kind.name
        ([0, 1], 'IDLE')
        >>> network.close()
    """

    def __init__(self, shape: Shape, inside: Link, between: Link, settings: Settings):
        self.shape = shape
        self.settings = settings
        self._plans = {}
        self._text = ffi.new("char[]", b"simulated all-reduce")
        self._rank, self._token = ffi.new("int32_t *"), ffi.new("uint64_t *")
        self._operation = ffi.new("cl_operation **")
        self._request = ffi.new("cl_request *", {"text": self._text, "kind": lib.CL_ALLREDUCE, "root": -1, "prescale": 1.0,
                                                 "postscale": 1.0, "dtype": lib.CL_FLOAT32})  # fmt: skip
        simulation = ffi.new("cl_sim **")
        status = lib.cl_sim_new(
            shape.size, [shape.host_of(rank) for rank in range(shape.size)], _native_link(inside), _native_link(between),
            ffi.new("cl_settings *", {name: getattr(settings, name) for name in ENGINE_SETTINGS}), simulation,
        )  # fmt: skip
        if status != lib.CL_OK:
            raise MemoryError(f"no memory for a simulation of {shape.size} ranks")
        self._simulation = ffi.gc(simulation[0], lib.cl_sim_free)
        self._engines = [lib.cl_sim_engine(self._simulation, rank) for rank in range(shape.size)]

    def allreduce(self, rank: int, key: int, count: int, priority: int = 0, memory=None, choice=None):
        """Submits one rank's part of an all-reduce (sum) of `count` float32 elements, at the present time.

        Args:
            rank: who submits.
            key: the same on all ranks, used once.
            count: elements.
            priority: lower goes first.
            memory: a writable float32 buffer reduced in place; None: only time passes.
            choice: a commlib.selection.Choice; None: what selection gives to one of many in flight.
        """
        plan, segment_count = self._plan(rank, count * FLOAT32_NBYTES, choice)
        request = self._request
        request.key, request.count, request.priority = key, count, priority
        request.plan, request.segment_count = plan, segment_count
        request.input = request.output = ffi.NULL if memory is None else ffi.from_buffer(memory, require_writable=True)
        if lib.cl_submit(self._engines[rank], request, self._operation) != lib.CL_OK:
            raise MemoryError("no memory for another operation")
        lib.cl_operation_release(self._operation[0])

    def timer(self, rank: int, at_s: float, token: int = 0):
        """Makes `next` return a TIMER event of that rank at that time."""
        if lib.cl_sim_timer(self._simulation, rank, at_s, token) != lib.CL_OK:
            raise ValueError(f"a timer at {at_s} s is in the past, or rank {rank} does not exist")

    def kill(self, rank: int):
        """From now on the rank is dead; its peers lose it after settings.lost_ms."""
        lib.cl_sim_kill(self._simulation, rank)

    def next(self) -> Event:
        """Runs until something happens that the caller must know of. IDLE: nothing is left to happen."""
        kind = lib.cl_sim_next(self._simulation, self._rank, self._token)
        if kind == lib.CL_SIM_NO_MEMORY:
            raise MemoryError("no memory for the simulation's next event: simulate fewer ranks, or shorter plans")
        return Event(EventKind(kind), self._rank[0], self._token[0])

    @property
    def now_s(self) -> float:
        """The virtual time."""
        return lib.cl_sim_now(self._simulation)

    def close(self):
        """Frees everything; the simulation must not be used after it."""
        if self._simulation is not None:
            ffi.release(self._simulation)
            self._simulation = None

    def _plan(self, rank, nbytes, choice):
        choice = choice or select("allreduce", nbytes, self.shape, self.settings, overlapped=True)
        plan = self._plans.get((rank, choice.algorithm))
        if plan is None:
            if choice.algorithm == ALONE:
                raise ValueError("a simulation needs at least two ranks")
            plan = native_plan(algorithms.plan_for("allreduce", choice.algorithm, rank, self.shape))
            self._plans[rank, choice.algorithm] = plan
        return plan, choice.segment_nbytes // FLOAT32_NBYTES


@dataclass(frozen=True)
class TrainingLayer:
    """What one layer does in a step.

    Args:
        forward_s, backward_s: compute on one rank, in seconds.
        counts: elements of each of its gradient tensors (float32), in order of first use.
    """

    forward_s: float
    backward_s: float
    counts: Tuple[int, ...] = ()


class Overlap(enum.Enum):
    """What a step waits for."""

    BOTH = "both passes"  # a layer's forward waits for its own gradients only
    BACKWARD = "backward"  # the next forward waits for all gradients, which move during backward
    NONE = "none"  # gradients move after backward, and the next forward waits for all


def simulate_training(layers: Sequence[TrainingLayer], simulation: Simulation, steps: int, overlap=Overlap.BOTH):
    """Runs `steps` training steps on every rank and returns their lengths.

    Args:
        layers: in order of forward use; priorities follow this order.
        simulation: a fresh Simulation.
        steps: at least 2.
        overlap: the schedule.

    Returns:
        A list of steps - 1 floats, in seconds: from the end of each backward pass to the end of the next, median of ranks.

    Raises:
        RuntimeError: the ranks wait for each other for ever (which would be a fault of the engine).
    """
    if steps < 2:
        raise ValueError("a step's length shows only between two steps: simulate at least 2")
    ranks = [_Rank(rank, layers, simulation, steps, overlap) for rank in range(simulation.shape.size)]
    for rank in ranks:
        rank.go_on()
    while (event := simulation.next()).kind is not EventKind.IDLE:
        if event.kind is EventKind.TIMER:
            ranks[event.rank].computed()
        else:
            ranks[event.rank].reduced(event.token)
    stuck = [rank.rank for rank in ranks if not rank.finished]
    if stuck:
        raise RuntimeError(f"the simulated ranks {stuck} wait for ever")
    ends = [statistics.median(times) for times in zip(*(rank.step_ends for rank in ranks))]
    return [after - before for before, after in zip(ends, ends[1:])]


class _Rank:
    """The training loop of one rank, as a state machine: forward up the layers, backward down, and again."""

    def __init__(self, rank, layers, simulation, steps, overlap):
        self.rank = rank
        self.layers = layers
        self.simulation = simulation
        self.steps_left = steps
        self.overlap = overlap
        self.step = 0
        self.position = 0  # layers are passed as 0 .. n-1 forward, then n .. 2n-1 backward
        self.computing = False
        self.step_ends = []
        self.awaited = [0] * len(layers)  # gradients of the step before that are still on their way
        self.first_tensor = [sum(len(layer.counts) for layer in layers[:i]) for i in range(len(layers))]
        self.layer_of = [i for i, layer in enumerate(layers) for _ in layer.counts]

    @property
    def finished(self):
        return self.steps_left == 0

    def go_on(self):
        """Starts the next layer's compute unless it has to wait."""
        if self.finished or self.computing or self._must_wait():
            return
        count = len(self.layers)
        forward = self.position < count
        layer = self.layers[self.position if forward else 2 * count - 1 - self.position]
        self.computing = True
        self.simulation.timer(self.rank, self.simulation.now_s + (layer.forward_s if forward else layer.backward_s))

    def _must_wait(self):
        if self.position >= len(self.layers):
            return False
        if self.overlap is Overlap.BOTH:
            return self.awaited[self.position] > 0
        return self.position == 0 and any(self.awaited)

    def computed(self):
        """A layer's compute is over."""
        self.computing = False
        count = len(self.layers)
        passed, self.position = self.position, self.position + 1
        if passed >= count and self.overlap is not Overlap.NONE:
            self._submit(2 * count - 1 - passed)
        if self.position == 2 * count:
            self._end_step()
        self.go_on()

    def _end_step(self):
        if self.overlap is Overlap.NONE:
            for layer in reversed(range(len(self.layers))):
                self._submit(layer)
        self.step_ends.append(self.simulation.now_s)
        self.position = 0
        self.step += 1
        self.steps_left -= 1

    def _submit(self, layer):
        first = self.first_tensor[layer]
        for tensor, count in enumerate(self.layers[layer].counts, first):
            self.awaited[layer] += 1
            key = self.step * _TENSORS_PER_STEP + tensor
            self.simulation.allreduce(self.rank, key, count, priority=tensor)

    def reduced(self, key):
        """One gradient has landed."""
        self.awaited[self.layer_of[key % _TENSORS_PER_STEP]] -= 1
        self.go_on()


def _native_link(link):
    return ffi.new("cl_sim_link *", {"alpha_s": link.alpha_s, "beta_s_per_byte": link.beta_s_per_byte,
                                     "gamma_s_per_byte": link.gamma_s_per_byte})  # fmt: skip
