"""Operations whose bytes a library of others moves (gloo, say): matched, checked, ordered and failed by our engine.

Such libraries want all ranks to begin their collectives in one order. Here every operation is posted to the engine as a
request for tickets; one thread takes them, in the order that all ranks share, and hands each to a `Mover`. What the
library cannot do itself is composed here. This file knows no library: the mover is handed in.
"""

import threading
import weakref
from typing import Protocol

from commlib.buffer import DTYPES, Buffer, new_like
from commlib.collective import Submitter, segment_elements
from commlib.engine import AGAIN, TICKET_CODE
from commlib.errors import CommlibError
from commlib.handle import Handle
from commlib.memory import scale
from commlib.requests import NO_OFFSETS, NO_PLAN
from commlib.results import Rows

# The engine's own exchange already is what these need: all ranks have come.
_OWN_KINDS = frozenset(("barrier", "exchange"))

# Their counts differ between ranks, and are told to all by the ticket's exchange.
_UNEVEN_KINDS = frozenset(("allgather", "alltoall"))

_SLICE_S = 1.0  # the end of the engine wakes who waits for tickets; this is for a word that was lost
_JOIN_S = 5.0  # an aborted mover is done at once
_PATIENCE_S = 4.0  # what breaks a mover's connection to a rank that died breaks the engine's at the same time


class Mover(Protocol):
    """A library's collectives on plain memory. One thread calls them, in the same order on every rank.

    `is_over()` becomes true when the operation has failed meanwhile; a collective then stops soon and raises. Buffers
    have one dimension and keep their memory alive; counts are elements for every rank.
    """

    name: str

    def open(self, exchange):
        """Connects with the other ranks' movers; `exchange(payload, name=...)` tells everybody's bytes to all."""

    def allreduce(self, buffer, reduction, is_over):
        """Reduces in place; `reduction` is a cl_reduction: 0 sum, 1 min, 2 max, 3 product."""

    def broadcast(self, buffer, root, is_over):
        """Overwrites with the root's elements."""

    def allgather(self, buffer, counts, is_over):
        """Joins the parts of all ranks in rank order; this rank's own lies in its place."""

    def alltoall(self, output, output_counts, source, source_counts, is_over):
        """Sends source_counts[r] elements to rank r and receives output_counts[r], both joined in rank order."""

    def abort(self):
        """Ends whatever runs, on this rank and its peers; nothing works afterwards."""

    def close(self):
        """Gives everything back; nothing runs."""

    def after_fork(self):
        """In a forked child: lets nothing of the parent's be touched."""


class Output:
    """The result of an operation whose size only the operation knows; `result` is as Engine.result."""

    __slots__ = ("buffer", "result")

    def __init__(self):
        self.buffer = self.result = None

    def allocate(self, count, dtype):
        """Memory that lives as long as its Buffer, which is returned."""
        self.buffer = new_like(None, (count,), dtype)[1]
        return self.buffer


class Job:
    """What the thread needs to know of one operation; it keeps the operation's memory alive.

    Args:
        kind: of the operation.
        source, target: Buffers read and written; the target is None where only the operation knows its size.
        request: the engine's request.
        rank, size: this rank and the number of ranks.
    """

    __slots__ = ("move", "source", "target", "output", "reduction", "prescale", "postscale", "root", "rank", "size")

    def __init__(self, kind, source, target, request, rank, size):
        self.move = _MOVES[kind]
        self.source = source
        self.target = target
        self.output = Output()
        self.reduction = request.reduction
        self.prescale, self.postscale = request.prescale, request.postscale
        self.root = request.root
        self.rank, self.size = rank, size


def _piece(buffer, first, count):
    """Some elements of a Buffer, which they keep alive."""
    return Buffer(buffer.address + first * buffer.itemsize, (count,), buffer.dtype, buffer, True)


def _scaled(target, source, factor):
    if target.address != source.address or factor != 1.0:
        scale(source.code, target.address, source.address, source.count, factor)


