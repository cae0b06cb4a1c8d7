"""DistributedOptimizer: the user's optimizer, made to train on all ranks.

This file checks arguments, finds names for parameters and puts the parts together. The optimizer object stays the
user's: its class is swapped for a run-time subclass, so schedulers made before and after hold the same object.
"""

from functools import partial

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

import commlib
from commlib.compressor import checked_compression
from commlib.ops import check_op
from commlib.process_sets import ProcessSet, communicator_of, global_process_set
from commlib.torch.adasum import Adasum, AdasumSteps
from commlib.torch.chosen_groups import chosen_groups
from commlib.torch.compression import Compression
from commlib.torch.gradients import GradientExchange
from commlib.torch.groups import LADDER
from commlib.torch.landing import landing_of
from commlib.torch.methods import DistributedMethods
from commlib.torch.naming import Names
from commlib.torch.overlapping import Overlapping
from commlib.torch.private import is_patched_by_scheduler
from commlib.torch.state import broadcast_optimizer_state, broadcast_parameters
from commlib.torch.tensors import overlapping_pair
from commlib.torch.waiting import Waiting


def DistributedOptimizer(  # noqa: N802 (Horovod's name)
    optimizer,
    named_parameters=None,
    compression=Compression.none,
    backward_passes_per_step=1,
    op=commlib.Average,
    gradient_predivide_factor=1.0,
    num_groups=0,
    groups=None,
    sparse_as_dense=False,
    process_set=global_process_set,
    *,
    model=None,
    overlap_forward=True,
    name="",
):
    """Makes an optimizer train on all ranks: gradients are reduced over ranks while backward still runs.

    With `named_parameters` (Horovod's form) step() waits for all gradients. With `model` also the next forward
    overlaps: the initial state of model and optimizer is the lowest rank's on every rank, step() returns at once, and each
    module's forward waits for its own parameters only. Weights are bitwise those of the form that waits. step() takes
    the gradients: p.grad is None after it.

    Args:
        optimizer: any torch.optim.Optimizer; it is changed in place and returned.
        named_parameters: (name, parameter) pairs, usually model.named_parameters(); names match gradients between
            ranks.
        compression: what dense gradients travel as; one of Compression, or another Compressor.
        backward_passes_per_step: backward passes that accumulate on each rank before a gradient is sent.
        op: Average or Sum over ranks; Adasum: each rank makes its own step, and the changes of the weights are combined.
        gradient_predivide_factor: with Average, divide by it before the sum and multiply by it after.
        num_groups, groups: gradients that travel as one operation, from the second step on: a number of groups, or lists of
            parameters; None: commlib makes groups by size and order of need.
        sparse_as_dense: turn sparse gradients into dense ones.
        process_set: the ranks that train together; on the others the optimizer is made and trains by itself.
        model: the nn.Module that is trained, instead of named_parameters.
        overlap_forward: with model, False makes step() wait.
        name: put before the names of operations; "": a prefix by the order in which optimizers are wrapped, which must be
            the same on all ranks.

    Returns:
        The optimizer, now of a subclass of its class, with synchronize(), skip_synchronize(), report() and priorities.

    Raises:
        ValueError: commlib is not initialised, an argument is not supported, names are missing or not unique.
        TypeError: not an optimizer or not a module.

    Example:
        >>> import torch, commlib.torch as comm
        >>> comm.init()
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = comm.DistributedOptimizer(optimizer, model=model)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> comm.shutdown()

    References:
        Sergeev and Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", 2018, arXiv:1802.05799.
        Peng et al., "A generic communication scheduler for distributed DNN training acceleration", SOSP 2019.
    """
    compression = checked_compression(compression)
    if type(backward_passes_per_step) is not int or backward_passes_per_step < 1:
        raise ValueError(f"backward_passes_per_step must be an int of at least 1, not {backward_passes_per_step!r}")
    _check_objects(optimizer, model, named_parameters)
    communicator = trained_with(process_set)
    exchange = GradientExchange(
        communicator,
        op=check_op(op, adasum=True),
        passes=backward_passes_per_step,
        sparse_as_dense=sparse_as_dense,
        presence=model is not None,
        prefix=f"{name}." if name else prefix_of(communicator),
        compression=compression,
        chosen=chosen_groups(num_groups, groups, trained_by(optimizer)),
        # What a compressor of the user's own makes of two tensors may not fit into one buffer.
        ladder=LADDER if compression in (Compression.none, Compression.fp16, Compression.bf16) else None,
        **_scales(op, gradient_predivide_factor),
    )
    names = Names(model, named_parameters)
    names.check(trained_by(optimizer))
    share = None
    if model is not None and communicator.size > 1:
        loose = [parameter for parameter in trained_by(optimizer) if parameter not in set(model.parameters())]
        root = {"root_rank": communicator.ranks[0], "process_set": process_set}
        broadcast_parameters([*model.named_parameters(), *model.named_buffers(), *loose], **root)
        broadcast_optimizer_state(optimizer, **root)
        share = partial(broadcast_parameters, **root)
    landing_of(communicator).watch(exchange)
    return wrap(optimizer, exchange, names, model, overlap_forward, share)


