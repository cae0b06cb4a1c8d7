"""A communicator whose completions the test controls: for gates and optimizers, in one process and without an engine.

Every reduction leaves its bytes as they are, as if all ranks had the same gradient; `wait` completes an operation at
once and writes down its name, or fails if the test has forbidden it.
"""

import commlib
from commlib.torch.gradients import GradientExchange
from commlib.torch.naming import Names
from commlib.torch.optimizer import wrap
from commlib.torch.tensors import tensor_of


class DoubleHandle:
    def __init__(self, communicator, name):
        self.communicator = communicator
        self.name = name
        self.times = (0.0, 1.0, 2.0)

    def done(self):
        return self.name not in self.communicator.in_flight

    def wait(self, timeout_s=None):
        if self.communicator.forbidden:
            raise AssertionError(f"waited for {self.name!r}, which was not needed")
        if self.name in self.communicator.in_flight:
            self.communicator.in_flight.discard(self.name)
            self.communicator.waited.append(self.name)


class DoubleCommunicator:
    """`submitted`: (name, priority) in order; `waited`: names in order; `forbidden`: True if no wait is allowed."""

    def __init__(self, size=2, rank_0_says=None):
        self.size = size
        self.ranks = tuple(range(size))
        self.timeline = None
        self.forbidden = False
        self.submitted = []
        self.waited = []
        self.in_flight = set()
        self._rank_0_says = rank_0_says

    def allreduce_async_(self, buffer, *, name, op, priority=0, prescale_factor=1.0, postscale_factor=1.0,
                         overlapped=False):  # fmt: skip
        assert name not in self.in_flight, f"{name!r} is in flight"
        self.in_flight.add(name)
        self.submitted.append((name, priority))
        if op is commlib.Sum:
            tensor_of(buffer).mul_(self.size)
        return DoubleHandle(self, name)

    def exchange(self, payload, *, name, without_joined=False):
        said = self._rank_0_says if "order" in name else None
        return [said or payload] + [payload] * (self.size - 1)


def distribute(optimizer, communicator, model=None, named_parameters=None, overlap_forward=True, ladder=None, **options):
    """DistributedOptimizer over a double; its initial broadcast is left out, and every gradient is a group by itself."""
    exchange = GradientExchange(communicator, op=commlib.Average, presence=model is not None, ladder=ladder, **options)
    return wrap(optimizer, exchange, Names(model, named_parameters), model, overlap_forward)
