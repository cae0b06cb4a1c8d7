"""Torch tensors seen as the core's Buffers, and back. The only file that knows where a tensor's bytes are.

Nothing is copied here but tensors that are not contiguous; nothing is communicated.
"""

import ctypes
import math

import torch

import commlib

DTYPE_NAMES = {
    torch.uint8: "uint8", torch.int8: "int8", torch.int16: "int16", torch.int32: "int32", torch.int64: "int64",
    torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64",
    torch.bool: "bool",
}  # fmt: skip
_DTYPE_OF_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def check_tensor(tensor, what):
    """Refuses what cannot travel.

    Args:
        tensor: anything that a user passed.
        what: how messages call it, such as "allreduce" or "the gradient of 'fc.weight'".

    Raises:
        TypeError: not a tensor.
        ValueError: not on the CPU, sparse, or of a dtype that commlib does not know.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{what} needs a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device.type == "meta":
        raise ValueError(f"{what}: the tensor is on the meta device and has no values: model.to_empty(device='cpu'), load or "
                         "initialise its weights, and then make the optimizer")  # fmt: skip
    if tensor.device.type != "cpu":
        raise ValueError(f"{what}: the tensor is on {tensor.device}; only CPU tensors are supported yet (use .cpu())")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{what}: the tensor is {tensor.layout}; only dense tensors are supported yet (.to_dense())")
    if tensor.dtype not in DTYPE_NAMES:
        known = ", ".join(_DTYPE_OF_NAME)
        raise ValueError(f"{what}: dtype {tensor.dtype} is not supported; use one of {known}")


def contiguous(tensor):
    """The tensor itself where its elements lie in order as they are, else a copy that does; outside of autograd."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def note_changes(tensors):
    """Tells autograd that tensors were changed by others; torch before 2.6 takes them one by one only."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def real_view(tensor):
    """A complex tensor as pairs of reals; another as it is. Sums and averages of the one are those of the other."""
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor


def buffer_of(tensor):
    """The memory of a contiguous CPU tensor as a Buffer, which keeps the tensor alive; complex as pairs of reals."""
    tensor = real_view(tensor)
    dtype = DTYPE_NAMES[tensor.dtype]
    return commlib.Buffer(tensor.data_ptr(), tuple(tensor.shape), dtype, owner=tensor, writable=True)


def overlapping_pair(named):
    """Names of two tensors whose memory may overlap, out of (name, tensor) pairs; None: all lie apart."""
    extents = []
    for name, tensor in named:
        if tensor.numel():
            last = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride()))
            begin = tensor.data_ptr()
            extents.append((begin, begin + (last + 1) * tensor.element_size(), name))
    extents.sort()
    for (_, end, first), (begin, _, second) in zip(extents, extents[1:]):
        if begin < end:
            return first, second
    return None


def tensor_of(buffer):
    """A tensor over a Buffer's memory, without a copy; the tensor keeps the memory alive."""
    dtype = _DTYPE_OF_NAME[buffer.dtype]
    if math.prod(buffer.shape) == 0:
        return torch.empty(buffer.shape, dtype=dtype)
    nbytes = math.prod(buffer.shape) * dtype.itemsize
    memory = (ctypes.c_char * nbytes).from_address(buffer.address)
    memory.owner = buffer  # torch keeps `memory` alive, and so it keeps the bytes behind it
    return torch.frombuffer(memory, dtype=dtype).view(buffer.shape)


def fingerprint(tensor):
    """A number that another tensor hardly has: the sum of its bytes, each weighted by its place."""
    tensor = contiguous(tensor.coalesce().values() if tensor.is_sparse else tensor)
    words = real_view(tensor).reshape(-1).view(torch.uint8).to(torch.int64)
    return int((words * torch.arange(1, len(words) + 1)).sum()) if len(words) else 0
