"""Gradients on their way: submitted by backward's hooks the moment they exist, waited for by whoever needs them.

This file knows parameters, names, priorities and handles. It does not know optimizers, modules or gates: both forms of
DistributedOptimizer stand on it, so both send the same operations and get the same bits.

A group of gradients is IDLE (nothing sent), FLYING (being reduced: nobody may touch its p.grad), REDUCED (p.grad holds
the result) or CLAIMED (step() has taken it out of p.grad; its update is still to come).
"""

import json
import time

import torch

from commlib.torch.groups import LADDER, Gradient, Group, Phase, can_share, members_of_groups
from commlib.torch.order import FirstUse
from commlib.torch.presence import Presence
from commlib.torch.sparse import SparseGroup, SparseSet
from commlib.torch.tensors import buffer_of, check_tensor, real_view

TOO_MANY_PASSES = (
    "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
    "backward_passes_per_step to accumulate gradients locally."
)
ZEROED_IN_FLIGHT = (
    "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or optimizer.synchronize(). "
    "This is prohibited as it can cause a race condition."
)

_IDLE, _FLYING, _REDUCED, _CLAIMED = Phase.IDLE, Phase.FLYING, Phase.REDUCED, Phase.CLAIMED


class Arrival:
    """The hook of one parameter. A parameter has one at most: the last exchange that tracks it sends its gradient."""

    __slots__ = ("exchange", "gradient", "_registration")

    def __init__(self, exchange, gradient):
        self.exchange = exchange
        self.gradient = gradient
        for hook in list((gradient.parameter._post_accumulate_grad_hooks or {}).values()):
            if isinstance(hook, Arrival) and hook.exchange is not exchange:
                hook.retire()
        self._registration = gradient.parameter.register_post_accumulate_grad_hook(self)

    def __call__(self, parameter):
        """Backward has accumulated into p.grad. What most calls do is done here, as it is done for every parameter."""
        gradient, exchange = self.gradient, self.exchange
        group = gradient.group
        is_measured = exchange.first_use.arrivals is not None
        if gradient.left != 1 or group.phase is not _IDLE or exchange.paused or is_measured:
            exchange.arrived(gradient)
            return
        gradient.left = 0
        group.missing -= 1
        if not group.missing:
            exchange.send(group)

    def retire(self):
        """The parameter belongs to a newer exchange now."""
        self.exchange.superseded_by = self.gradient.name
        self._registration.remove()


