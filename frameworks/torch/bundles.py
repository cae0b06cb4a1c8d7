"""Stepping over some parameters only: how a user's optimizer is made to update one group of gradients and no others.

The step is the user's own, of whatever class: for the time of one call `param_groups` name these parameters and no others,
with hyper-parameters as they were at step(). Whether that equals a whole step is for probe.py to find out.
"""

import copy

import torch


def snapshot(param_groups):
    """The hyper-parameters of every group as they are now; what can be changed in place is copied, `params` left out."""
    return [{key: _kept(value) for key, value in group.items() if key != "params"} for group in param_groups]


def _kept(value):
    if torch.is_tensor(value):
        return value.clone()
    return copy.deepcopy(value) if type(value) in (list, dict) else value


def group_indices(param_groups):
    """Which group each parameter is in: parameter -> index."""
    return {parameter: index for index, group in enumerate(param_groups) for parameter in group["params"]}


def groups_of(parameters, index_of, snapshots):
    """param_groups of just these parameters, with hyper-parameters from `snapshots`."""
    if len(snapshots) == 1:
        return [{**snapshots[0], "params": parameters}]
    members = {}
    for parameter in parameters:
        members.setdefault(index_of[parameter], []).append(parameter)
    return [{**snapshots[index], "params": members[index]} for index in sorted(members)]


def step_groups(optimizer, real_class, groups):
    """One real step over `groups` instead of the optimizer's own; modes of the caller do not reach it.

    The step is that of a stand-in, of the user's class, with the optimizer's attributes: so its code finds no methods of
    commlib, and no other thread ever sees the optimizer itself with other groups, or as one that is not distributed.
    """
    stand_in = object.__new__(real_class)
    attributes = vars(stand_in)
    attributes.update(vars(optimizer))
    attributes["param_groups"] = groups
    before = dict(attributes)
    try:
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
            with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
                real_class.step(stand_in)
        else:
            real_class.step(stand_in)
    finally:
        for name, value in attributes.items():
            if before.get(name, attributes) is not value and name != "param_groups":
                vars(optimizer)[name] = value


def has_own_groups(optimizer, real_class):
    """Whether param_groups are an attribute, as of every class of torch, and not something else in disguise."""
    return "param_groups" in vars(optimizer) and not hasattr(real_class, "param_groups")
