"""Gradients on their way: submitted by backward's hooks the moment they exist, waited for by whoever needs them.

This file knows parameters, names, priorities and handles. It does not know optimizers, modules or gates: both forms of
DistributedOptimizer stand on it, so both send the same operations and get the same bits.

A group of gradients is IDLE (nothing sent), FLYING (being reduced: nobody may touch its p.grad), REDUCED (p.grad holds
the result) or CLAIMED (step() has taken it out of p.grad; its update is still to come).
"""

import time
from operator import attrgetter

import commlib
from commlib.torch.arrival import Arrival, arrivals_of
from commlib.torch.chosen_groups import members_of_chosen
from commlib.torch.compressed import new_group
from commlib.torch.compression import NoneCompressor
from commlib.torch.costs import Costs
from commlib.torch.differences import check_alike, told_by_all
from commlib.torch.groups import (
    AFTER_SHUTDOWN, CAME_EARLY, CAME_LATE, LADDER, TOO_MANY_PASSES, ZEROED_IN_FLIGHT, Gradient, Phase, are_ordinary, can_share,
    members_of_groups, versions_of,
)  # fmt: skip
from commlib.torch.order import FirstUse
from commlib.torch.presence import Presence
from commlib.torch.private import version_of
from commlib.torch.sparse import SparseGroup, SparseSet
from commlib.torch.tensors import buffer_of, check_tensor, fingerprint, real_view

_IS_TRAINED = attrgetter("requires_grad")
_IDLE, _FLYING, _REDUCED, _CLAIMED = Phase.IDLE, Phase.FLYING, Phase.REDUCED, Phase.CLAIMED


