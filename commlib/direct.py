"""What native code of an adapter needs to submit operations by itself, and to be told when any operation is done.

A framework's own kernels run on its own threads, without Python: a call of theirs must not cost a change into it. So Python
describes an operation once, and native code submits it again and again, under keys that it counts. This file hands out
addresses; who uses them, and when, it does not know.
"""

from commlib.adasum import AdasumHandle
from commlib.buffer import Buffer
from commlib.engine import functions_address
from commlib.names import STRIDE
from commlib.reduction import check_op
from commlib.requests import write_request

_NOTHING = Buffer(0, (0,), "uint8", None, True)


class Direct:
    """Access of native code to the engine of a communicator; one for each of all ranks' communicators.

    Args:
        communicator: the default communicator.

    Attributes:
        functions, engine: addresses of a cl_functions and of the cl_engine.
        stride: what is added to a base key for each further use of a name (modulo 2^64).
    """

    stride = STRIDE

    def __init__(self, communicator):
        self._engine, self._submitter = communicator.native
        self._held = set()  # submitters whose plans native code knows
        self.functions = functions_address()
        self.engine = self._engine.address

    @property
    def is_possible(self):
        """False: other things than the engine must see each operation: another backend, a timeline. Submit by Python then."""
        return self._submitter.prepares and self._submitter.flight.timeline is None

    @property
    def first_use(self):
        """The number from which uses of every name are counted: another one after a join of all ranks."""
        return self._submitter.names.first

    def on_change(self, callback):
        """Has callback() called when `is_possible` or `first_use` may have changed."""
        self._submitter.flight.watchers.append(callback)

    def on_ended(self, callback):
        """Has callback() called when the engine was shut down, and nothing is in flight any more."""
        self._engine.ended.append(callback)

    def describe_allreduce(self, communicator, name, dtype, shape, *, op, priority, scales, overlapped, address, text_address):
        """Writes the cl_request of an all-reduce to an address; all but key, input and output.

        Args:
            communicator: the one that the operation is for, of the same engine.
            name, op, priority, overlapped: as for `Communicator.allreduce_async_`.
            dtype, shape: of the array: a name, a tuple.
            scales: (prescale_factor, postscale_factor).
            address, text_address: of the cl_request, and of the 256 bytes for its text.

        Returns:
            The base key. The n-th use of the name, counted from `first_use`, has the key base + n * stride.

        Raises:
            ValueError, TypeError: as `Communicator.allreduce_async_`.
        """
        check_op(op, dtype)
        submitter = communicator.native[1]
        self._held.add(submitter)
        use = submitter.description("allreduce", name, dtype, shape, priority=priority, op=op, scales=scales,
                                    overlapped=overlapped)  # fmt: skip
        write_request(use.request, address, text_address)
        return use.base

    def base_of(self, communicator, name):
        """The base key that `describe_allreduce` gives for a name."""
        return communicator.native[1].native_base("allreduce", name)

    def barrier_async(self, communicator):
        """As `Communicator.barrier`; returns a Handle at once."""
        return communicator.native[1].submit("barrier", None, _NOTHING, _NOTHING)

    def tell(self, handle, queue, token):
        """Has an operation of a handle put on a queue when the handle is done; `queue` and `token` are addresses."""
        if isinstance(handle, AdasumHandle):
            handle.tell(lambda operation: self._engine.tell(operation, queue, token))
        else:
            self._engine.tell(handle.operation, queue, token)
