"""Groups: gradients that travel as one operation and are updated together.

A gradient of more than `SMALL_NBYTES` is a group of its own and is reduced where it lies, without a copy. Smaller ones
share a group with their neighbours in the order of need: they are copied into one buffer; a copy of that length costs
less than an operation of its own. The result is copied back where p.grad is the user's to see, so that it stays the
tensor that autograd made; where only the optimizer sees it, it is lent views of the buffer.

This file knows parameters, gradients and memory; it communicates nothing.
"""

import sys
import time
from enum import Enum
from operator import attrgetter, is_
from typing import NamedTuple

import torch

import commlib
from commlib.torch.private import can_count, copy_all, count_owners, version_of
from commlib.torch.storage import COPIED, PRIVATE, SMALL_NBYTES, Place, shared_tensor
from commlib.torch.tensors import buffer_of, note_changes

# A loop in C over the tensors of a group costs a fifth of one in Python.
_DTYPE_OF, _LAYOUT_OF, _HAS_GRAPH = map(attrgetter, ("dtype", "layout", "requires_grad"))
_NBYTES_OF, _GRADIENT_OF = attrgetter("nbytes"), attrgetter("grad")
_ADDRESS_OF, _IS_CONTIGUOUS, _IS_NEGATED = torch.Tensor.data_ptr, torch.Tensor.is_contiguous, torch.Tensor.is_neg

Phase = Enum("Phase", "IDLE FLYING REDUCED CLAIMED")

# Instead of how often a gradient is still to arrive.
_UNKNOWN = 1 << 30

TOO_MANY_PASSES = (
    "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
    "backward_passes_per_step to accumulate gradients locally."
)
ZEROED_IN_FLIGHT = (
    "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or optimizer.synchronize(). "
    "This is prohibited as it can cause a race condition."
)
CHANGED_IN_FLIGHT = (
    "the gradient of {!r} was changed while it was being reduced: call optimizer.synchronize() between loss.backward() and "
    "whatever changes gradients (clipping, unscaling)"
)
CAME_EARLY = (
    "a gradient arrived for parameter {!r}, whose update from the last step() is still pending: it was used without its "
    "module's forward or attribute (from a list made earlier, perhaps), so its old value was used. Call "
    "optimizer.synchronize() before such a use, or pass overlap_forward=False"
)
CAME_LATE = (
    "the gradient of {!r} came while it was being reduced and is lost: call optimizer.synchronize() and "
    "optimizer.zero_grad(), and begin the step again"
)

AFTER_SHUTDOWN = (
    "shutdown() has ended the communicator that this optimizer was wrapped for: after init(), wrap it again with "
    "DistributedOptimizer(optimizer, ...); to train alone, make a new optimizer and give it this one's state_dict()"
)


class Capacity(NamedTuple):
    """How many tensors, and how many bytes, a group takes before it is full."""

    tensors: int
    nbytes: int


# Of the first group of several tensors, the second, ...; the last holds for all that follow. What is needed first waits
# for few others; behind, fewer operations count more. Fujitsu's precedent has groups of 3, 21, 57 and 80 tensors.
LADDER = (Capacity(4, 64 << 10), Capacity(16, 256 << 10), Capacity(64, 1 << 20), Capacity(256, 1 << 20))


