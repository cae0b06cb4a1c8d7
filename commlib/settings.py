"""The settings record: everything that changes how, and so in which bits, a collective is done.

Rank 0's record is broadcast at init, so that all ranks hold the same; its hash travels in every operation. It can be
saved to a file and pinned from it. This file reads no environment: `bootstrap` hands over the COMMLIB_* options as text.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

KINDS = ("allreduce", "broadcast", "allgather", "reducescatter", "alltoall", "barrier")
TRANSPORTS = ("auto", "shm", "tcp")


@dataclass(frozen=True)
class Settings:
    """One immutable record; `replace` makes another.

    Args:
        eager_nbytes: operations up to this size are sent without waiting for the receiver's grant.
        eager_budget_nbytes: eager bytes on the way to one peer, at most.
        inflight_nbytes: bytes posted to one link and not yet sent, at most: what an urgent tensor waits for.
        spin_us: a waiting caller polls this long before it blocks.
        heartbeat_ms: how often an idle tcp link says that it lives.
        lost_ms: a tcp link silent for this long is lost.
        shm_ring_nbytes: bytes of one direction of one shared-memory link; a power of two.
        segment_nbytes: the largest segment, the unit of pipelining and of preemption.
        uneven_nbytes: the size per rank that the choice of algorithm assumes where ranks cannot know the true one.
        transport: "auto" (shm inside a host, tcp between hosts), "shm" or "tcp".
        algorithms: forced choices, such as (("allreduce", "ring"),).
        alpha_inside_s, beta_inside_s_per_byte: latency and 1 / bandwidth inside a host; 0: measured at init.
        alpha_between_s, beta_between_s_per_byte: the same between hosts; 0: measured at init.
        gamma_s_per_byte: cost of a reduction; 0: measured at init.

    Raises:
        ValueError: a field that is out of range, or of the wrong type, and what it may be.

    Example:
        >>> Settings(segment_nbytes=65536).hash != Settings().hash
        True
    """

    eager_nbytes: int = 16 << 10  # copying 16 KiB (about 1 us) is cheaper than a round trip for the grant
    eager_budget_nbytes: int = 1 << 20  # 64 of the largest eager messages per peer: bounds the memory kept for early ones
    inflight_nbytes: int = 32 << 10  # what 10 Gbit/s carry in 25 us: keeps a link busy, and is soon over
    spin_us: int = 20  # a few times the cost of a futex wake-up; longer spinning takes cores from training
    heartbeat_ms: int = 500
    lost_ms: int = 3000  # several heartbeats, yet all ranks know of a death within 5 s
    shm_ring_nbytes: int = 512 << 10  # two rings of a pair stay in a core's L2
    segment_nbytes: int = 1 << 20  # long against latency, short against what an urgent tensor may wait for
    uneven_nbytes: int = 256 << 10
    transport: str = "auto"
    algorithms: tuple = ()
    alpha_inside_s: float = 0.0
    beta_inside_s_per_byte: float = 0.0
    alpha_between_s: float = 0.0
    beta_between_s_per_byte: float = 0.0
    gamma_s_per_byte: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _CHECK_OF_TYPE[type(field.default)](field.name, getattr(self, field.name))
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
        object.__setattr__(self, "algorithms", tuple(sorted((kind, name) for kind, name in self.algorithms)))

    def replace(self, **changes):
        """This record with some fields changed."""
        return dataclasses.replace(self, **changes)

    def forced_algorithm(self, kind):
        """The algorithm that is forced for a kind, None if none is."""
        return dict(self.algorithms).get(kind)

    @property
    def hash(self):
        """32 bits that are equal for equal records, in every process."""
        return int.from_bytes(hashlib.blake2b(self.to_json().encode(), digest_size=4).digest(), "little")

    def as_dict(self):
        """The record as JSON can carry it."""
        return {**dataclasses.asdict(self), "algorithms": dict(self.algorithms)}

    def to_json(self):
        """The record as JSON text, its fields in a fixed order."""
        return json.dumps(self.as_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text):
        """The record of `to_json`.

        Raises:
            ValueError: no JSON object, or a field that this version does not have.
        """
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("a settings record is a JSON object")
        unknown = sorted(set(record) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"this version of commlib has no setting named {', '.join(unknown)}")
        record["algorithms"] = tuple(dict(record.get("algorithms", {})).items())
        return cls(**record)

    def save(self, path):
        """Writes the record to a file, from which `load` pins it."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json() + "\n")

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
            options: field name -> text; `algorithms` as "allreduce=ring,broadcast=binomial".

        Raises:
            ValueError: an unknown field or a text that is no value for it.
        """
        fields = {field.name: field for field in dataclasses.fields(self)}
        changes = {}
        for name, text in options.items():
            if name not in fields:
                raise ValueError(f"there is no setting named {name!r}; there are {', '.join(fields)}")
            try:
                changes[name] = _PARSE_OF_TYPE[type(fields[name].default)](text)
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


def _parse_pairs(text):
    return tuple(tuple(pair.strip().split("=", 1)) for pair in text.split(",") if pair.strip())


_CHECK_OF_TYPE = {int: _check_int, float: _check_float, str: _check_text, tuple: _check_pairs}
_PARSE_OF_TYPE = {int: int, float: float, str: str, tuple: _parse_pairs}