def _reduce(job, ticket, mover, is_over, target):
    if ticket.count:
        part = _piece(target, ticket.first, ticket.count)
        _scaled(part, _piece(job.source, ticket.first, ticket.count), job.prescale)
        mover.allreduce(part, job.reduction, is_over)
        _scaled(part, part, job.postscale)


def _move_allreduce(job, ticket, mover, is_over):
    _reduce(job, ticket, mover, is_over, job.target)


def _move_reducescatter(job, ticket, mover, is_over):
    """An all-reduce of a copy, of which every rank takes its share: libraries want equal shares, and ours are uneven."""
    source, output = job.source, job.output
    if output.buffer is None:
        parts = Rows("reducescatter", source, source).parts(job.size)
        first, end = parts[job.rank], parts[job.rank + 1]
        copy = output.allocate(source.count, source.dtype)
        output.result = (copy.address + first * copy.itemsize, end - first, [])
    _reduce(job, ticket, mover, is_over, output.buffer)


def _move_broadcast(job, ticket, mover, is_over):
    if ticket.count:
        mover.broadcast(_piece(job.target, ticket.first, ticket.count), job.root, is_over)


def _move_allgather(job, ticket, mover, is_over):
    counts, source = ticket.splits, job.source
    output = job.output.allocate(sum(counts), source.dtype)
    _scaled(_piece(output, sum(counts[: job.rank]), source.count), source, 1.0)
    mover.allgather(output, counts, is_over)
    job.output.result = (output.address, output.count, counts)


def _move_alltoall(job, ticket, mover, is_over):
    sent = ticket.splits[job.rank * job.size : (job.rank + 1) * job.size]
    received = ticket.splits[job.rank :: job.size]
    output = job.output.allocate(sum(received), job.source.dtype)
    mover.alltoall(output, received, _piece(job.source, 0, sum(sent)), sent, is_over)
    job.output.result = (output.address, output.count, received)


_MOVES = {
    "allreduce": _move_allreduce, "reducescatter": _move_reducescatter, "broadcast": _move_broadcast,
    "allgather": _move_allgather, "alltoall": _move_alltoall,
}  # fmt: skip


class TicketHandle(Handle):
    """A handle whose result lies in memory of a job, not of the engine."""

    __slots__ = ("job", "output")

    def __init__(self, *args):
        super().__init__(*args)
        self.job = self.output = None

    def assign(self, request, rank, size):
        """Makes the job of this handle's operation, and keeps its result for good."""
        source, target = self._keep
        self.job = Job(self.kind, source, target, request, rank, size)
        self.output = self.job.output

    def result_memory(self):
        """As Handle.result_memory."""
        return super().result_memory() if self.output is None else self.output.result

    def _let_go(self):
        super()._let_go()
        self.job = None  # the thread may still hold the job of a failed operation, and with it the memory that it moves


class TicketSubmitter(Submitter):
    """A Submitter whose operations a mover carries out.

    Args:
        engine, hosts, settings: as for Submitter.
        mover: a Mover; it is opened by `open`, and closed by `close`.
    """

    handle_class = TicketHandle
    prepares = False

    def __init__(self, engine, hosts, settings, mover):
        self._moves = False  # the operation that is being described
        super().__init__(engine, hosts, settings)
        self.backend = mover.name
        self._worker = Worker(engine, mover, patience_s=_PATIENCE_S)

    def open(self, exchange):
        """Starts the thread and waits until the mover has met the others'; `exchange` as for Mover.open."""
        self._worker.start(exchange)

    def close(self):
        """The engine was shut down: the thread ends, and the mover with it."""
        self._worker.join()
        super().close()

    def after_fork(self):
        """In a forked child."""
        super().after_fork()
        self._worker.after_fork()

    def run_again(self, *_):
        """There is no short way: every operation has a job."""
        return False

    def start_again(self, *_):
        """As `run_again`."""

    def _post(self, handle, request, submit=None):
        if request.kind == TICKET_CODE:
            handle.assign(request, self.engine.rank, self.engine.size)
            if submit is not None:
                handle.job.prescale = 1.0  # what stands in changes nothing as it is
            self._worker.expect(request.key, handle)
        super()._post(handle, request, submit)

    def _plan_of_engine(self, *args):
        self._moves = False
        return super()._plan_of_engine(*args)

    def is_moved(self, kind, dtype, nbytes, overlapped):
        """Whether the mover carries out an operation, and not the engine; equal on all ranks."""
        return kind not in _OWN_KINDS

    def _describe(self, use, kind, signature):
        dtype, count, overlapped = signature[0], signature[1], signature[-1]
        self._moves = self.is_moved(kind, dtype, count * DTYPES[dtype][1], overlapped)
        if use.request is not None:  # the name may have been one of the mover's
            use.request.members, use.request.nmembers = NO_OFFSETS, 0
        super()._describe(use, kind, signature)
        if not self._moves:
            return
        request = use.request
        request.kind = TICKET_CODE
        request.parts = NO_OFFSETS
        request.members, request.nmembers = self._members, self.engine.size
        if kind in _UNEVEN_KINDS:
            request.count = 0

    def _plan(self, kind, nbytes, itemsize, root, overlapped):
        if not self._moves:
            return super()._plan(kind, nbytes, itemsize, root, overlapped)
        return NO_PLAN, segment_elements(self.settings.segment_nbytes, itemsize)


