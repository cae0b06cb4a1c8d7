"""Which algorithm and which segment size an operation gets: a pure function of what is equal on all ranks.

The cheapest applicable algorithm by its closed form, unless the settings force one or have a table of choices. This file
knows link classes and costs; it knows no algorithm by name, no engine and no clock.
"""

from typing import NamedTuple

from commlib import algorithms
from commlib.cost import Link, Machine, cost_s

# A group of one has no peers, so no algorithm: its plan has no steps.
ALONE = "alone"

# Not planned but moved by MPI's own collective, where the settings say so: see commlib.mpi_mover.
MPI_OWN = "mpi"

# What a link costs until it was measured: shared memory through a ring; 10 Gbit/s Ethernet with kernel TCP; one core.
_ALPHA_INSIDE_S, _BETA_INSIDE = 2e-6, 2.5e-10
_ALPHA_BETWEEN_S, _BETA_BETWEEN = 2e-5, 8e-10
_GAMMA = 1e-10

# A segment's chunks are to be this many times longer than what a link carries in one latency: latency costs at most a
# quarter then. And an operation is to have this many segments, if it is long enough, so that one fills the other's gaps.
_CHUNK_LATENCIES = 4
_SEGMENTS = 4

# Inside a host a chunk of private memory goes through a place of this size in the second-level cache (CL_STAGE_NBYTES of
# native/shm.h), and what is longer takes a pass more. Measured on 2 ranks with 1 MiB of that cache: two places of 256 KiB
# take 119 us for 4 MiB, 642 for 16 and 3.9 ms for 64, four of half the size 125, 725 and 4.2; arrays in shared memory,
# which need no such place, 52 and 62 us for 4 MiB.
_CHUNK_INSIDE_NBYTES = 256 << 10

# Overlapped operations between hosts share each rank's one port. A ring has one neighbour on each side, so their
# messages never wait for each other's partners, and its latency is hidden by the others in flight: it is worth having
# up to this multiple of the cheapest closed form. Simulated (ResNet-50, 10 Gbit/s, 20 us, communication as long as
# compute), a step of 32 ranks takes 1.13 of the ideal schedule with 1, 1.01 with 4; of 64 ranks 1.18 and 1.02.
_PATIENCE = 4.0

# But what is in flight together must fill the ring: each rank's chunk is to be as long as what a link carries in one latency, or
# nothing hides that. A model is not known here, so this much is taken to be in flight; where a ring takes more, patience shrinks
# with it. Simulated (216 us, 232 Gbit/s, 64 ranks: 400 MB), AlexNet's step takes 1.19 of the ideal schedule's and 1.80 without,
# BERT-base's 1.12 and 1.71; from 1 to 100 Gbit/s with 10 to 100 us nothing changes up to 64 ranks.
_IN_FLIGHT_NBYTES = 32 << 20

# Alone, a long operation's own segments share the port in the same way: 25 MB on 8 hosts at 1 Gbit/s reach 0.97 of the link's
# ceiling by a ring and 0.88 by halving-doubling, on 16 hosts at 500 Mbit/s 0.99 and 0.83, where closed forms see no difference.
_PATIENCE_ALONE = 1.25

# A message between hosts costs both of them about 12 us of processor time, which training wants as well: segments have
# chunks of this length if they may be so long, and patience ends where chunks would be shorter than the second.
# Measured on 64 hosts at 100 Mbit/s (AlexNet, one in 50 elements): 1,867 messages per rank and step without these.
_CHUNK_BETWEEN_NBYTES = 32 << 10
_LEAST_CHUNK_NBYTES = 4 << 10

# Sizes differ between ranks there and are known only when the plan is chosen.
_UNEVEN = frozenset(("allgather", "alltoall"))


class Choice(NamedTuple):
    """How an operation is done: an algorithm of the table, and bytes per segment (0: one segment)."""

    algorithm: str
    segment_nbytes: int


