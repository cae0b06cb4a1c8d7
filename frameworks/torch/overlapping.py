"""The form with `model=`: step() returns at once, and each module's forward waits for its own parameters only.

step() claims the gradients, remembers the hyper-parameters and leaves every group of gradients pending. A gate (gates.py)
opens a group when somebody needs its weights: it waits for the group's gradients and has the user's own optimizer
update them, in the thread that waits, together with whatever else has come by then. Where that would not give the bits
of a whole step (probe.py), step() waits instead and says so.
"""

import logging
import threading
import time
from contextlib import contextmanager, nullcontext

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import commlib
from commlib.torch.arrival import is_tracked
from commlib.torch.bundles import group_indices, groups_of, snapshot, step_groups
from commlib.torch.gates import Gates
from commlib.torch.groups import Phase
from commlib.torch.guards import Guards
from commlib.torch.options import Options
from commlib.torch.private import (
    at_end_of_backward, has_parameter_dicts, in_backward, thread_in_backward, without_torch_function,
)  # fmt: skip
from commlib.torch.probe import reason_to_wait
from commlib.torch.regions import scripted_parameters
from commlib.torch.turns import Turn
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
        self.model = model
        self._probed = False
        self._waits = False  # whether every step() is waited for
        self._updating = False
        self._turn = Turn()  # held by whoever makes updates, or takes gradients for some that are to come
        self._backward_in = None  # the thread in whose backward pass gradients are leaving; None: it is over
        self._all_guarded = False  # whether guards are on every parameter
        self._snapshots = None  # hyper-parameters at the last step()
        self._is_end_told = True  # whether torch tells when the backward pass is over
        registrars = (optimizer.register_step_pre_hook, optimizer.register_step_post_hook, register_optimizer_step_pre_hook,
                      register_optimizer_step_post_hook)  # fmt: skip
        self._step_hooks = [hooks_with(registrar) for registrar in registrars]
        self._index_of = {}
        self._options = Options()
        self._ungated = set()  # gradients whose parameters are read without anybody noticing
        # torch.compile is to let this code alone where a function that calls gated modules is compiled.
        self.gates = Gates(torch.compiler.disable(self.open), torch.compiler.disable(self._settle), self._unguarded)
        self.guards = Guards(self.gates.before_read, self._before_gradient)
        exchange.departing = self._guard_after_backward
        self._install_gates()
        if not has_parameter_dicts:
            reason = reason or "this torch keeps the parameters of modules where no gate can be"
        self._forced = reason is not None
        if reason is not None:
            self._probed = self._waits = True
            self.fallbacks.append(reason)

    @property
    def overlap(self):
        """What communication overlaps with, for people."""
        return "backward" if self._waits else "backward and forward"

    def _install_gates(self):
        """Puts gates where there are none yet, and finds parameters that cannot have one."""
        gradients = self.exchange.gradients
        self._index_of = group_indices(self.optimizer.param_groups)
        gated = self.gates.install(self.model, {gradient.parameter: gradient for gradient in gradients})
        outside = [gradient for gradient in gradients if gradient.parameter not in gated]
        scripted = scripted_parameters(self.model)
        if scripted:
            compiled = [gradient for gradient in gradients if gradient.parameter in scripted]
            self._ungate(compiled, "torch.jit compiled the code that uses these")
        blind = [gradient for gradient in outside if not self.guards.can_guard(gradient.parameter)]
        self._ungate(blind, "these are not parameters of the model, and of a class of their own")

    def _ungate(self, gradients, reason):
        new = [gradient for gradient in gradients if gradient not in self._ungated]
        self._ungated.update(new)
        if new:
            self._say(f"{reason}: {', '.join(gradient.name for gradient in new)}")

    # ---- step

    def step(self, closure=None):
        """Claims all gradients and returns; or, with a reason to wait, makes the whole step."""
        if closure is not None:
            return self._step(closure)
        with self._turn:
            return self._step(None)

    def _step(self, closure):
        self._check_complete()
        if self.gates.replaced:
            self._check_replaced()
        self.finish_updates()  # of parameters that nobody has read since the last step
        self.account(now=False)  # of the last step, whose waits came after it
        self.meter.steps += 1
        result = self._put_off() if closure is None and self._may_put_off() else self._whole(closure)
        self.exchange.steps += 1
        if self.exchange.regroup_due:
            self.finish_updates()
            self._regroup()
        return result

    def _check_replaced(self):
        """Somebody has put other parameters into modules: that is well if the optimizer trains them."""
        self._release()
        gone = self.gates.gone()
        new = self.gates.new_names(is_tracked) if gone else []
        if not new:
            self.gates.replaced.clear()
        else:
            raise RuntimeError(
                f"parameter {self.gates.member_of[gone[0]].name!r}, which the optimizer trains, is no longer in the model; "
                f"{new[0]!r}, which is, is trained by nobody. load_state_dict(assign=True), weight_norm and assignments "
                "replace parameters: do that before you make the optimizer and its DistributedOptimizer, or pass the new "
                "ones to optimizer.add_param_group(...)"
            )

    def _may_put_off(self):
        if not self.exchange.first_use.cohorts:
            return False  # the first step: there are no groups yet
        if self._options.have_turned(self.optimizer.param_groups):
            self.probe_again()
        if not self._probed:
            self._probe()
        if any(self._step_hooks):
            self._waits = True
            self._say("the optimizer has step hooks, which see whole steps")
        if getattr(self.optimizer, "found_inf", None) is not None:
            self._say("GradScaler leaves scaling to the fused step, which is made at once")
            return False
        return not self._waits

    def _probe(self):
        self._probed = True
        self._release()
        bundles = [group.parameters for group in self.exchange.groups]
        sparse = {self.exchange.parameters[number] for number in self.exchange.sparse.dims}
        reason = reason_to_wait(self.optimizer, self.real_class, bundles, sparse)
        if reason is not None:
            self._waits = True
            self._say(f"{self.real_class.__name__}: {reason}")

    def _put_off(self):
        try:
            with self._unnoticed():
                self.exchange.claim()
                self._snapshots = snapshot(self.optimizer.param_groups)
                self.gates.shut(self.exchange.groups)
        except BaseException:
            self._release()
            raise
        self._guard()
        if self._ungated:
            for group in self.exchange.groups:
                if not self._ungated.isdisjoint(group.gradients):
                    self.open(group)

    def _whole(self, closure=None):
        self._release()
        if closure is None:
            self.exchange.synchronize()
            self.exchange.end_step()
        else:
            self._say("step(closure) computes gradients itself")
        self._updating = True
        try:
            return self.whole_step() if closure is None else self.whole_step(self.reducing(closure))
        finally:
            self._release()
            self._updating = False
            for gradient in self.exchange.gradients:
                gradient.parameter.grad = None  # as if put off: zero_grad(set_to_none=False) makes no difference
            self.exchange.rest()

    def _regroup(self):
        """Priorities are the order of first use in forward, and groups follow it, from the next step on."""
        exchange, read = self.exchange, self.gates.read
        new = [exchange.gradients[number] for number in exchange.first_use.measured]
        self._ungate(
            [gradient for gradient in new if read is not None and gradient.parameter not in read
             and not self.guards.can_guard(gradient.parameter)],
            "these are used outside of their modules' forward, and of a class of their own",
        )
        exchange.regroup()
        self._install_gates()
        self.gates.note_reads(exchange.first_use.arrivals is not None)
        if not self._waits:
            self._probed = False

    def _reduce_now(self):
        with self._turn:
            self._release()
            self.exchange.synchronize()

    # ---- what is pending

    def open(self, group):
        """Waits for a pending group and updates its parameters, and those of all that have come by then.

        Updates that are ready have to be made anyway; made together they cost one call of the optimizer. Whatever thread
        needs them first makes them; another one waits for him.
        """
        with self._turn:
            if group in self.gates.pending and not self._updating:  # or a thread before us has opened it
                self._open(group)

    def _open(self, group):
        begin_s = time.monotonic()
        self._wait(group)
        opened = [group]
        for other in self.gates.pending:  # in the order of need
            if other is not group:
                if other.handle is not None and not other.handle.done():
                    break
                self._wait(other)
                opened.append(other)
        waited_s = time.monotonic()
        try:
            self._update(opened)
        finally:
            for one in opened:
                self.gates.opened(one)
        for one in opened:
            one.take_back()
            one.rest(self.exchange.passes)
        self._record(group, begin_s, waited_s)

    def _wait(self, group):
        self._all_guarded = False
        self.guards.release(group.parameters)
        self.exchange.wait(group, lend=True)

    def _update(self, groups):
        parameters = [parameter for group in groups for parameter in group.parameters]
        for group in groups:
            for parameter, tensor in zip(group.parameters, group.tensors):
                parameter.grad = tensor
        self._updating = True
        try:
            step_groups(self.optimizer, self.real_class, groups_of(parameters, self._index_of, self._snapshots))
        finally:
            self._updating = False
            for parameter in parameters:
                parameter.grad = None

    def finish_updates(self):
        """Makes all updates that are still to come, in the order in which forward would have needed them."""
        if self.gates.pending:
            with self._turn:
                while self.gates.pending and not self._updating:
                    self.open(next(iter(self.gates.pending)))

    def leave(self):
        """As Waiting.leave; updates whose gradients were lost with another rank are not made."""
        try:
            self.finish_updates()
        except commlib.CommlibError as error:
            _log.warning("commlib: updates were lost with the communicator: %s", error)
            self.gates.pending.clear()
        self._release()
        self.gates.remove()

    def synchronize(self):
        """Makes all updates still to come, and waits for all gradients that are on their way."""
        self.finish_updates()
        self._settle()

    def probe_again(self):
        """State, groups or options were replaced: whether updates may be put off is to be found out anew."""
        if not self._forced:
            self._probed = self._waits = False

    def added(self, parameters):
        """Parameters were added to the optimizer, on every rank."""
        super().added(parameters)
        self._install_gates()
        self.probe_again()

    def _settle(self):
        """Gradients are about to be seen: those on their way are waited for."""
        if self.exchange.begun and not in_backward() and self._may_settle():
            with self._turn:
                if self.exchange.begun:  # or another thread, perhaps step(), has waited for them
                    self._release()
                    self.finish_updates()  # of groups that this forward has not needed
                    self.exchange.synchronize(looked=True)

    def _before_gradient(self, parameter):
        """Somebody reads p.grad."""
        if self.exchange.begun and not self.gates.is_listing:
            if in_backward() and self.gates.member_of[parameter].group.phase is Phase.FLYING:
                raise RuntimeError(
                    f"the gradient of {self.gates.member_of[parameter].name!r} was read within backward, while it was "
                    "being reduced: register the hook that reads it before DistributedOptimizer(...), or use "
                    "tensor.register_hook"
                )
            self._settle()

    def _guard_after_backward(self):
        """The first gradient of a step leaves: once backward is over, whoever reads one waits for all."""
        if in_backward():
            self._backward_in = threading.get_ident()
            self._is_end_told = at_end_of_backward(self._backward_over)
            if not self._is_end_told:
                self._guard()  # from now on, which costs something for every gradient that is still to come

    def _backward_over(self):
        self._backward_in = None
        self._guard()

    def _may_settle(self):
        """Whether all gradients that are still to come can be taken for absent: not while another thread makes them.

        After an exception in backward the thread in which it ran is the one that knows.
        """
        if self._backward_in in (None, threading.get_ident()):
            return True
        return not self._is_end_told and not thread_in_backward(self._backward_in)

    def _unnoticed(self):
        """A context within which guards say nothing: cheaper than to take them off and put them on again."""
        if without_torch_function is not None:
            return without_torch_function()
        self._release()
        return nullcontext()

    @contextmanager
    def _unguarded(self):
        """Within it parameters are looked at one by one, but neither their values nor gradients on their way are read."""
        self._release()
        try:
            yield
        finally:
            if self.exchange.begun:
                self._guard()
            for group in self.gates.pending:
                self.guards.guard(group.parameters)

    def zero_grad(self, set_to_none):
        """The user's own zero_grad; pending gradients are not in p.grad any more, so there may be nothing to do."""
        is_all_pending = len(self.gates.pending) == len(self.exchange.groups) and not self.exchange.asleep
        if is_all_pending and self.real_class.zero_grad is torch.optim.Optimizer.zero_grad:
            return
        with self._unguarded():
            super().zero_grad(set_to_none)

    def _guard(self):
        if not self._all_guarded:
            self._all_guarded = True
            self.guards.guard(self.exchange.parameters)

    def _release(self):
        self._all_guarded = False
        self.guards.release(self.exchange.parameters)

    # ---- what people see

    def _say(self, reason):
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)
            _log.warning("commlib waits at step(): %s", reason)

    def _record(self, group, begin_s, waited_s):
        timeline = self.exchange.communicator.timeline
        if timeline is not None:
            timeline.span(f"wait {group.name}", "wait", begin_s, waited_s)
            timeline.span(f"update {group.name}", "update", waited_s, time.monotonic())


def hooks_with(register):
    """The dict of hooks to which register(hook) adds one."""
    handle = register(lambda *arguments: None)
    handle.remove()
    return handle.hooks_dict_ref()
