"""Gradients on their way: submitted by backward's hooks the moment they exist, waited for by whoever needs them.

This file knows parameters, names, priorities and handles. It does not know optimizers, modules or gates: both forms of
DistributedOptimizer stand on it, so both send the same operations and get the same bits.

A gradient is IDLE (nothing sent), FLYING (being reduced in place: nobody may touch p.grad), REDUCED (p.grad holds the
result) or CLAIMED (step() has taken it out of p.grad; its update is still to come).
"""

import time
from enum import Enum

import torch

import commlib
from commlib.torch.tensors import buffer_of, check_tensor, contiguous

Phase = Enum("Phase", "IDLE FLYING REDUCED CLAIMED")

TOO_MANY_PASSES = (
    "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
    "backward_passes_per_step to accumulate gradients locally."
)
ZEROED_IN_FLIGHT = (
    "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or optimizer.synchronize(). "
    "This is prohibited as it can cause a race condition."
)


class Gradient:
    """What is known of one parameter's gradient between two steps."""

    __slots__ = ("parameter", "name", "index", "priority", "nbytes", "exposed_s", "phase", "passes_left", "tensor",
                 "wire", "version", "handle", "absent")  # fmt: skip

    def __init__(self, parameter, name, index, passes):
        self.parameter = parameter
        self.name = name
        self.index = index
        self.priority = index  # registration order, until the order of first use is known
        self.nbytes = parameter.numel() * parameter.element_size()
        self.exposed_s = 0.0  # how long the main thread has waited for it, in all steps
        self.rest(passes)

    def rest(self, passes):
        """Back to IDLE: the next backward pass starts anew."""
        self.phase = Phase.IDLE
        self.passes_left = passes
        self.tensor = self.wire = self.version = self.handle = None
        self.absent = False  # whether zeros were sent, because this rank had no gradient


class Arrival:
    """The hook of one parameter. A parameter has one at most: the last exchange that tracks it sends its gradient."""

    def __init__(self, exchange, gradient):
        self.exchange = exchange
        self.gradient = gradient
        for hook in list((gradient.parameter._post_accumulate_grad_hooks or {}).values()):
            if isinstance(hook, Arrival):
                hook.retire()
        self._registration = gradient.parameter.register_post_accumulate_grad_hook(self)

    def __call__(self, parameter):
        self.exchange.arrived(self.gradient)

    def retire(self):
        """The parameter belongs to a newer exchange now."""
        self.exchange.superseded_by = self.gradient.name
        self._registration.remove()


