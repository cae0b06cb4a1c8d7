"""A communicator: the collectives of one group of ranks on arrays.

Every collective comes as `name_async`, which returns a Handle at once, and `name`, which waits. With a trailing
underscore it works in place. This file checks what users pass, and describes results; `collective` does the rest.
"""

from contextlib import suppress
from functools import partial

from commlib.adasum import Adasums
from commlib.buffer import Buffer, as_buffer, copy_into, ndarray, new_like, style_of, writable_buffer
from commlib.collective import ANY, ANY_OR_NONE, Submitter
from commlib.control import Control
from commlib.grouped import GroupedCollectives
from commlib.layout import checked_ranks
from commlib.membership import Membership
from commlib.reduction import Adasum, Average, check_op
from commlib.results import Rows, exchanged, new_shared
from commlib.timeline import Timeline

# Operations of others that still need this rank's last bytes get this long at close.
_LINGER_MS = 2000

_NOTHING = Buffer(0, (0,), "uint8", None, True)


class Communicator(GroupedCollectives, Membership):
    """The collectives of a group of ranks; made by `commlib.init()`.

    Operations are matched between ranks by their names, in whatever order they are submitted; unnamed ones by their
    sequence number per kind. Arrays are NumPy arrays, anything with the buffer protocol, or `commlib.Buffer`.

    Args:
        engine: a started commlib.engine.Engine.
        topology: a commlib.connect.Topology: who lives where.
        settings: the settings record that all ranks hold.
        submitter: what posts operations; None: the engine moves their bytes.
        parent: the communicator of all ranks, if this one is a group's.

    Example:
        >>> import commlib, numpy
        >>> communicator = commlib.init()
        >>> communicator.allreduce(numpy.arange(3.0), op=commlib.Sum)  # with one rank
        array([0., 1., 2.])
        >>> commlib.shutdown()
    """

    def __init__(self, engine, topology, settings, submitter=None, parent=None):
        self._engine = engine
        self._submitter = submitter or Submitter(engine, topology.hosts, settings)
        self.native = engine, self._submitter  # for commlib.direct
        self._topology = topology
        self._layouts = {}  # of grouped operations
        self.rank, self.size, self.ranks = self._submitter.rank, self._submitter.size, self._submitter.members
        self.local_rank, self.local_size = topology.local_rank, topology.local_size
        self.cross_rank, self.cross_size = topology.cross_rank, topology.cross_size
        self.is_homogeneous = topology.is_homogeneous
        self.transports = topology.transports
        self.host_sizes = tuple(topology.hosts.count(host) for host in range(max(topology.hosts) + 1))
        self.control = Control(self.exchange, self.rank, self.size)
        Membership.__init__(self, parent)
        self._adasums = Adasums(self._submitter)
        self.on_join(before=self._adasums.settle)

    # ---- allreduce -------------------------------------------------------------------------------------------

    def allreduce_async_(self, array, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0,
                         overlapped=False):  # fmt: skip
        """Reduces the array over all ranks, in place: x <- postscale * op_r(prescale * x_r); Average divides by size.

        Args:
            array: contiguous, writable, of the same shape and dtype on all ranks. Do not touch it before the wait.
            name: matches the operation between ranks; None: by sequence number.
            op: commlib.Average, Sum, Min, Max, Product, or Adasum for floats. On bool: Sum, Max are "or", Product, Min "and".
            priority: 0 is needed first; lower goes first.
            overlapped: one of many in flight, whose throughput together counts and not the latency of this one, as with
                gradients; it changes which algorithm is chosen, so it must be equal on all ranks.
            prescale_factor, postscale_factor: multiply each contribution, and the result.

        Returns:
            A Handle; its wait() returns the array.

        Raises:
            ValueError: read-only or non-contiguous array, name in flight.
            TypeError: no array, unknown dtype, unknown op.
        """
        wish = (op, priority, prescale_factor, postscale_factor, overlapped)
        if type(array) is ndarray:
            handle = self._submitter.start_again("allreduce", name, array, wish)
            if handle is not None:
                return handle
        return self._in_place(array, name, wish, False)

    def allreduce_async(self, array, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0,
                        overlapped=False):  # fmt: skip
        """As `allreduce_async_`, with the result in a new array; the array is only read."""
        return self._allreduce(array, as_buffer(array), True, name, op, priority, prescale_factor, postscale_factor,
                               overlapped)  # fmt: skip

    def allreduce_(self, array, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0,
                   timeout_s=None):  # fmt: skip
        """As `allreduce_async_`, and waits. Returns the array."""
        wish = (op, priority, prescale_factor, postscale_factor, False)
        if type(array) is ndarray and self._submitter.run_again("allreduce", name, array, wish, timeout_s):
            return array
        return self._in_place(array, name, wish, True).wait(timeout_s)

    def allreduce(self, array, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0,
                  timeout_s=None):  # fmt: skip
        """As `allreduce_async`, and waits. Returns the new array.

        Example:
            >>> import commlib, numpy
            >>> commlib.init().allreduce(numpy.array([3, 4]), op=commlib.Max)
            array([3, 4])
            >>> commlib.shutdown()
        """
        return self._allreduce(array, as_buffer(array), True, name, op, priority,
                               prescale_factor, postscale_factor, lazy=True).wait(timeout_s)  # fmt: skip

    def prepare_allreduce_(self, array, *, name, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0):
        """An in-place all-reduce of one array, to be called again and again: `allreduce_` at the cost of a call into C.

        The array's memory is remembered: write new values into it between calls. Timelines do not show these operations.

        Args:
            array, op, priority, prescale_factor, postscale_factor: as for `allreduce_async_`.
            name: needed, and for this alone.

        Returns:
            A Prepared; calling it returns the array.
        """
        buffer = writable_buffer(array, "allreduce_")
        check_op(op, buffer.dtype)
        if op is Adasum:
            raise ValueError("Adasum is several operations, which cannot be prepared: use allreduce_")
        if type(name) is not str:
            raise TypeError(f"a prepared operation needs a name, a string, not {name!r}")
        if not self._submitter.prepares:
            return partial(self.allreduce_, array, name=name, op=op, priority=priority, prescale_factor=prescale_factor,
                           postscale_factor=postscale_factor)  # fmt: skip
        return self._submitter.prepare("allreduce", name, buffer, buffer, priority=priority, op=op,
                                       scales=(float(prescale_factor), float(postscale_factor)), result=array)  # fmt: skip

    def empty(self, shape, dtype="float32", *, shared_only=False):
        """A new array of zeros in memory that all ranks of this host map: collectives on it copy nothing between them.

        Reductions read it where it lies. It is ordinary memory where no other rank is on this host, where links are tcp, and
        where `ulimit -v` or `-f` forbid a shared heap. It may outlive the communicator.

        Args:
            shape: an int or a tuple.
            dtype: of NumPy.
            shared_only: True: None instead of ordinary memory.

        Raises:
            MemoryError: there is no memory.

        Example:
            >>> import commlib
            >>> commlib.init().empty((2, 3)).sum()
            np.float32(0.0)
            >>> commlib.shutdown()
        """
        return new_shared(self._engine.shared_memory, shape, dtype, shared_only)

    def _in_place(self, array, name, wish, lazy):
        buffer = writable_buffer(array, "allreduce_")
        op, priority, prescale, postscale, overlapped = wish
        handle = self._allreduce(array, buffer, False, name, op, priority, prescale, postscale, overlapped, lazy)
        if type(array) is ndarray and op is not Adasum:
            self._submitter.remember("allreduce", name, array, wish)
        return handle

    def _allreduce(self, array, source, is_new, name, op, priority, prescale, postscale, overlapped=False, lazy=False):
        check_op(op, source.dtype)
        scales = (float(prescale), float(postscale))
        result, target = (array, source)
        if is_new:
            result, target = new_like(style_of(array, source), source.shape, source.dtype)
        if op is Adasum:
            return self._adasums.submit(name, [source], [target], result, priority, scales)
        return self._submitter.submit("allreduce", name, source, target, priority=priority, op=op, scales=scales,
                                      overlapped=overlapped, lazy=lazy, result=result)  # fmt: skip

    # ---- broadcast -------------------------------------------------------------------------------------------

    def broadcast_async_(self, array, root_rank, *, name=None, priority=0):
        """Overwrites the array with the root's, in place.

        Args:
            array: contiguous, writable, of the same shape and dtype on all ranks.
            root_rank: the rank whose array everybody gets; name, priority: as for `allreduce_async_`.

        Returns:
            A Handle; its wait() returns the array.

        Raises:
            ValueError: root_rank is no rank, read-only or non-contiguous array, name in flight.
        """
        buffer = writable_buffer(array, "broadcast_")
        self._check_root(root_rank)
        return self._submitter.submit("broadcast", name, buffer, buffer, priority=priority, root=root_rank, result=array)

    def broadcast_async(self, array, root_rank, *, name=None, priority=0):
        """As `broadcast_async_`, with the root's values in a new array."""
        source = as_buffer(array)
        self._check_root(root_rank)
        result, target = new_like(style_of(array, source), source.shape, source.dtype)
        if self.rank == root_rank:
            copy_into(target, source)
        return self._submitter.submit("broadcast", name, target, target, priority=priority, root=root_rank, result=result)

    def broadcast_(self, array, root_rank, *, name=None, priority=0, timeout_s=None):
        """As `broadcast_async_`, and waits. Returns the array."""
        return self.broadcast_async_(array, root_rank, name=name, priority=priority).wait(timeout_s)

    def broadcast(self, array, root_rank, *, name=None, priority=0, timeout_s=None):
        """As `broadcast_async`, and waits. Returns the new array."""
        return self.broadcast_async(array, root_rank, name=name, priority=priority).wait(timeout_s)

    # ---- allgather, reducescatter, alltoall ------------------------------------------------------------------

    def allgather_async(self, array, *, name=None, priority=0):
        """Joins the arrays of all ranks along the first dimension, in rank order.

        Args:
            array: contiguous, of one dimension at least; the first may differ between ranks, the others not.
            name, priority: as for `allreduce_async_`.

        Returns:
            A Handle; its wait() returns the new array.

        Raises:
            ValueError: an array without dimensions, non-contiguous array, name in flight.
        """
        rows = Rows("allgather", array, as_buffer(array))
        return self._submitter.submit("allgather", name, rows.payload, None, priority=priority, shape=rows.shape_hashed,
                                      splits=(rows.payload.count,), finish=rows.gathered)  # fmt: skip

    def allgather(self, array, *, name=None, priority=0, timeout_s=None):
        """As `allgather_async`, and waits. Returns the new array."""
        return self.allgather_async(array, name=name, priority=priority).wait(timeout_s)

    def reducescatter_async(self, array, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0):
        """Reduces over all ranks and gives each its share of the rows; low ranks get the rows that remain.

        Args:
            array: contiguous, of one dimension at least, of the same shape and dtype on all ranks.
            name, op, priority, prescale_factor, postscale_factor: as for `allreduce_async_`.

        Returns:
            A Handle; its wait() returns this rank's rows as a new array.

        Raises:
            ValueError: an array without dimensions, non-contiguous array, name in flight.
        """
        source = as_buffer(array)
        rows = Rows("reducescatter", array, source)
        check_op(op, source.dtype)
        if op is Adasum:
            raise ValueError("there is no reducescatter with op=commlib.Adasum: use allreduce, or another op")
        return self._submitter.submit("reducescatter", name, source, None, priority=priority, op=op,
                                      scales=(float(prescale_factor), float(postscale_factor)), parts=rows.parts(self.size),
                                      finish=partial(rows.scattered, self.rank, self.size))  # fmt: skip

    def reducescatter(self, array, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0,
                      timeout_s=None):  # fmt: skip
        """As `reducescatter_async`, and waits. Returns this rank's rows."""
        return self.reducescatter_async(array, name=name, op=op, priority=priority, prescale_factor=prescale_factor,
                                        postscale_factor=postscale_factor).wait(timeout_s)  # fmt: skip

    def alltoall_async(self, array, splits=None, *, name=None, priority=0):
        """Sends rows to every rank and receives theirs, joined in rank order.

        Args:
            array: contiguous, of one dimension at least; the first may differ between ranks, the others not.
            splits: rows for each rank, in rank order; None: the same number for each.
            name, priority: as for `allreduce_async_`.

        Returns:
            A Handle; its wait() returns the new array, or with splits (array, rows received from each rank).

        Raises:
            ValueError: splits that do not fit the array, or rows that do not divide evenly; as for `allgather_async`.
        """
        rows = Rows("alltoall", array, as_buffer(array))
        row_splits = rows.even_splits(self.size) if splits is None else rows.checked_splits(splits, self.size)
        return self._submitter.submit(
            "alltoall", name, rows.payload, None, priority=priority, shape=rows.shape_hashed,
            splits=rows.elements(row_splits),
            finish=rows.gathered if splits is None else rows.gathered_with_splits,
        )  # fmt: skip

    def alltoall(self, array, splits=None, *, name=None, priority=0, timeout_s=None):
        """As `alltoall_async`, and waits."""
        return self.alltoall_async(array, splits, name=name, priority=priority).wait(timeout_s)

    # ---- without arrays --------------------------------------------------------------------------------------

    def barrier(self, timeout_s=None):
        """Returns when all ranks have called it.

        Raises:
            TimeoutError: some rank did not within timeout_s.
        """
        self.barrier_async().wait(timeout_s)

    def barrier_async(self):
        """As `barrier`; returns at once, a Handle."""
        return self._submitter.submit("barrier", None, _NOTHING, _NOTHING)

    def exchange(self, payload, *, name, timeout_s=None, without_joined=False):
        """Tells every rank everybody's bytes: the control plane, for what ranks must know of each other.

        Args:
            payload: bytes; the length may differ between ranks.
            name: matches the exchange between ranks.
            without_joined: True: of a rank that has joined it tells no bytes, instead of failing.

        Returns:
            A list of bytes, one per rank, in rank order.
        """
        shape = ANY_OR_NONE if without_joined else ANY
        return self._submitter.submit("exchange", name, as_buffer(payload), None, shape=shape, finish=exchanged).wait(timeout_s)

    # ---- groups ----------------------------------------------------------------------------------------------

    def is_begun(self, kind):
        """True if the first rank of this group has heard of its next unnamed operation of a kind, and has not submitted it."""
        return self._submitter.is_begun(kind)

    def group(self, ranks, name=None):
        """A communicator of some of the ranks, on the same engine; nothing is communicated.

        Each member calls it, and equally often: the n-th group of these ranks on one is the n-th on the others. Ranks,
        roots and splits of its operations are counted within it, in the order given here.

        Args:
            ranks: of this communicator, this one among them; in the same order on every member.
            name: tells groups of the same ranks apart where members make them in different orders; each name serves once.

        Raises:
            ValueError: no such ranks, one named twice, or this one is not among them.
        """
        places = checked_ranks(ranks, self.rank, self.size)
        topology = self._topology.of(places, places.index(self.rank))
        submitter = self._submitter.part([self.ranks[place] for place in places], topology.hosts, name)
        return Communicator(self._engine, topology, self.settings, submitter, parent=self)

    # ---- life ------------------------------------------------------------------------------------------------

    @property
    def timeline(self):
        """What is being recorded, if anything is: a Timeline."""
        return self._submitter.flight.timeline

    @property
    def backend(self):
        """Who moves the bytes: "native", or a library of others."""
        return self._submitter.backend

    @property
    def settings(self):
        """The settings record that all ranks hold."""
        return self._submitter.settings

    @settings.setter
    def settings(self, settings):
        self._submitter.use_settings(settings)

    def algorithm(self, kind, nbytes, overlapped=False):
        """The name of the algorithm that an operation of this kind and size is given, "alone" with one rank.

        Example:
            >>> import commlib
            >>> commlib.init().algorithm("allreduce", 1000)
            'alone'
            >>> commlib.shutdown()
        """
        return self._submitter.algorithm(kind, nbytes, overlapped)

    @property
    def health(self):
        """None while the communicator is well; else the exception that every further call would raise."""
        try:
            self._engine.check()
        except Exception as error:
            return error
        return None

    @property
    def is_forked(self):
        """True in a forked child of the process that made the communicator: there it only raises ForkedError."""
        return self._engine.forked

    def after_fork(self):
        """Called in a forked child, before anything else: gives up the engine, and touches nothing of the parent's."""
        self._engine.after_fork()
        self._submitter.after_fork()

    def start_timeline(self, path):
        """Records operations and user spans of this rank from now on; every rank calls it with the same path.

        Args:
            path: of the Chrome trace (JSON) that `stop_timeline` writes; open it in ui.perfetto.dev.
        """
        if self.timeline is not None:
            raise ValueError(f"a timeline is being written to {self.timeline.path}: call stop_timeline() first")
        self._submitter.flight.record(Timeline(path, self.rank))

    def stop_timeline(self, timeout_s=60.0):
        """Ends the timeline; every rank calls it, and rank 0 writes one file that shows all of them."""
        timeline = self.timeline
        if timeline is not None:
            self._submitter.flight.sweep()
            self._submitter.flight.record(None)
            timeline.finish(partial(self.exchange, name="timeline", timeout_s=timeout_s))

    def close(self):
        """Leaves the other ranks. What is in flight fails with ShutdownError, and they learn of it. Nothing if it is a group's."""
        if self._parent:
            return
        while self._before_close and not self._engine.forked:
            self._before_close.pop()()
        if self.timeline is not None and not self._engine.forked:
            with suppress(RuntimeError, OSError):  # others are gone or busy, or the disk is full: each rank's own file stays
                self.stop_timeline(timeout_s=_LINGER_MS / 1000)
        self._engine.shutdown(_LINGER_MS)
        if not self._engine.forked:
            self._submitter.close()

    def _check_root(self, root_rank):
        if type(root_rank) is not int or not 0 <= root_rank < self.size:
            raise ValueError(f"root_rank must be a rank, an int in [0, {self.size}), not {root_rank!r}")
