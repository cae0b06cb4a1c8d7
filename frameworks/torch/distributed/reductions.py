"""What torch.distributed calls a reduction, in the core's words; and those that the core lacks, made of its all-gather."""

import torch
from torch.distributed import ReduceOp

import commlib
from commlib.torch.tensors import check_tensor

_OPS = ReduceOp.RedOpType

# c10d's reduction -> the core's
_NATIVE = {_OPS.SUM: commlib.Sum, _OPS.AVG: commlib.Average, _OPS.MIN: commlib.Min, _OPS.MAX: commlib.Max,
           _OPS.PRODUCT: commlib.Product, _OPS.PREMUL_SUM: commlib.Sum}  # fmt: skip

_BITWISE = {_OPS.BAND: torch.bitwise_and, _OPS.BOR: torch.bitwise_or, _OPS.BXOR: torch.bitwise_xor}


_FOR_COMPLEX = (_OPS.SUM, _OPS.AVG, _OPS.PREMUL_SUM)  # those that pairs of reals can stand for


def reduction_of(op):
    """(the core's reduction, what contributions are multiplied by) of a c10d reduction; (None, 1.0): a bitwise one."""
    kind = _kind_of(op)
    if kind in _BITWISE:
        return None, 1.0
    return _NATIVE[kind], _factor_of(op) if kind == _OPS.PREMUL_SUM else 1.0


def check_reducible(op, tensor, what):
    """Refuses tensors for which a reduction has no meaning, or that the core cannot add.

    Raises:
        ValueError: so it is.
    """
    kind = _kind_of(op)
    if kind in _BITWISE:
        if tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"{what}: {kind.name} is for integers and bool, not for {tensor.dtype}")
    elif tensor.is_complex():
        if kind not in _FOR_COMPLEX:
            raise ValueError(f"{what}: {kind.name} has no meaning for {tensor.dtype}; SUM, AVG and PREMUL_SUM have")
    else:
        check_tensor(tensor, what)


def reduced_bitwise(op, rows):
    """The bitwise reduction of a tensor along its first dimension."""
    function = _BITWISE[_kind_of(op)]
    result = rows[0].clone()
    for row in rows[1:]:
        function(result, row, out=result)
    return result


def _kind_of(op):
    return op if isinstance(op, _OPS) else op.op


def _factor_of(op):
    factor = op.__getstate__()[1]
    if isinstance(factor, torch.Tensor):
        if factor.numel() != 1:
            raise ValueError(f"PREMUL_SUM needs one factor, not a tensor of {factor.numel()}")
        return factor.item()
    return factor
