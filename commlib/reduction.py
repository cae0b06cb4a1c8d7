"""The reductions that users name, and what each asks of the engine.

Average is not a reduction of its own: it is a sum whose result is multiplied by 1 / size.
"""

import enum

import numpy


FLOATS = ("float16", "bfloat16", "float32", "float64")


class ReduceOp(enum.Enum):
    """How the contributions of all ranks become one value; `code` is the engine's cl_reduction."""

    Average = ("average", 0)
    Sum = ("sum", 0)
    Min = ("min", 1)
    Max = ("max", 2)
    Product = ("product", 3)
    Adasum = ("adasum", 0)

    def __init__(self, word, code):
        self.word = word
        self.code = code

    def __repr__(self):
        return f"commlib.{self.name}"


Average = ReduceOp.Average
Sum = ReduceOp.Sum
Min = ReduceOp.Min
Max = ReduceOp.Max
Product = ReduceOp.Product
Adasum = ReduceOp.Adasum


def check_op(op, dtype):
    """Refuses what is no reduction, or has no meaning for the dtype.

    Raises:
        TypeError: op is not one of commlib.Average, Sum, Min, Max, Product, Adasum.
        ValueError: the average of truth values, Adasum of integers.
    """
    if type(op) is not ReduceOp:
        raise TypeError(f"op must be commlib.Average, Sum, Min, Max, Product or Adasum, not {op!r}")
    if op is Adasum and dtype not in FLOATS:
        raise ValueError(f"op=commlib.Adasum is for {', '.join(FLOATS)}, not {dtype}: use Sum or Average")
    if op is Average and dtype == "bool":
        raise ValueError("the average of bool has no meaning: use op=commlib.Max (or) or commlib.Min (and)")


_NEUTRAL_OF_BFLOAT16 = {0: 0x0000, 1: 0x7F80, 2: 0xFF80, 3: 0x3F80}  # 0, infinity, -infinity, 1, in its bits


def neutral_array(code, count, dtype):
    """A NumPy array of `count` elements that change nothing in a reduction: zeros for a sum, ones for a product.

    Args:
        code: of the reduction, as ReduceOp.code.
        count: elements.
        dtype: a name; of bfloat16, which NumPy lacks, the bits.

    Example:
        >>> neutral_array(Min.code, 2, "int8")
        array([127, 127], dtype=int8)
    """
    if dtype == "bfloat16":
        return numpy.full(count, _NEUTRAL_OF_BFLOAT16[code], numpy.uint16)
    if code == Sum.code:
        return numpy.zeros(count, dtype)
    if code == Product.code:
        return numpy.ones(count, dtype)
    return numpy.full(count, _extreme(dtype, largest=code == Min.code), dtype)


def _extreme(dtype, largest):
    kind = numpy.dtype(dtype).kind
    if kind == "b":
        return largest
    if kind == "f":
        return numpy.inf if largest else -numpy.inf
    return numpy.iinfo(dtype).max if largest else numpy.iinfo(dtype).min
