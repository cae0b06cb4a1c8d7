"""The settings record: everything that changes how, and so in which bits, a collective is done.

Rank 0's record is broadcast at init, so that all ranks hold the same; its hash travels in every operation. It can be
saved to a file and pinned from it. This file reads no environment: `bootstrap` hands over the COMMLIB_* options as text.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional, Tuple

KINDS = ("allreduce", "broadcast", "allgather", "reducescatter", "alltoall", "barrier")
TRANSPORTS = ("auto", "shm", "tcp", "mpi")


class Threshold(NamedTuple):
    """One line of the table of choices: operations of this kind up to this size, on ranks that lie so, use this algorithm.

    Args:
        kind: of KINDS.
        ranks_per_host: the shape that the line is for, such as (8,) or (4, 4); other shapes do not see it.
        upto_nbytes: the largest size that it is for; None: any.
        algorithm: a name of the kind's table.
    """

    kind: str
    ranks_per_host: Tuple[int, ...]
    upto_nbytes: Optional[int]
    algorithm: str


@dataclass(frozen=True)
class Settings:
    """One immutable record; `replace` makes another.

    Args:
        eager_nbytes: operations up to this size are sent without waiting for the receiver's grant.
        eager_budget_nbytes: eager bytes on the way to one peer, at most.
        inflight_nbytes: bytes posted to one link and not yet sent, at most: what an urgent tensor waits for. Of a TCP connection
            the kernel holds up to twice as many that are not on the wire, or bandwidth times delay where that is more.
        inflight_most_nbytes: but never more than this for the sake of bandwidth and delay; 0: nothing is derived from them.
        spin_us: a waiting caller polls this long before it blocks.
        heartbeat_ms: how often an idle tcp link says that it lives.
        lost_ms: a tcp link silent for this long is lost, or one whose bytes are not acknowledged for this long; at least 3
            heartbeats.
        shm_ring_nbytes: bytes of one direction of one shared-memory link; a power of two.
        stall_warning_s: an operation that some rank has not submitted so long after another did is told in the log; 0: never.
        stall_shutdown_s: and fails on every rank so long after; 0: never, it is waited for.
        segment_nbytes: the largest segment, the unit of pipelining and of preemption; between hosts it may be longer with
            many ranks, of which each has 32 KiB at least.
        uneven_nbytes: the size per rank that the choice of algorithm assumes where ranks cannot know the true one.
        transport: "auto" (shm inside a host; between hosts tcp, or mpi where init() was given a communicator), "shm", "tcp" or
            "mpi".
        algorithms: forced choices, such as (("allreduce", "ring"),).
        table: choices by size, a tuple of Threshold; the first line that is large enough holds. `commlib tune` writes it.
        alpha_inside_s, beta_inside_s_per_byte: latency and 1 / bandwidth inside a host; 0: measured at init.
        alpha_between_s, beta_between_s_per_byte: the same between hosts; 0: measured at init.
        gamma_s_per_byte: cost of a reduction; 0: measured at init.
        message_s: what a message costs whatever its size where ranks of one host share processors; 0: nothing, or the ordinary
            value if rank 0's host has more ranks than processors.

    Raises:
        ValueError: a field that is out of range, or of the wrong type, and what it may be.

    Example:
        >>> Settings(segment_nbytes=65536).hash != Settings().hash
        True
    """

    eager_nbytes: int = 16 << 10  # copying 16 KiB (about 1 us) is cheaper than a round trip for the grant
    eager_budget_nbytes: int = 1 << 20  # 64 of the largest eager messages per peer: bounds the memory kept for early ones
    inflight_nbytes: int = 32 << 10  # what 10 Gbit/s carry in 25 us: keeps a link busy, and is soon over
    inflight_most_nbytes: int = 4 << 20  # what 40 Gbit/s carry in 0.8 ms; as far as Linux lets a connection's buffer grow
    spin_us: int = 20  # a few times the cost of a futex wake-up; longer spinning takes cores from training
    heartbeat_ms: int = 1000
    lost_ms: int = 30_000  # a switch that restarts, a host that swaps; a process that dies is noticed at once
    shm_ring_nbytes: int = 512 << 10  # two rings of a pair stay in a core's L2
    stall_warning_s: float = 60.0  # Horovod's
    stall_shutdown_s: float = 0.0
    segment_nbytes: int = 1 << 20  # long against latency, short against what an urgent tensor may wait for
    uneven_nbytes: int = 256 << 10
    transport: str = "auto"
    algorithms: tuple = ()
    table: tuple = ()
    alpha_inside_s: float = 0.0
    beta_inside_s_per_byte: float = 0.0
    alpha_between_s: float = 0.0
    beta_between_s_per_byte: float = 0.0
    gamma_s_per_byte: float = 0.0
    message_s: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _type_of(field).check(field.name, getattr(self, field.name))
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, not {self.transport!r}")
        if self.shm_ring_nbytes < 4096 or self.shm_ring_nbytes & (self.shm_ring_nbytes - 1):
            raise ValueError(f"shm_ring_nbytes must be a power of two of at least 4096, not {self.shm_ring_nbytes}")
        for name in _32_BITS:
            if getattr(self, name) >= 1 << 32:
                raise ValueError(f"{name} must be below 2^32, not {getattr(self, name)}")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.lost_ms < 3 * self.heartbeat_ms:
            raise ValueError(f"lost_ms must be at least 3 x heartbeat_ms, so {3 * self.heartbeat_ms}, not {self.lost_ms}: a late "
                             "heartbeat is no death; set both")  # fmt: skip
        object.__setattr__(self, "algorithms", tuple(sorted((kind, name) for kind, name in self.algorithms)))
        object.__setattr__(self, "table", tuple(sorted(map(_threshold, self.table), key=_place_in_table)))

    def replace(self, **changes):
        """This record with some fields changed."""
        return dataclasses.replace(self, **changes)

    def forced_algorithm(self, kind):
        """The algorithm that is forced for a kind, None if none is."""
        return dict(self.algorithms).get(kind)

    def tabled_algorithm(self, kind, ranks_per_host, nbytes):
        """The algorithm that the table names for a size, None if it has no line for it.

        Example:
            >>> record = Settings(table=(("allreduce", (2,), 4096, "recursive_doubling"), ("allreduce", (2,), None, "ring")))
            >>> record.tabled_algorithm("allreduce", (2,), 4097), record.tabled_algorithm("allreduce", (3,), 4097)
            ('ring', None)
        """
        for line in self.table:
            if line[:2] == (kind, ranks_per_host) and (line.upto_nbytes is None or nbytes <= line.upto_nbytes):
                return line.algorithm
        return None

    @property
    def hash(self):
        """32 bits that are equal for equal records, in every process."""
        return int.from_bytes(hashlib.blake2b(self.to_json().encode(), digest_size=4).digest(), "little")

    def as_dict(self):
        """The record as JSON can carry it."""
        table = [[line.kind, list(line.ranks_per_host), line.upto_nbytes, line.algorithm] for line in self.table]
        return {**dataclasses.asdict(self), "algorithms": dict(self.algorithms), "table": table}

    def to_json(self):
        """The record as JSON text, its fields in a fixed order."""
        return json.dumps(self.as_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text):
        """The record of `to_json`.

        Raises:
            ValueError: no JSON object, a field that this version does not have, or one that cannot have its value.
        """
        try:
            record = json.loads(text)
        except RecursionError:
            raise ValueError("a settings record is not that deep") from None
        if not isinstance(record, dict):
            raise ValueError("a settings record is a JSON object")
        unknown = sorted(set(record) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"this version of commlib has no setting named {', '.join(unknown)}")
        forced, table = record.get("algorithms", {}), record.get("table", [])
        if not isinstance(forced, dict) or not isinstance(table, list):
            raise ValueError("a settings record's 'algorithms' are an object, its 'table' is an array")
        return cls(**{**record, "algorithms": tuple(forced.items()), "table": tuple(table)})

    def save(self, path):
        """Writes the record to a file, from which `load` pins it.

        Raises:
            OSError: it cannot be written; a record that was there before is as it was.
        """
        in_place = os.path.exists(path) and not os.path.isfile(path)  # /dev/stdout
        target = path if in_place else f"{os.path.realpath(path)}.part"
        try:
            with open(target, "w", encoding="utf-8") as file:
                file.write(self.to_json() + "\n")
            if not in_place:
                os.replace(target, os.path.realpath(path))
        except OSError:
            if not in_place:
                with contextlib.suppress(OSError):
                    os.remove(target)
            raise

    @classmethod
    def load(cls, path):
        """Reads a record that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no settings record.
        """
        with open(path, encoding="utf-8") as file:
            return cls.from_json(file.read())

    def overridden(self, options):
        """This record with fields from text, as the environment gives them.

        Args:
            options: field name -> text; `algorithms` as "allreduce=ring,broadcast=binomial", `table` as
                "allreduce@8:65536=direct,allreduce@4+4:any=ring": kind, ranks per host, largest size, algorithm.

        Raises:
            ValueError: an unknown field or a text that is no value for it.
        """
        fields = {field.name: field for field in dataclasses.fields(self)}
        changes = {}
        for name, text in options.items():
            if name not in fields:
                raise ValueError(f"there is no setting named {name!r}; there are {', '.join(fields)}")
            try:
                changes[name] = _type_of(fields[name]).parse(text)
            except ValueError:
                raise ValueError(f"setting {name} cannot be {text!r}") from None
        return self.replace(**changes)


_32_BITS = ("spin_us", "heartbeat_ms", "lost_ms", "shm_ring_nbytes")
_POSITIVE = (
    "eager_budget_nbytes", "inflight_nbytes", "heartbeat_ms", "lost_ms", "segment_nbytes", "uneven_nbytes",
)  # fmt: skip


def _check_int(name, value):
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be an int of at least 0, not {value!r}")


def _check_float(name, value):
    if type(value) not in (int, float) or not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least 0, not {value!r}")


def _check_text(name, value):
    if type(value) is not str:
        raise ValueError(f"{name} must be a string, not {value!r}")


def _check_pairs(name, value):
    for pair in value:
        if len(pair) != 2 or pair[0] not in KINDS or type(pair[1]) is not str:
            raise ValueError(f"{name} must be pairs (kind, algorithm) with a kind of {', '.join(KINDS)}, not {pair!r}")


def _check_table(name, value):
    for line in value:
        if not _is_threshold(line):
            raise ValueError(f"{name} must be lines (kind, ranks per host, largest size in bytes or None, algorithm) with a "
                             f"kind of {', '.join(KINDS)}, such as ('allreduce', (8,), 65536, 'direct'), not {line!r}")  # fmt: skip
    places = [_threshold(line)[:3] for line in value]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{name} has two lines for {place!r}: keep one")


def _is_threshold(line):
    if not isinstance(line, (tuple, list)) or len(line) != 4 or not isinstance(line[1], (tuple, list)):
        return False
    kind, hosts, upto_nbytes, algorithm = line
    is_shape = len(hosts) > 0 and all(type(ranks) is int and ranks > 0 for ranks in hosts)
    is_size = upto_nbytes is None or type(upto_nbytes) is int and upto_nbytes >= 0
    return kind in KINDS and is_shape and is_size and type(algorithm) is str


def _threshold(line):
    """A line as JSON or a user gives it, with a shape that can be hashed."""
    return Threshold(line[0], tuple(line[1]), *line[2:])


def _place_in_table(line):
    return line.kind, line.ranks_per_host, float("inf") if line.upto_nbytes is None else line.upto_nbytes


def _parse_pairs(text):
    return tuple(tuple(pair.strip().split("=", 1)) for pair in text.split(",") if pair.strip())


_LINE = re.compile(r"(\w+)@(\d+(?:\+\d+)*):(\d+|any)=(\w+)")


def _parse_table(text):
    lines = []
    for word in filter(None, map(str.strip, text.split(","))):
        match = _LINE.fullmatch(word)
        if match is None:
            raise ValueError(f"{word!r} is no line of a table")
        kind, hosts, upto, algorithm = match.groups()
        lines.append((kind, tuple(map(int, hosts.split("+"))), None if upto == "any" else int(upto), algorithm))
    return tuple(lines)


class _Type(NamedTuple):
    """How a field's value is checked, and read from text."""

    check: Callable
    parse: Callable


_TYPES = {int: _Type(_check_int, int), float: _Type(_check_float, float), str: _Type(_check_text, str)}
_TYPES_BY_NAME = {"algorithms": _Type(_check_pairs, _parse_pairs), "table": _Type(_check_table, _parse_table)}


def _type_of(field):
    return _TYPES_BY_NAME.get(field.name) or _TYPES[type(field.default)]
