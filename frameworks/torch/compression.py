"""What a tensor is made into before it travels, and back: Horovod's Compression, and its interface for others.

A compressor works on whole tensors, outside of the engine: what it makes is reduced as any tensor is. So with fp16 and bf16
sums are rounded to 16 bits in every step of the algorithm; the engine adds in fp32 within a step.
"""

import torch


class Compressor:
    """The interface: two functions that belong together. Both see every tensor, on every rank alike."""

    @staticmethod
    def compress(tensor):
        """Returns the tensor that travels, and whatever `decompress` needs."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor, ctx):
        """Returns the result as the caller wants it."""
        raise NotImplementedError


class NoneCompressor(Compressor):
    """The tensor as it is."""

    @staticmethod
    def compress(tensor):
        """As Compressor.compress."""
        return tensor, None

    @staticmethod
    def decompress(tensor, ctx):
        """As Compressor.decompress."""
        return tensor


class _Cast(Compressor):
    """Floating-point tensors in another dtype; others as they are."""

    dtype = None

    @classmethod
    def compress(cls, tensor):
        """As Compressor.compress."""
        return (tensor.to(cls.dtype) if tensor.is_floating_point() else tensor), tensor.dtype

    @classmethod
    def decompress(cls, tensor, ctx):
        """As Compressor.decompress."""
        return tensor.to(ctx)


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


def checked_compression(compression):
    """The compressor; None is Compression.none.

    Raises:
        ValueError: no compressor.
    """
    if compression is None:
        return NoneCompressor
    if not callable(getattr(compression, "compress", None)) or not callable(getattr(compression, "decompress", None)):
        raise ValueError(f"compression must be one of comm.Compression, or have compress and decompress, not {compression!r}")
    return compression