class GradientExchange:
    """Sends gradients of tracked parameters as backward makes them.

    Args:
        communicator: the core's communicator.
        op: commlib.Average, Sum, ...
        prescale_factor, postscale_factor: multiplied before and after the reduction.
        passes: backward passes that accumulate locally before a gradient is sent.
        sparse_as_dense: turn sparse gradients into dense ones (otherwise they are an error).
        presence: tell all ranks which gradients existed anywhere, so that one that no rank had stays None.
        prefix: put before the names of the operations.
    """

    def __init__(self, communicator, *, op, prescale_factor=1.0, postscale_factor=1.0, passes=1, sparse_as_dense=False,
                 presence=False, prefix=""):  # fmt: skip
        self.communicator = communicator
        self.gradients = []
        self.passes = passes
        self.prefix = prefix
        self.exposed_s = 0.0
        self.flying = 0  # how many gradients are being reduced for a step() still to come
        self._arguments = {"op": op, "prescale_factor": prescale_factor, "postscale_factor": postscale_factor}
        self._sparse_as_dense = sparse_as_dense
        self._presence = presence
        self.superseded_by = None  # a parameter's name, once a newer exchange tracks it
        self._spans = []  # (started_s, done_s) of operations that were waited for
        self._frozen = []
        self._closed = False  # whether every parameter's gradient of this step has been sent
        self._counts = None
        self._counts_handle = None

    # ---- tracking

    def track(self, parameter, name):
        """Sends this parameter's gradients from now on. Returns its Gradient."""
        check_tensor(parameter, f"parameter {name!r}")
        gradient = Gradient(parameter, name, len(self.gradients), self.passes)
        self.gradients.append(gradient)
        Arrival(self, gradient)
        return gradient

    def watch_frozen(self, parameter, name):
        """Refuses the next step if this parameter, which needs no gradient now, needs one then."""
        self._frozen.append((parameter, name))

    def set_passes(self, passes):
        """How many backward passes accumulate locally before a gradient is sent, from now on."""
        self.passes = passes
        for gradient in self.gradients:
            gradient.passes_left = passes

    # ---- sending

    def arrived(self, gradient):
        """Backward has accumulated into p.grad: send it, if this was the last pass."""
        if gradient.phase is Phase.CLAIMED:
            raise RuntimeError(
                f"a gradient arrived for parameter {gradient.name!r}, whose update from the last step() is still "
                "pending: it was used without its module's forward or attribute (from a list made earlier, perhaps), "
                "so its old value was used. Call optimizer.synchronize() before such a use, or pass overlap_forward=False"
            )
        if gradient.phase is Phase.FLYING:
            raise AssertionError(f"{TOO_MANY_PASSES} (parameter {gradient.name!r})")
        if gradient.phase is Phase.REDUCED:
            gradient.rest(self.passes)  # synchronize() without step(): the pass begins a new step
            self._closed = False
        gradient.passes_left -= 1
        if gradient.passes_left <= 0:
            self._send(gradient)

    def close(self):
        """Sends what backward did not: zeros for parameters that this rank did not use, so that no rank hangs."""
        if self._closed:
            return
        self._check_in_charge()
        self._closed = True
        idle = [gradient for gradient in self.gradients if gradient.phase is Phase.IDLE]
        for gradient in idle:
            gradient.absent = gradient.parameter.grad is None
        if self._presence and self.gradients:
            self._send_presence()
        for gradient in idle:
            # A frozen parameter is frozen on every rank: nobody sends it.
            if gradient.parameter.requires_grad or not gradient.absent:
                self._send(gradient)

    def _check_in_charge(self):
        if self.superseded_by is not None:
            raise RuntimeError(
                f"this optimizer is no longer in charge: parameter {self.superseded_by!r} was given to a newer "
                "DistributedOptimizer"
            )
        for parameter, name in self._frozen:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when the optimizer was wrapped and requires a gradient now: "
                    "unfreezing is not supported yet, so make the optimizer and its DistributedOptimizer anew"
                )

    def _send(self, gradient):
        parameter = gradient.parameter
        if gradient.absent:
            tensor = torch.zeros_like(parameter, requires_grad=False)
        else:
            tensor = self._dense(gradient)
        gradient.tensor = tensor
        gradient.wire = contiguous(tensor)
        gradient.version = tensor._version
        gradient.phase = Phase.FLYING
        self.flying += 1
        gradient.handle = self.communicator.allreduce_async_(
            buffer_of(gradient.wire), name=self.prefix + gradient.name, priority=gradient.priority, **self._arguments
        )

    def _dense(self, gradient):
        tensor = gradient.parameter.grad
        if tensor.requires_grad:
            raise ValueError(f"the gradient of {gradient.name!r} requires a gradient: create_graph is not supported")
        if tensor.is_sparse:
            if not self._sparse_as_dense:
                raise ValueError(
                    f"the gradient of {gradient.name!r} is sparse: pass sparse_as_dense=True to DistributedOptimizer"
                )
            tensor = gradient.parameter.grad = tensor.to_dense()
        check_tensor(tensor, f"the gradient of {gradient.name!r}")
        return tensor

    def _send_presence(self):
        if self._counts_handle is not None:
            self._counts_handle.wait()  # of the last step, long done: a name is in flight only once
        self._counts = torch.tensor([int(not gradient.absent) for gradient in self.gradients], dtype=torch.int32)
        name = f"{self.prefix}presence of {self.gradients[0].name}"
        self._counts_handle = self.communicator.allreduce_async_(buffer_of(self._counts), name=name, op=commlib.Sum)

    # ---- receiving

    def check_untouched(self, gradient):
        """Refuses to go on if p.grad of a FLYING gradient was changed: nobody knows which bytes were sent.

        Raises:
            AssertionError: zero_grad() or the like took it away.
            RuntimeError: it was changed in place, or replaced.
        """
        if gradient.absent:
            return
        present = gradient.parameter.grad
        if present is None:
            raise AssertionError(f"{ZEROED_IN_FLIGHT} (parameter {gradient.name!r})")
        if present is not gradient.tensor or present._version != gradient.version:
            raise RuntimeError(
                f"the gradient of {gradient.name!r} was changed while it was being reduced: call "
                "optimizer.synchronize() between loss.backward() and whatever changes gradients (clipping, unscaling)"
            )

    def wait(self, gradient):
        """Waits until a gradient that was sent is reduced; its `tensor` is the result, None if no rank had one."""
        if gradient.handle is None:
            return
        begin_s = time.monotonic()
        gradient.handle.wait()
        if gradient.absent and self._presence:
            self._counts_handle.wait()
        waited_s = time.monotonic() - begin_s
        gradient.exposed_s += waited_s
        self.exposed_s += waited_s
        _, started_s, done_s = gradient.handle.times
        self._spans.append((started_s if started_s >= 0 else done_s, done_s))
        if gradient.absent and self._presence and not self._counts[gradient.index]:
            gradient.tensor = None
        elif not gradient.tensor.is_contiguous():
            gradient.tensor.copy_(gradient.wire)
        gradient.handle = gradient.wire = None
        if gradient.phase is Phase.FLYING:
            gradient.phase = Phase.REDUCED
            self.flying -= 1

    def synchronize(self):
        """Waits for every gradient of this step and leaves the results in p.grad."""
        self.close()
        for gradient in self.gradients:
            if gradient.phase is Phase.FLYING:
                self.check_untouched(gradient)
                self.wait(gradient)
                gradient.parameter.grad = gradient.tensor

    def claim(self):
        """Takes every gradient of this step out of p.grad; each is still to be waited for."""
        self.close()
        for gradient in self.gradients:
            if gradient.phase is Phase.FLYING:
                self.check_untouched(gradient)
            else:
                gradient.tensor = gradient.parameter.grad  # whatever the user made of the reduced one
            gradient.phase = Phase.CLAIMED
            gradient.parameter.grad = None
        self.flying = 0
        self._closed = False

    def rest(self):
        """Forgets gradients that were used, or will not be: the next backward pass starts anew. Claimed ones stay."""
        for gradient in self.gradients:
            if gradient.phase is not Phase.CLAIMED:
                gradient.rest(self.passes)
        self._closed = False

    def take_spans(self):
        """(started_s, done_s) of the operations that were waited for since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def forget_costs(self):
        """Begins all measurements anew."""
        self.take_spans()
        self.exposed_s = 0.0
        for gradient in self.gradients:
            gradient.exposed_s = 0.0

    def check_not_flying(self):
        """For zero_grad().

        Raises:
            AssertionError: a gradient is on its way.
        """
        if self.flying:
            raise AssertionError(ZEROED_IN_FLIGHT)
