"""commrun's side of `commlib.run`: the function in, as bytes, to every rank's standard input; results out, as they come.

Nothing is unpickled here. The words to the caller: piece (of a rank's result) and failed (with a sentence).
"""
from __future__ import annotations

import contextlib
import os
from typing import Callable, Optional

from commlib.launch.loop import Loop
from commlib.rendezvous_wire import encode
from commlib.run import LENGTH

DESCRIPTOR = 3  # where a rank writes its result


class Caller:
    """The two pipes to the process that called `commlib.run`.

    Args:
        pipes: "IN:OUT", descriptors; IN gives the length of the call and the call, and stays open as long as the caller lives.
    """

    def __init__(self, pipes: str):
        self._input, self._output = map(int, pipes.split(":"))
        for descriptor in (self._input, self._output):
            os.set_inheritable(descriptor, False)
        with open(self._input, "rb", buffering=0, closefd=False) as source:
            self.call = _exactly(source, LENGTH.unpack(_exactly(source, LENGTH.size))[0])

    def take(self, rank: int, data: bytes) -> None:
        """Passes on a piece of what a rank wrote to DESCRIPTOR."""
        if data:
            self._tell({"op": "piece", "rank": rank}, data)

    def failed(self, text: str, rank: Optional[int] = None) -> None:
        """Tells why there will be no result."""
        self._tell({"op": "failed", "rank": rank, "text": text})

    def watch(self, loop: Loop, gone: Callable[[], None]) -> None:
        """Calls gone() if the caller dies."""
        def ended(_events: int) -> None:
            loop.unwatch(self._input)
            gone()
        loop.watch(self._input, ended)

    def _tell(self, header: dict, payload: bytes = b"") -> None:
        data = memoryview(encode(header, payload))
        with contextlib.suppress(BrokenPipeError):  # `watch` notices
            while data:
                data = data[os.write(self._output, data):]


def file_of(data: bytes) -> int:
    """A descriptor from which `data` can be read, of a file without a name; the caller's to close."""
    memory = os.memfd_create("commlib-call")
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(data)
        return os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    finally:
        os.close(memory)


def _exactly(source, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        piece = source.read(min(nbytes - len(data), 1 << 20))
        if not piece:
            raise SystemExit("commrun: commlib.run ended before it had said what to run")
        data += piece
    return bytes(data)
