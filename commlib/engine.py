"""The C engine as Python sees it: one object per engine, and the one place that knows how to call it.

It knows cffi, statuses and pointers; it knows no algorithm, no NumPy and no name. Whoever holds it decides what to
submit. In a forked child the object is dead: it only says so.
"""

from functools import partial
from typing import NamedTuple

from commlib._native import ffi, lib
from commlib.errors import CommlibError, ForkedError, JoinedError, ShutdownError, error_of
from commlib.requests import Announced, new_text, string_of

# The engine's cl_kind of every kind.
KIND_CODES = {
    "allreduce": lib.CL_ALLREDUCE, "broadcast": lib.CL_BROADCAST, "allgather": lib.CL_ALLGATHER,
    "reducescatter": lib.CL_REDUCESCATTER, "alltoall": lib.CL_ALLTOALL, "barrier": lib.CL_BARRIER,
    "exchange": lib.CL_EXCHANGE,
}  # fmt: skip

AGAIN = lib.CL_AGAIN

# What every kind is to the engine when the bytes are moved by somebody else.
TICKET_CODE = lib.CL_TICKET

# Waits in C return this often, so that Python can run signal handlers (Ctrl-C).
_SLICE_MS = 100

_REPORT_NBYTES = 1024  # what the engine makes at most

_STATS = ("operations", "failed", "sent_nbytes", "received_nbytes", "eager_kept", "eager_starved", "grants", "frames")

_FORKED_TEXT = (
    "commlib was initialized in the parent of this process, and a forked child holds no engine: communicate in the "
    "process that called init(), or start children with multiprocessing's 'spawn' method and call init() there"
)


class Ticket(NamedTuple):
    """A turn: segment [first, first + count) of the elements of the operation of this key may be moved now."""

    key: int
    first: int
    count: int
    splits: list  # all members' splits, in member order
    operation: object
    native: object


