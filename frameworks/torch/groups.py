"""Groups: gradients that travel as one operation and are updated together.

A gradient of more than `SMALL_NBYTES` is a group of its own and is reduced where it lies, without a copy. Smaller ones
share a group with their neighbours in the order of need: they are copied into one buffer, and the result back out, so
that p.grad stays the tensor that autograd made. A copy of that length costs less than an operation of its own.

This file knows parameters, gradients and memory; it communicates nothing.
"""

from enum import Enum
from typing import NamedTuple

import torch

from commlib.torch.tensors import buffer_of, contiguous

Phase = Enum("Phase", "IDLE FLYING REDUCED CLAIMED")

# To copy 64 KiB in and out of a buffer takes 10 to 20 us, what an operation costs at least.
SMALL_NBYTES = 64 << 10


class Capacity(NamedTuple):
    """How many tensors, and how many bytes, a group takes before it is full."""

    tensors: int
    nbytes: int


# Of the first group of several tensors, the second, ...; the last holds for all that follow. What is needed first waits
# for few others; behind, fewer operations count more. Fujitsu's precedent has groups of 3, 21, 57 and 80 tensors.
LADDER = (Capacity(4, 64 << 10), Capacity(16, 256 << 10), Capacity(64, 1 << 20), Capacity(256, 1 << 20))


class Gradient:
    """What is known of one parameter's gradient between two steps.

    Attributes:
        number: its place among the gradients of its exchange, the same on all ranks.
        priority: its place in the order of need, 0 first.
        group: the Group it travels with; None while its parameter is frozen.
        left: backward passes that are still to accumulate into it before it is sent.
        tensor: what is being reduced, or the result; None: no rank had one.
        version: of the tensor, when it was sent.
        absent: whether zeros were sent, because this rank had no gradient.
    """

    __slots__ = ("parameter", "name", "number", "priority", "group", "left", "tensor", "version", "absent")

    def __init__(self, parameter, name, number):
        self.parameter = parameter
        self.name = name
        self.number = number
        self.priority = number  # the order of registration, until the order of need is known
        self.group = None
        self.left = 0
        self.tensor = self.version = None
        self.absent = False


class Group:
    """Gradients that travel as one operation; IDLE (nothing sent), FLYING (being reduced), REDUCED or CLAIMED.

    Attributes:
        gradients: its members, in the order of need, of one dtype and device.
        missing: how many of them are still to arrive in this step.
        nbytes, dtype: of the operation.
        exposed_s: how long the main thread has waited for it, in all steps.
        options: keyword arguments of the operation.
    """

    __slots__ = ("gradients", "name", "priority", "phase", "missing", "dtype", "nbytes", "counts", "exposed_s", "handle",
                 "options", "_wire", "_views", "_buffer")  # fmt: skip

    def __init__(self, gradients, prefix, options):
        first = gradients[0]
        self.gradients = gradients
        self.name = first.name if len(gradients) == 1 else f"{first.name} and {len(gradients) - 1} more"
        self.priority = min(gradient.priority for gradient in gradients)
        self.options = {"name": prefix + self.name, "priority": self.priority, **options}
        self.dtype = first.parameter.dtype
        self.counts = [gradient.parameter.numel() for gradient in gradients]
        self.nbytes = sum(self.counts) * first.parameter.element_size()
        self.exposed_s = 0.0
        self._wire = self._views = self._buffer = None
        for gradient in gradients:
            gradient.group = self

    def rest(self, passes):
        """Back to IDLE: the next backward pass starts anew."""
        self.phase = Phase.IDLE
        self.missing = len(self.gradients)
        self.handle = None
        for gradient in self.gradients:
            gradient.left = passes
            gradient.tensor = gradient.version = None
            gradient.absent = False

    def fits(self):
        """Whether the gradients, or the parameters where there are none, are still what the group was made for."""
        dtype = self.dtype
        for gradient, count in zip(self.gradients, self.counts):
            tensor = gradient.parameter if gradient.absent else gradient.tensor
            if tensor.dtype is not dtype or tensor.numel() != count:
                return False
        return True

    def gather(self):
        """Brings the members' tensors together. Returns the Buffer to be reduced in place."""
        if len(self.gradients) == 1:
            gradient = self.gradients[0]
            if gradient.absent:
                gradient.tensor = torch.zeros_like(gradient.parameter, requires_grad=False)
            self._wire = contiguous(gradient.tensor)
            return buffer_of(self._wire)
        if self._buffer is None:
            self._make_buffer()
        present = [(view, gradient.tensor) for view, gradient in zip(self._views, self.gradients) if not gradient.absent]
        if len(present) < len(self.gradients):
            self._wire.zero_()
        if present:
            torch._foreach_copy_(*map(list, zip(*present)))
        return self._buffer

    def _make_buffer(self):
        parameters = [gradient.parameter for gradient in self.gradients]
        self._wire = torch.zeros(sum(self.counts), dtype=self.dtype, device=parameters[0].device)
        parts = self._wire.split(self.counts)
        self._views = [part.view(parameter.shape) for part, parameter in zip(parts, parameters)]
        self._buffer = buffer_of(self._wire)

    def scatter(self, is_wanted):
        """Takes the result apart: every gradient's `tensor` becomes it, or None where is_wanted(gradient) is false."""
        wanted = []
        for index, gradient in enumerate(self.gradients):
            if gradient.absent:
                if not is_wanted(gradient):
                    gradient.tensor = None
                    continue
                if gradient.tensor is None:
                    gradient.tensor = torch.empty_like(gradient.parameter, requires_grad=False)
            wanted.append(index)
        if self._buffer is None:
            tensor, wire, self._wire = self.gradients[0].tensor, self._wire, None
            if tensor is not None and tensor.data_ptr() != wire.data_ptr():
                tensor.copy_(wire)
        elif wanted:
            tensors = [self.gradients[index].tensor for index in wanted]
            torch._foreach_copy_(tensors, [self._views[index] for index in wanted])


def members_of_groups(gradients, cohorts, ladder=LADDER):
    """Cuts gradients into groups: equal on all ranks, as it depends on nothing but what they agreed on.

    Args:
        gradients: in the order of need.
        cohorts: number -> which ranks used it, in words; those of one group are the same.
        ladder: capacities of the first group of several tensors, the second, ...

    Returns:
        Lists of gradients, in the order of their first members.
    """
    groups, filling, started = [], {}, 0
    for gradient in gradients:
        parameter = gradient.parameter
        nbytes = parameter.numel() * parameter.element_size()
        if nbytes > SMALL_NBYTES or parameter.layout is not torch.strided or ladder is None:
            groups.append([gradient])
            continue
        kind = (parameter.dtype, parameter.device, cohorts.get(gradient.number))
        if kind not in filling:
            filling[kind] = ([], ladder[min(started, len(ladder) - 1)])
            groups.append(filling[kind][0])
            started += 1
        members, capacity = filling[kind]
        members.append(gradient)
        held_nbytes = sum(g.parameter.numel() for g in members) * parameter.element_size()
        if len(members) >= capacity.tensors or held_nbytes >= capacity.nbytes:
            del filling[kind]
    return groups