class Worker:
    """The thread that takes tickets.

    A mover that fails once has lost the common order, so it ends there: everything after it fails too.

    Args:
        engine: a started Engine.
        mover: a Mover.
        patience_s: how long a failed mover waits for the engine to know why (a rank was lost), before it blames itself.
    """

    def __init__(self, engine, mover, patience_s):
        self._engine = engine
        self._mover = mover
        self._patience_s = patience_s
        self._handles = weakref.WeakValueDictionary()  # by key; handles live in the flight table while they are in flight
        self._broken = False
        self._opened = threading.Event()
        self._error = None
        self._thread = None

    def start(self, exchange):
        """Opens the mover in the thread, which can be left behind if a rank is lost meanwhile."""
        self._thread = threading.Thread(target=self._run, args=(exchange,), name=f"commlib-{self._mover.name}", daemon=True)
        self._thread.start()
        while not self._opened.wait(0.1):
            self._engine.check()
        if self._error is not None:
            self._engine.check()  # a lost rank is the better reason
            raise self._error

    def expect(self, key, handle):
        """Tickets of this key are for this handle."""
        self._handles[key] = handle

    def join(self):
        """Waits for the thread, whose engine has ended."""
        if self._thread is not None and not self._engine.forked:
            self._thread.join(_JOIN_S)

    def after_fork(self):
        """In a forked child, where the thread does not exist."""
        self._mover.after_fork()

    def _run(self, exchange):
        try:
            self._mover.open(exchange)
        except BaseException as error:
            self._error = error
            self._engine.fail(f"{self._mover.name} could not be started: {error}")
        self._opened.set()
        try:
            while True:
                ticket = self._engine.next_ticket(_SLICE_S)
                if ticket is not None:
                    self._carry_out(ticket)
        except Exception as error:  # the engine has ended, as a rule
            self._engine.fail(f"{self._mover.name} ended: {error}")
        self._mover.close()

    def _carry_out(self, ticket):
        engine, operation = self._engine, ticket.operation
        job = getattr(self._handles.get(ticket.key), "job", None)  # None: the operation has failed, and was let go of
        try:
            if self._broken or job is None or engine.done(operation):
                raise CommlibError("its collectives have ended")
            job.move(job, ticket, self._mover, lambda: engine.done(operation))
        except Exception as error:
            self._give_up(operation, error)
        engine.return_ticket(ticket)

    def _give_up(self, operation, error):
        """Others' sockets show a death before the engine tells it: its word is waited for.

        Only then is the mover aborted: that makes it fail on all other ranks, which must have heard by then who failed first.
        """
        if self._engine.wait(operation, self._patience_s) == AGAIN:
            self._engine.fail(f"{self._mover.name} failed: {error}")
        if not self._broken:
            self._broken = True
            self._mover.abort()
