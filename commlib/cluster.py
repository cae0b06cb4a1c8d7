"""A cluster that may not exist, described in a small JSON file: hosts, links and how fast ranks compute.

    {"ranks_per_host": 8, "nic": "shared",
     "inside":  {"latency_us": 3,  "gbit_per_s": 200},
     "between": {"latency_us": 20, "gbit_per_s": 25},
     "reduction_gbyte_per_s": 10, "oversubscription": 2, "jitter_us": 5, "stragglers": {"one_in": 64, "slower": 1.2}}

This file knows what such a file may say and what it means in seconds; it knows no model, no engine and no clock. What it does
not know it refuses: a key that is not read would be a wrong prediction.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional, Tuple

from commlib.cost import Link
from commlib.json_table import JsonTable, load
from commlib.plan import Shape
from commlib.settings import Settings

_BITS = 8
_MOST_CORES = 1024
_MOST_RANKS = 8192  # the simulation has a table of all pairs of ranks: 0.5 GB at this size

# What a core adds in fp32, read and written once: 10 GB/s, as selection assumes where nothing was measured.
_REDUCTION_GBYTE_PER_S = 10.0


class Processor(NamedTuple):
    """What moves the messages of a host's ranks, or of several hosts' that are emulated on one machine.

    Args:
        cores: that work beside each other; 0: messages take no processor time.
        hosts: so many hosts share one processor.
        message_s: to send or to receive a message, whatever its size.
        busy_s_per_byte: of a message on its way out or in, beside its way over the link.
    """

    cores: int = 0
    hosts: int = 1
    message_s: float = 0.0
    busy_s_per_byte: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Hosts that are all alike, and the network between them.

    Args:
        ranks_per_host: ranks (accelerators) on each host; the last host may have fewer.
        inside, between: a link inside a host, and one between hosts, alone and undisturbed; gamma is the reduction's time.
        shared_nic: the ranks of a host share one port between hosts, else each has its own.
        oversubscription: by how much all ports between hosts together exceed the switch; 1: the switch never limits.
        jitter_s: mean of what a message between hosts takes longer (exponential).
        seed: of the jitter.
        straggler_every: one rank in so many is slow, rank 0 first; 0: none is.
        straggler_slowness: by what compute and reductions of the slow ones are multiplied.
        tflops: floating-point operations that a rank really sustains, in 10^12 per second; None: not known.
        processor: what messages cost those who send and receive them.
    """

    ranks_per_host: int
    inside: Link
    between: Link
    shared_nic: bool = True
    oversubscription: float = 1.0
    jitter_s: float = 0.0
    seed: int = 1
    straggler_every: int = 0
    straggler_slowness: float = 1.0
    tflops: Optional[float] = None
    processor: Processor = Processor()

    @classmethod
    def load(cls, path: str) -> Cluster:
        """Reads a file as above.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not such a file; the text says what is wrong.
        """
        return load(path, cls.from_dict)

    @classmethod
    def from_dict(cls, table: Any) -> Cluster:
        """As `load`, of a table that was read already.

        Example:
            >>> table = {"ranks_per_host": 1, "between": {"latency_us": 20, "gbit_per_s": 8}}
            >>> Cluster.from_dict(table).between.beta_s_per_byte
            1e-09
        """
        reader = JsonTable(table, "the cluster")
        ranks_per_host = reader.whole("ranks_per_host", least=1, most=_MOST_RANKS)
        many = ranks_per_host > 1
        gamma = 1e-9 / reader.number("reduction_gbyte_per_s", _REDUCTION_GBYTE_PER_S, above=0)
        nic = reader.word("nic", ("shared", "per rank"), None if many else "shared")
        between = _link(reader.part("between"), "between", gamma)
        stragglers = JsonTable(reader.part("stragglers", {"one_in": 0, "slower": 1}), "stragglers")
        cluster = cls(
            ranks_per_host=ranks_per_host,
            inside=_link(reader.part("inside", None if many else {"latency_us": 0, "gbit_per_s": 1}), "inside", gamma),
            between=between,
            shared_nic=nic == "shared",
            oversubscription=reader.number("oversubscription", 1, least=1),
            jitter_s=1e-6 * reader.number("jitter_us", 0, least=0),
            seed=reader.whole("seed", least=0, most=1 << 63, default=1),
            straggler_every=stragglers.whole("one_in", least=0, most=_MOST_RANKS),
            straggler_slowness=stragglers.number("slower", least=1),
            tflops=reader.number("tflops", 0, least=0) or None,
            processor=_processor(reader.part("processor", False)),
        )
        stragglers.end()
        reader.end()
        return cluster

    def shape(self, size: int) -> Shape:
        """How that many ranks lie on hosts."""
        if not 1 <= size <= _MOST_RANKS:
            raise ValueError(f"between 1 and {_MOST_RANKS} ranks can be simulated, not {size}")
        full, rest = divmod(size, self.ranks_per_host)
        return Shape((self.ranks_per_host,) * full + ((rest,) if rest else ()))

    def slowness(self, size: int) -> Tuple[float, ...]:
        """By what each rank's compute and reductions are multiplied."""
        every = self.straggler_every
        return tuple(self.straggler_slowness if every and rank % every == 0 else 1.0 for rank in range(size))

    def settings(self, shape: Shape, record: Settings) -> Settings:
        """The record with the constants of these links, as measuring them with all ranks busy would find them."""
        sharing = max(shape.ranks_per_host) if self.shared_nic else 1
        return record.replace(
            alpha_inside_s=self.inside.alpha_s, beta_inside_s_per_byte=self.inside.beta_s_per_byte,
            alpha_between_s=self.between.alpha_s + self.jitter_s,
            beta_between_s_per_byte=max(self.between.beta_s_per_byte * sharing, self._switch_share(shape)),
            gamma_s_per_byte=self.between.gamma_s_per_byte,
        )  # fmt: skip

    def switch_beta_s_per_byte(self, shape: Shape) -> float:
        """1 / bandwidth of the switch for the traffic of all hosts together; 0: it does not limit."""
        if self.oversubscription == 1 or shape.hosts == 1:
            return 0.0
        ports = shape.hosts if self.shared_nic else shape.size
        return self.between.beta_s_per_byte * self.oversubscription / ports

    def least_s_per_byte(self, shape: Shape) -> float:
        """No all-reduce takes less time than this per byte, whatever its algorithm: see docs/simulate.md."""
        if shape.size == 1:
            return 0.0
        if shape.hosts == 1:
            return 2 * (shape.size - 1) / shape.size * self.inside.beta_s_per_byte
        out_of_hosts = 2 * (shape.hosts - 1)  # of all hosts together, per byte
        ports = shape.hosts if self.shared_nic else shape.size
        return out_of_hosts * max(self.between.beta_s_per_byte / ports, self.switch_beta_s_per_byte(shape))

    def least_reduction_s_per_byte(self, shape: Shape) -> float:
        """What each rank must add at least, all ranks doing an equal part."""
        return (shape.size - 1) / shape.size * self.between.gamma_s_per_byte

    def faster(self, factor: float) -> Cluster:
        """The same with that many times the bandwidth on all links, and the same latencies."""
        return replace(self, inside=_faster(self.inside, factor), between=_faster(self.between, factor))

    def sooner(self, factor: float) -> Cluster:
        """The same with latencies (and jitter) so many times shorter, and the same bandwidth."""
        inside, between = (replace(link, alpha_s=link.alpha_s / factor) for link in (self.inside, self.between))
        return replace(self, inside=inside, between=between, jitter_s=self.jitter_s / factor)

    def _switch_share(self, shape):
        return self.switch_beta_s_per_byte(shape) * shape.size


def _faster(link: Link, factor: float) -> Link:
    return replace(link, beta_s_per_byte=link.beta_s_per_byte / factor)


def _processor(table: Any) -> Processor:
    if table is False:
        return Processor()  # the file does not speak of it
    reader = JsonTable(table, "the processor")
    processor = Processor(
        cores=reader.whole("cores", least=1, most=_MOST_CORES), hosts=reader.whole("hosts", least=1, most=_MOST_RANKS, default=1),
        message_s=1e-6 * reader.number("message_us", least=0), busy_s_per_byte=1e-9 / reader.number("gbyte_per_s", above=0),
    )  # fmt: skip
    reader.end()
    return processor


def _link(table: Any, where: str, gamma_s_per_byte: float) -> Link:
    reader = JsonTable(table, where)
    alpha_s = 1e-6 * reader.number("latency_us", least=0)
    beta_s_per_byte = _BITS * 1e-9 / reader.number("gbit_per_s", above=0)
    reader.end()
    return Link(alpha_s, beta_s_per_byte, gamma_s_per_byte)
