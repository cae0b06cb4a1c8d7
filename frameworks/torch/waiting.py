"""Horovod's form of the distributed optimizer: backward overlaps with communication, step() waits for all of it.

This file decides what step() and synchronize() do; methods.py is how users reach it, gradients.py does the sending.
"""

import warnings

import torch

from commlib.torch.report import Meter, make_report

STEP_AFTER_SYNCHRONIZE = (
    "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). This can "
    "cause training slowdown. You may want to consider using optimizer.skip_synchronize() context if you use "
    "optimizer.synchronize() in your code."
)

# Of a few operations each.
_MANY_STEPS = 64


class Waiting:
    """What a distributed optimizer knows beyond the user's own: the exchange of gradients, and what it cost.

    Args:
        optimizer: the user's optimizer.
        exchange: a GradientExchange that tracks its parameters.
        whole_step: whole_step() makes the user's own step; whole_step(closure) passes it a closure.
    """

    def __init__(self, optimizer, exchange, whole_step):
        self.optimizer = optimizer
        self.real_class = type(optimizer)
        self.exchange = exchange
        self.whole_step = whole_step
        self.meter = Meter()
        self._spans = []  # of every step that is not added up yet
        self.fallbacks = []  # reasons, in words, why something is waited for at step()
        self.synchronized = False
        self.should_synchronize = True
        self.name_new = None  # name_new(parameters) -> (name, parameter) pairs
        self.share = None  # share(parameters) makes them rank 0's; None: they stay as they are

    def step(self, closure=None):
        """Waits for all gradients and makes the user's own step; with a closure, as often as that is called."""
        self._check_complete()
        if closure is not None:
            closure = self.reducing(closure)
        elif self.should_synchronize:
            if self.synchronized:
                warnings.warn(STEP_AFTER_SYNCHRONIZE, stacklevel=4)
            self.exchange.synchronize()
        elif self.exchange.begun:
            raise RuntimeError("step() within skip_synchronize(), but gradients are on their way: synchronize() first")
        self.synchronized = False
        self.exchange.end_step()
        result = self.whole_step() if closure is None else self.whole_step(closure)
        self.exchange.rest()
        self.exchange.steps += 1
        if self.exchange.regroup_due:
            self.exchange.regroup()
        self.meter.steps += 1
        self.account(now=False)
        return result

    def _check_complete(self):
        """Refuses to step if the optimizer has got or lost parameters behind our back.

        Raises:
            RuntimeError: it has another number of parameters than are tracked.
        """
        known, count = len(self.exchange.gradients), sum(len(group["params"]) for group in self.optimizer.param_groups)
        if known and count != known:
            raise RuntimeError(
                f"the optimizer has {count} parameters, but {known} are known to DistributedOptimizer: add parameters with "
                "optimizer.add_param_group(...), on every rank"
            )

    def reducing(self, closure):
        """The closure, with gradients of all ranks after every call, and the loss that belongs to them."""

        def reduced():
            with torch.enable_grad():
                loss = closure()
            if not self.exchange.gradients:
                return loss
            self._reduce_now()
            self.exchange.end_step()
            if loss is None:
                return None
            total = torch.as_tensor(loss, dtype=None if torch.is_tensor(loss) else torch.float64).detach().clone()
            self.exchange.reduce_value(total, "loss")
            return total if torch.is_tensor(loss) else total.item()

        return reduced

    def _reduce_now(self):
        self.exchange.synchronize()

    def account(self, now=True):
        """Adds up what was measured; the first step, with its one-time work, is dropped.

        Args:
            now: False: not before there are many steps to add up, as that has a price of its own.
        """
        if self.meter.steps <= 1:
            self.exchange.forget_costs()
            return
        self._spans.append(self.exchange.take_spans())
        if now or len(self._spans) == _MANY_STEPS:
            for spans in self._spans:
                self.meter.add(spans)
            self._spans.clear()

    def synchronize(self):
        """Waits for all gradients; p.grad holds the reduced ones."""
        self.exchange.synchronize(looked=True)
        self.synchronized = True

    def forget(self):
        """zero_grad() or load_state_dict(): gradients that were reduced but not used are of no more interest."""
        self.exchange.check_not_begun()
        self.exchange.rest()
        self.synchronized = False

    def zero_grad(self, set_to_none):
        """The user's own zero_grad."""
        self.forget()
        self.real_class.zero_grad(self.optimizer, set_to_none=set_to_none)

    def probe_again(self):
        """State, groups or options were replaced: in this form nothing depends on them."""

    def added(self, parameters):
        """Parameters were added to the optimizer, on every rank."""
        if self.exchange.gradients:
            if self.share is not None:
                self.share(parameters)
            for name, parameter in self.name_new(parameters):
                self.exchange.track(parameter, name)

    def finish_updates(self):
        """Makes updates that are still to come: in this form there are none."""

    def leave(self):
        """Undoes what was done to the model: the communicator has ended."""

    @property
    def overlap(self):
        """What communication overlaps with, for people."""
        return "backward" if self.exchange.gradients else "nothing: there is one rank"

    def report(self):
        """What all this cost so far."""
        self.account()
        return make_report(self.meter, self.exchange, self.overlap, self.fallbacks)