def trained_with(process_set):
    """The communicator of the ranks that train together: this one alone, where it is not part of the set."""
    if isinstance(process_set, ProcessSet) and process_set.included() is False:
        return commlib.communicator().group([commlib.rank()])
    return communicator_of(process_set)


def prefix_of(communicator):
    """What goes before the names of the next optimizer's operations: nothing for the first of a communicator."""
    number = landing_of(communicator).number()
    return f"optimizer {number}." if number else ""


def wrap(optimizer, exchange, names, model=None, overlap_forward=True, share=None):
    """Puts a distributed optimizer together from parts that were checked; communicates nothing. Returns the optimizer.

    Args:
        optimizer: the user's optimizer.
        exchange: a GradientExchange that tracks nothing yet.
        names: Names for its parameters.
        model, overlap_forward: as for DistributedOptimizer.
        share: share(parameters) gives parameters that are added later rank 0's values; None: they stay as they are.
    """
    named_parameters = names.of(trained_by(optimizer))
    # What somebody put on the instance is the real step; a scheduler's patch is not needed, as methods.py has its mark.
    patched = vars(optimizer).pop("step", None)
    is_schedulers = is_patched_by_scheduler(patched)
    real_class = type(optimizer)
    is_own = patched is None or is_schedulers
    whole_step = (lambda *closure: real_class.step(optimizer, *closure)) if is_own else patched
    if exchange.communicator.size > 1 and exchange.op is not Adasum:
        for name, parameter in named_parameters:
            exchange.track(parameter, name)
    if exchange.op is Adasum and exchange.communicator.size > 1:
        optimizer._commlib = AdasumSteps(optimizer, exchange, whole_step)
    elif model is None or not exchange.gradients:
        optimizer._commlib = Waiting(optimizer, exchange, whole_step)
    else:
        reason = None if overlap_forward else "overlap_forward=False was asked for"
        if whole_step is patched:
            replacement = getattr(patched, "__qualname__", patched)
            reason = f"optimizer.step had been replaced by {replacement!r} before wrapping"
        overlapping = overlapping_pair(named_parameters)
        if overlapping is not None:
            reason = "parameters {!r} and {!r} share memory".format(*overlapping)
        optimizer._commlib = Overlapping(optimizer, exchange, whole_step, model, reason)
        exchange.finish_updates = optimizer._commlib.finish_updates
    optimizer._commlib.name_new = names.of
    optimizer._commlib.share = share
    namespace = {name: getattr(real_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    optimizer.__class__ = type(real_class.__name__, (DistributedMethods, real_class), namespace)
    return optimizer


def unwrap(optimizer):
    """Makes the optimizer the user's own again, once its communicator has ended; updates that can still be made are made."""
    optimizer._commlib.leave()
    optimizer.__class__ = vars(optimizer).pop("_commlib").real_class


def _check_objects(optimizer, model, named_parameters):
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"DistributedOptimizer needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, DistributedMethods):
        if not optimizer._commlib.exchange.ended:
            raise ValueError("this optimizer is a DistributedOptimizer already")
        unwrap(optimizer)
    if any(is_lazy(parameter) for parameter in trained_by(optimizer)):
        raise ValueError(
            "a lazy module has no parameters yet: run one batch through the model on every rank, then make the optimizer "
            "and its DistributedOptimizer"
        )
    if model is None:
        return
    if named_parameters is not None:
        raise ValueError("pass model or named_parameters, not both: model names its parameters")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def _scales(op, gradient_predivide_factor):
    if gradient_predivide_factor == 1.0:
        return {}
    if op is not commlib.Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    return {"prescale_factor": 1.0 / gradient_predivide_factor, "postscale_factor": gradient_predivide_factor}


def trained_by(optimizer):
    """Every parameter of an optimizer, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
