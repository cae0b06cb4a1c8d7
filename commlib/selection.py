"""Which algorithm and which segment size an operation gets: a pure function of what is equal on all ranks.

The cheapest applicable algorithm by its closed form, unless the settings force one. This file knows link classes and
costs; it knows no algorithm by name, no engine and no clock.
"""

from typing import NamedTuple

from commlib import algorithms

# A group of one has no peers, so no algorithm: its plan has no steps.
ALONE = "alone"

# What a link costs until it was measured: shared memory through a ring; 10 Gbit/s Ethernet with kernel TCP; one core.
_ALPHA_INSIDE_S, _BETA_INSIDE = 2e-6, 2.5e-10
_ALPHA_BETWEEN_S, _BETA_BETWEEN = 2e-5, 8e-10
_GAMMA = 1e-10

# A segment's chunks are to be this many times longer than what a link carries in one latency: latency costs at most a
# quarter then. And an operation is to have this many segments, if it is long enough, so that one fills the other's gaps.
_CHUNK_LATENCIES = 4
_SEGMENTS = 4

# Sizes differ between ranks there and are known only when the plan is chosen.
_UNEVEN = frozenset(("allgather", "alltoall"))


class Choice(NamedTuple):
    """How an operation is done: an algorithm of the table, and bytes per segment (0: one segment)."""

    algorithm: str
    segment_nbytes: int


class Machine(NamedTuple):
    """The cost of every link class: seconds, and seconds per byte."""

    alpha_inside_s: float
    beta_inside_s_per_byte: float
    alpha_between_s: float
    beta_between_s_per_byte: float
    gamma_s_per_byte: float

    def cost_s(self, terms, nbytes):
        """The time of an algorithm with these LinkTerms on nbytes."""
        inside, between = terms.inside, terms.between
        return (
            inside.alpha * self.alpha_inside_s + between.alpha * self.alpha_between_s
            + nbytes * (inside.beta * self.beta_inside_s_per_byte + between.beta * self.beta_between_s_per_byte
                        + (inside.gamma + between.gamma) * self.gamma_s_per_byte)
        )  # fmt: skip


def machine_of(settings):
    """The link classes of a settings record; a constant of 0 stands for the ordinary value."""
    return Machine(
        settings.alpha_inside_s or _ALPHA_INSIDE_S,
        settings.beta_inside_s_per_byte or _BETA_INSIDE,
        settings.alpha_between_s or _ALPHA_BETWEEN_S,
        settings.beta_between_s_per_byte or _BETA_BETWEEN,
        settings.gamma_s_per_byte or _GAMMA,
    )


def select(kind, nbytes, shape, settings):
    """Chooses algorithm and segment size.

    Args:
        kind: "allreduce", ...: a key of algorithms.KINDS.
        nbytes: bytes of the operation; not looked at where ranks may differ in it.
        shape: the commlib.plan.Shape of the group.
        settings: the record that all ranks hold.

    Raises:
        ValueError: the forced algorithm does not exist or does not support the shape.

    Example:
        >>> from commlib.plan import Shape
        >>> from commlib.settings import Settings
        >>> select("allreduce", 8, Shape((2,)), Settings(algorithms=(("allreduce", "ring"),))).algorithm
        'ring'
    """
    if shape.size == 1:
        return Choice(ALONE, 0)
    if kind in _UNEVEN:
        nbytes = settings.uneven_nbytes * shape.size
    machine = machine_of(settings)
    candidates = algorithms.applicable(kind, shape)
    forced = settings.forced_algorithm(kind)
    if forced is not None:
        module = algorithms.algorithm(kind, forced)
        if forced not in candidates:
            raise ValueError(f"{kind} is forced to {forced!r}, which does not support {shape.ranks_per_host} ranks per "
                             f"host: force one of {', '.join(candidates)}")  # fmt: skip
    else:
        # Ties go to the first of the table, so that the choice is the same everywhere.
        forced, module = min(candidates.items(), key=lambda item: machine.cost_s(item[1].terms(shape), nbytes))
    return Choice(forced, _segment_nbytes(nbytes, module.nchunks(shape), shape, machine, settings))


def _segment_nbytes(nbytes, nchunks, shape, machine, settings):
    if shape.hosts == 1:
        latency_nbytes = machine.alpha_inside_s / machine.beta_inside_s_per_byte
    else:
        latency_nbytes = machine.alpha_between_s / machine.beta_between_s_per_byte
    shortest = _CHUNK_LATENCIES * latency_nbytes * nchunks
    wanted = int(max(nbytes / _SEGMENTS, shortest))
    power_of_two = 1 << max(wanted - 1, 0).bit_length()
    return min(power_of_two, settings.segment_nbytes)
