"""Gradients of the collectives, as Horovod defines them.

The loss that a program means is the mean of the ranks' losses. So the gradient of a broadcast or an all-gather is the
average of what the ranks say; that of a sum is a sum, as each rank's input went into every rank's output.
"""

import torch
from torch.autograd.function import once_differentiable

import commlib
from commlib.process_sets import communicator_of
from commlib.torch import operations


def is_needed(tensor):
    """Whether autograd wants to know what happens to this tensor."""
    return isinstance(tensor, torch.Tensor) and tensor.requires_grad and torch.is_grad_enabled()


def result_of(function, tensor, handle, *arguments):
    """Waits for the operation that was begun on a tensor; autograd learns of it by `function`, one of those below."""
    return function.apply(tensor, handle, *arguments) if is_needed(tensor) else handle.wait()


def check_reduction(what, op, tensors):
    """Refuses to reduce what autograd follows by an op that has no gradient here.

    Raises:
        ValueError: so it is.
    """
    if op not in (commlib.Average, commlib.Sum) and any(map(is_needed, tensors)):
        raise ValueError(f"{what} with op={op!r} is not differentiable: pass tensor.detach()")


class Allreduce(torch.autograd.Function):
    """Sum and Average: the same reduction of the gradients."""

    @staticmethod
    def forward(ctx, tensor, handle, op, prescale_factor, postscale_factor, process_set):
        ctx.arguments = {"op": op, "prescale_factor": prescale_factor, "postscale_factor": postscale_factor,
                         "process_set": process_set}  # fmt: skip
        return handle.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return (operations.allreduce_async(gradient, **ctx.arguments).wait(), *[None] * 5)


class Broadcast(torch.autograd.Function):
    """The root's gradient is the average of all; the others' tensors had no influence."""

    @staticmethod
    def forward(ctx, tensor, handle, root_rank, process_set):
        ctx.root_rank, ctx.process_set = root_rank, process_set
        return handle.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        reduced = operations.allreduce_async(gradient, op=commlib.Average, process_set=ctx.process_set).wait()
        return (reduced if commlib.rank() == ctx.root_rank else torch.zeros_like(reduced)), None, None, None


class Allgather(torch.autograd.Function):
    """The average of all gradients, of which each rank takes its own rows."""

    @staticmethod
    def forward(ctx, tensor, handle, process_set):
        ctx.nrows, ctx.process_set = tensor.shape[0], process_set
        return handle.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        reduced = operations.allreduce_async(gradient, op=commlib.Average, process_set=ctx.process_set).wait()
        nrows = operations.allgather_async(torch.tensor([ctx.nrows]), process_set=ctx.process_set).wait().tolist()
        place = communicator_of(ctx.process_set).rank
        return reduced.narrow(0, sum(nrows[:place]), ctx.nrows), None, None


class Reducescatter(torch.autograd.Function):
    """Every rank's rows went into each rank's share: gradients of the shares are gathered."""

    @staticmethod
    def forward(ctx, tensor, handle, op, prescale_factor, postscale_factor, process_set):
        size = communicator_of(process_set).size
        ctx.factor, ctx.process_set = prescale_factor * postscale_factor / (size if op is commlib.Average else 1), process_set
        return handle.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return (operations.allgather_async(gradient, process_set=ctx.process_set).wait() * ctx.factor, *[None] * 5)


class Alltoall(torch.autograd.Function):
    """Gradients go back the way that the rows came."""

    @staticmethod
    def forward(ctx, tensor, splits, name, process_set):
        received, ctx.received_splits = operations.alltoall_async(tensor, splits, name, process_set).wait()
        ctx.mark_non_differentiable(ctx.received_splits)
        ctx.process_set = process_set
        ctx.unsent = tensor.shape[0] - sum(splits)
        return received, ctx.received_splits

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        returned, _ = operations.alltoall_async(gradient, ctx.received_splits, process_set=ctx.process_set).wait()
        return torch.cat([returned, returned.new_zeros(ctx.unsent, *returned.shape[1:])]), None, None, None


def alltoall(tensor, splits, name, process_set):
    """The differentiable all-to-all; without splits, rows are shared evenly and only the tensor is returned."""
    if splits is not None:
        dtype = splits.dtype if isinstance(splits, torch.Tensor) else torch.int32
        rows, received = Alltoall.apply(tensor, torch.as_tensor(splits).tolist(), name, process_set)
        return rows, received.to(dtype)
    size = communicator_of(process_set).size
    if not tensor.dim() or tensor.shape[0] % size:
        return operations.alltoall_async(tensor, None, name, process_set).wait()  # raises what is wrong
    return Alltoall.apply(tensor, [tensor.shape[0] // size] * size, name, process_set)[0]
