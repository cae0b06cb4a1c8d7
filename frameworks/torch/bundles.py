"""Bundles: which parameters are updated together, and how a user's optimizer is made to step one bundle only.

The optimizer is the user's own, of whatever class: for the time of one call its `param_groups` name the bundle's
parameters and no others, with hyper-parameters as they were at step(). Whether that equals a whole step is for probe.py
to find out.
"""

import torch


class Bundle:
    """Parameters that are updated together: those that one module owns directly.

    Attributes:
        name: the module's name, for people.
        gradients: what is updated: gradients.Gradient, or anything with `.parameter`.
        gated: whether readers of these parameters wait; otherwise step() does.
        groups: after step(), param_groups of just these parameters.
    """

    def __init__(self, name, gradients, gated=True):
        self.name = name
        self.gradients = gradients
        self.gated = gated
        self.groups = None


def bundles_of(model, gradients):
    """Splits gradients by the module of `model` that owns their parameter; the rest is one bundle without gates.

    A parameter that several modules share belongs to the first of them.
    """
    left = {gradient.parameter: gradient for gradient in gradients}
    bundles = []
    for name, module in model.named_modules():
        owned = [left.pop(p) for p in dict.values(module._parameters) if p is not None and p in left]
        if owned:
            bundles.append(Bundle(name, owned))
    if left:
        bundles.append(Bundle("outside of the model", list(left.values()), gated=False))
    return bundles


def snapshot(param_groups):
    """The hyper-parameters of every group as they are now; tensors are cloned, `params` left out."""
    return [
        {key: value.clone() if torch.is_tensor(value) else value for key, value in group.items() if key != "params"}
        for group in param_groups
    ]


def group_indices(param_groups):
    """Which group each parameter is in: parameter -> index."""
    return {parameter: index for index, group in enumerate(param_groups) for parameter in group["params"]}


def groups_of(parameters, index_of, snapshots):
    """param_groups of just these parameters, with hyper-parameters from `snapshots`."""
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
