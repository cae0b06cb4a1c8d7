"""The form with `model=`: step() returns at once, and each module's forward waits for its own parameters only.

step() claims the gradients, remembers the hyper-parameters and leaves one pending bundle per module. A gate (gates.py)
opens a bundle when somebody needs its weights: it waits for the bundle's gradients and has the user's own optimizer
update them, in the thread that waits. Where that would not give the bits of a whole step (probe.py), step() waits
instead and says so.
"""

import logging
import time

from commlib.torch.bundles import bundles_of, group_indices, groups_of, snapshot, step_groups
from commlib.torch.gates import Gates
from commlib.torch.order import FirstUse, agree_on_priorities
from commlib.torch.probe import reason_to_wait
from commlib.torch.waiting import Waiting

_log = logging.getLogger("commlib.torch")


class Overlapping(Waiting):
    """A distributed optimizer whose updates may still be to come after step().

    Args:
        optimizer, exchange, whole_step: as for Waiting.
        model: the nn.Module whose parameters are trained.
        reason: why updates are never put off, in words; None: they are, if the probe finds no reason.
    """

    def __init__(self, optimizer, exchange, whole_step, model, reason=None):
        super().__init__(optimizer, exchange, whole_step)
        self.bundles = bundles_of(model, exchange.gradients)
        self._index_of = group_indices(optimizer.param_groups)
        self._probed = False
        self._waits = False  # whether every step() is waited for
        self._updating = False
        bundle_of = {gradient.parameter: b for b in self.bundles if b.gated for gradient in b.gradients}
        self.gates = Gates(bundle_of, self.open, self._settle, used=FirstUse())
        self.gates.install(model)
        if reason is not None:
            self._probed = self._waits = True
            self.fallbacks.append(reason)
        for bundle in self.bundles:
            if not bundle.gated:
                names = ", ".join(gradient.name for gradient in bundle.gradients)
                self._say(f"these are not parameters of the model: {names}")

    @property
    def overlap(self):
        """What communication overlaps with, for people."""
        return "backward" if self._waits else "backward and forward"

    # ---- step

    def step(self):
        """Claims all gradients and returns; or, with a reason to wait, makes the whole step."""
        self.finish_updates()  # of parameters that nobody has read since the last step
        self.account()  # of the last step, whose waits came after it
        self.meter.steps += 1
        result = self._put_off() if self._may_put_off() else self._whole()
        if self.gates.used is not None:
            self._agree_on_order()
        return result

    def _may_put_off(self):
        if not self._probed:
            self._probed = True
            bundles = [[gradient.parameter for gradient in bundle.gradients] for bundle in self.bundles]
            reason = reason_to_wait(self.optimizer, self.real_class, bundles)
            if reason is not None:
                self._waits = True
                self._say(f"{self.real_class.__name__}: {reason}")
        if self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks:
            self._waits = True
            self._say("the optimizer has step hooks, which see whole steps")
        return not self._waits

    def _put_off(self):
        self.exchange.claim()
        snapshots = snapshot(self.optimizer.param_groups)
        for bundle in self.bundles:
            bundle.groups = groups_of([gradient.parameter for gradient in bundle.gradients], self._index_of, snapshots)
            self.gates.pending.add(bundle)
        for bundle in self.bundles:
            if not bundle.gated:
                self.open(bundle)

    def _whole(self):
        self.exchange.synchronize()
        self._updating = True
        try:
            return self.whole_step()
        finally:
            self._updating = False
            for gradient in self.exchange.gradients:
                gradient.parameter.grad = None  # as if put off: zero_grad(set_to_none=False) makes no difference
            self.exchange.rest()

    def _agree_on_order(self):
        """After the first step: priorities are the order of first use in forward, from the next step on."""
        gradients = self.exchange.gradients
        name = f"{self.exchange.prefix}order of {gradients[0].name}"
        agreed = agree_on_priorities(self.exchange.communicator, gradients, self.gates.used, name)
        if not agreed:
            _log.warning("commlib: this rank used parameters in another order than rank 0, whose order gives priority")
        self.gates.used = None
        self.bundles.sort(key=lambda bundle: min(gradient.priority for gradient in bundle.gradients))

    # ---- what is pending

    def open(self, bundle):
        """Waits for a pending bundle's gradients and updates its parameters."""
        begin_s = time.monotonic()
        for gradient in bundle.gradients:
            self.exchange.wait(gradient)
        waited_s = time.monotonic()
        self.gates.pending.discard(bundle)
        for gradient in bundle.gradients:
            gradient.parameter.grad = gradient.tensor
        self._updating = True
        try:
            step_groups(self.optimizer, self.real_class.step, bundle.groups)
        finally:
            self._updating = False
            bundle.groups = None
            for gradient in bundle.gradients:
                gradient.parameter.grad = None
                gradient.rest(self.exchange.passes)
        self._record(bundle, begin_s, waited_s)

    def finish_updates(self):
        """Makes all updates that are still to come, in the order in which forward would have needed them."""
        if self.gates.pending and not self._updating:
            for bundle in self.bundles:
                if bundle in self.gates.pending:
                    self.open(bundle)

    def synchronize(self):
        """Makes all updates still to come, and waits for all gradients that are on their way."""
        self.finish_updates()
        self._settle()

    def _settle(self):
        if self.exchange.flying:
            self.exchange.synchronize()

    # ---- what people see

    def _say(self, reason):
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)
            _log.warning("commlib waits at step(): %s", reason)

    def _record(self, bundle, begin_s, waited_s):
        timeline = self.exchange.communicator.timeline
        if timeline is not None:
            timeline.span(f"wait {bundle.name}", "wait", begin_s, waited_s)
            timeline.span(f"update {bundle.name}", "update", waited_s, time.monotonic())
