"""Guards: whoever touches a parameter that is not finished waits for it, however he came by it.

While a parameter's update is pending, or its gradient is on its way, its class is a subclass of its own whose
`__torch_function__` sees every use from Python: an operation, `p.data`, `p.grad`, a list of parameters made long ago, a
copy, a pickle. gates.py opens whole modules at once and before code that torch cannot see; guards catch the rest. To
change the class and back costs 70 ns; outside of that time a parameter is what it was.

This file knows tensors; what waiting means it is told by functions.
"""

import copy

import torch
from torch import nn

from commlib.torch.private import without_dynamo

_GETTERS = (
    "device", "dtype", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mkldnn", "is_mps", "is_nested",
    "is_quantized", "is_sparse", "is_xla", "is_xpu", "itemsize", "layout", "names", "nbytes", "ndim", "output_nr",
    "requires_grad", "retains_grad", "shape", "_backward_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip
_METHODS = (
    "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point", "is_inference", "is_signed",
    "ndimension", "nelement", "numel", "register_hook", "register_post_accumulate_grad_hook", "size", "storage_offset",
    "stride",
)  # fmt: skip

# What may be asked of a parameter at any time: it depends neither on its value nor on its gradient.
_HARMLESS = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _GETTERS if hasattr(torch.Tensor, name)]
    + [getattr(torch.Tensor, name) for name in _METHODS]
    + [torch.is_complex, torch.is_floating_point, torch.numel]
)
_READ_GRADIENT = torch.Tensor.grad.__get__
_SET_GRADIENT = torch.Tensor.grad.__set__


class Guards:
    """Guards over parameters of one optimizer.

    Args:
        before_value: before_value(parameter) is called before a guarded parameter is read or written.
        before_gradient: before_gradient(parameter) is called before its p.grad is read.
    """

    def __init__(self, before_value, before_gradient):
        self.before_value = before_value
        self.before_gradient = before_gradient
        self._guarded_class = {plain: _class_over(plain, self) for plain in (nn.Parameter, torch.Tensor)}
        self._plain_class = {guarded: plain for plain, guarded in self._guarded_class.items()}

    def can_guard(self, parameter):
        """Whether it is of a class that guards know; a subclass with ideas of its own is left alone."""
        return type(parameter) in self._guarded_class or type(parameter) in self._plain_class

    def guard(self, parameters):
        """From now on whoever touches these parameters is noticed."""
        guarded_class = self._guarded_class
        for parameter in parameters:
            new_class = guarded_class.get(type(parameter))
            if new_class is not None:
                parameter.__class__ = new_class

    def release(self, parameters):
        """These parameters are ordinary again."""
        plain_class = self._plain_class
        for parameter in parameters:
            new_class = plain_class.get(type(parameter))
            if new_class is not None:
                parameter.__class__ = new_class


class _Guarded:
    """What is in front of the class of a guarded parameter."""

    guards = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _noticed(function, list(_guarded_in((args, *kwargs.values()))), args, kwargs)

    # Copying and pickling ask for the class before torch notices.

    def __deepcopy__(self, memo):
        return _noticed(copy.deepcopy, [self], (self, memo), {})

    def __reduce_ex__(self, protocol):
        return _noticed(lambda tensor: tensor.__reduce_ex__(protocol), [self], (self,), {})


def _class_over(plain, guards):
    """A subclass of `plain` whose use `guards` hears of; it goes by the same name."""
    namespace = {"guards": guards, "__module__": plain.__module__, "__qualname__": plain.__qualname__, "__slots__": ()}
    return type(plain)(plain.__name__, (_Guarded, plain), namespace)


def _guarded_in(arguments):
    for argument in arguments:
        if isinstance(argument, _Guarded):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _guarded_in(argument)
        elif isinstance(argument, dict):
            yield from _guarded_in(argument.values())


@without_dynamo
def _noticed(function, parameters, args, kwargs):
    """Calls torch's function after whatever has to come before it."""
    if function == _READ_GRADIENT:
        for parameter in parameters:
            parameter.guards.before_gradient(parameter)
    elif function not in _HARMLESS and not (function == _SET_GRADIENT and args[1] is None):
        for parameter in parameters:
            if isinstance(parameter, _Guarded):  # one may have been opened with another
                parameter.guards.before_value(parameter)
    still = [(parameter, parameter.guards) for parameter in parameters if isinstance(parameter, _Guarded)]
    for parameter, guards in still:
        guards.release((parameter,))
    try:
        return function(*args, **kwargs)
    finally:
        for parameter, guards in still:
            guards.guard((parameter,))
