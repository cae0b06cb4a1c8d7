"""The collectives that wait, on tensors, with Horovod's names, arguments and defaults.

All but the in-place ones are differentiable (autograd.py); operations.py has those that return at once.
"""

import commlib
from commlib.compressor import checked_compression
from commlib.ops import check_op, op_of
from commlib.process_sets import communicator_of, global_process_set
from commlib.torch import autograd
from commlib.torch.compression import Compression
from commlib.torch.operations import (
    allgather_async, allreduce_async, allreduce_async_, alltoall_async, broadcast_async, broadcast_async_,
    reducescatter_async,
)  # fmt: skip
from commlib.torch.tensors import check_tensor


def barrier(process_set=global_process_set):
    """Returns when all ranks of the process set have called it."""
    communicator_of(process_set).barrier()


def allreduce(tensor, average=None, name=None, compression=Compression.none, op=None, prescale_factor=1.0,
              postscale_factor=1.0, process_set=global_process_set):  # fmt: skip
    """Reduces a tensor over all ranks: postscale * op_r(prescale * x_r), on every rank. Differentiable.

    Args:
        tensor: a CPU tensor of the same shape and dtype on all ranks.
        average: deprecated: True for op=Average, False for op=Sum.
        name: matches the operation between ranks; None: by sequence number.
        compression: what travels; one of Compression.
        op: Average (the default), Sum, Min, Max, Product or Adasum (floats; not differentiable).
        prescale_factor, postscale_factor: multiply each contribution, and the result.
        process_set: the ranks that take part; others do not call it. Average divides by how many they are.

    Returns:
        A new tensor.

    Raises:
        ValueError: a tensor or an argument that is not supported, or a name that is in flight.
        CommlibError: ranks differ in shape, dtype or op; a rank was lost.

    Example:
        >>> import torch, commlib.torch as comm
        >>> comm.init()
        >>> comm.allreduce(torch.ones(2), op=comm.Sum)  # with one rank
        tensor([1., 1.])
        >>> comm.shutdown()
    """
    op, compression = op_of(average, op, adasum=True), checked_compression(compression)
    check_tensor(tensor, "allreduce")
    autograd.check_reduction("allreduce", op, [tensor])
    wire, ctx = compression.compress(tensor)
    arguments = (op, prescale_factor, postscale_factor, process_set)
    handle = allreduce_async(wire, None, name, *arguments)
    return compression.decompress(autograd.result_of(autograd.Allreduce, wire, handle, *arguments), ctx)


def allreduce_(tensor, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
               process_set=global_process_set):  # fmt: skip
    """As `allreduce`, in place; returns the tensor."""
    return allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set).wait()


def broadcast(tensor, root_rank, name=None, process_set=global_process_set):
    """The root's tensor, as a new tensor on every rank. Differentiable.

    Args:
        tensor: of the same shape and dtype on all ranks.
        root_rank: whose values everybody gets; its rank among all, also with a process set.
        name, process_set: as for `allreduce`.
    """
    handle = broadcast_async(tensor, root_rank, name, process_set)
    return autograd.result_of(autograd.Broadcast, tensor, handle, root_rank, process_set)


def broadcast_(tensor, root_rank, name=None, process_set=global_process_set):
    """As `broadcast`, in place; returns the tensor."""
    return broadcast_async_(tensor, root_rank, name, process_set).wait()


def allgather(tensor, name=None, process_set=global_process_set):
    """All ranks' tensors joined along the first dimension, which may differ between ranks. Differentiable.

    Returns:
        A new tensor, the same on every rank.
    """
    return autograd.result_of(autograd.Allgather, tensor, allgather_async(tensor, name, process_set), process_set)


def reducescatter(tensor, name=None, compression=Compression.none, op=commlib.Average, process_set=global_process_set,
                  prescale_factor=1.0, postscale_factor=1.0):  # fmt: skip
    """Reduces over all ranks and gives each its share of the rows; low ranks get those that remain. Differentiable."""
    op, compression = check_op(op), checked_compression(compression)
    check_tensor(tensor, "reducescatter")
    autograd.check_reduction("reducescatter", op, [tensor])
    wire, ctx = compression.compress(tensor)
    handle = reducescatter_async(wire, name, op, process_set, prescale_factor, postscale_factor)
    arguments = (op, prescale_factor, postscale_factor, process_set)
    return compression.decompress(autograd.result_of(autograd.Reducescatter, wire, handle, *arguments), ctx)


def alltoall(tensor, splits=None, name=None, process_set=global_process_set):
    """Sends rows to every rank and receives theirs, joined in rank order. Differentiable.

    Args:
        tensor: of one dimension at least; the first may differ between ranks.
        splits: rows for each rank, in rank order, a tensor or a list; None: the same number for each.
        name: as for `allreduce`.

    Returns:
        The received rows; with splits, (received rows, how many came from each rank).
    """
    if autograd.is_needed(tensor):
        return autograd.alltoall(tensor, splits, name, process_set)
    return alltoall_async(tensor, splits, name, process_set).wait()
