"""An operation that is made again and again on the same memory: all that does not change is done once.

It is a call into C and back, without a handle; only where that does not end at once does it become an ordinary one.
"""

from commlib.handle import Handle


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

    __slots__ = ("_submitter", "_engine", "_use", "_kind", "_request", "_keep", "_result")

    def __init__(self, submitter, use, kind, request, keep, result):
        self._submitter = submitter
        self._engine = submitter.engine
        self._use = use
        self._kind = kind
        self._request = request
        self._keep = keep
        self._result = result

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
        if use.handle is not None:
            self._submitter.free_name(self._kind, use)
        self._request.key = use.next_key()
        operation = self._engine.run(self._request)
        if operation is None:
            return self._result
        flight = self._submitter.flight
        handle = use.handle = Handle(flight, use, self._kind, use.name, self._keep, None, self._result)
        flight.add(handle)
        handle.operation = operation
        return handle.wait(timeout_s)
