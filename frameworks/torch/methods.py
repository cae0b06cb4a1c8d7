"""The methods by which a distributed optimizer differs from the user's own.

The class here is put in front of the user's optimizer class in a run-time subclass, so that everything else is the
user's. All of commlib's state is in one attribute, `_commlib` (waiting.Waiting or overlapping.Overlapping), which no
state_dict shows.
"""

import copyreg
from contextlib import contextmanager

from commlib.torch.private import mark_patched, note_step


class DistributedMethods:
    """The methods by which a distributed optimizer differs from the user's own."""

    def step(self, closure=None):
        """Makes one step with the gradients of all ranks.

        Args:
            closure: as for the user's own step: it computes the loss and its gradients. After every call of it the
                gradients are reduced over all ranks, and so is the loss, which step() then returns. step() waits.
        """
        note_step(self)
        return self._commlib.step(closure)

    mark_patched(step)  # the real step below has been

    def synchronize(self):
        """Waits for all gradients and all updates still to come: p.grad and weights may be read and changed."""
        self._commlib.synchronize()

    @contextmanager
    def skip_synchronize(self):
        """Within this context step() takes gradients as they are, after synchronize().

        Example:
            >>> optimizer.synchronize()  # doctest: +SKIP
            >>> with optimizer.skip_synchronize():
            ...     optimizer.step()
        """
        self._commlib.should_synchronize = False
        try:
            yield
        finally:
            self._commlib.should_synchronize = True

    @contextmanager
    def no_sync(self):
        """Within this context backward only accumulates on this rank; the first backward after it sends the sum.

        Example:
            >>> with optimizer.no_sync():  # doctest: +SKIP
            ...     loss_of(first_half).backward()
            >>> loss_of(second_half).backward()  # doctest: +SKIP
            >>> optimizer.step()  # doctest: +SKIP
        """
        exchange = self._commlib.exchange
        before, exchange.paused = exchange.paused, True
        try:
            yield
        finally:
            exchange.paused = before

    def zero_grad(self, set_to_none=True):
        """Resets all gradients.

        Raises:
            AssertionError: gradients are on their way: after backward, before step() or synchronize().
        """
        self._commlib.zero_grad(set_to_none)

    def set_backward_passes_per_step(self, passes):
        """How many backward passes accumulate on each rank before a gradient is sent."""
        self._commlib.exchange.set_passes(passes)

    @property
    def backward_passes_per_step(self):
        """How many backward passes accumulate on each rank before a gradient is sent."""
        return self._commlib.exchange.passes

    @property
    def priorities(self):
        """Parameter name -> priority of its gradient; 0 is needed first."""
        return {gradient.name: gradient.priority for gradient in self._commlib.exchange.gradients}

    def report(self):
        """Communication so far: hidden and exposed time, priorities, bytes, what is waited for and why; prints well."""
        return self._commlib.report()

    @property
    def state(self):
        """The user's own optimizer's state, once all updates are made."""
        if "_commlib" in self.__dict__:
            self._commlib.finish_updates()
        return self.__dict__["state"]

    @state.setter
    def state(self, state):
        if "_commlib" in self.__dict__:
            self._commlib.finish_updates()
            self._commlib.probe_again()
        self.__dict__["state"] = state

    def state_dict(self):
        """The user's own state_dict, once all updates are made."""
        self._commlib.finish_updates()
        return self._commlib.real_class.state_dict(self)

    def load_state_dict(self, state_dict):
        """The user's own load_state_dict, once all updates are made."""
        self._commlib.finish_updates()
        self._commlib.real_class.load_state_dict(self, state_dict)
        self._commlib.probe_again()

    def add_param_group(self, param_group):
        """The user's own add_param_group, on every rank. With `model=` the new parameters become rank 0's."""
        self._commlib.finish_updates()
        self._commlib.real_class.add_param_group(self, param_group)
        self._commlib.added(self.param_groups[-1]["params"])

    def __reduce_ex__(self, protocol):
        """Copies and pickles are the user's own optimizer."""
        self._commlib.finish_updates()
        return (copyreg.__newobj__, (self._commlib.real_class,), self.__getstate__())
