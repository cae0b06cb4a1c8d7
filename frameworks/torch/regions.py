"""Compiled regions: code that torch.compile made of whole modules has one gate, at its entry.

Within such a region nothing of commlib runs: hooks would cut the compiled code into pieces, or not be called at all.
Everything that the region may read is finished before it begins. What torch.jit compiled cannot even have that gate. This
file knows modules and two ways to call them.
"""

import torch

from commlib.torch.private import compiled_call, set_compiled_call


def compiled_regions(model):
    """The outermost modules whose call runs compiled code, out of `model` and everything in it."""
    if _is_compiled(model):
        return [model]
    return [region for child in model.children() for region in compiled_regions(child)]


def scripted_parameters(model):
    """Parameters of modules that torch.jit compiled: its code reads them without anybody noticing."""
    return {p for module in model.modules() if isinstance(module, torch.jit.ScriptModule) for p in module.parameters()}


def _is_compiled(module):
    is_wrapper = type(module).__name__ == "OptimizedModule"  # torch.compile(module)
    return is_wrapper or compiled_call(module) is not None  # by module.compile()


def gate_entry(module, enter):
    """Has enter() called at every call of a compiled module, outside of the compiled code.

    Returns:
        A function that undoes it.
    """
    compiled = compiled_call(module)
    if compiled is None:
        return module.register_forward_pre_hook(_Entry(enter), prepend=True).remove

    def entered_call(*args, **kwargs):
        enter()
        return compiled(*args, **kwargs)

    set_compiled_call(module, entered_call)
    return lambda: set_compiled_call(module, compiled)


class _Entry:
    """A forward pre-hook; in a copy of the module it does nothing, as the copy's weights are pending for nobody."""

    def __init__(self, enter):
        self.enter = enter

    def __call__(self, module, arguments):
        self.enter()

    def __reduce__(self):
        return (_Entry, (int,))  # int(): something that may be called
