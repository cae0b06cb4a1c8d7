"""The hook by which a parameter's gradient reaches its exchange: what most calls do is done here, as it costs every parameter.

This file knows one gradient and its group; everything out of the ordinary is the exchange's.
"""

from commlib.torch.groups import Phase

_IDLE = Phase.IDLE


class Arrival:
    """The hook of one parameter. A parameter has one at most: the last exchange that tracks it sends its gradient."""

    __slots__ = ("exchange", "gradient", "_registration")

    def __init__(self, exchange, gradient):
        self.exchange = exchange
        self.gradient = gradient
        for arrival in arrivals_of(gradient.parameter):
            if arrival.exchange is not exchange:
                arrival.retire()
        # A bound method, as torch takes 0.25 us longer to call an object with __call__.
        self._registration = gradient.parameter.register_post_accumulate_grad_hook(self.came)

    def came(self, parameter):
        """Backward has accumulated into p.grad. What most calls do is done here, as it is done for every parameter."""
        gradient, exchange = self.gradient, self.exchange
        group = gradient.group
        is_measured = exchange.first_use.arrivals is not None
        if gradient.left != 1 or group.phase is not _IDLE or exchange.paused or is_measured:
            exchange.arrived(gradient)
            return
        gradient.left = 0
        group.missing -= 1
        if not exchange.begun:
            exchange.begin()
        if not group.missing:
            exchange.send(group)

    def retire(self):
        """The parameter belongs to a newer exchange now."""
        self.exchange.superseded_by = self.gradient.name
        self._registration.remove()


def arrivals_of(parameter):
    """The Arrivals among a parameter's hooks."""
    handle = parameter.register_post_accumulate_grad_hook(_nothing)  # where it lies, all of them do
    owners = [getattr(hook, "__self__", None) for hook in handle.hooks_dict_ref().values()]
    handle.remove()
    return [owner for owner in owners if isinstance(owner, Arrival)]


def is_tracked(parameter):
    """Whether a gradient of this parameter reaches an exchange."""
    return bool(arrivals_of(parameter))


def _nothing(parameter):
    """A hook for the time of a look."""
