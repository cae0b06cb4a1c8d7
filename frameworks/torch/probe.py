"""The probe: does stepping bundle by bundle give the same bits as one whole step? Tried, not assumed.

Two deep copies of the optimizer, with parameters, state and groups, get the same gradients. One makes whole steps, the
other steps bundle by bundle, in the way that the real one would. Whatever differs afterwards is a reason to wait at
step(): a norm over all parameters, a counter in a group, a random number.
"""

import copy
import math
from collections import OrderedDict

import torch

from commlib.torch.bundles import group_indices, groups_of, has_own_groups, snapshot, step_groups

# Gradients large and small, so that what clips or damps by a norm over all parameters shows itself.
_SCALES = (1.0, 1e-3)
_SEED = 20260
_NOT_COPIED = ("step", "_commlib")


def reason_to_wait(optimizer, real_class, bundles, sparse=frozenset()):
    """Why this optimizer cannot be stepped bundle by bundle, in words; None if it can.

    Args:
        optimizer: the user's optimizer; it is only read.
        real_class: its class, without commlib's.
        bundles: lists of parameters that are to be stepped together; all the parameters that get gradients.
        sparse: those of them whose gradients are sparse.
    """
    if not has_own_groups(optimizer, real_class):
        return "its param_groups are not its own"
    random_state = torch.get_rng_state()
    try:
        whole, whole_of = _twin(optimizer, real_class)
        parts, parts_of = _twin(optimizer, real_class)
        with torch.enable_grad():
            for number, scale in enumerate(_SCALES):
                for step, twin, copy_of in ((_step_whole, whole, whole_of), (_step_parts, parts, parts_of)):
                    copies = [[copy_of[id(p)] for p in bundle] for bundle in bundles]
                    step(twin, copies, {copy_of[id(p)] for p in sparse}, number, scale)
        if not torch.equal(torch.get_rng_state(), random_state):
            return "it draws random numbers"
        place = _difference(_visible(whole), _visible(parts), real_class.__name__, set())
        return None if place is None else f"stepping layer by layer changes {place}"
    except Exception as error:  # whatever a user's class does on a copy, the real one is then simply waited for
        return f"trying it on a copy failed with {type(error).__name__}: {error}"
    finally:
        torch.set_rng_state(random_state)


def _twin(optimizer, real_class):
    """A deep copy without hooks, and which parameter became which: id(original) -> copy."""
    attributes = {}
    for name, value in vars(optimizer).items():
        if name not in _NOT_COPIED:
            attributes[name] = OrderedDict() if name.endswith("_hooks") else value
    memo = {}
    twin = object.__new__(real_class)
    vars(twin).update(copy.deepcopy(attributes, memo))
    originals = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return twin, {id(parameter): memo[id(parameter)] for parameter in originals}


def _give_gradients(parameters, sparse, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        dtype = torch.complex64 if parameter.is_complex() else torch.float32
        noise = torch.randn(parameter.shape, generator=generator, dtype=dtype) * scale
        gradient = torch.empty_like(parameter, requires_grad=False).copy_(noise)
        parameter.grad = gradient.to_sparse(1) if parameter in sparse else gradient


def _step_whole(twin, bundles, sparse, number, scale):
    for index, bundle in enumerate(bundles):
        _give_gradients(bundle, sparse, _SEED + 1000 * number + index, scale)
    type(twin).step(twin)


def _step_parts(twin, bundles, sparse, number, scale):
    snapshots, index_of = snapshot(twin.param_groups), group_indices(twin.param_groups)
    # Last to first, as no order may matter.
    for index, bundle in reversed(list(enumerate(bundles))):
        _give_gradients(bundle, sparse, _SEED + 1000 * number + index, scale)
        step_groups(twin, type(twin), groups_of(bundle, index_of, snapshots))
        for parameter in bundle:
            parameter.grad = None


def _visible(twin):
    """What the two copies are compared by; state by the parameter's place, as the parameters themselves differ."""
    parameters = [parameter for group in twin.param_groups for parameter in group["params"]]
    visible = {name: value for name, value in vars(twin).items() if name != "state"}
    visible["state"] = [twin.state.get(parameter) for parameter in parameters]
    mine = set(parameters)
    visible["other state"] = {key: value for key, value in twin.state.items() if key not in mine}
    return visible


def _difference(first, second, place, seen):
    """Where two structures differ, in words; None: nowhere."""
    if type(first) is not type(second):
        return place
    if torch.is_tensor(first):
        return None if same_bits(first, second) else place
    if isinstance(first, (bool, int, str, float, complex, type(None))):
        both_nan = isinstance(first, float) and math.isnan(first) and math.isnan(second)
        return None if first == second or both_nan else place
    if id(first) in seen:
        return None
    seen.add(id(first))
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return place
        pairs = [(f"{place}[{key!r}]", first[key], second[key]) for key in first]
    elif isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return place
        pairs = [(f"{place}[{index}]", *pair) for index, pair in enumerate(zip(first, second))]
    elif hasattr(first, "__dict__") and not isinstance(first, type):
        return _difference(vars(first), vars(second), place, seen)
    else:
        return None
    found = (_difference(one, other, where, seen) for where, one, other in pairs)
    return next((where for where in found if where is not None), None)


def same_bits(first, second):
    """Whether two tensors have the same shape, dtype and bits; NaN equals the same NaN, 0 does not equal -0."""
    if first.shape != second.shape or first.dtype != second.dtype or first.layout != second.layout:
        return False
    if first.is_sparse:
        first, second = first.coalesce(), second.coalesce()
        return torch.equal(first.indices(), second.indices()) and same_bits(first.values(), second.values())
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*bits)