class Gradient:
    """What is known of one parameter's gradient.

    Attributes:
        number: its place among the gradients of its exchange, the same on all ranks.
        priority: its place in the order of need, 0 first.
        group: the Group it travels with; None while its parameter is frozen.
        uses: how often it arrives in one backward pass; None: that has not been seen yet. Where reentrant checkpoints run
            backward within backward, a layer that is in two of them gets its gradient in two pieces.
        left: how often it is still to arrive before it is sent.
        version: of p.grad when it arrived last, as long as its uses are not known.
        place: where it is reduced while it travels by itself.
    """

    __slots__ = ("parameter", "name", "number", "priority", "group", "uses", "left", "version", "place")

    def __init__(self, parameter, name, number):
        self.parameter = parameter
        self.name = name
        self.number = number
        self.priority = number  # the order of registration, until the order of need is known
        self.group = None
        self.uses = self.version = None
        self.left = 0
        self.place = Place()

    def expect(self, passes):
        """A step of so many backward passes begins."""
        self.left = _UNKNOWN if self.uses is None else self.uses * passes
        self.version = None

    def has_come(self, passes):
        """Whether all passes may have accumulated into it; until its uses are known, it is sent when the step is closed."""
        return self.left <= 0 or self.uses is None and _UNKNOWN - self.left >= passes

    def learn(self, passes):
        """At the end of a step: it arrives as often as it did here."""
        if self.left < _UNKNOWN:
            self.uses = -(-(_UNKNOWN - self.left) // passes)

    def came_again(self):
        """It arrived more often than was known."""
        if self.uses is not None:
            self.uses += 1


class Group:
    """Gradients that travel as one operation; IDLE (nothing sent), FLYING (being reduced), REDUCED or CLAIMED.

    What belongs to one gradient is in lists, in the order of the members, as loops over them are what a step costs.

    Attributes:
        gradients, parameters: its members, in the order of need, of one dtype and device.
        missing: how many of them are still to arrive in this step.
        absent: indices of members of which this rank had no gradient in this step; zeros are sent for them.
        tensors: what is being reduced, or the results; None: no rank had one.
        versions: of the tensors, when they were sent.
        nbytes, dtype: of the gradients.
        wire_nbytes, wire_dtype: of the operation, which are others if a compressor is used.
        exposed_s: how long the main thread has waited for it, in all steps.
        options: keyword arguments of the operation.
        path: where its bytes were reduced last: a word of storage.py.
        is_plain: whether its tensors were copied into the buffer as bytes.
    """

    __slots__ = ("gradients", "parameters", "name", "priority", "phase", "missing", "absent", "tensors", "versions", "dtype",
                 "nbytes", "wire_nbytes", "wire_dtype", "exposed_s", "handle", "options", "path", "_wire", "_views", "_buffer",
                 "_owners", "_pieces", "_piece_nbytes", "is_plain")  # fmt: skip

    def __init__(self, gradients, prefix, options):
        first = gradients[0]
        self.gradients = gradients
        self.parameters = [gradient.parameter for gradient in gradients]
        self.name = first.name if len(gradients) == 1 else f"{first.name} and {len(gradients) - 1} more"
        self.priority = min(gradient.priority for gradient in gradients)
        self.options = {"name": prefix + self.name, "priority": self.priority, **options}
        self.dtype = first.parameter.dtype
        self._piece_nbytes = [parameter.numel() * parameter.element_size() for parameter in self.parameters]
        self.nbytes = sum(self._piece_nbytes)
        self.wire_nbytes, self.wire_dtype = self.nbytes, self.dtype
        self.exposed_s = 0.0
        self.path = PRIVATE
        self._wire = self._views = self._buffer = self._pieces = None
        for gradient in gradients:
            gradient.group = self

    def rest(self, passes):
        """Back to IDLE: the next backward pass starts anew."""
        self.phase = Phase.IDLE
        self.missing = len(self.gradients)
        self.handle = self.tensors = self.versions = None
        self.absent = ()
        for gradient in self.gradients:
            gradient.expect(passes)

    def check_complete(self, passes):
        """Refuses to send p.grad of a gradient that came and was changed or taken away since.

        Raises:
            AssertionError, RuntimeError: as `check_untouched`.
        """
        for gradient in self.gradients:
            present = gradient.parameter.grad
            if present is None and gradient.has_come(passes):
                raise AssertionError(f"{ZEROED_IN_FLIGHT} (parameter {gradient.name!r})")
            if present is not None and gradient.version not in (None, version_of(present)):
                raise RuntimeError(CHANGED_IN_FLIGHT.format(gradient.name))

    def check_untouched(self):
        """Refuses to go on if p.grad was changed while it is FLYING: nobody knows which bytes were sent.

        Raises:
            AssertionError: zero_grad() or the like took it away.
            RuntimeError: it was changed in place, or replaced.
        """
        tensors, now = self.tensors, list(map(_GRADIENT_OF, self.parameters))
        if not self.absent and all(map(is_, now, tensors)) and list(map(version_of, tensors)) == self.versions:
            return
        for index, (present, tensor, version) in enumerate(zip(now, tensors, self.versions)):
            if present is tensor and tensor is not None and version_of(tensor) == version or index in self.absent:
                continue
            name = self.gradients[index].name
            if present is None:
                raise AssertionError(f"{ZEROED_IN_FLIGHT} (parameter {name!r})")
            raise RuntimeError(CHANGED_IN_FLIGHT.format(name))

    def lie_plainly(self, tensors):
        """Whether the bytes of all, which are ordinary, are those of the members: copied as bytes, they cost less."""
        return (len(tensors) > 1 and not self.dtype.is_complex and all(map(_IS_CONTIGUOUS, tensors))
                and not any(map(_IS_NEGATED, tensors)) and list(map(_NBYTES_OF, tensors)) == self._piece_nbytes)  # fmt: skip

    def fits(self):
        """Whether the parameters are still of the dtype and size that the group was made for."""
        dtype = self.dtype
        return all(parameter.dtype is dtype for parameter in self.parameters) and self._piece_nbytes == [
            parameter.numel() * parameter.element_size() for parameter in self.parameters
        ]

    def submit(self, communicator):
        """Sends the group's bytes. Returns the operation's handle."""
        begin_s = time.monotonic()
        buffer = self.gather(communicator)
        if communicator.timeline is not None and self.path is COPIED:
            communicator.timeline.span(f"copy {self.name}", "copy", begin_s, time.monotonic())
        handle = communicator.allreduce_async_(buffer, **self.options)
        handle.note = self.path
        return handle

    def gather(self, communicator):
        """Brings the members' tensors together. Returns the Buffer to be reduced in place."""
        if len(self.gradients) == 1:
            if self.absent:
                self.tensors = [torch.zeros_like(self.parameters[0], requires_grad=False)]
            place = self.gradients[0].place
            self._wire = place.bring(communicator, self.parameters[0], self.tensors)
            self.path = place.path
            return buffer_of(self._wire)
        if self._views is None:
            self._make_buffer(communicator)
        if not self.absent:
            if self.is_plain:
                self._pieces.gather(map(_ADDRESS_OF, self.tensors))
            else:
                copy_all(self._views, self.tensors)
            return self._buffer
        self._wire.zero_()
        present = [index for index in range(len(self.tensors)) if index not in self.absent]
        if present:
            copy_all([self._views[index] for index in present], [self.tensors[index] for index in present])
        return self._buffer

    def _make_buffer(self, communicator):
        counts = [parameter.numel() for parameter in self.parameters]
        self._wire = shared_tensor(communicator, sum(counts), self.dtype)
        self.path = PRIVATE if self._wire is None else COPIED
        if self._wire is None:
            self._wire = torch.zeros(sum(counts), dtype=self.dtype)
        parts = self._wire.split(counts)
        self._views = [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters)]
        self._buffer = buffer_of(self._wire)
        self._pieces = commlib.Pieces(self._buffer.address, self._piece_nbytes)
        del parts
        self._owners = self._count_owners() if can_count() else None

    def scatter(self, is_wanted):
        """Copies the result back: `tensors` become it, and None where is_wanted(gradient) is false for an absent one."""
        self._drop_unwanted(is_wanted)
        if len(self.gradients) == 1:
            tensor, wire, self._wire = self.tensors[0], self._wire, None
            if tensor is not None and tensor.data_ptr() != wire.data_ptr():
                tensor.copy_(wire)
            return
        if self.is_plain and self.lie_plainly(self.tensors):
            self._pieces.scatter(map(_ADDRESS_OF, self.tensors))
            note_changes(self.tensors)
            return
        for index in self.absent:
            if self.tensors[index] is not None:
                self.tensors[index] = torch.empty_like(self.parameters[index], requires_grad=False)
        for tensor, view in zip(self.tensors, self._views):
            if tensor is not None:
                tensor.copy_(view)  # not foreach, which knows no negated tensors

    def lend(self, is_wanted):
        """As `scatter`, but `tensors` become views of the buffer, which the group uses again after `take_back`.

        Where nobody can tell whether they were given back, they are not lent.
        """
        if len(self.gradients) == 1 or not can_count():
            self.scatter(is_wanted)
            return
        self.tensors = list(self._views)
        self._drop_unwanted(is_wanted)

    def take_back(self):
        """Whoever was lent the views is done with them. If he keeps one, he keeps the buffer, and the group gets another."""
        self.tensors = None
        if self._views is not None and can_count() and self._count_owners() != self._owners:
            self._wire = self._views = self._buffer = self._pieces = None

    def _count_owners(self):
        """Who holds the buffer: a view itself, or another tensor over the same memory."""
        return max(map(sys.getrefcount, self._views)), count_owners(self._wire)

    def _drop_unwanted(self, is_wanted):
        for index in self.absent:
            if not is_wanted(self.gradients[index]):
                self.tensors[index] = None
            elif self.tensors[index] is None:
                self.tensors[index] = self._views[index]


