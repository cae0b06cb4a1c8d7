"""What of torch is private, and what stands in where a torch has none of it.

The only file of the adapter that names such things: a test holds that, and takes all of them away. Results never depend
on them; without them something is slower. Knows nothing else of commlib.
"""

import sys
from datetime import timedelta
from operator import attrgetter

import torch
import torch.distributed
from torch import nn
from torch.optim import lr_scheduler

# ---- torch.compile

# The private one is there without the compiler's import, which takes seconds.
without_dynamo = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable


def compiled_call(module):
    """What module.compile() has put in place of its call; None: nothing, or it cannot be told. Gates then cut the code."""
    return getattr(module, "_compiled_call_impl", None)


def set_compiled_call(module, call):
    """Puts another call where `compiled_call` has found one."""
    module._compiled_call_impl = call


# ---- the backward pass

_graph_task = getattr(torch._C, "_current_graph_task_id", None)
_engine = getattr(torch.autograd.Variable, "_execution_engine", None)
_queue_callback = getattr(_engine, "queue_callback", None)

# By which Python code every backward pass of a CPU's tensors begins, in whose thread it runs.
_ENTRIES = (torch.autograd.backward.__code__, torch.autograd.grad.__code__)


def in_backward():
    """Whether autograd is running the backward pass in this thread."""
    return _graph_task() != -1 if _graph_task is not None else _is_within(sys._getframe())


def thread_in_backward(thread):
    """Whether autograd is running the backward pass in the thread of this number; slow."""
    return _is_within(sys._current_frames().get(thread))


def _is_within(frame):
    while frame is not None:
        if frame.f_code in _ENTRIES:
            return True
        frame = frame.f_back
    return False


def at_end_of_backward(call):
    """Has call() called when the backward pass that runs in this thread is over. False: this torch cannot tell."""
    if _queue_callback is not None:
        _queue_callback(call)
    return _queue_callback is not None


# ---- tensors

# A context manager within which `__torch_function__` is not called; None: there is none.
without_torch_function = getattr(torch._C, "DisableTorchFunctionSubclass", None)


class _Saved(torch.autograd.Function):
    """Keeps a tensor as for a backward pass: whoever asks for it afterwards is told if it was changed in place."""

    @staticmethod
    def forward(ctx, one, tensor):
        ctx.save_for_backward(tensor)
        return one.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Version:
    """A tensor as it is now; equal to a later one of the same tensor as long as nobody changes it in place. 30 us."""

    def __init__(self, tensor):
        with torch.enable_grad():
            self._kept = _Saved.apply(torch.ones((), requires_grad=True), tensor)  # older torch forgets a node without it

    def __eq__(self, later):
        if not isinstance(later, _Version):
            return NotImplemented
        try:
            return all(version._kept.grad_fn.saved_tensors is not None for version in (self, later))
        except RuntimeError:  # "modified by an inplace operation"
            return False


# version_of(tensor) differs from what it was before the tensor was changed in place.
version_of = attrgetter("_version") if hasattr(torch.Tensor, "_version") else _Version

# How many tensors lie over a storage is known to torch alone. Where it does not tell, everything is taken for shared.
_use_count = getattr(torch._C, "_storage_Use_Count", None)
_address_of_storage = attrgetter("_cdata") if hasattr(torch.UntypedStorage, "_cdata") else None


def can_count():
    """Whether it can be told that nobody else sees a tensor's memory."""
    return _use_count is not None and _address_of_storage is not None


def count_owners(tensor):
    """How many tensors lie over this one's memory; only where `can_count`."""
    return _use_count(_address_of_storage(tensor.untyped_storage()))


def _copy_each(targets, sources):
    for target, source in zip(targets, sources):
        target.copy_(source)


# copy_all(targets, sources) copies each tensor of a list into one of another.
copy_all = getattr(torch, "_foreach_copy_", _copy_each)


# ---- modules

# torch.nn's batch normalisations have one base, which is how programs tell them from other layers.
BatchNorm = getattr(nn.modules.batchnorm, "_BatchNorm", nn.SyncBatchNorm)

# Whether a module's parameters are in a dict that can be replaced; else nothing is there for a gate.
has_parameter_dicts = isinstance(vars(nn.Linear(1, 1)).get("_parameters"), dict)


def parameters_of(module):
    """A module's own parameters by name: its dict, where there is such a thing."""
    return module._parameters if has_parameter_dicts else dict(module.named_parameters(recurse=False))


def set_parameters(module, parameters):
    """Replaces a module's dict of parameters; only where `has_parameter_dicts`."""
    module._parameters = parameters


# ---- optimizers

# Torch and its schedulers patch an optimizer's `step` unless it carries their marks.


def mark_patched(step):
    """Torch and its schedulers are to let this function alone."""
    step.hooked = step._wrapped_by_lr_sched = True


def is_patched_by_scheduler(step):
    """Whether this `step` is a scheduler's patch: it has its mark, or its code is from the schedulers' file."""
    code = getattr(getattr(step, "__func__", step), "__code__", None)
    return getattr(step, "_wrapped_by_lr_sched", False) or code is not None and code.co_filename == lr_scheduler.__file__


def note_step(optimizer):
    """An optimizer makes a step: a scheduler that is asked to go on looks for this."""
    optimizer._opt_called = True


# ---- gloo

_gloo = getattr(torch.distributed, "ProcessGroupGloo", None)
_gloo_options = getattr(_gloo, "_Options", None)
_set_gloo_timeout = getattr(_gloo, "_set_default_timeout", None)

_USUAL = timedelta(minutes=30)  # torch.distributed's own for gloo


def gloo_group(store, rank, size, place, start, running):
    """A gloo process group, which is registered nowhere.

    Args:
        store: where the ranks meet.
        rank, size: this rank, and how many there are.
        place: where gloo listens, as create_device takes it; None: as torch.distributed would choose (GLOO_SOCKET_IFNAME),
            and so it does where a torch cannot be told.
        start: how long to wait for the other ranks, a timedelta.
        running: how long a collective may take; where a torch cannot be told apart, both may take half an hour at least.
    """
    timeout = start if _set_gloo_timeout is not None else max(start, _USUAL)
    group = _gloo(store, rank, size, _options_of_gloo(place, timeout) or timeout)
    if _set_gloo_timeout is not None:
        _set_gloo_timeout(group, running)
    return group


def _options_of_gloo(place, timeout):
    if place is None or _gloo_options is None:
        return None
    options = _gloo_options()
    options._timeout = timeout
    try:
        options._devices = [_gloo.create_device(lazy_init=False, **place)]
    except TypeError:  # of an older torch, which never connects as late as that
        options._devices = [_gloo.create_device(**place)]
    return options
