"""The order of first use: which parameter the forward pass needs first. It becomes the priority, 0 first.

Measured in the first step, told by rank 0 to all ranks, never guessed from the order of registration.
"""

import json


class FirstUse:
    """Remembers the order in which parameters are first used."""

    def __init__(self):
        self._order = {}

    def __call__(self, parameter):
        self._order.setdefault(parameter, len(self._order))

    def order(self, gradients):
        """Gradients in order of first use; those never used come last, in order of registration."""
        never = len(self._order)
        return sorted(gradients, key=lambda gradient: (self._order.get(gradient.parameter, never), gradient.index))


def agree_on_priorities(communicator, gradients, first_use, name):
    """Gives every gradient its place in rank 0's order of first use, on all ranks.

    Returns:
        True if this rank measured the same order.
    """
    mine = [gradient.index for gradient in first_use.order(gradients)]
    told = json.loads(communicator.exchange(json.dumps(mine).encode(), name=name)[0])
    for priority, index in enumerate(told):
        gradients[index].priority = priority
    return told == mine
