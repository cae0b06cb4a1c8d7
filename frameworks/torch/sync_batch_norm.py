"""Batch normalisation over the batches of all ranks.

Each rank's sums over its own rows travel in two small operations forward, and one backward; everything else is local. Gradients of
weight and bias stay this rank's own, for DistributedOptimizer to average, as with every other parameter.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

import commlib
from commlib.process_sets import communicator_of, global_process_set
from commlib.torch.operations import begin_allreduce
from commlib.torch.private import BatchNorm


class SyncBatchNorm(BatchNorm):
    """Batch normalisation of (N, C) or (N, C, ...) over N of all ranks and every dimension after C.

    In training y = (x - mean) / sqrt(variance + eps) * weight + bias, with mean and variance over the rows of all ranks, which
    may have different numbers of them, none too. In evaluation it is torch's own. All ranks call the modules in one order.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; None: their plain average.
        affine: whether there are weight and bias, of C elements.
        track_running_stats: whether running statistics are kept, for evaluation; False: it uses the batch's, too.
        process_set: the ranks that share statistics.

    Raises:
        ValueError: of less than two dimensions, or fewer than two values per channel on all ranks together.

    Example:
        >>> import torch, commlib.torch as comm
        >>> comm.init()
        >>> comm.SyncBatchNorm(1, affine=False)(torch.tensor([[1.0], [3.0]])).round()
        tensor([[-1.],
                [ 1.]])
        >>> comm.shutdown()

    References:
        Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate shift",
        ICML 2015.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *,
                 process_set=global_process_set, **options):  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.process_set = process_set

    def forward(self, x):
        """Normalises this rank's part of the batch."""
        if x.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")
        is_training = self.training or not self.track_running_stats
        factor = self.momentum or 0.0
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if not is_training or communicator_of(self.process_set).size == 1:
            statistics = (self.running_mean, self.running_var)
            return nn.functional.batch_norm(x, *statistics, self.weight, self.bias, is_training, factor, self.eps)
        y, mean, variance, count = _Normalize.apply(x, self.eps, self.process_set)
        if self.training and self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), factor)
        if not self.affine:
            return y
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (y * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps); also the mean, the variance and the number of values per channel, of all ranks."""

    @staticmethod
    def forward(ctx, x, eps, process_set):
        wide = x.to(_wide(x.dtype))
        axes, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        mine = x.numel() // x.shape[1] if x.shape[1] else 0
        # Sums of squares would cancel; so means are told first, and then every rank's distance from their mean.
        sums = _told("mean", torch.cat([wide.sum(axes).double(), torch.tensor([mine], dtype=torch.float64)]), process_set)
        count = sums[-1].item()
        if count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape} on this rank and "
                             f"{int(count)} values on all ranks together")  # fmt: skip
        mean = (sums[:-1] / count).to(wide.dtype)
        centred = wide - mean.view(shape)
        variance = _told("variance", (centred * centred).sum(axes), process_set) / count
        scale = torch.rsqrt(variance + eps)
        y = centred * scale.view(shape)
        ctx.save_for_backward(y, scale)
        ctx.arguments = axes, shape, count, process_set
        count = torch.tensor(count, dtype=torch.float64)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        y, scale = ctx.saved_tensors
        axes, shape, count, process_set = ctx.arguments
        wide = gradient.to(y.dtype)
        # d loss / d x = scale (g - mean(g) - y mean(g y)), with means over the values of all ranks.
        nchannels = len(scale)
        sums = _told("gradient", torch.cat([wide.sum(axes), (wide * y).sum(axes)]), process_set) / count
        inner = wide - sums[:nchannels].view(shape) - y * sums[nchannels:].view(shape)
        return (inner * scale.view(shape)).to(gradient.dtype), None, None


def _wide(dtype):
    """What statistics are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _told(what, sums, process_set):
    """This rank's sums become those of all ranks; in place."""
    return begin_allreduce(sums, f"sync_batch_norm {what}", commlib.Sum, 1.0, 1.0, process_set).wait()
