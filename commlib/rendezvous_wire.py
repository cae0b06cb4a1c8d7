"""The words between a rank and the rendezvous store: framing, limits, the hello. Bytes in, messages out; no sockets.

A message is a JSON header and a payload of bytes. Nothing is unpickled, and every length is checked before it is
believed, though whoever speaks has proven before (proof.py) that it belongs to the job.
"""
from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, fields
from typing import Iterable, List, NamedTuple, Optional

PROTOCOL = 2
MAX_HEADER_NBYTES = 1 << 20    # the longest: a list of one key per rank, some 20 bytes each
MAX_PAYLOAD_NBYTES = 64 << 20  # the longest: one value of every rank
MAX_VALUE_NBYTES = 1 << 20
MAX_HELLO_NBYTES = 4096        # nobody may send more before it has said who it is
MAX_RANKS = 1 << 16

_MAGIC = b"clrv"
_FRAME = struct.Struct("!4sII")  # magic, bytes of header, bytes of payload


class WireError(Exception):
    """These bytes do not come from a commlib process."""


class Message(NamedTuple):
    header: dict
    payload: bytes


def encode(header: dict, payload: bytes = b"") -> bytes:
    """One message as bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return _FRAME.pack(_MAGIC, len(text), len(payload)) + text + payload


class Decoder:
    """Turns a stream of bytes into messages; refuses any that is longer than `max_nbytes`."""

    def __init__(self, max_nbytes: int = MAX_HEADER_NBYTES + MAX_PAYLOAD_NBYTES):
        self.max_nbytes = max_nbytes
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        self._bytes += data

    def next(self) -> Optional[Message]:
        """The next whole message, or None. Raises WireError when the bytes are not ours."""
        if len(self._bytes) < _FRAME.size:
            if not _MAGIC.startswith(bytes(self._bytes[:len(_MAGIC)])):
                raise WireError("no commlib message")
            return None
        magic, header_nbytes, payload_nbytes = _FRAME.unpack_from(self._bytes)
        if magic != _MAGIC:
            raise WireError("no commlib message")
        if header_nbytes > MAX_HEADER_NBYTES or header_nbytes + payload_nbytes > self.max_nbytes:
            raise WireError(f"a message of {header_nbytes} + {payload_nbytes} bytes is over the limit")
        middle = _FRAME.size + header_nbytes
        if len(self._bytes) < middle + payload_nbytes:
            return None
        message = Message(_parse(bytes(self._bytes[_FRAME.size:middle])),
                          bytes(self._bytes[middle:middle + payload_nbytes]))
        del self._bytes[:middle + payload_nbytes]
        return message


def _parse(text: bytes) -> dict:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise WireError("a header that is not JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get("op"), str):
        raise WireError("a header without an op")
    return header


@dataclass(frozen=True)
class Hello:
    """How a rank introduces itself to the store. All ranks must agree in protocol, version and size."""

    protocol: int
    version: str
    size: int
    rank: int
    generation: int  # how many times this process has begun to initialise, this time included
    host: str
    pid: int

    def header(self) -> dict:
        return dict(asdict(self), op="hello")

    def who(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def hello_of(header: dict) -> Hello:
    """The hello in a header. Raises WireError for one that is incomplete or absurd."""
    kinds = {field.name: int if field.type == "int" else str for field in fields(Hello)}
    values = {name: header.get(name) for name in kinds}
    if header["op"] != "hello" or any(type(values[name]) is not kind for name, kind in kinds.items()):
        raise WireError("no hello")
    hello = Hello(**values)
    if not (0 < hello.size <= MAX_RANKS and 0 <= hello.rank < hello.size and hello.generation > 0):
        raise WireError(f"rank {hello.rank} of {hello.size}, generation {hello.generation}")
    return hello


def values_of(message: Message, count: int) -> List[bytes]:
    """The values in an answer to a request for so many. Raises WireError for an answer that is none."""
    lengths, values, offset = message.header.get("lengths"), [], 0
    if not isinstance(lengths, list) or len(lengths) != count or any(type(nbytes) is not int or nbytes < 0 for nbytes in lengths):
        raise WireError("an answer without sound lengths")
    if sum(lengths) != len(message.payload):
        raise WireError("an answer whose lengths are not those of its values")
    for nbytes in lengths:
        values.append(message.payload[offset:offset + nbytes])
        offset += nbytes
    return values


def spell_ranks(ranks: Iterable[int]) -> str:
    """Ranks for people: ``0, 3-5, 9``.

    Example:
        >>> spell_ranks([9, 3, 4, 5, 0])
        '0, 3-5, 9'
    """
    spans: list = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