class GradientExchange:
    """Sends gradients of tracked parameters as backward makes them.

    The first step sends every gradient by itself and measures in which order parameters are used. At its end, and at
    the end of a step at which any rank found that something has changed, all ranks agree on the order of need and on
    groups: `regroup`.

    Args:
        communicator: the core's communicator.
        op: commlib.Average, Sum, ...
        prescale_factor, postscale_factor: multiplied before and after the reduction.
        passes: backward passes that accumulate locally before a gradient is sent.
        sparse_as_dense: turn sparse gradients into dense ones (otherwise their rows are gathered).
        presence: a gradient that no rank had stays None; otherwise it becomes zeros, as in Horovod.
        prefix: put before the names of the operations.
        ladder: capacities of groups, see groups.LADDER; None: every gradient by itself.

    Attributes:
        gradients, parameters: a Gradient per tracked parameter.
        groups: what is sent as one, in the order of need.
        asleep: gradients of frozen parameters, which nobody sends.
        regroup_due: whether all ranks are to call `regroup` at the end of this step.
    """

    def __init__(self, communicator, *, op, prescale_factor=1.0, postscale_factor=1.0, passes=1, sparse_as_dense=False,
                 presence=False, prefix="", ladder=LADDER):  # fmt: skip
        self.communicator = communicator
        self.gradients = []
        self.parameters = []
        self.groups = []
        self.passes = passes
        self.prefix = prefix
        self.exposed_s = 0.0
        self.steps = 0  # how many the optimizer has made
        self.flying = 0  # how many groups are being reduced for a step() still to come
        self.first_use = FirstUse()
        self.regroup_due = False
        self.superseded_by = None  # a parameter's name, once a newer exchange tracks it
        self.paused = False  # while True, gradients only accumulate on this rank
        self.departing = None  # departing() is called when the first gradient of a step leaves
        self._options = {"op": op, "prescale_factor": prescale_factor, "postscale_factor": postscale_factor,
                         "overlapped": True}  # fmt: skip
        self.sparse = SparseSet()
        self._sparse_as_dense = sparse_as_dense
        self._keeps_none = presence
        self._ladder = ladder
        self._spans = []  # (started_s, done_s) of operations that were waited for
        self.asleep = []
        self._closed = False  # whether every parameter's gradient of this step has been sent
        self._wants = True  # whether this rank wants new groups
        self._presence = None

    # ---- tracking

    def track(self, parameter, name):
        """Sends this parameter's gradients from now on. Returns its Gradient."""
        check_tensor(real_view(parameter), f"parameter {name!r}")
        gradient = Gradient(parameter, name, len(self.gradients))
        self.gradients.append(gradient)
        self.parameters.append(parameter)
        self.sparse.is_agreed = False
        self.first_use.add()
        self._wants = True
        if self._presence is None:
            self._presence = Presence(self.communicator, f"{self.prefix}presence of {name}")
        self.asleep.append(gradient)
        if parameter.requires_grad:
            self._wake(gradient)
        return gradient

    def _wake(self, gradient):
        """A parameter requires gradients: until the next regrouping they travel by themselves."""
        self.asleep.remove(gradient)
        hooks = (gradient.parameter._post_accumulate_grad_hooks or {}).values()
        if not any(isinstance(hook, Arrival) and hook.exchange is self for hook in hooks):
            Arrival(self, gradient)
        self._add_group([gradient])
        self._wants = True

    def _add_group(self, members):
        sparse_dim = self.sparse.dims.get(members[0].number)
        if sparse_dim is None:
            group = Group(members, self.prefix, self._options)
        else:
            group = SparseGroup(members, self.prefix, self._options, sparse_dim)
        group.rest(self.passes)
        self.groups.append(group)

    def check_complete(self, param_groups):
        """Refuses to step if the optimizer has got or lost parameters behind our back.

        Raises:
            RuntimeError: it has another number of parameters than are tracked.
        """
        count = sum(len(group["params"]) for group in param_groups)
        if self.gradients and count != len(self.gradients):
            raise RuntimeError(
                f"the optimizer has {count} parameters, but {len(self.gradients)} are known to DistributedOptimizer: "
                "add parameters with optimizer.add_param_group(...), on every rank"
            )

    def set_passes(self, passes):
        """How many backward passes accumulate locally before a gradient is sent, from now on."""
        self.passes = passes
        for group in self.groups:
            for gradient in group.gradients:
                gradient.left = passes

    # ---- sending

    def arrived(self, gradient):
        """Backward has accumulated into p.grad: send it, if it was the last pass and its group is complete."""
        group = gradient.group
        if group is None:
            return  # of a parameter that was frozen: `close` wakes it
        if group.phase is not _IDLE:
            self._arrived_late(gradient, group)
        if self.paused:
            return
        arrivals = self.first_use.arrivals
        if arrivals is not None:
            arrivals.append(gradient.number)
        gradient.left -= 1
        if gradient.left > 0:
            return
        if gradient.left < 0:
            raise AssertionError(f"{TOO_MANY_PASSES} (parameter {gradient.name!r})")
        group.missing -= 1
        if not group.missing:
            self.send(group)

    def _arrived_late(self, gradient, group):
        if group.phase is _CLAIMED:
            raise RuntimeError(
                f"a gradient arrived for parameter {gradient.name!r}, whose update from the last step() is still "
                "pending: it was used without its module's forward or attribute (from a list made earlier, perhaps), "
                "so its old value was used. Call optimizer.synchronize() before such a use, or pass overlap_forward=False"
            )
        if group.phase is _FLYING:
            raise AssertionError(f"{TOO_MANY_PASSES} (parameter {gradient.name!r})")
        group.rest(self.passes)  # synchronize() without step(): the pass begins a new step
        self._closed = False

    def close(self):
        """Sends what backward did not: zeros for parameters that this rank did not use, so that no rank hangs."""
        if self._closed or not self.gradients:
            return
        if self.superseded_by is not None:
            raise RuntimeError(
                f"this optimizer is no longer in charge: parameter {self.superseded_by!r} was given to a newer "
                "DistributedOptimizer"
            )
        self._closed = True
        for gradient in [gradient for gradient in self.asleep if gradient.parameter.requires_grad]:
            self._wake(gradient)
        if not self.sparse.is_agreed:
            self._agree_on_sparse()
        idle = [group for group in self.groups if group.phase is _IDLE]
        absent = [gradient for group in idle for gradient in self._absent_of(group)]
        self._wants |= any(not gradient.parameter.requires_grad for gradient in absent)
        self._wants |= self.first_use.end_step()
        self.regroup_due = self.regroup_due or not self.first_use.cohorts or self._presence.wanted()
        wants = self._wants and not self.regroup_due
        self._presence.check_steps()
        self._presence.send(len(self.gradients), [gradient.number for gradient in absent], wants, self.steps)
        for group in idle:
            # A frozen parameter is frozen on every rank: a group of them is sent by nobody.
            if len(group.absent) < len(group.gradients) or any(p.requires_grad for p in group.parameters):
                self.send(group)

    def _agree_on_sparse(self):
        name = f"{self.prefix}sparse of {self.gradients[0].name}"
        for number in self.sparse.agree(lambda payload: self.communicator.exchange(payload, name=name)):
            self.groups.remove(self.gradients[number].group)
            self._add_group([self.gradients[number]])

    def _absent_of(self, group):
        group.absent = [index for index, parameter in enumerate(group.parameters) if parameter.grad is None]
        return [group.gradients[index] for index in group.absent]

    def send(self, group):
        """Submits a group, complete or not."""
        group.tensors = tensors = [parameter.grad for parameter in group.parameters]
        dtype, strided = group.dtype, torch.strided
        for index, tensor in enumerate(tensors):
            if tensor is None or tensor.dtype is not dtype or tensor.requires_grad or tensor.layout is not strided:
                if index not in group.absent:
                    tensors[index] = self._checked(group.gradients[index])
                    if tensors[index] is None:
                        return  # sparse: `close` sends it
        if len(tensors) > 1 and (group.absent or tensors[0].dtype is not dtype) and not group.fits():
            self._send_apart(group)
            return
        group.versions = [None if tensor is None else tensor._version for tensor in tensors]
        group.handle = group.submit(self.communicator)
        group.phase = _FLYING
        self.flying += 1
        if self.flying == 1 and self.departing is not None:
            self.departing()

    def _send_apart(self, group):
        """The model was moved to another dtype: until the next regrouping these travel by themselves."""
        self.groups.remove(group)
        self._wants = True
        for index, gradient in enumerate(group.gradients):
            check_tensor(real_view(gradient.parameter), f"parameter {gradient.name!r}")
            self._add_group([gradient])
            gradient.left = 0
            gradient.group.absent = (0,) if index in group.absent else ()
            self.send(gradient.group)

    def _checked(self, gradient):
        tensor = gradient.parameter.grad
        if tensor is None:
            raise AssertionError(f"{ZEROED_IN_FLIGHT} (parameter {gradient.name!r})")
        if tensor.requires_grad:
            raise ValueError(f"the gradient of {gradient.name!r} requires a gradient: create_graph is not supported")
        if gradient.number in self.sparse.dims:
            return tensor
        if tensor.is_sparse and not self._sparse_as_dense and self.sparse.noticed(gradient, tensor):
            return None
        if tensor.is_sparse:
            tensor = gradient.parameter.grad = tensor.to_dense()
        check_tensor(real_view(tensor), f"the gradient of {gradient.name!r}")
        return tensor

    # ---- receiving

    def check_untouched(self, group):
        """Refuses to go on if p.grad of a FLYING gradient was changed: nobody knows which bytes were sent.

        Raises:
            AssertionError: zero_grad() or the like took it away.
            RuntimeError: it was changed in place, or replaced.
        """
        for index, (parameter, tensor, version) in enumerate(zip(group.parameters, group.tensors, group.versions)):
            present = parameter.grad
            if present is tensor and tensor is not None and tensor._version == version or index in group.absent:
                continue
            name = group.gradients[index].name
            if present is None:
                raise AssertionError(f"{ZEROED_IN_FLIGHT} (parameter {name!r})")
            raise RuntimeError(
                f"the gradient of {name!r} was changed while it was being reduced: call "
                "optimizer.synchronize() between loss.backward() and whatever changes gradients (clipping, unscaling)"
            )

    def wait(self, group, lend=False):
        """Waits until a group that was sent is reduced; its `tensors` are the results, None if no rank had one.

        Args:
            group: if it was not sent, or was waited for, nothing happens.
            lend: the results are looked at until group.take_back() only.
        """
        if group.handle is None:
            return
        begin_s = time.monotonic()
        group.handle.wait()
        waited_s = time.monotonic() - begin_s
        group.exposed_s += waited_s
        self.exposed_s += waited_s
        _, started_s, done_s = group.handle.times
        self._spans.append((started_s if started_s >= 0 else done_s, done_s))
        (group.lend if lend else group.scatter)(self._is_wanted)
        group.handle = None
        if group.phase is _FLYING:
            group.phase = _REDUCED
            self.flying -= 1

    def _is_wanted(self, gradient):
        """Whether a gradient that this rank did not have is to become what the others make of it."""
        if not gradient.parameter.requires_grad:
            return False
        return not self._keeps_none or self._presence.anywhere(gradient.number)

    def synchronize(self):
        """Waits for every gradient of this step and leaves the results in p.grad."""
        self.close()
        for group in self.groups:
            if group.phase is _FLYING:
                self.check_untouched(group)
                self.wait(group)
                for index in (0,) if isinstance(group, SparseGroup) else group.absent:
                    group.parameters[index].grad = group.tensors[index]

    def claim(self):
        """Takes every gradient of this step out of p.grad; each is still to be waited for."""
        self.close()
        for group in self.groups:
            if group.phase is _FLYING:
                self.check_untouched(group)
            else:  # whatever the user made of the reduced ones
                group.tensors = [parameter.grad for parameter in group.parameters]
            for parameter in group.parameters:
                parameter.grad = None
            group.phase = _CLAIMED
        self.flying = 0
        self._closed = False

    def rest(self):
        """Forgets gradients that were used, or will not be: the next backward pass starts anew. Claimed ones stay."""
        for group in self.groups:
            if group.phase is not _CLAIMED:
                group.rest(self.passes)
        self._closed = False

    def check_not_flying(self):
        """For zero_grad().

        Raises:
            AssertionError: a gradient is on its way.
        """
        if self.flying:
            raise AssertionError(ZEROED_IN_FLIGHT)

    def reduce_value(self, tensor, name):
        """Reduces a tensor that belongs to the gradients, such as their loss, as they are; in place."""
        options = {**self._options, "name": self.prefix + name}
        self.communicator.allreduce_async_(buffer_of(tensor), **options).wait()

    def land(self, deadline_s):
        """Waits until no operation is on its way, without a look at the results.

        Raises:
            TimeoutError: it is past `deadline_s` on the monotonic clock.
            CommlibError: another rank was lost or has left.
        """
        for handle in [group.handle for group in self.groups] + [self._presence.handle] if self.gradients else []:
            if handle is not None:
                handle.wait(max(0.0, deadline_s - time.monotonic()))

    # ---- order and groups

    def regroup(self):
        """At the end of a step at which it is due on all ranks, with nothing in flight: new priorities and groups."""
        self.regroup_due = self._wants = False
        apart = [*self.sparse.dims, *(g.number for g in self.gradients if not can_share(g.parameter))]
        mine = json.dumps({"measured": self.first_use.measured, "apart": apart}).encode()
        name = f"{self.prefix}order of {self.gradients[0].name}"
        told = [json.loads(payload) for payload in self.communicator.exchange(mine, name=name)]
        self.first_use.agree([one["measured"] for one in told], len(self.gradients))
        apart = frozenset(number for one in told for number in one["apart"])
        used = [self.gradients[number] for number in self.first_use.order]
        known = frozenset(self.first_use.order)
        ordered = used + [gradient for gradient in self.gradients if gradient.number not in known]
        for priority, gradient in enumerate(ordered):
            gradient.priority = priority
        self.asleep = [gradient for gradient in ordered if not gradient.parameter.requires_grad]
        exposed_s = {gradient: group.exposed_s for group in self.groups for gradient in group.gradients}
        for gradient in self.asleep:
            gradient.group, gradient.left = None, 0
        self.groups = []
        awake = [gradient for gradient in ordered if gradient.parameter.requires_grad]
        for members in members_of_groups(awake, self.first_use.cohorts, apart, self._ladder):
            self._add_group(members)
        for group in self.groups:
            group.exposed_s = max(exposed_s.get(gradient, 0.0) for gradient in group.gradients)

    # ---- what it cost

    def take_spans(self):
        """(started_s, done_s) of the operations that were waited for since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def forget_costs(self):
        """Begins all measurements anew."""
        self.take_spans()
        self.exposed_s = 0.0
        for group in self.groups:
            group.exposed_s = 0.0
