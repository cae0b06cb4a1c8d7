"""Where gradients lie while they travel: in memory that all ranks of the host map, or in that of this rank alone.

Between ranks of a host, bytes in shared memory are added where they lie; others are copied into a ring and out of it. Torch
makes every gradient in memory of its own, so it has to be copied once to be shared. For small gradients, which share a
buffer, that copy is needed anyway. For a large one it costs what it saves, unless p.grad stays from step to step, as with
zero_grad(set_to_none=False): then one copy moves it for good, and autograd accumulates straight into shared memory.

This file knows tensors, memory and who holds it; it communicates nothing and knows no groups.
"""

import sys
import weakref

import torch

from commlib.torch.private import can_count, count_owners
from commlib.torch.tensors import contiguous

# Up to this size gradients share an operation, and a buffer. To copy 64 KiB in and out of it takes 10 to 20 us, what an
# operation costs at least.
SMALL_NBYTES = 64 << 10

# What a tensor's path is called in reports.
PRIVATE, COPIED, SHARED = "private", "copied", "shared"


def shared_tensor(communicator, count, dtype):
    """A flat tensor of zeros in memory that all ranks of this host map; None: there is none, or it would be no use.

    Args:
        communicator: the core's communicator.
        count: how many elements.
        dtype: of torch.
    """
    if count == 0 or not has_shared(communicator):
        return None
    array = communicator.empty(count * dtype.itemsize, "uint8", shared_only=True)
    return None if array is None else torch.from_numpy(array).view(dtype)


def has_shared(communicator):
    """Whether another rank maps what this one shares, and the engine makes use of it."""
    return getattr(communicator, "backend", None) == "native" and communicator.local_size > 1


def _count_holders(tensors):
    """How many hold the first tensor of a list, the list among them, and how many tensors lie over its memory."""
    return sys.getrefcount(tensors[0]), count_owners(tensors[0])


def _count_two():
    """What is counted where only p.grad and a list hold a tensor; it depends on the versions of Python and torch."""
    parameter = torch.nn.Parameter(torch.empty(1))
    parameter.grad = torch.empty(1)
    return _count_holders([parameter.grad])


_TWO_HOLDERS = _count_two() if can_count() else None


class Place:
    """Where one large gradient is reduced, from step to step.

    A p.grad that stays is moved to shared memory, and what torch had made is freed; p.grad is then another tensor. So
    nobody else may hold the old one. Whoever keeps the new one keeps its memory.

    Attributes:
        path: of the last gradient. PRIVATE: reduced where torch had made it; COPIED: moved to shared memory, and reduced there;
            SHARED: torch had accumulated into what was moved before.
    """

    __slots__ = ("path", "_last", "_memory")

    def __init__(self):
        self.path = PRIVATE
        self._last = lambda: None  # a weak reference to the last p.grad
        self._memory = None

    def bring(self, communicator, parameter, tensors):
        """Brings a gradient to where it is to be reduced.

        Args:
            communicator: the core's communicator.
            parameter: whose gradient it is.
            tensors: a list of its p.grad, which becomes the new p.grad. The caller holds no other reference.

        Returns:
            A contiguous tensor, to be reduced in place. It is tensors[0], unless that is not contiguous.
        """
        has_stayed = tensors[0] is self._last()
        if has_stayed and self._is_here(tensors[0]):
            self.path = SHARED
            return tensors[0]
        self.path, self._memory = PRIVATE, None
        if has_stayed and can_count() and tensors[0].is_contiguous() and _count_holders(tensors) == _TWO_HOLDERS:
            self._move(communicator, parameter, tensors)
        self._last = weakref.ref(tensors[0])
        return contiguous(tensors[0])

    def _move(self, communicator, parameter, tensors):
        tensor = tensors[0]
        memory = shared_tensor(communicator, tensor.numel(), tensor.dtype) if tensor.nbytes > SMALL_NBYTES else None
        if memory is not None:
            self.path, self._memory = COPIED, memory
            parameter.grad = tensors[0] = memory.view(tensor.shape).copy_(tensor)

    def _is_here(self, tensor):
        """A model that is moved to another dtype takes its gradients elsewhere."""
        memory = self._memory
        return memory is not None and tensor.data_ptr() == memory.data_ptr() and tensor.nbytes == memory.nbytes