def are_ordinary(tensors, dtype):
    """Whether all are there, dense, of this dtype and without a graph."""
    try:
        return (set(map(_DTYPE_OF, tensors)) == {dtype} and set(map(_LAYOUT_OF, tensors)) == {torch.strided}
                and not any(map(_HAS_GRAPH, tensors)))  # fmt: skip
    except AttributeError:  # of None
        return False


def versions_of(tensors):
    """How often each was changed in place; None of None."""
    try:
        return list(map(version_of, tensors))
    except AttributeError:
        return [None if tensor is None else version_of(tensor) for tensor in tensors]


def can_share(parameter):
    """Whether a gradient may travel in a group: small, and laid out as a view of a buffer is."""
    nbytes = parameter.numel() * parameter.element_size()
    return nbytes <= SMALL_NBYTES and parameter.layout is torch.strided and parameter.is_contiguous()


def members_of_groups(gradients, cohorts, apart, ladder=LADDER):
    """Cuts gradients into groups: equal on all ranks, as it depends on nothing but what they agreed on.

    Args:
        gradients: in the order of need.
        cohorts: number -> which ranks used it, in words; those of one group are the same.
        apart: numbers of gradients that share no group on some rank.
        ladder: capacities of the first group of several tensors, the second, ...

    Returns:
        Lists of gradients, in the order of their first members.
    """
    groups, filling, started = [], {}, 0
    for gradient in gradients:
        parameter = gradient.parameter
        if ladder is None or gradient.number in apart:
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
