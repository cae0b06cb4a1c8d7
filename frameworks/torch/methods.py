"""The methods by which a distributed optimizer differs from the user's own.

The class here is put in front of the user's optimizer class in a run-time subclass, so that everything else is the
user's. All of commlib's state is in one attribute, `_commlib` (waiting.Waiting or overlapping.Overlapping), which no
state_dict shows.
"""

import copyreg
from contextlib import contextmanager


class DistributedMethods:
    """The methods by which a distributed optimizer differs from the user's own."""

    def step(self, closure=None):
        """Makes one step with the gradients of all ranks.

        Raises:
            ValueError: a closure was passed, or a GradScaler left its marks on a fused optimizer: not supported yet.
        """
        if closure is not None:
            raise ValueError("step(closure) is not supported yet by commlib.torch.DistributedOptimizer")
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise ValueError("a fused optimizer with a GradScaler is not supported yet: make it with fused=False")
        self._opt_called = True  # a learning-rate scheduler asks for it
        return self._commlib.step()

    # Torch and its schedulers patch `step` unless it carries these marks; the real step below has been patched already.
    step.hooked = True
    step._wrapped_by_lr_sched = True

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

    def zero_grad(self, set_to_none=True):
        """Resets all gradients.

        Raises:
            AssertionError: gradients are on their way: after backward, before step() or synchronize().
        """
        self._commlib.forget()
        self._commlib.real_class.zero_grad(self, set_to_none=set_to_none)

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
        self.__dict__["state"] = state

    def state_dict(self):
        """The user's own state_dict, once all updates are made."""
        self._commlib.finish_updates()
        return self._commlib.real_class.state_dict(self)

    def load_state_dict(self, state_dict):
        """The user's own load_state_dict, once all updates are made."""
        self._commlib.finish_updates()
        self._commlib.forget()
        self._commlib.real_class.load_state_dict(self, state_dict)

    def add_param_group(self, param_group):
        """Not supported yet.

        Raises:
            ValueError: always.
        """
        raise ValueError("add_param_group after DistributedOptimizer is not supported yet: add it before wrapping")

    def __reduce_ex__(self, protocol):
        """Copies and pickles are the user's own optimizer."""
        self._commlib.finish_updates()
        return (copyreg.__newobj__, (self._commlib.real_class,), self.__getstate__())
