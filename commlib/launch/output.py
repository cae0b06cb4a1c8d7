"""What ranks print, line by line: labelled with the rank, copied to files. Knows pipes, not processes."""
from __future__ import annotations

import os
import re
import select
import time
from typing import BinaryIO, Optional

ENDED = -1  # of Stream.pump

_READ_NBYTES = 1 << 16
_LONGEST_LINE_NBYTES = 1 << 16
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)")  # progress bars end their lines with \r


class Stream:
    """One rank's stdout or stderr on its way to ours.

    Args:
        pipe: read end, owned.
        label: put before each line; "" to pass the bytes on as they are.
        timestamp: whether date and time come before the label.
        terminal: where to.
        copy: an open file that gets the unlabelled bytes, owned, or None.
    """

    def __init__(self, pipe: int, label: str, timestamp: bool, terminal: BinaryIO, copy: Optional[BinaryIO]):
        os.set_blocking(pipe, False)
        self.pipe, self._label, self._timestamp, self._terminal, self._copy = pipe, label, timestamp, terminal, copy
        self._rest = b""

    def pump(self) -> int:
        """Moves what has come: the number of bytes, 0 if there is nothing now, ENDED if nothing will come any more.

        A reader of ours that has gone away (``commrun ... | head``) counts as the end too: with the pipe closed, the
        rank meets the same SIGPIPE as if it wrote to that reader itself.
        """
        try:
            data = os.read(self.pipe, _READ_NBYTES)
        except BlockingIOError:
            return 0
        if self._copy is not None:
            _write_whole(self._copy, data)
        try:
            _write_whole(self._terminal, self._labelled(data) if self._label else data)
            self._terminal.flush()
        except BrokenPipeError:
            return ENDED
        return len(data) or ENDED

    def close(self) -> None:
        os.close(self.pipe)
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


def _write_whole(file: BinaryIO, data: bytes) -> None:
    """Writes all of it: an unbuffered file (stdout under PYTHONUNBUFFERED) takes less when a signal comes in between."""
    left = memoryview(data)
    while left:
        written = file.write(left)
        if written is None:  # somebody made our stdout non-blocking, and it is full
            select.select([], [file], [])
        left = left[written or 0 :]
