"""The engine under a virtual clock: many ranks in one process, the real plans, priorities and segments, a modelled network.

No payload moves unless memory is given, so that large models on many ranks cost only their events. This file knows engines
and clocks; which algorithm an operation gets is asked of `selection`, as in real runs.
"""

from __future__ import annotations

import enum
from typing import Dict, NamedTuple, Optional, Sequence

from commlib import algorithms
from commlib._native import ffi, lib
from commlib.cluster import Processor
from commlib.cost import Link
from commlib.engine import ENGINE_SETTINGS
from commlib.plan import Shape
from commlib.requests import native_plan
from commlib.selection import ALONE, Choice, select
from commlib.settings import Settings

FLOAT32_NBYTES = 4


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
        shares_port: the ranks of a host share one port between hosts.
        switch_beta_s_per_byte: 1 / bandwidth of the switch that all hosts together send through; 0: it never limits.
        jitter_s: latencies between hosts are longer by a random time of this mean, exponentially distributed.
        seed: of the jitter.
        slowness: per rank, by what the time of its reductions is multiplied; None: 1.
        processor: what messages cost those who send and receive them.

    Raises:
        ValueError: a time, rate or factor that is negative or not finite, or a slowness that is missing for some rank.
        MemoryError: too many ranks for this machine.

    Example:
        >>> network = Simulation(Shape((1, 1)), Link(0, 0), Link(20e-6, 8e-10), Settings())
        >>> for rank in range(2):
        ...     network.allreduce(rank, key=1, count=1000)
        >>> sorted(network.next().rank for _ in range(2)), network.next().kind.name
        ([0, 1], 'IDLE')
        >>> network.close()
    """

    def __init__(self, shape: Shape, inside: Link, between: Link, settings: Settings, shares_port: bool = False,
                 switch_beta_s_per_byte: float = 0.0, jitter_s: float = 0.0, seed: int = 0,
                 slowness: Optional[Sequence[float]] = None, processor: Processor = Processor()):  # fmt: skip
        factors = [1.0] * shape.size if slowness is None else list(slowness)
        if len(factors) != shape.size or not all(0 <= number < float("inf") for number in (
                *factors, switch_beta_s_per_byte, jitter_s, *processor)):  # fmt: skip
            raise ValueError("a simulated network's times and factors are finite and not negative, and every rank has a "
                             f"slowness: got {jitter_s=}, {switch_beta_s_per_byte=} and {len(factors)} of {shape.size}")
        self.shape = shape
        self.settings = settings
        self._plans = {}
        self._choices: Dict[int, Choice] = {}
        self._text = ffi.new("char[]", b"simulated all-reduce")
        self._rank, self._token = ffi.new("int32_t *"), ffi.new("uint64_t *")
        self._operation = ffi.new("cl_operation **")
        self._request = ffi.new("cl_request *", {"text": self._text, "kind": lib.CL_ALLREDUCE, "root": -1, "prescale": 1.0,
                                                 "postscale": 1.0, "dtype": lib.CL_FLOAT32})  # fmt: skip
        hosts = ffi.new("int32_t[]", [shape.host_of(rank) for rank in range(shape.size)])
        slow = ffi.new("double[]", factors)
        network = ffi.new("cl_sim_network *", {
            "size": shape.size, "hosts": hosts, "inside": inside.__dict__, "between": between.__dict__, "unconnected": 1,
            "shares_port": shares_port, "switch_beta_s_per_byte": switch_beta_s_per_byte, "jitter_s": jitter_s,
            "seed": seed, "slowness": slow, "cores": processor.cores, "hosts_per_processor": processor.hosts,
            "message_s": processor.message_s, "busy_s_per_byte": processor.busy_s_per_byte,
        })  # fmt: skip
        native_settings = ffi.new("cl_settings *", {name: getattr(settings, name) for name in ENGINE_SETTINGS})
        simulation = ffi.new("cl_sim **")
        if lib.cl_sim_new_on(network, native_settings, simulation) != lib.CL_OK:
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

    def choice(self, nbytes: int) -> Choice:
        """The algorithm and segments that selection gives to an all-reduce of so many bytes, one of many in flight."""
        choice = self._choices.get(nbytes)
        if choice is None:
            choice = self._choices[nbytes] = select("allreduce", nbytes, self.shape, self.settings, overlapped=True)
        return choice

    def _plan(self, rank, nbytes, choice):
        choice = choice or self.choice(nbytes)
        plan = self._plans.get((rank, choice.algorithm))
        if plan is None:
            if choice.algorithm == ALONE:
                raise ValueError("a simulation needs at least two ranks")
            plan = self._plans[rank, choice.algorithm] = self._new_plan(rank, choice.algorithm)
        return plan, choice.segment_nbytes // FLOAT32_NBYTES

    def _new_plan(self, rank, algorithm):
        """Packs it, and links the rank to those it talks to: of two million pairs of 2,048 ranks a few are used."""
        plan = algorithms.plan_for("allreduce", algorithm, rank, self.shape)
        for peer in {step.peer for step in plan.steps}:
            if lib.cl_sim_connect(self._simulation, rank, peer) != lib.CL_OK:
                raise MemoryError(f"no memory for the link between ranks {rank} and {peer}")
        return native_plan(plan)
