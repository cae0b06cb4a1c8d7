"""Groups of gradients that the user chose: Horovod's `groups` and `num_groups`.

Gradients of one group are one operation, which begins when the last of them has come. This file knows parameters and their
numbers.
"""

import warnings

import torch


def chosen_groups(num_groups, groups, parameters):
    """What the user chose as a dict: number of a parameter -> number of its group; None: nothing.

    Args:
        num_groups: deprecated: as groups, a number.
        groups: into how many groups the parameters are cut, in their order, as evenly as can be; or lists of parameters.
            What is in no list travels by itself. None or 0: commlib makes groups as it sees fit.
        parameters: of the optimizer, in order.

    Raises:
        ValueError: no such number, no lists of parameters of this optimizer, or a parameter in two of them.
    """
    if num_groups:
        warnings.warn("Parameter `num_groups` has been replaced by `groups`", DeprecationWarning, stacklevel=4)
        groups = num_groups if groups is None else groups
    if type(groups) is int and groups >= 0:
        return _cut(len(parameters), groups) if groups else None
    return None if groups is None else _listed(groups, parameters)


def _cut(count, ngroups):
    return {number: number * ngroups // count for number in range(count)} if ngroups < count else {n: n for n in range(count)}


def _listed(groups, parameters):
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(group, (list, tuple)) and all(isinstance(one, torch.Tensor) for one in group) for group in groups
    ):
        raise ValueError(f"groups should be a non-negative integer or a list of list of torch.Tensor, not {groups!r}")
    number_of = {parameter: number for number, parameter in enumerate(parameters)}
    chosen = {}
    for place, group in enumerate(groups):
        for parameter in group:
            number = number_of.get(parameter)
            if number is None:
                raise ValueError(f"groups[{place}] has a parameter of shape {tuple(parameter.shape)} that this optimizer does "
                                 "not train")  # fmt: skip
            if number in chosen:
                raise ValueError(f"groups: the parameter at place {number} of the optimizer is in two of them")
            chosen[number] = place
    return chosen


def members_of_chosen(gradients, chosen, alone):
    """Gradients as lists, in the order of need of their first members.

    Args:
        gradients: in the order of need.
        chosen: as from `chosen_groups`.
        alone: numbers of gradients that can share no operation: the sparse ones.
    """
    groups, made = [], {}
    for gradient in gradients:
        kind = (chosen.get(gradient.number), gradient.parameter.dtype, gradient.parameter.device)
        if kind[0] is None or gradient.number in alone:
            groups.append([gradient])
        elif kind in made:
            made[kind].append(gradient)
        else:
            made[kind] = [gradient]
            groups.append(made[kind])
    return groups
