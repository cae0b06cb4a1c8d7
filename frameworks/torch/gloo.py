"""`init(backend="gloo")`: bytes are moved by torch.distributed's gloo, in the order of commlib's tickets.

The core's engine still matches, checks, prioritises, cuts and fails operations; here is only what gloo does with memory
that a ticket has freed for it.
"""

from datetime import timedelta

import torch
import torch.distributed

from commlib import CommlibError
from commlib.communicator import Communicator
from commlib.tickets import TicketSubmitter
from commlib.torch.gloo_group import GlooGroup, listening_place
from commlib.torch.tensors import tensor_of

_SUM, _MIN, _MAX, _PRODUCT = range(4)
_OPS = (
    torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.MIN, torch.distributed.ReduceOp.MAX,
    torch.distributed.ReduceOp.PRODUCT,
)  # fmt: skip

# On truth values, as bytes: "or" and "and".
_REDUCTIONS_OF_BOOL = {_SUM: _MAX, _PRODUCT: _MIN}

_SLICE = timedelta(seconds=0.1)  # how soon a collective notices that its operation has failed
_ABORTED = timedelta(seconds=2)  # gloo needs about a millisecond once its connections are down


def gloo_communicator(engine, topology, settings, placement, timeout_s):
    """A Communicator whose bytes gloo moves; see `commlib.session.open_communicator`."""
    place = listening_place(topology.hosts, placement.options.get("network_interfaces", ""), placement.store)
    mover = GlooMover(engine.rank, engine.size, place, timeout_s or placement.start_timeout_s)
    submitter = TicketSubmitter(engine, topology.hosts, settings, mover)
    communicator = Communicator(engine, topology, settings, submitter)
    submitter.open(communicator.exchange)
    return communicator


class GlooMover:
    """A commlib.tickets.Mover.

    Args:
        rank, size: this rank and the number of ranks.
        place: where gloo listens; see `gloo_group.listening_place`.
        timeout_s: how long to wait for the other ranks at the start.
    """

    name = "gloo"

    def __init__(self, rank, size, place, timeout_s):
        self._arguments = (rank, size, place, timeout_s)
        self._group = None
        self._work = None  # what was begun last

    # ---- life

    def open(self, exchange):
        """Connects all ranks with all."""
        try:
            self._group = GlooGroup(*self._arguments, exchange)
        except RuntimeError as error:
            raise CommlibError(
                f"{error}; between hosts, set COMMLIB_NETWORK_INTERFACES to the network interface that they share"
            ) from error

    def abort(self):
        """Shuts the connections down."""
        if self._group is not None:
            self._group.abort()

    def close(self):
        """Frees the group, or leaves it to the end of the process if gloo is stuck."""
        if self._group is None:
            return
        if self._work is not None and not self._work.is_completed():
            self.abort()
            try:
                self._work.wait(_ABORTED)
            except RuntimeError:
                pass
            if not self._work.is_completed():
                self._group.leave_to_process()
        self._work = None
        self._group.close()
        self._group = None

    def after_fork(self):
        """The child has none of gloo's threads, for which the group's destructor would wait."""
        if self._group is not None:
            self._group.leave_to_process()

    # ---- collectives

    def allreduce(self, buffer, reduction, is_over):
        """As Mover.allreduce; gloo knows no int16, and bool only in part."""
        tensor = tensor_of(buffer)
        if tensor.dtype is torch.bool:
            tensor, reduction = tensor.view(torch.uint8), _REDUCTIONS_OF_BOOL.get(reduction, reduction)
        if tensor.dtype is torch.int16:
            wide = tensor.to(torch.int32)  # its low 16 bits are the sum or product of the low 16 bits
            self._finish(self._group.process_group.allreduce([wide], _OPS[reduction]), is_over)
            tensor.copy_(wide)
        else:
            self._finish(self._group.process_group.allreduce([tensor], _OPS[reduction]), is_over)

    def broadcast(self, buffer, root, is_over):
        """As Mover.broadcast; what is only moved is bytes to gloo."""
        self._finish(self._group.process_group.broadcast(_bytes_of(buffer), root), is_over)

    def allgather(self, buffer, counts, is_over):
        """As Mover.allgather. Gloo wants equal parts; uneven ones go one after the other."""
        parts = _bytes_of(buffer).split([count * buffer.itemsize for count in counts])
        if len(set(counts)) == 1:
            self._finish(self._group.process_group.allgather([list(parts)], [parts[self._rank].clone()]), is_over)
            return
        for root, part in enumerate(parts):
            if len(part):
                self._finish(self._group.process_group.broadcast(part, root), is_over)

    def alltoall(self, output, output_counts, source, source_counts, is_over):
        """As Mover.alltoall."""
        work = self._group.process_group.alltoall_base(
            _bytes_of(output), _bytes_of(source),
            [count * output.itemsize for count in output_counts], [count * source.itemsize for count in source_counts],
        )  # fmt: skip
        self._finish(work, is_over)

    @property
    def _rank(self):
        return self._arguments[0]

    def _finish(self, work, is_over):
        self._work = work
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # says what became of it: it may have completed well, just after the slice was over
                    return
                if is_over():
                    raise CommlibError("the operation has failed") from None


def _bytes_of(buffer):
    return tensor_of(buffer).view(torch.uint8)
