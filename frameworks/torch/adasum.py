"""DistributedOptimizer with op=Adasum, as Horovod has it: ranks make steps of their own, and the changes of weights are combined.

Gradients of different ranks are not comparable once an optimizer has scaled them each by its own state, but the changes that
it makes are. So nothing travels in backward: step() makes the user's own step with this rank's gradients, and Adasum makes one
change of all ranks' changes, with coefficients for each parameter.
"""

import torch

from commlib import Adasum
from commlib.torch.tensors import buffer_of, contiguous, real_view
from commlib.torch.waiting import Waiting


class AdasumSteps(Waiting):
    """A distributed optimizer whose ranks combine what they did. Gradients are this rank's own throughout.

    Args:
        optimizer, exchange, whole_step: as for Waiting; the exchange tracks no gradient.
    """

    def step(self, closure=None):
        """Makes the user's own step and combines the changes of all ranks."""
        parameters = [one for group in self.optimizer.param_groups for one in group["params"] if one.requires_grad]
        before = [one.detach().clone() for one in parameters]
        result = self.whole_step() if closure is None else self.whole_step(closure)
        with torch.no_grad():
            changes = [one - start for one, start in zip(parameters, before)]
            for one, start, change in zip(parameters, before, self._combined(changes)):
                one.copy_(start.add_(change))
        self.exchange.steps += 1
        self.meter.steps += 1
        return result

    def _combined(self, changes):
        compression = self.exchange.compression
        pairs = [compression.compress(contiguous(change)) for change in changes]
        wires = [wire for wire, _ in pairs]
        self.exchange.communicator.grouped_allreduce_([buffer_of(real_view(wire)) for wire in wires], op=Adasum,
                                                      name=f"{self.exchange.prefix}changes of weights")  # fmt: skip
        return [compression.decompress(wire, ctx) for wire, ctx in pairs]

    @property
    def overlap(self):
        """What communication overlaps with, for people."""
        return "nothing: Adasum combines whole steps"
