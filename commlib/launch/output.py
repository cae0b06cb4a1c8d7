"""What ranks print, line by line: labelled with the rank, copied to files. Knows pipes, not processes.

A `Stream` reads one pipe and hands every piece to a sink: a `Terminal` here, or whoever forwards it to another host.
"""
from __future__ import annotations

import os
import re
import select
import sys
import time
from typing import BinaryIO, Callable, Optional

ENDED = -1  # of Stream.pump

_READ_NBYTES = 1 << 16
_LONGEST_LINE_NBYTES = 1 << 16
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)")  # progress bars end their lines with \r


class Terminal:
    """Where one of a rank's outputs goes: our stdout or stderr, and a file.

    Args:
        label: put before each line; "" to pass the bytes on as they are.
        timestamp: whether date and time come before the label.
        terminal: where to.
        copy: an open file that gets the unlabelled bytes, owned, or None.
    """

    def __init__(self, label: str, timestamp: bool, terminal: BinaryIO, copy: Optional[BinaryIO]):
        self._label, self._timestamp, self._terminal, self._copy = label, timestamp, terminal, copy
        self._rest = b""

    def write(self, data: bytes) -> None:
        """Takes a piece of the output; an empty one is the end. Raises OSError when the reader has gone away."""
        if self._copy is not None:
            self._write_copy(data)
        _write_whole(self._terminal, self._labelled(data) if self._label else data)
        self._terminal.flush()

    def _write_copy(self, data: bytes) -> None:
        """A full disk costs the rest of the file, and not the job."""
        try:
            _write_whole(self._copy, data)
        except OSError as error:
            say(f"cannot write to {self._copy.name}: {error.strerror}; what follows is shown only")
            self._copy.close()
            self._copy = None

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()

    def _labelled(self, data: bytes) -> bytes:
        """The whole lines so far; at the end of the stream, or if it grows too long, the unfinished one too."""
        self._rest += data
        lines = _LINE.findall(self._rest)
        self._rest = self._rest[sum(map(len, lines)):]
        if self._rest and (not data or len(self._rest) > _LONGEST_LINE_NBYTES):
            lines.append(self._rest + b"\n")
            self._rest = b""
        now = time.strftime("%Y-%m-%d %H:%M:%S ") if self._timestamp else ""
        label = (now + self._label).encode()
        return b"".join(label + line for line in lines)


class Stream:
    """One pipe from a rank.

    Args:
        pipe: read end, owned.
        write: gets every piece as it comes, and an empty one at the end.
        close: called when the stream is closed.
    """

    def __init__(self, pipe: int, write: Callable[[bytes], None], close: Callable[[], None] = lambda: None):
        os.set_blocking(pipe, False)
        self.pipe, self._write, self._close = pipe, write, close

    def pump(self) -> int:
        """Moves what has come: the number of bytes, 0 if there is nothing now, ENDED if nothing will come any more.

        A reader of ours that has gone away (``commrun ... | head``) counts as the end too: with the pipe closed, the
        rank meets the same SIGPIPE as if it wrote to that reader itself.
        """
        try:
            data = os.read(self.pipe, _READ_NBYTES)
        except BlockingIOError:
            return 0
        try:
            self._write(data)
        except OSError:
            return ENDED
        return len(data) or ENDED

    def close(self) -> None:
        os.close(self.pipe)
        self._close()


def terminal_of(options, rank: int, size: int, name: str) -> Terminal:
    """The sink that the options ask for, of a rank's "stdout" or "stderr". Horovod's label and file names."""
    copy = None
    if options.output_filename is not None:
        folder = os.path.join(options.output_filename, f"rank.{rank:0{len(str(size - 1))}d}")
        os.makedirs(folder, exist_ok=True)
        copy = open(os.path.join(folder, name), "wb", buffering=0)
    label = f"[{rank}]<{name}>:" if options.prefix_output or options.prefix_output_with_timestamp else ""
    return Terminal(label, options.prefix_output_with_timestamp, getattr(sys, name).buffer, copy)


def say(text: str) -> None:
    """A message of commrun's own."""
    print(f"commrun: {text}", file=sys.stderr, flush=True)


def _write_whole(file: BinaryIO, data: bytes) -> None:
    """Writes all of it: an unbuffered file (stdout under PYTHONUNBUFFERED) takes less when a signal comes in between."""
    left = memoryview(data)
    while left:
        written = file.write(left)
        if written is None:  # somebody made our stdout non-blocking, and it is full
            select.select([], [file], [])
        left = left[written or 0 :]
