"""Horovod's form of the distributed optimizer: backward overlaps with communication, step() waits for all of it.

This file decides what step() and synchronize() do; methods.py is how users reach it, gradients.py does the sending.
"""

import warnings

from commlib.torch.report import Meter, make_report

STEP_AFTER_SYNCHRONIZE = (
    "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). This can "
    "cause training slowdown. You may want to consider using optimizer.skip_synchronize() context if you use "
    "optimizer.synchronize() in your code."
)


class Waiting:
    """What a distributed optimizer knows beyond the user's own: the exchange of gradients, and what it cost.

    Args:
        optimizer: the user's optimizer.
        exchange: a GradientExchange that tracks its parameters.
        whole_step: whole_step() makes the user's own step.
    """

    def __init__(self, optimizer, exchange, whole_step):
        self.optimizer = optimizer
        self.real_class = type(optimizer)
        self.exchange = exchange
        self.whole_step = whole_step
        self.meter = Meter()
        self.fallbacks = []  # reasons, in words, why something is waited for at step()
        self.synchronized = False
        self.should_synchronize = True

    def step(self):
        """Waits for all gradients and makes the user's own step."""
        if self.should_synchronize:
            if self.synchronized:
                warnings.warn(STEP_AFTER_SYNCHRONIZE, stacklevel=4)
            self.synchronize()
        elif self.exchange.flying:
            raise RuntimeError("step() within skip_synchronize(), but gradients are on their way: synchronize() first")
        self.synchronized = False
        result = self.whole_step()
        self.exchange.rest()
        if self.exchange.regroup_due:
            self.exchange.regroup()
        self.meter.steps += 1
        self.account()
        return result

    def account(self):
        """Adds up what was measured since the last call; the first step, with its one-time work, is dropped."""
        if self.meter.steps > 1:
            self.meter.add(self.exchange.take_spans())
        else:
            self.exchange.forget_costs()

    def synchronize(self):
        """Waits for all gradients; p.grad holds the reduced ones."""
        self.exchange.synchronize()
        self.synchronized = True

    def forget(self):
        """zero_grad() or load_state_dict(): gradients that were reduced but not used are of no more interest."""
        self.exchange.check_not_flying()
        self.exchange.rest()
        self.synchronized = False

    def finish_updates(self):
        """Makes updates that are still to come: in this form there are none."""

    @property
    def overlap(self):
        """What communication overlaps with, for people."""
        return "backward" if self.exchange.gradients else "nothing: there is one rank"

    def report(self):
        """What all this cost so far."""
        self.account()
        return make_report(self.meter, self.exchange, self.overlap, self.fallbacks)
