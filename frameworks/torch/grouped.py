"""Collectives on lists of tensors, which complete together: Horovod's grouped forms.

What is reduced travels as commlib's grouped all-reduce, small tensors together. Of the others every tensor is an operation of its
own, matched and checked by its own name; here they are begun together, and waited for together.
"""

import time

import commlib
from commlib.compressor import checked_compression
from commlib.ops import check_op, op_of
from commlib.process_sets import communicator_of, global_process_set
from commlib.torch import autograd
from commlib.torch.compression import Compression
from commlib.torch.operations import allgather_async, check_in_place, landed, reducescatter_async
from commlib.torch.tensors import buffer_of, check_tensor, contiguous


class GroupedHandle:
    """Operations in flight that complete together; `synchronize(handle)` or `handle.wait()` gives the list of their tensors.

    Attributes:
        parts: their Handles.
    """

    __slots__ = ("parts",)

    def __init__(self, parts):
        self.parts = parts

    def wait(self, timeout_s=None):
        """Waits until all operations are done and returns their tensors.

        Raises:
            TimeoutError: they are not after timeout_s; they go on.
            CommlibError: one failed, the first in the list; all are done.
        """
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        results, failure = [], None
        for part in self.parts:
            try:
                results.append(part.wait(None if end_s is None else max(0.0, end_s - time.monotonic())))
            except commlib.CommlibError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return results

    def done(self):
        """True if all operations are done, well or not."""
        return all(part.done() for part in self.parts)


def _listed(tensors, what, check=check_tensor):
    """The tensors as a list, all of them checked before the first is sent."""
    tensors = list(tensors)
    for tensor in tensors:
        check(tensor, what)
    return tensors


def _names(name, tensors):
    return [None if name is None else f"{name}.{place}" for place in range(len(tensors))]


# ---- allreduce


def grouped_allreduce_async(tensors, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
                            process_set=global_process_set):  # fmt: skip
    """As `grouped_allreduce`, returning a GroupedHandle at once."""
    copies = [tensor.detach().clone() for tensor in _listed(tensors, "grouped_allreduce")]
    return _begin(copies, name, op_of(average, op, adasum=True), prescale_factor, postscale_factor, process_set)


def grouped_allreduce_async_(tensors, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
                             process_set=global_process_set):  # fmt: skip
    """As `grouped_allreduce_`, returning a GroupedHandle at once; do not touch the tensors before the wait."""
    tensors = _listed(tensors, "grouped_allreduce_", check_in_place)
    return _begin(tensors, name, op_of(average, op, adasum=True), prescale_factor, postscale_factor, process_set)


class ReducedHandle:
    """All-reduces in flight that complete together; `synchronize(handle)` or `handle.wait()` gives the list of their tensors."""

    __slots__ = ("_handle", "_tensors", "_wires")

    def __init__(self, handle, tensors, wires):
        self._handle, self._tensors, self._wires = handle, tensors, wires

    def wait(self, timeout_s=None):
        """As GroupedHandle.wait."""
        self._handle.wait(timeout_s)
        while self._wires:
            landed(self._tensors[len(self._wires) - 1], self._wires.pop())
        return self._tensors

    def done(self):
        """As GroupedHandle.done."""
        return self._handle.done()

    @property
    def parts(self):
        """For each tensor something whose wait() gives it."""
        return [_Part(self, place) for place in range(len(self._tensors))]


class _Part:
    __slots__ = ("_whole", "_place")

    def __init__(self, whole, place):
        self._whole, self._place = whole, place

    def wait(self):
        return self._whole.wait()[self._place]


def _begin(tensors, name, op, prescale_factor, postscale_factor, process_set):
    wires = [contiguous(tensor) for tensor in tensors]
    handle = communicator_of(process_set).grouped_allreduce_async_(
        [buffer_of(wire) for wire in wires], name=name, op=op, prescale_factor=prescale_factor, postscale_factor=postscale_factor,
    )  # fmt: skip
    return ReducedHandle(handle, tensors, wires)


