"""The collectives that return at once, on tensors: the core's operations with Horovod's names, arguments and defaults.

With a trailing underscore they work in place. None is differentiable; collectives.py has those that are. This file
checks tensors and moves them in and out of Buffers; the core does everything else.
"""

import torch

import commlib
from commlib.ops import check_op, op_of
from commlib.process_sets import communicator_of, global_process_set
from commlib.torch.tensors import buffer_of, check_tensor, contiguous, tensor_of


class Handle:
    """One operation in flight; `synchronize(handle)` or `handle.wait()` gives its tensor."""

    __slots__ = ("_handle", "_finish", "_result")

    def __init__(self, handle, finish):
        self._handle = handle
        self._finish = finish
        self._result = None

    def wait(self, timeout_s=None):
        """Waits until the operation is done and returns its tensor.

        Raises:
            TimeoutError: it is not done after timeout_s; it goes on.
            CommlibError: it failed.
        """
        buffers = self._handle.wait(timeout_s)
        if self._finish is not None:
            self._result = self._finish(buffers)
            self._finish = None
        return self._result

    def done(self):
        """True if the operation is done, well or not."""
        return self._handle.done()


def poll(handle):
    """True if the operation is done: synchronize(handle) will not block."""
    return handle.done()


def synchronize(handle):
    """Waits for an operation and returns its tensor; see Handle.wait."""
    return handle.wait()


# ---- allreduce


def allreduce_async(tensor, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
                    process_set=global_process_set):  # fmt: skip
    """As collectives.allreduce, returning a Handle at once."""
    check_tensor(tensor, "allreduce")
    copy, op = tensor.detach().clone(), op_of(average, op, adasum=True)
    return begin_allreduce(copy, name, op, prescale_factor, postscale_factor, process_set)


def allreduce_async_(tensor, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
                     process_set=global_process_set):  # fmt: skip
    """As collectives.allreduce_, returning a Handle at once; do not touch the tensor before the wait."""
    check_in_place(tensor, "allreduce_")
    return begin_allreduce(tensor, name, op_of(average, op, adasum=True), prescale_factor, postscale_factor, process_set)


def begin_allreduce(tensor, name, op, prescale_factor, postscale_factor, process_set):
    """Reduces a tensor that was checked, in place."""
    wire = contiguous(tensor)
    handle = communicator_of(process_set).allreduce_async_(
        buffer_of(wire), name=name, op=op, prescale_factor=prescale_factor, postscale_factor=postscale_factor,
    )  # fmt: skip
    return Handle(handle, lambda _: landed(tensor, wire))


# ---- broadcast


def broadcast_async(tensor, root_rank, name=None, process_set=global_process_set):
    """As collectives.broadcast, returning a Handle at once."""
    check_tensor(tensor, "broadcast")
    return _broadcast(tensor.detach().clone(), root_rank, name, process_set)


def broadcast_async_(tensor, root_rank, name=None, process_set=global_process_set):
    """As collectives.broadcast_, returning a Handle at once; do not touch the tensor before the wait."""
    check_in_place(tensor, "broadcast_")
    return _broadcast(tensor, root_rank, name, process_set)


def _broadcast(tensor, root_rank, name, process_set):
    wire = contiguous(tensor)
    communicator = communicator_of(process_set)
    handle = communicator.broadcast_async_(buffer_of(wire), _place_of(root_rank, communicator), name=name)
    return Handle(handle, lambda _: landed(tensor, wire))


def _place_of(root_rank, communicator):
    """Horovod names the root of a process set by its rank among all."""
    if type(root_rank) is not int or root_rank not in communicator.ranks:
        raise ValueError(f"root_rank must be a rank of the process set, one of {list(communicator.ranks)}, not {root_rank!r}")
    return communicator.ranks.index(root_rank)


# ---- allgather, reducescatter, alltoall


def allgather_async(tensor, name=None, process_set=global_process_set):
    """As collectives.allgather, returning a Handle at once."""
    check_tensor(tensor, "allgather")
    return Handle(communicator_of(process_set).allgather_async(buffer_of(contiguous(tensor)), name=name), tensor_of)


def reducescatter_async(tensor, name=None, op=commlib.Average, process_set=global_process_set, prescale_factor=1.0,
                        postscale_factor=1.0):  # fmt: skip
    """As collectives.reducescatter, returning a Handle at once."""
    check_tensor(tensor, "reducescatter")
    handle = communicator_of(process_set).reducescatter_async(
        buffer_of(contiguous(tensor)), name=name, op=check_op(op), prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )  # fmt: skip
    return Handle(handle, tensor_of)


def alltoall_async(tensor, splits=None, name=None, process_set=global_process_set):
    """As collectives.alltoall, returning a Handle at once."""
    check_tensor(tensor, "alltoall")
    communicator = communicator_of(process_set)
    if splits is None:
        return Handle(communicator.alltoall_async(buffer_of(contiguous(tensor)), name=name), tensor_of)
    is_tensor = isinstance(splits, torch.Tensor)
    rows, dtype = (splits.tolist(), splits.dtype) if is_tensor else (list(splits), torch.int32)
    handle = communicator.alltoall_async(buffer_of(contiguous(tensor)), rows, name=name)
    return Handle(handle, lambda result: (tensor_of(result[0]), torch.as_tensor(result[1]).to(dtype)))


# ---- in place


def check_in_place(tensor, what):
    """Refuses to change a tensor that autograd computed.

    Raises:
        ValueError, TypeError: so it is, or it cannot travel.
    """
    check_tensor(tensor, what)
    if tensor.grad_fn is not None and torch.is_grad_enabled():
        raise ValueError(
            f"{what} would change a tensor that autograd computed: use {what[:-1]}, which is differentiable, or "
            "tensor.detach()"
        )


def landed(tensor, wire):
    """The result is in `wire`; it belongs in `tensor`, of which autograd must know that it changed."""
    if tensor.is_contiguous():
        torch.autograd.graph.increment_version(tensor)
    else:
        with torch.no_grad():
            tensor.copy_(wire)
    return tensor