class GradientExchange(Costs):
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
        chosen, compression: the user's own groups instead, as from chosen_groups; what dense gradients travel as.

    Attributes:
        gradients, parameters: a Gradient per tracked parameter.
        groups: what is sent as one, in the order of need.
        asleep: gradients of frozen parameters, which nobody sends.
        regroup_due: whether all ranks are to call `regroup` at the end of this step.
    """

    def __init__(self, communicator, *, op, prescale_factor=1.0, postscale_factor=1.0, passes=1, sparse_as_dense=False,
                 presence=False, prefix="", ladder=LADDER, chosen=None, compression=NoneCompressor):  # fmt: skip
        super().__init__()
        self.communicator = communicator
        self.gradients, self.parameters = [], []
        self.passes, self.prefix, self.op, self.compression = passes, prefix, op, compression
        self.superseded_by = None  # a parameter's name, once a newer exchange tracks it
        self.ended = False  # whether the communicator was closed
        self.paused = False  # while True, gradients only accumulate on this rank
        self.departing = None  # departing() is called when the first gradient of a step has come
        self._options = {"op": op, "prescale_factor": prescale_factor, "postscale_factor": postscale_factor,
                         "overlapped": True}  # fmt: skip
        self._as_dense = sparse_as_dense
        self._keeps_none, self._ladder, self._chosen, self._compression = presence, ladder, chosen, compression
        self._presence = None
        self._disagreement = None  # the error that all ranks had
        self.finish_updates = None  # finish_updates() makes updates that are still to come; None: there never are any
        self._begin()

    def _begin(self):
        """What ranks find out about gradients together is to be found out, as in the first step of all."""
        self.groups, self.asleep = [], []
        self.steps = 0  # how many the optimizer has made
        self.begun = False  # whether gradients have come whose reduction is still to be waited for
        self.first_use = FirstUse()
        self.regroup_due = False
        self.sparse = SparseSet(self._as_dense)
        self._closed = False  # whether every parameter's gradient of this step has been sent
        self._wants = True  # whether this rank wants new groups
        self._seen = None  # what reduced gradients were when some ranks looked at them before step()
        self._changed = False  # whether they were others at step()
        self._woken = set()  # groups of parameters that began to require gradients after the last regrouping
        self._spoiled = []  # groups into whose gradients backward accumulated while they were being reduced

    def begin_anew(self):
        """All ranks have joined (commlib.join): what ranks know that had more work than others is forgotten."""
        self._begin()
        if self._presence is not None:
            self._presence.handle = None
        for gradient in self.gradients:
            gradient.priority, gradient.group, gradient.uses = gradient.number, None, None
            if gradient.parameter.requires_grad:
                self._add_group([gradient])
            else:
                self.asleep.append(gradient)

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
        self._closed = False  # it may have a gradient already, and all others have been waited for
        if parameter.requires_grad:
            self._wake(gradient)
        return gradient

    @property
    def _frozen(self):
        return [number for number, is_trained in enumerate(map(_IS_TRAINED, self.parameters)) if not is_trained]

    def _wake(self, gradient):
        """A parameter requires gradients: until the next regrouping they travel by themselves."""
        self.asleep.remove(gradient)
        if not any(arrival.exchange is self for arrival in arrivals_of(gradient.parameter)):
            Arrival(self, gradient)
        self._add_group([gradient])
        self._woken.add(gradient.group)
        self._wants = True

    def _add_group(self, members):
        sparse_dim = self.sparse.dims.get(members[0].number)
        if sparse_dim is None:
            group = new_group(members, self.prefix, self._options, self._compression)
        else:
            group = SparseGroup(members, self.prefix, self._options, sparse_dim)
        group.rest(self.passes)
        self.groups.append(group)

    def _check_not_ended(self):
        if self.ended:
            raise commlib.ShutdownError(AFTER_SHUTDOWN)

    def set_passes(self, passes):
        """How many backward passes accumulate locally before a gradient is sent, from now on."""
        self.passes = passes
        for group in self.groups:
            for gradient in group.gradients:
                gradient.expect(passes)

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
        if gradient.uses is None:
            gradient.version = version_of(gradient.parameter.grad)
        if not gradient.has_come(self.passes):
            return
        if not self.begun:
            self.begin()
        if gradient.left == 0:
            group.missing -= 1
            if not group.missing:
                self.send(group)
        elif gradient.left < 0:
            gradient.came_again()

    def begin(self):
        """A gradient of this step is complete on this rank: from now on who looks at gradients has to wait for all."""
        self._check_not_ended()
        self.begun = True
        if self.departing is not None:
            self.departing()

    def _arrived_late(self, gradient, group):
        if group.phase is _CLAIMED:
            raise RuntimeError(CAME_EARLY.format(gradient.name))
        if group.phase is _FLYING:
            self._spoiled.append(group)
            raise AssertionError(f"{TOO_MANY_PASSES} (parameter {gradient.name!r})")
        group.rest(self.passes)  # synchronize() without step(): the pass begins a new step
        self._closed = False

    def close(self, looked=False):
        """Sends what backward did not: zeros for parameters that this rank did not use, so that no rank hangs.

        Args:
            looked: whether somebody is about to see the reduced gradients.

        Raises:
            RuntimeError: on every rank, if ranks did different things in the last step or have frozen different parameters.
        """
        if self._closed or not self.gradients:
            return
        self._check_not_ended()
        if self.superseded_by is not None:
            raise RuntimeError(
                f"this optimizer is no longer in charge: parameter {self.superseded_by!r} was given to a newer "
                "DistributedOptimizer"
            )
        self.check_alike()
        self._closed = self.begun = True
        for gradient in [gradient for gradient in self.asleep if gradient.parameter.requires_grad]:
            self._wake(gradient)
        if not self.sparse.is_agreed:
            self._agree()
        idle = [group for group in self.groups if group.phase is _IDLE]
        absent = [gradient for group in idle for gradient in self._absent_of(group)]
        self._wants |= any(not gradient.parameter.requires_grad for gradient in absent)
        self.first_use.watch()
        self._wants |= self.first_use.end_step()
        self.regroup_due = self.regroup_due or not self.first_use.cohorts or self._presence.wanted()
        self._presence.send(
            len(self.gradients), [gradient.number for gradient in absent], self._frozen,
            wants=self._wants and not self.regroup_due, looked=looked, steps=self.steps,
        )  # fmt: skip
        for group in idle:
            self.send(group)

    def check_alike(self):
        """Looks whether all ranks did the same in the last step that was closed, as all ranks do after the same step.

        Raises:
            RuntimeError: on every rank, with the same words.
        """
        if self._disagreement is not None:
            raise self._disagreement
        if self._presence.differs():
            self._told("step", {"steps": self._presence.steps, "frozen": self._presence.frozen, "changed": self._changed})
        self._changed = False

    def _agree(self):
        """Gradients came that the ranks have not spoken about: which are sparse, and which do not come at all."""
        told = self._told("sparse", {"sparse": self.sparse.found(self.gradients), "frozen": self._frozen})
        for number in self.sparse.agree([one["sparse"] for one in told]):
            self.groups.remove(self.gradients[number].group)
            self._add_group([self.gradients[number]])

    def _told(self, what, mine):
        """Every rank's record; all ranks call it after the same step, and are told the same error if the records differ."""
        told, ranks = told_by_all(self.communicator, f"{self.prefix}{what} of {self.gradients[0].name}", mine)
        try:
            check_alike(told, [gradient.name for gradient in self.gradients], ranks)
        except RuntimeError as error:
            self._disagreement = error
            raise
        return told

    def _absent_of(self, group):
        group.check_complete(self.passes)
        group.absent = [index for index, parameter in enumerate(group.parameters) if parameter.grad is None]
        return [group.gradients[index] for index in group.absent]

    def send(self, group):
        """Submits a group, complete or not."""
        group.tensors = tensors = [parameter.grad for parameter in group.parameters]
        if not are_ordinary(tensors, group.dtype):
            group.is_plain = False
            for index, gradient in enumerate(group.gradients):
                if index not in group.absent:
                    tensors[index] = self._checked(gradient)
        else:
            group.is_plain = group.lie_plainly(tensors)
        if not group.is_plain and len(tensors) > 1 and not group.fits():
            self._send_apart(group)
            return
        group.handle = group.submit(self.communicator)  # here nothing but the list holds a gradient: storage.py counts
        group.versions = versions_of(group.tensors)
        group.phase = _FLYING
        self.first_use.sent.append(group.priority)

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
        if tensor.is_sparse:
            self.sparse.check_dense(gradient)
            tensor = gradient.parameter.grad = tensor.to_dense()
        check_tensor(real_view(tensor), f"the gradient of {gradient.name!r}")
        return tensor

    # ---- receiving

    def wait(self, group, lend=False):
        """Waits until a group that was sent is reduced; its `tensors` are the results, None if no rank had one.

        Args:
            group: if it was not sent, or was waited for, nothing happens.
            lend: the results are looked at until group.take_back() only.
        """
        if group.handle is None:
            return
        if group in self._woken and self._presence.frozen_differ():
            self.check_alike()  # raises: others do not know of this group and would be waited for in vain
        begin_s = time.monotonic()
        group.handle.wait()
        self.note_wait(group, time.monotonic() - begin_s)
        (group.lend if lend else group.scatter)(self._is_wanted)
        group.handle = None
        if group.phase is _FLYING:
            group.phase = _REDUCED

    def _is_wanted(self, gradient):
        """Whether a gradient that this rank did not have is to become what the others make of it."""
        if gradient.parameter.requires_grad and not self._keeps_none:
            return True
        return self._presence.anywhere(gradient.number)

    def synchronize(self, looked=False):
        """Waits for every gradient of this step and leaves the results in p.grad; `looked`: for somebody who may change them."""
        self.close(looked)
        for group in self.groups:
            if group.phase is _FLYING:
                if group not in self._spoiled:
                    group.check_untouched()
                self.wait(group)
                for index in (0,) if isinstance(group, SparseGroup) else group.absent:
                    group.parameters[index].grad = group.tensors[index]
        self.begun = False
        if looked and self.gradients and self._presence.is_seen_by_some():
            self._seen = self._fingerprints()

    def _fingerprints(self):
        return [None if parameter.grad is None else fingerprint(parameter.grad) for parameter in self.parameters]

    def claim(self):
        """Takes every gradient of this step out of p.grad; each is still to be waited for."""
        self.close()
        self.end_step()
        for group in self.groups:
            if group.phase is _FLYING:
                group.check_untouched()
            else:  # whatever the user made of the reduced ones
                group.tensors = [parameter.grad for parameter in group.parameters]
            for parameter in group.parameters:
                parameter.grad = None
            group.phase = _CLAIMED
        self.begun = self._closed = False

    def end_step(self):
        """Step() takes what p.grad holds now: the last look at how gradients came, and at what became of them.

        Raises:
            RuntimeError: a gradient is no longer what backward made.
        """
        for group in self._spoiled:
            raise RuntimeError(CAME_LATE.format(group.name))
        for group in self.groups:
            for gradient in group.gradients:
                if gradient.uses is None:
                    gradient.learn(self.passes)
        if self._seen is not None:
            self._changed, self._seen = self._fingerprints() != self._seen, None

    def rest(self):
        """Forgets gradients that were used, or will not be: the next backward pass starts anew. Claimed ones stay."""
        if self._spoiled:  # how often gradients arrive is not what it was
            for gradient in self.gradients:
                gradient.uses = None
            self._spoiled.clear()
        for group in self.groups:
            if group.phase is not _CLAIMED:
                group.rest(self.passes)
        self.begun = self._closed = False
        self._seen = None

    def check_not_begun(self):
        """For zero_grad().

        Raises:
            AssertionError: a gradient is on its way.
        """
        if self.begun:
            raise AssertionError(ZEROED_IN_FLIGHT)

    def reduce_value(self, tensor, name):
        """Reduces a tensor that belongs to the gradients, such as their loss, as they are; in place."""
        options = {**self._options, "name": self.prefix + name}
        self.communicator.allreduce_async_(buffer_of(tensor), **options).wait()

    def land(self, deadline_s):
        """Waits until no operation is on its way, without a look at the results; where ranks disagree, some never land.

        Raises:
            TimeoutError: it is past `deadline_s` on the monotonic clock.
            CommlibError: another rank was lost or has left.
        """
        if not self.gradients or self._disagreement is not None:
            return
        for handle in [*(group.handle for group in self.groups), self._presence.handle]:
            if handle is not None:
                handle.wait(max(0.0, deadline_s - time.monotonic()))

    # ---- order and groups

    def regroup(self):
        """At the end of a step at which it is due on all ranks, with nothing in flight: new priorities and groups."""
        self.regroup_due = self._wants = False
        apart = [*self.sparse.dims, *(g.number for g in self.gradients if not can_share(g.parameter))]
        told = self._told("order", {"measured": self.first_use.measured, "apart": apart, "frozen": self._frozen})
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
        self.groups, self._woken = [], set()
        awake = [gradient for gradient in ordered if gradient.parameter.requires_grad]
        for members in (members_of_groups(awake, self.first_use.cohorts, apart, self._ladder) if self._chosen is None
                        else members_of_chosen(awake, self._chosen, self.sparse.dims)):  # fmt: skip
            self._add_group(members)
        for group in self.groups:
            group.exposed_s = max(exposed_s.get(gradient, 0.0) for gradient in group.gradients)
