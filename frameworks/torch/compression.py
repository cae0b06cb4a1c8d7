"""Horovod's Compression: floating-point tensors that travel in 16 bits. commlib/compressor.py has the interface."""

import torch

from commlib.compressor import CastCompressor, NoneCompressor


class _Cast(CastCompressor):
    is_floating = staticmethod(torch.is_floating_point)
    cast = staticmethod(torch.Tensor.to)


class FP16Compressor(_Cast):
    """Floating-point tensors in 16 bits, with 5 of exponent: largest value 65504."""

    dtype = torch.float16


class BF16Compressor(_Cast):
    """Floating-point tensors in 16 bits, with the exponent of fp32 and 8 bits of precision."""

    dtype = torch.bfloat16


class Compression:
    """What travels instead of a tensor.

    Attributes:
        none: the tensor itself.
        fp16, bf16: half as many bytes as of fp32, rounded.

    Example:
        >>> import torch, commlib.torch as comm
        >>> comm.init()
        >>> comm.allreduce(torch.tensor([1.0, 1e-9]), compression=comm.Compression.fp16)
        tensor([1., 0.])
        >>> comm.shutdown()
    """

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
