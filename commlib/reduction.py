"""The reductions that users name, and what each asks of the engine.

Average is not a reduction of its own: it is a sum whose result is multiplied by 1 / size.
"""

import enum


class ReduceOp(enum.Enum):
    """How the contributions of all ranks become one value; `code` is the engine's cl_reduction."""

    Average = ("average", 0)
    Sum = ("sum", 0)
    Min = ("min", 1)
    Max = ("max", 2)
    Product = ("product", 3)

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


def check_op(op, dtype):
    """Refuses what is no reduction, or has no meaning for the dtype.

    Raises:
        TypeError: op is not one of commlib.Average, Sum, Min, Max, Product.
        ValueError: the average of truth values.
    """
    if type(op) is not ReduceOp:
        raise TypeError(f"op must be commlib.Average, Sum, Min, Max or Product, not {op!r}")
    if op is Average and dtype == "bool":
        raise ValueError("the average of bool has no meaning: use op=commlib.Max (or) or commlib.Min (and)")
