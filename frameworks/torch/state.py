"""State made equal on all ranks: parameters, an optimizer's state, any object.

Objects travel as pickles over the collectives of tensors. This file knows parameters and state, not how steps are made.
"""

import pickle

import torch

import commlib
from commlib.process_sets import global_process_set
from commlib.torch.collectives import allgather, broadcast_
from commlib.torch.operations import broadcast_async_
from commlib.torch.tensors import real_view


def broadcast_parameters(params, root_rank, process_set=global_process_set):
    """Overwrites tensors with the root's, in place.

    Args:
        params: a state_dict, or (name, tensor) pairs such as model.named_parameters(), or tensors; the same on all
            ranks.
        root_rank: whose values everybody gets.
        process_set: the ranks that take part.

    Raises:
        ValueError: something else, or an entry that is not a tensor.

    Example:
        >>> import torch, commlib.torch as comm
        >>> comm.init()
        >>> model = torch.nn.Linear(2, 1)
        >>> comm.broadcast_parameters(model.state_dict(), root_rank=0)
        >>> comm.shutdown()
    """
    if isinstance(params, dict):
        pairs = sorted(params.items())
    else:
        try:
            pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
        except TypeError:
            raise ValueError(f"invalid params of type: {type(params)}; pass model.state_dict()") from None
    for name, tensor in pairs:
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name!r} is a {type(tensor).__name__}, not a tensor: use broadcast_object for it")
    handles = [broadcast_async_(real_view(tensor.detach()), root_rank, name, process_set) for name, tensor in pairs]
    for handle in handles:
        handle.wait()


def broadcast_object(obj, root_rank=0, name=None, process_set=global_process_set):
    """The root's object, on every rank; it must be picklable.

    Args:
        obj: what the root has; ignored on the other ranks.
        root_rank: whose object everybody gets.
        name: matches the operation between ranks; None: by sequence number.

    Returns:
        The root's own object there, a copy of it elsewhere.
    """
    is_root = commlib.rank() == root_rank
    payload = _bytes_of(obj) if is_root else torch.empty(0, dtype=torch.uint8)
    nbytes = broadcast_(torch.tensor([payload.numel()]), root_rank, name and f"{name}.nbytes", process_set)
    payload = payload if is_root else torch.empty(int(nbytes), dtype=torch.uint8)
    broadcast_(payload, root_rank, name and f"{name}.payload", process_set)
    return obj if is_root else pickle.loads(payload.numpy().tobytes())


def allgather_object(obj, name=None, process_set=global_process_set):
    """The object of every rank of the process set, as a list in rank order; they must be picklable."""
    payload = _bytes_of(obj)
    nbytes = allgather(torch.tensor([payload.numel()]), name and f"{name}.nbytes", process_set).tolist()
    parts = allgather(payload, name and f"{name}.payload", process_set).split(nbytes)
    return [pickle.loads(part.numpy().tobytes()) for part in parts]


def _bytes_of(obj):
    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)


def broadcast_optimizer_state(optimizer, root_rank, model=None, process_set=global_process_set):
    """Makes every rank's optimizer have the root's state and hyper-parameters, created where a rank has none.

    Args:
        optimizer: any torch.optim.Optimizer, with its parameters in the same order on all ranks.
        root_rank: whose state everybody gets.
        model: accepted for Horovod's sake; not needed.
        process_set: the ranks that take part.

    Raises:
        ValueError: the root's groups have another number of parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    is_root = commlib.rank() == root_rank
    tensors = []
    skeleton = _strip(_state_of(optimizer, parameters), tensors) if is_root else None
    shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
    skeleton, shapes = broadcast_object((skeleton, shapes), root_rank, process_set=process_set)
    if not is_root:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    broadcast_parameters(tensors, root_rank, process_set)
    if not is_root:
        _restore(optimizer, parameters, _fill(skeleton, tensors))


class _Hole:
    """Stands for the index-th tensor, or for the index-th parameter, in a structure without tensors."""

    def __init__(self, kind, index):
        self.kind, self.index = kind, index

    def __hash__(self):
        return hash((self.kind, self.index))

    def __eq__(self, other):
        return isinstance(other, _Hole) and (self.kind, self.index) == (other.kind, other.index)


def _state_of(optimizer, parameters):
    """Groups without their parameters, and state by the parameter's index."""
    index_of = {parameter: index for index, parameter in enumerate(parameters)}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    counts = [len(group["params"]) for group in optimizer.param_groups]
    state = [
        (_Hole("parameter", index_of[key]) if key in index_of else key, value) for key, value in optimizer.state.items()
    ]
    return {"groups": groups, "counts": counts, "state": state}


def _strip(structure, tensors):
    """A copy of nested dicts, lists and tuples with every tensor moved to `tensors` and a hole in its place."""
    if isinstance(structure, torch.Tensor):
        tensors.append(structure)
        return _Hole("tensor", len(tensors) - 1)
    return _mapped(structure, lambda part: _strip(part, tensors))


def _fill(structure, tensors):
    """The reverse of _strip."""
    if isinstance(structure, _Hole) and structure.kind == "tensor":
        return tensors[structure.index]
    return _mapped(structure, lambda part: _fill(part, tensors))


def _mapped(structure, change):
    if isinstance(structure, dict):
        return {key: change(value) for key, value in structure.items()}
    if type(structure) in (list, tuple):
        return type(structure)(change(value) for value in structure)
    return structure


def _restore(optimizer, parameters, told):
    if told["counts"] != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError(
            f"the root's optimizer has groups of {told['counts']} parameters, this one of "
            f"{[len(group['params']) for group in optimizer.param_groups]}: make them alike before the broadcast"
        )
    for group, options in zip(optimizer.param_groups, told["groups"]):
        group.update(options)
    optimizer.state.clear()
    for key, value in told["state"]:
        optimizer.state[parameters[key.index] if isinstance(key, _Hole) else key] = value
