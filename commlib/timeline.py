"""The timeline: Chrome trace JSON that shows operations and user spans of all ranks, for ui.perfetto.dev.

Each rank is a process of the trace and writes a file of its own as it goes, which is valid JSON after every write; at the
end rank 0 joins them. Names of events are those that Horovod's tools look for. This file knows handles' names and times
and nothing of the engine.
"""

import contextlib
import json
import logging
import os
import threading
import time

_log = logging.getLogger("commlib")

_FLUSH_EVENTS = 4096
_FLUSH_S = 1.0  # what a rank that is killed may lose

# Tracks of a rank, by thread id of the trace; user tracks follow the operations' lanes.
_FIRST_LANE = 1
_FIRST_USER_TRACK = 1000


class Timeline:
    """Records one rank's events and writes them.

    Args:
        path: of the joined file; this rank's own lies beside it as path.rankN until `finish`.
        rank: this rank, the process id of the trace.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path, rank):
        self.path = os.fspath(path)
        self.rank = rank
        self.part_path = f"{self.path}.rank{rank}"
        self._lock = threading.Lock()
        self._events = []
        self._is_full = False
        self._tracks = {}
        self._free_lanes = []
        self._lanes = 0
        self._flushed_s = time.monotonic()
        # Monotonic clocks of hosts begin at will; the epoch is what they share.
        self.epoch_us = round((time.time() - time.monotonic()) * 1e6)
        self._file = open(self.part_path, "w+b", buffering=0)  # a forked child must find nothing to write at its end
        self._file.write(b"[\n]")
        self._metadata("process_name", 0, {"name": f"rank {rank}", "start_time_since_epoch_in_micros": self.epoch_us})
        self._metadata("process_sort_index", 0, {"sort_index": rank})
        self.flush()

    # ---- what users record -----------------------------------------------------------------------------------

    def span(self, name, category, begin_s, end_s, track="compute", arguments=None):
        """Records a span of the user's own, such as a layer's forward pass.

        Args:
            name, category: texts; the category can be searched for.
            begin_s, end_s: on time.monotonic().
            track: the row of this rank in which it is drawn; spans of one track nest and never cross.
            arguments: a dict of what else there is to say about it, as JSON can.
        """
        whole = _complete(name, category, begin_s, end_s, self.rank, self._track(track))
        if arguments is not None:
            whole["args"] = arguments
        self._add(whole)

    def instant(self, name, at_s=None):
        """Records a moment, such as CYCLE_START."""
        at_s = time.monotonic() if at_s is None else at_s
        self._add({"name": name, "ph": "i", "s": "p", "ts": _us(at_s), "pid": self.rank, "tid": 0})

    # ---- what the communicator records -----------------------------------------------------------------------

    def submitted(self, handle):
        """An operation takes the lowest free lane, so that lanes never hold two at a time."""
        with self._lock:
            if self._free_lanes:
                handle.lane = self._free_lanes.pop()
                return
            self._lanes += 1
            handle.lane = self._lanes
        self._metadata("thread_name", _FIRST_LANE + handle.lane, {"name": f"communication {handle.lane}"})

    def completed(self, handle):
        """An operation is done: its whole life, queued and transferring."""
        submitted_s, started_s, done_s = handle.times
        started_s = started_s if started_s >= 0 else done_s
        kind, track = handle.kind, _FIRST_LANE + handle.lane
        word = kind.upper()
        whole = _complete(f"{kind}.{handle.name}", kind, submitted_s, done_s, self.rank, track)
        if handle.note is not None:
            whole["args"] = {"memory": handle.note}
        self._add(
            whole,
            _complete(f"NEGOTIATE_{word}", "queued", submitted_s, started_s, self.rank, track),
            _complete(word, "transferring", started_s, done_s, self.rank, track),
        )
        with self._lock:
            self._free_lanes.append(handle.lane)
            self._free_lanes.sort(reverse=True)

    # ---- files -----------------------------------------------------------------------------------------------

    def flush(self):
        """Writes what was recorded; the file is valid JSON before and after."""
        with self._lock:
            events, self._events = self._events, []
            self._flushed_s = time.monotonic()
            if events and not self._is_full:
                self._append(b",\n".join(json.dumps(event).encode() for event in events))

    def _append(self, text):
        """Adds events to the array in the file. Where they do not fit, the timeline ends, and the training goes on."""
        end = self._file.seek(-1, os.SEEK_END)
        rest = memoryview((b",\n" if end > 2 else b"") + text + b"]")
        try:
            while rest:
                rest = rest[self._file.write(rest):]  # a disk that is nearly full takes a part
        except OSError as error:
            self._is_full = True
            _log.warning("the timeline %s ends here: %s; make room and start another", self.part_path, error.strerror)
            with contextlib.suppress(OSError):  # the bracket's own place is still there
                self._file.truncate(end)
                self._file.seek(end)
                self._file.write(b"]")

    def finish(self, exchange):
        """Joins the files of all ranks in the one that rank 0 writes.

        Args:
            exchange: tells every rank's bytes to all; if it fails, every rank's own file stays.
        """
        self.flush()
        self._file.seek(0)
        part = self._file.read()
        self._file.close()
        clock = _clock_identity()
        header = json.dumps({"clock": clock, "epoch_us": self.epoch_us}).encode()
        parts = exchange(header + b"\n" + part)
        if self.rank == 0:
            with open(self.path, "wb") as file:
                file.write(joined(parts))
        os.unlink(self.part_path)

    def _track(self, name):
        with self._lock:
            tid = self._tracks.get(name)
            if tid is not None:
                return tid
            tid = self._tracks[name] = _FIRST_USER_TRACK + len(self._tracks)
        self._metadata("thread_name", tid, {"name": name})
        return tid

    def _metadata(self, name, tid, arguments):
        self._add({"name": name, "ph": "M", "pid": self.rank, "tid": tid, "args": arguments})

    def _add(self, *events):
        with self._lock:
            self._events.extend(events)
            is_due = len(self._events) >= _FLUSH_EVENTS or time.monotonic() - self._flushed_s > _FLUSH_S
        if is_due:
            self.flush()


def joined(parts):
    """One trace of all ranks' parts; times of other hosts are moved to rank 0's clock.

    Args:
        parts: per rank, a line of JSON with its clock, and its events as a JSON array.
    """
    first, events = None, []
    for part in parts:
        header, _, body = part.partition(b"\n")
        clock = json.loads(header)
        first = first or clock
        shift_us = 0 if clock["clock"] == first["clock"] else clock["epoch_us"] - first["epoch_us"]
        for event in json.loads(body):
            if "ts" in event:
                event["ts"] += shift_us
            events.append(event)
    return b"[\n" + b",\n".join(json.dumps(event).encode() for event in events) + b"\n]\n"


def _us(seconds):
    return round(seconds * 1e6, 3)


def _complete(name, category, begin_s, end_s, rank, tid):
    begin_us = _us(begin_s)
    return {"name": name, "cat": category, "ph": "X", "ts": begin_us, "dur": round(_us(end_s) - begin_us, 3),
            "pid": rank, "tid": tid}  # fmt: skip


def _clock_identity():
    """Processes with the same boot share one monotonic clock."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return os.uname().nodename
