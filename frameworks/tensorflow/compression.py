"""Horovod's Compression: floating-point tensors that travel in 16 bits. commlib/compressor.py has the interface."""

import tensorflow as tf

from commlib.compressor import CastCompressor, NoneCompressor


class _Cast(CastCompressor):
    is_floating = staticmethod(lambda tensor: tensor.dtype.is_floating)
    cast = staticmethod(tf.cast)


class FP16Compressor(_Cast):
    """Floating-point tensors in 16 bits, with 5 of exponent: largest value 65504."""

    dtype = tf.float16


class BF16Compressor(_Cast):
    """Floating-point tensors in 16 bits, with the exponent of fp32 and 8 bits of precision."""

    dtype = tf.bfloat16


class Compression:
    """What travels instead of a tensor.

    Attributes:
        none: the tensor itself.
        fp16, bf16: half as many bytes as of fp32, rounded.
    """

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
