"""A handle on one operation in flight, and the table that keeps what is in flight alive.

Memory that the engine may still touch belongs to the table until the operation is done, whatever the user does with the
handle: drop it, wait too briefly, leave by an exception. This file knows nothing of kinds, names or algorithms.
"""

from commlib.engine import AGAIN, operation_error, operation_times

# What a handle knows of its operation without asking.
_RUNNING, _WELL, _FAILED = 0, 1, 2

# A sweep asks every handle; done when so many were added, or a quarter, it costs a few questions per submission.
_SWEEP_EVERY = 64


class Handle:
    """One submitted operation; `wait` gives its result.

    Example:
        >>> import commlib, numpy
        >>> communicator = commlib.init()
        >>> handle = communicator.allreduce_async(numpy.ones(3, dtype=numpy.float32), op=commlib.Sum)
        >>> handle.wait()  # doctest: +SKIP
        array([2., 2., 2.], dtype=float32)
    """

    __slots__ = ("name", "kind", "lane", "note", "operation", "_engine", "_flight", "_use", "_keep", "_finish", "_result", "_state",
                 "__weakref__")  # fmt: skip

    def __init__(self, flight, use, kind, name, keep, finish, result):
        self.name = name
        self.kind = kind
        self.lane = None
        self.note = None  # a word of the submitter's own, for the timeline
        self.operation = None
        self._engine = flight.engine
        self._flight = flight
        self._use = use
        self._keep = keep
        self._finish = finish
        self._result = result
        self._state = _RUNNING

    def wait(self, timeout_s=None):
        """Waits until the operation is done and returns its result: the array, or what the collective describes.

        A wait that times out changes nothing: the operation goes on, and may be waited for again.

        Args:
            timeout_s: seconds; None waits until the operation ends, well or not.

        Raises:
            TimeoutError: the operation is not done after timeout_s.
            CommlibError: the operation failed: MismatchError, PeerLostError, PeerLeftError, ShutdownError.
        """
        if self._state == _RUNNING:
            status = self._engine.wait(self.operation, timeout_s)
            if status == AGAIN:
                raise TimeoutError(f"{self.kind} {self.name!r} is not done after {timeout_s} s; it goes on: wait again, "
                                   "and see that every rank submits it")  # fmt: skip
            self._state = _FAILED if status else _WELL
            self._flight.landed(self)
        if self._state == _FAILED:
            raise operation_error(self.operation)
        return self._result if self._finish is None else self._finish(self)

    def done(self):
        """True if the operation is done, well or not: `wait` will not block."""
        return self._state != _RUNNING or self._engine.done(self.operation)

    @property
    def times(self):
        """(submitted_s, started_s, done_s) on CLOCK_MONOTONIC; negative: not yet."""
        return operation_times(self.operation)

    def result_memory(self):
        """What Engine.result says; the memory lives as long as the handle."""
        return self._engine.result(self.operation, self._use.nmembers)

    def _let_go(self):
        """The engine touches no memory of the operation any more."""
        self._keep = None
        use = self._use
        if use.handle is self:
            use.handle = None

    def __del__(self):
        # The table held the handle for as long as the operation ran, so it is done by now, or was never submitted.
        if self.operation is not None:
            self._engine.release(self.operation)


class Flight:
    """The handles of all operations that are not known to be done.

    Args:
        engine: the commlib.engine.Engine that runs them.
    """

    __slots__ = ("engine", "timeline", "watchers", "_handles", "_sweep_at")

    def __init__(self, engine):
        self.engine = engine
        self.timeline = None  # told of every take-off and landing, if there is one
        self.watchers = []  # functions that want to know whenever that changes
        self._handles = {}
        self._sweep_at = _SWEEP_EVERY

    def __len__(self):
        return len(self._handles)

    def add(self, handle):
        """Keeps a handle, and now and then lets go of those that are done."""
        handles = self._handles
        if handles:
            self._let_go_of_oldest()  # so that few calls, too, let go of all that were dropped
        handles[id(handle)] = handle
        if self.timeline is not None:
            self.timeline.submitted(handle)
        if len(handles) >= self._sweep_at:
            self.sweep()
            self._sweep_at = len(handles) + max(_SWEEP_EVERY, len(handles) // 4)

    def record(self, timeline):
        """From now on this timeline is told; None: none is."""
        self.timeline = timeline
        self.tell_watchers()

    def tell_watchers(self):
        """Something has changed that whoever submits by himself must know of."""
        for watcher in self.watchers:
            watcher()

    def discard(self, handle):
        """Forgets a handle that was never submitted."""
        self._handles.pop(id(handle), None)

    def landed(self, handle):
        """The handle's operation is done: its memory is the user's again."""
        if self._handles.pop(id(handle), None) is not None:
            handle._let_go()
            if self.timeline is not None and handle.lane is not None:
                self.timeline.completed(handle)

    def sweep(self):
        """Lets go of every handle whose operation is done."""
        for handle in list(self._handles.values()):
            self._let_go_if_done(handle)

    def _let_go_of_oldest(self):
        try:
            handle = next(iter(self._handles.values()), None)
        except RuntimeError:  # another thread's operation landed just now
            return
        if handle is not None:
            self._let_go_if_done(handle)

    def _let_go_if_done(self, handle):
        # Without an operation it is being submitted by another thread just now.
        if handle.operation is not None and handle.done():
            self.landed(handle)