def machine_of(settings):
    """The link classes of a settings record; a constant of 0 stands for the ordinary value, which is 0 for messages."""
    gamma = settings.gamma_s_per_byte or _GAMMA
    return Machine(
        inside=Link(settings.alpha_inside_s or _ALPHA_INSIDE_S, settings.beta_inside_s_per_byte or _BETA_INSIDE, gamma),
        between=Link(settings.alpha_between_s or _ALPHA_BETWEEN_S, settings.beta_between_s_per_byte or _BETA_BETWEEN, gamma),
        message_s=settings.message_s,
    )


def select(kind, nbytes, shape, settings, overlapped=False):
    """Chooses algorithm and segment size.

    Args:
        kind: "allreduce", ...: a key of algorithms.KINDS.
        nbytes: bytes of the operation; not looked at where ranks may differ in it.
        shape: the commlib.plan.Shape of the group.
        settings: the record that all ranks hold.
        overlapped: one of many in flight, whose throughput together counts and not the latency of this one.

    Raises:
        ValueError: the forced or tabled algorithm does not exist or does not support the shape.

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
    name = settings.forced_algorithm(kind) or _tabled(kind, nbytes, shape, settings, overlapped)
    if name == MPI_OWN and kind == "allreduce":
        return Choice(MPI_OWN, settings.segment_nbytes)
    machine = machine_of(settings)
    candidates = algorithms.applicable(kind, shape)
    name = name or _cheapest(candidates, nbytes, shape, machine, overlapped)
    module = algorithms.algorithm(kind, name)
    if name not in candidates:
        raise ValueError(f"the settings force {kind} to {name!r}, which does not support {shape.ranks_per_host} ranks per "
                         f"host: force one of {', '.join(candidates)}")  # fmt: skip
    return Choice(name, _segment_nbytes(nbytes, module.nchunks(shape), shape, machine, settings))


def _tabled(kind, nbytes, shape, settings, overlapped):
    """The table is measured on one operation at a time, so it says nothing of those that share a port between hosts."""
    if overlapped and shape.hosts > 1:
        return None
    return settings.tabled_algorithm(kind, shape.ranks_per_host, nbytes)


def _cheapest(candidates, nbytes, shape, machine, overlapped):
    """The cheapest; between hosts the table's first, which disturbs other operations least, while it is cheap enough."""
    costs_s = {name: cost_s(module, shape, nbytes, machine) for name, module in candidates.items()}
    cheapest, first = min(costs_s, key=costs_s.get), next(iter(candidates))
    nchunks = candidates[first].nchunks(shape)
    is_long = nbytes >= _LEAST_CHUNK_NBYTES * nchunks
    if shape.hosts > 1 and is_long and costs_s[first] <= _patience(nchunks, machine.between, overlapped) * costs_s[cheapest]:
        return first
    return cheapest


def _patience(nchunks, link, overlapped):
    """How many times the cheapest closed form a ring of so many chunks may cost."""
    filling_nbytes = nchunks * link.alpha_s / link.beta_s_per_byte if link.beta_s_per_byte > 0 else float("inf")
    if not overlapped or filling_nbytes * (_PATIENCE_ALONE - 1) >= _IN_FLIGHT_NBYTES:
        return _PATIENCE_ALONE
    return min(_PATIENCE, 1 + _IN_FLIGHT_NBYTES / max(filling_nbytes, 1.0))


def _segment_nbytes(nbytes, nchunks, shape, machine, settings):
    longest = settings.segment_nbytes
    if shape.hosts == 1:
        latency_nbytes = machine.inside.alpha_s / machine.inside.beta_s_per_byte
        longest = min(longest, _CHUNK_INSIDE_NBYTES * nchunks)
        shortest_chunk = 0
    else:
        latency_nbytes = machine.between.alpha_s / machine.between.beta_s_per_byte
        shortest_chunk = _CHUNK_BETWEEN_NBYTES
        longest = max(longest, shortest_chunk * nchunks)
    shortest = max(_CHUNK_LATENCIES * latency_nbytes, shortest_chunk) * nchunks
    wanted = int(max(nbytes / _SEGMENTS, shortest))
    power_of_two = 1 << max(wanted - 1, 0).bit_length()
    return min(power_of_two, longest)
