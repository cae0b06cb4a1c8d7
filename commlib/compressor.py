"""What a tensor is made into before it travels, and back: Horovod's interface of compressors; for the adapters of frameworks.

A compressor works on whole tensors, outside of the engine: what it makes is reduced as any tensor is. So with 16-bit formats
sums are rounded to 16 bits in every step of the algorithm; the engine adds in fp32 within a step.
"""


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


class CastCompressor(Compressor):
    """Floating-point tensors in another dtype; others as they are. An adapter says how its framework asks and casts."""

    dtype = None
    is_floating = None  # (tensor) -> bool
    cast = None         # (tensor, dtype) -> tensor

    @classmethod
    def compress(cls, tensor):
        """As Compressor.compress."""
        return (cls.cast(tensor, cls.dtype) if cls.is_floating(tensor) else tensor), tensor.dtype

    @classmethod
    def decompress(cls, tensor, ctx):
        """As Compressor.decompress."""
        return cls.cast(tensor, ctx)


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
