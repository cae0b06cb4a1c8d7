"""An operation that is made again and again on the same memory: all that does not change is done once.

It is a call into C and back, without a handle; only where that does not end at once does it become an ordinary one.
"""

from commlib.engine import AGAIN
from commlib.handle import Handle
from commlib.names import STRIDE, key_of_use


class Prepared:
    """A blocking collective on fixed memory; calling it runs it once. One thread at a time.

    Example:
        >>> import commlib, numpy
        >>> loss = numpy.array([3.0])
        >>> average_loss = commlib.init().prepare_allreduce_(loss, name="loss")
        >>> average_loss()  # with one rank
        array([3.])
        >>> commlib.shutdown()
    """

    __slots__ = ("_submitter", "_engine", "_use", "_kind", "_request", "_keep", "_result", "_run", "_place", "_count")

    def __init__(self, submitter, use, kind, request, keep, result):
        self._place = None
        self._submitter = submitter
        self._engine = submitter.engine
        self._use = use
        self._kind = kind
        self._request = request
        self._keep = keep
        self._result = result
        self._count = -1  # of the name's uses when this was called last
        self._run, self._place = self._engine.runner(request, STRIDE)

    def __call__(self, timeout_s=None):
        """Runs the operation and returns the array.

        Args:
            timeout_s: seconds, at least a tenth; None waits until the operation ends, well or not.

        Raises:
            ValueError: an ordinary operation of this name is in flight.
            TimeoutError: it is not done after timeout_s; it goes on, and the next call is of a name in flight.
            CommlibError: it failed, as with Handle.wait.
        """
        use = self._use
        if use.handle is not None or use.count != self._count:
            self._catch_up()
        use.count = self._count = use.count + 1
        try:
            status = self._run()
        except BaseException:  # Ctrl-C, which Python learns here; the operation goes on
            self._caught(AGAIN)
            raise
        return self._result if status == 0 else self._caught(status).wait(timeout_s)

    def _catch_up(self):
        """The name was used by others since the last call."""
        if self._use.handle is not None:
            self._submitter.free_name(self._kind, self._use)
        self._request.key = key_of_use(self._use.base, self._use.count - 1)

    def _caught(self, status):
        """It was not done well at once: it becomes an ordinary operation in flight. Returns its handle."""
        operation = self._engine.taken_from(self._place, status)
        flight, use = self._submitter.flight, self._use
        handle = use.handle = Handle(flight, use, self._kind, use.name, self._keep, None, self._result)
        flight.add(handle)
        handle.operation = operation
        return handle

    def __del__(self):
        if self._place is not None and self._place[0]:
            self._engine.release(self._place[0])
