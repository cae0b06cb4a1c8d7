"""A group of gradients that travels as something else: what a compressor makes of each, in one buffer.

The result comes back through the compressor, too, also this rank's own part, so replicas stay equal. This file knows
compressors as compression.py describes them; what they do to a tensor is theirs.
"""

import math

import torch

from commlib.torch.compression import NoneCompressor
from commlib.torch.groups import Group
from commlib.torch.storage import COPIED, PRIVATE, shared_tensor
from commlib.torch.tensors import buffer_of, contiguous


def new_group(gradients, prefix, options, compression):
    """The Group that sends these gradients."""
    if compression is NoneCompressor:
        return Group(gradients, prefix, options)
    return CompressedGroup(gradients, prefix, options, compression)


class CompressedGroup(Group):
    """As Group, for every compressor but none."""

    __slots__ = ("_compression", "_parts", "_contexts")

    def __init__(self, gradients, prefix, options, compression):
        super().__init__(gradients, prefix, options)
        self._compression = compression
        self._parts = self._contexts = None

    def gather(self, communicator):
        """Compresses the members' tensors into one buffer, which is returned, to be reduced in place."""
        dense = [tensor if tensor is not None else torch.zeros_like(parameter, requires_grad=False)
                 for tensor, parameter in zip(self.tensors, self.parameters)]  # fmt: skip
        if len(dense) == 1:
            self.tensors = dense
        pairs = [self._compression.compress(tensor.detach()) for tensor in dense]
        self._contexts = [ctx for _, ctx in pairs]
        compressed = [contiguous(tensor) for tensor, _ in pairs]
        wire = self._memory(communicator, sum(tensor.numel() for tensor in compressed), compressed[0].dtype)
        torch.cat([tensor.reshape(-1) for tensor in compressed], out=wire)
        shapes = [tensor.shape for tensor in compressed]
        self._parts = [part.view(shape) for part, shape in zip(wire.split([math.prod(shape) for shape in shapes]), shapes)]
        self.wire_nbytes, self.wire_dtype = wire.nbytes, wire.dtype
        return buffer_of(wire)

    def _memory(self, communicator, count, dtype):
        """The buffer of the last step, where it fits."""
        if self._wire is None or self._wire.numel() != count or self._wire.dtype is not dtype:
            self._wire = shared_tensor(communicator, count, dtype)
            self.path = PRIVATE if self._wire is None else COPIED
            if self._wire is None:
                self._wire = torch.empty(count, dtype=dtype)
        return self._wire

    def scatter(self, is_wanted):
        """As Group.scatter."""
        for index, result in enumerate(self._results(is_wanted)):
            tensor = self.tensors[index]
            self.tensors[index] = result if result is None or tensor is None else tensor.copy_(result)

    def lend(self, is_wanted):
        """As Group.lend: here `tensors` become new ones, and nobody has to give them back."""
        self.tensors = self._results(is_wanted)

    def take_back(self):
        """Whoever was lent the results may keep them."""
        self.tensors = None

    def _results(self, is_wanted):
        """Decompressed: of the members' dtype and in memory of their own; None where an absent one is not wanted."""
        results = []
        for index, (part, ctx) in enumerate(zip(self._parts, self._contexts)):
            if index in self.absent and not is_wanted(self.gradients[index]):
                results.append(None)
                continue
            result = self._compression.decompress(part, ctx).to(self.dtype)
            results.append(result.clone() if result.data_ptr() == part.data_ptr() else result)
        return results