class Engine:
    """One cl_engine: made, linked, started, used, shut down.

    Args:
        rank, size: this rank and the number of ranks.
        settings: the commlib.settings.Settings that the links are made with.

    Raises:
        ValueError: the engine refuses a setting.
    """

    __slots__ = ("pointer", "rank", "size", "forked", "closed", "joined", "is_open", "run_at", "submit_at", "places", "ended",
                 "_out", "_library", "__weakref__")  # fmt: skip

    def __init__(self, rank, size, settings):
        self.pointer = None
        self.rank = rank
        self.size = size
        self.forked = False
        self.closed = False
        self.ended = []  # functions that are called when it was shut down: nothing is in flight then
        self.joined = False
        self.is_open = True  # nothing of this is the case
        self._library = None  # of MPI, while there are links over it
        self._out = ffi.new("cl_operation **")
        fields = {name: getattr(settings, name) for name in ENGINE_SETTINGS}
        engine = ffi.new("cl_engine **")
        _check(lib.cl_engine_new(rank, size, ffi.new("cl_settings *", fields), engine))
        self.pointer = engine[0]
        # (request, key, input, output, place) -> status: a request on other memory under another key, see commlib.h. Bound
        # here, since many small operations spend most of their time on the way to C.
        self.run_at = partial(lib.cl_run_at, self.pointer)
        self.submit_at = partial(lib.cl_submit_at, self.pointer)
        self.places = []  # for their results, free to be used; a list's pop and append are atomic

    # ---- links: what commlib.connect wants of an endpoint; descriptors given here are the engine's from then on ---

    def create_shared(self, npeers):
        """Makes this rank's shared memory for its local peers. Returns (memfd, doorbell), which stay the engine's."""
        memfd, doorbell = ffi.new("int *"), ffi.new("int *")
        status = lib.cl_shm_create(self.pointer, npeers, memfd, doorbell)
        if status != lib.CL_OK:
            raise error_of(status, f"{string_of(lib.cl_status_text(status))} while making shared memory for {npeers} peers: "
                           "free some memory, raise the limit of open files or of memory (ulimit), or set a smaller "
                           "shm_ring_nbytes")  # fmt: skip
        return memfd[0], doorbell[0]

    def attach_shared(self, peer, shared):
        """Links a peer by its shared memory (a commlib.connect.SharedPeer)."""
        _check(lib.cl_shm_attach(self.pointer, peer, shared.memfd, shared.doorbell, shared.pidfd, shared.my_slot,
                                 shared.peer_slot))  # fmt: skip

    def attach_tcp(self, peer, descriptor):
        """Links a peer by a connected socket."""
        _check(lib.cl_tcp_attach(self.pointer, peer, descriptor))

    def attach_mpi(self, peers, library):
        """Links peers by an MPI library (a commlib.mpi.Library), which is told when the engine has ended."""
        native = ffi.new("cl_mpi_library *", {
            **{name: ffi.cast("cl_mpi_function", address) for name, address in library.functions.items()},
            "communicator": library.communicator, "byte": library.byte,
            "handle_nbytes": library.handle_nbytes, "status_nbytes": library.status_nbytes,
        })  # fmt: skip
        _check(lib.cl_mpi_create(self.pointer, native))
        self._library = library
        for peer in peers:
            _check(lib.cl_mpi_attach(self.pointer, peer))

    def name_hosts(self, names):
        """Every rank's host name, for errors that name a rank; before `start`."""
        for rank, name in enumerate(names):
            _check(lib.cl_engine_name_host(self.pointer, rank, new_text(name)))

    # ---- life ------------------------------------------------------------------------------------------------

    def start(self):
        """Starts the progress thread; all links are attached by now."""
        _check(lib.cl_engine_start(self.pointer))

    def submit(self, request):
        """Posts a request and returns its operation; the caller holds its lock, and releases the operation."""
        status = lib.cl_submit(self.pointer, request, self._out)
        if status:
            raise error_of(status, _REFUSED if status == lib.CL_INVALID else "")
        return self._out[0]

    def check_open(self):
        """Raises if this is a forked child, the engine was shut down, or this rank has joined."""
        if not self.is_open:
            self.check()
            raise JoinedError("this rank has joined: it submits nothing until join() has returned", self.rank)

    def check(self):
        """Raises what ended this engine, if anything did: a fork, a shutdown, a lost peer."""
        if self.forked:
            raise ForkedError(_FORKED_TEXT)
        if self.closed:
            raise ShutdownError("this communicator was closed: call commlib.init() to make another")
        text, peer = ffi.new("char **"), ffi.new("int32_t *")
        status = lib.cl_engine_health(self.pointer, text, peer)
        if status != lib.CL_OK:
            raise error_of(status, string_of(text[0]), peer[0])

    def now(self):
        """Seconds on the clock of an operation's times."""
        return lib.cl_engine_now(self.pointer)

    def stats(self):
        """What the engine has counted, a dict of ints."""
        if self.forked:
            raise ForkedError(_FORKED_TEXT)
        stats = ffi.new("cl_stats *")
        lib.cl_engine_stats(self.pointer, stats)
        return {name: getattr(stats, name) for name in _STATS}

    def shutdown(self, linger_ms):
        """Says goodbye to the peers and closes all links; idempotent, and nothing in a forked child."""
        if not self.forked and not self.closed:
            self.closed = True
            self.is_open = False
            lib.cl_engine_shutdown(self.pointer, linger_ms)
            if self._library is not None:
                self._library.ended(lib.cl_mpi_ended(self.pointer) == 1)
                self._library = None
            while self.ended:
                self.ended.pop()()

    def after_fork(self):
        """In the child: gives back this process's copies of descriptors; from here on every call is refused."""
        if not self.forked:
            self.forked = True
            self.is_open = False
            lib.cl_engine_forked(self.pointer)

    def __del__(self):
        # A child must not free what its parent's threads may have held at the fork.
        if self.pointer is not None and not self.forked:
            self.shutdown(0)
            lib.cl_engine_free(self.pointer)

    # ---- operations ------------------------------------------------------------------------------------------

    def wait(self, operation, timeout_s):
        """Waits for an operation, moving data meanwhile. Returns its status, CL_AGAIN if the time is over first."""
        if self.forked:
            raise ForkedError(_FORKED_TEXT)
        if timeout_s is None:
            status = lib.CL_AGAIN
            while status == lib.CL_AGAIN:
                status = lib.cl_operation_wait(operation, _SLICE_MS)
            return status
        end_s = lib.cl_engine_now(self.pointer) + timeout_s
        while True:
            left_ms = (end_s - lib.cl_engine_now(self.pointer)) * 1e3
            status = lib.cl_operation_wait(operation, max(0, min(_SLICE_MS, int(left_ms + 0.999))))
            if status != lib.CL_AGAIN or left_ms <= 0:
                return status

    def runner(self, request, stride):
        """A request that is run again and again on the same memory, its key increased by `stride` before each run.

        Returns:
            (call, place): call() runs it and waits a moment, and returns its status. Unless that is 0, `place` holds the
            operation, or NULL if there is none, and `taken_from(place)` takes it over.
        """
        place = ffi.new("cl_operation **")
        return partial(lib.cl_run_again, self.pointer, request, stride, _SLICE_MS, place), place

    def new_place(self):
        """One more, where `places` is empty."""
        return ffi.new("cl_operation **")

    def taken_from(self, place, status):
        """The operation that a runner has left behind, still held.

        Raises:
            CommlibError: there is none, or this engine has ended.
        """
        operation, place[0] = place[0], ffi.NULL
        try:
            self.check_open()
            if operation == ffi.NULL:
                raise error_of(status, _REFUSED if status == lib.CL_INVALID else "")
        except CommlibError:
            self.release(operation)
            raise
        return operation

    def shared_memory(self, nbytes):
        """A writable buffer of zeros in memory that all ranks of this host map, freed with its last user; None: no such memory."""
        block = ffi.new("cl_shared **")
        if self.forked or lib.cl_shared_new(self.pointer, nbytes, block) != lib.CL_OK:
            return None
        block = block[0]
        address = ffi.gc(lib.cl_shared_address(block), lambda _: lib.cl_shared_free(block), nbytes)
        return ffi.buffer(address, nbytes)

    def done(self, operation):
        """True if the operation is done, well or not."""
        if self.forked:
            raise ForkedError(_FORKED_TEXT)
        return lib.cl_operation_done(operation) != 0

    def is_begun(self, key):
        """True if a peer's word of an operation that is not posted here has come; looks at the links first."""
        self.check()
        return lib.cl_engine_is_begun(self.pointer, key) != 0

    def release(self, operation):
        """Gives an operation back; its result memory goes with it."""
        if not self.forked:
            lib.cl_operation_release(operation)

    def result(self, operation, nmembers):
        """(address, count, every member's count) of the result of a kind that allocates it; it goes with the operation."""
        address, count, counts = ffi.new("void **"), ffi.new("uint64_t *"), ffi.new("uint64_t **")
        _check(lib.cl_operation_result(operation, address, count, counts))
        members = [] if counts[0] == ffi.NULL else ffi.unpack(counts[0], nmembers)
        return int(ffi.cast("uintptr_t", address[0])), count[0], members


    # ---- for native code of others, which submits by itself ----------------------------------------------------------

    @property
    def address(self):
        """Where the cl_engine is, an int."""
        return int(ffi.cast("uintptr_t", self.pointer))

    def tell(self, operation, queue, token):
        """Has an operation put on a queue when it is done; `queue` and `token` are addresses, ints."""
        lib.cl_operation_tell(operation, ffi.cast("cl_queue *", queue), ffi.cast("void *", token))

    # ---- stalls ------------------------------------------------------------------------------------------------

    def next_stall(self, timeout_s):
        """Waits for the next report of an operation that waits for ranks which have not submitted it.

        Returns:
            What to tell people; None if nothing came in time.

        Raises:
            CommlibError: the engine has ended, and there will be no more.
        """
        text = ffi.new("char[]", _REPORT_NBYTES)
        status = lib.cl_stall_next(self.pointer, int(timeout_s * 1e3), text, _REPORT_NBYTES)
        if status == AGAIN:
            return None
        _check(status)
        return string_of(text)

    # ---- joining -----------------------------------------------------------------------------------------------

    def join(self):
        """From here on this rank submits nothing of its own; nothing changes if it has joined already."""
        self.joined, self.is_open = True, False  # before others count on it
        _check(lib.cl_join(self.pointer))

    def next_announced(self, timeout_s):
        """Waits for what there is to do while joined.

        Returns:
            An Announced, to be given to `stand_in` or `refuse` or left; an int, the last rank that joined, when all have; None
            if nothing came in time.

        Raises:
            PeerLeftError, PeerLostError: a rank has gone, and not all will join.
        """
        if self.forked:
            raise ForkedError(_FORKED_TEXT)
        told, last = ffi.new("cl_announced **"), ffi.new("int32_t *")
        status = lib.cl_join_next(self.pointer, int(timeout_s * 1e3), told, last)
        if status == AGAIN:
            return None
        if status == lib.CL_PEER_LEFT:
            raise error_of(status, f"join() waits in vain: rank {last[0]} has shut down without joining", last[0])
        if status != lib.CL_OK:
            self.check()
            _check(status)
        return last[0] if told[0] == ffi.NULL else Announced(told[0])

    def stand_in(self, announced):
        """Posts this rank's part in an operation of others. Returns the operation, to be released."""
        status = lib.cl_stand_in(self.pointer, announced.native, self._out)
        if status:
            raise error_of(status, _REFUSED if status == lib.CL_INVALID else "")
        return self._out[0]

    def refuse(self, announced, text):
        """An operation of others fails on all of them, since this rank has joined."""
        lib.cl_join_refuse(self.pointer, announced.native, new_text(text))

    def end_join(self):
        """All have joined, and the keys of what follows are others than before."""
        _check(lib.cl_join_end(self.pointer))
        self.joined, self.is_open = False, not self.closed

    # ---- tickets: for operations whose bytes somebody else moves ---------------------------------------------------

    def next_ticket(self, timeout_s):
        """Waits for this rank's next ticket; one thread takes them all.

        Returns:
            A Ticket, to be given back by `return_ticket`; None if none came in time.

        Raises:
            CommlibError: the engine has ended, and there will be no more.
        """
        ticket = ffi.new("cl_ticket *")
        status = lib.cl_ticket_next(self.pointer, int(timeout_s * 1e3), ticket)
        if status == AGAIN:
            return None
        _check(status)
        splits = ffi.unpack(ticket.splits, ticket.nsplits) if ticket.nsplits else []
        return Ticket(ticket.key, ticket.first, ticket.count, splits, ticket.operation, ticket)

    def return_ticket(self, ticket):
        """This rank is done with a ticket: its bytes were moved, or its operation has failed."""
        lib.cl_ticket_return(ticket.native)

    def fail(self, text):
        """Ends the engine as if this rank had been lost: what is in flight fails on every rank, with this reason."""
        if not self.forked:
            lib.cl_engine_fail(self.pointer, new_text(text))


def operation_times(operation):
    """(submitted, started, done) of an operation in seconds on the engine's clock; negative: not yet."""
    times = ffi.new("double[3]")
    lib.cl_operation_times(operation, times, times + 1, times + 2, ffi.new("uint32_t *"))
    return times[0], times[1], times[2]


def operation_error(operation):
    """The exception of a failed operation; the caller raises it."""
    text, peer = ffi.new("char **"), ffi.new("int32_t *")
    status = lib.cl_operation_status(operation, text, peer)
    return error_of(status, string_of(text[0]), peer[0])


def functions_address():
    """Where the engine's cl_functions are, an int."""
    return int(ffi.cast("uintptr_t", lib.cl_engine_functions()))


ENGINE_SETTINGS = (
    "eager_nbytes", "eager_budget_nbytes", "inflight_nbytes", "inflight_most_nbytes", "spin_us", "heartbeat_ms", "lost_ms",
    "shm_ring_nbytes", "stall_warning_s", "stall_shutdown_s",
)  # fmt: skip

_REFUSED = "the engine refuses a request that contradicts itself: this is a fault of commlib, please report it"


def _check(status):
    if status != lib.CL_OK:
        raise error_of(status)
