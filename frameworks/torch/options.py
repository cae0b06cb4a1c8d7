"""Options of parameter groups that somebody changes by hand: which changes may change the way in which a step is made.

A learning rate that moves from 0.1 to 0.09 changes nothing but numbers. A momentum that was 0, `nesterov`, `fused`: with
these the optimizer takes another path, and whether that can be stepped bundle by bundle is to be tried anew. This file
knows dicts of options, no optimizers.
"""

import torch


class Options:
    """The options of groups as they were when somebody looked last."""

    def __init__(self):
        self._known = []

    def have_turned(self, param_groups):
        """Whether, since the last call, an option has come, gone, or become of another kind; True at the first call."""
        known, self._known = self._known, [(list(group), list(group.values())) for group in param_groups]
        if len(known) != len(param_groups):
            return True
        return any(_has_turned(names, values, group) for (names, values), group in zip(known, param_groups))


def _has_turned(names, values, group):
    if names != list(group):
        return True
    return any(new is not old and kind_of(new) != kind_of(old) for old, new in zip(values, group.values()))


def kind_of(value):
    """What may decide which way a step is made: numbers by their sign, structures by their parts, all else by itself.

    Example:
        >>> kind_of(0.9) == kind_of(0.8), kind_of(0.9) == kind_of(0.0), kind_of((0.9, 0.0)) == kind_of((0.8, 0.0))
        (True, False, True)
    """
    if isinstance(value, (bool, str, type(None))):
        return value
    if isinstance(value, (int, float)):
        return (value > 0) - (value < 0), "number"
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, (list, tuple)):
        return [kind_of(part) for part in value]
    return type(value)