def grouped_allreduce(tensors, average=None, name=None, compression=Compression.none, op=None, prescale_factor=1.0,
                      postscale_factor=1.0, process_set=global_process_set):  # fmt: skip
    """Reduces tensors over all ranks, those at the same place of the list with each other. Differentiable.

    Args:
        tensors: CPU tensors, as many on every rank; dtypes and shapes may differ within the list.
        name: the first part of each operation's name; None: by sequence number.
        average, compression, op, prescale_factor, postscale_factor, process_set: as for `allreduce`.

    Returns:
        A list of new tensors.

    Raises:
        ValueError, CommlibError: as `allreduce`; all of the operations are done then.

    Example:
        >>> import torch, commlib.torch as comm
        >>> comm.init()
        >>> comm.grouped_allreduce([torch.ones(1), torch.tensor(3)], op=comm.Sum)
        [tensor([1.]), tensor(3)]
        >>> comm.shutdown()
    """
    op = op_of(average, op, adasum=True)
    arguments = (op, prescale_factor, postscale_factor, process_set)
    wires, decompressed = _compressed("grouped_allreduce", op, tensors, compression)
    handle = grouped_allreduce_async(wires, None, name, *arguments)
    return decompressed(_results(handle, autograd.Allreduce, wires, *arguments))


def grouped_allreduce_(tensors, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0,
                       process_set=global_process_set):  # fmt: skip
    """As `grouped_allreduce`, in place; returns the list of the tensors."""
    return grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set).wait()


# ---- allgather, reducescatter


def grouped_allgather_async(tensors, name=None, process_set=global_process_set):
    """As `grouped_allgather`, returning a GroupedHandle at once."""
    tensors = _listed(tensors, "grouped_allgather", _check_rows)
    names = _names(name, tensors)
    return GroupedHandle([allgather_async(tensor, own, process_set) for tensor, own in zip(tensors, names)])


def grouped_allgather(tensors, name=None, process_set=global_process_set):
    """As `allgather` of each tensor of a list; they complete together. Returns a list of new tensors. Differentiable."""
    tensors = list(tensors)
    return _results(grouped_allgather_async(tensors, name, process_set), autograd.Allgather, tensors, process_set)


def grouped_reducescatter_async(tensors, name=None, op=commlib.Average, process_set=global_process_set, prescale_factor=1.0,
                                postscale_factor=1.0):  # fmt: skip
    """As `grouped_reducescatter`, returning a GroupedHandle at once."""
    tensors = _listed(tensors, "grouped_reducescatter", _check_rows)
    arguments = (check_op(op), process_set, prescale_factor, postscale_factor)
    return GroupedHandle([
        reducescatter_async(tensor, own, *arguments) for tensor, own in zip(tensors, _names(name, tensors))
    ])  # fmt: skip


def grouped_reducescatter(tensors, name=None, compression=Compression.none, op=commlib.Average,
                          process_set=global_process_set, prescale_factor=1.0, postscale_factor=1.0):  # fmt: skip
    """As `reducescatter` of each tensor of a list; they complete together. Returns a list of new tensors. Differentiable."""
    op = check_op(op)
    wires, decompressed = _compressed("grouped_reducescatter", op, tensors, compression)
    handle = grouped_reducescatter_async(wires, name, op, process_set, prescale_factor, postscale_factor)
    arguments = (op, prescale_factor, postscale_factor, process_set)
    return decompressed(_results(handle, autograd.Reducescatter, wires, *arguments))


def _check_rows(tensor, what):
    check_tensor(tensor, what)
    if not tensor.dim():
        raise ValueError(f"{what} works along the first dimension, and a scalar has none: reshape it to (1,)")


def _compressed(what, op, tensors, compression):
    """What travels, and a function that makes the results of it."""
    tensors, compression = _listed(tensors, what), checked_compression(compression)
    autograd.check_reduction(what, op, tensors)
    pairs = [compression.compress(tensor) for tensor in tensors]

    def decompressed(results):
        return [compression.decompress(result, ctx) for result, (_, ctx) in zip(results, pairs)]

    return [wire for wire, _ in pairs], decompressed


def _results(handle, function, tensors, *arguments):
    handle.wait()
    return [autograd.result_of(function, tensor, part, *arguments) for tensor, part in zip(tensors, handle.parts)]
