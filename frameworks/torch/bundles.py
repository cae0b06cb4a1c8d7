"""Stepping over some parameters only: how a user's optimizer is made to update one group of gradients and no others.

The optimizer is the user's own, of whatever class: for the time of one call its `param_groups` name these parameters and
no others, with hyper-parameters as they were at step(). Whether that equals a whole step is for probe.py to find out.
"""

import copy
from contextlib import contextmanager

import torch


@contextmanager
def as_users_own(optimizer, real_class):
    """Within it the optimizer is of the user's class again: its step finds no methods of commlib, and no detours."""
    wrapped_class = optimizer.__class__
    optimizer.__class__ = real_class
    try:
        yield
    finally:
        optimizer.__class__ = wrapped_class


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


def step_groups(optimizer, real_step, groups):
    """One real step of `optimizer` over `groups` instead of its own; modes of the caller do not reach it."""
    own_groups = optimizer.param_groups
    optimizer.param_groups = groups
    try:
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
            with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
                real_step(optimizer)
        else:
            real_step(optimizer)
    finally:
        optimizer.param_groups = own_groups
