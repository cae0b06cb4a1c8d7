"""Gates: whoever reads a module's weights first waits for their pending update, and for no other.

Reading happens in two ways. A module's forward begins: a forward pre-hook. Somebody takes a parameter out of a module,
by attribute (`self.decoder.weight`), by `parameters()`, `state_dict()` or anything built on them: the module's dict of
parameters is replaced by one that opens the gate first. This file knows modules; what opening means it is told by
functions, so it knows neither gradients nor optimizers.

A deep copy or a pickle of a gated module is an ordinary module without gates.
"""

import types

import torch
from torch import nn

COMPILED = (
    "a model with DistributedOptimizer(model=...) cannot be compiled as one graph yet: leave out fullgraph=True, or "
    "use DistributedOptimizer(optimizer, named_parameters=model.named_parameters())"
)


class Gates:
    """All gates of one optimizer in one model.

    Args:
        bundle_of: parameter -> the bundle it is updated with; any hashable objects.
        open_bundle: open_bundle(bundle) is called before a parameter of a pending bundle is read.
        settle: settle() is called before gradients are seen together with weights, as `parameters()` makes possible.
        used: used(parameter) is called at every use in forward, in order of use; None: nobody wants to know.

    `pending` is the set of bundles whose update is still to come; its owner fills and empties it.
    """

    def __init__(self, bundle_of, open_bundle, settle, used=None):
        self.bundle_of = bundle_of
        self.open_bundle = open_bundle
        self.settle = settle
        self.used = used
        self.pending = set()
        self.forward_depth = 0  # how many forwards of the whole model are running
        self.reading = True  # False: parameters are listed for other reasons than their values
        self._removals = []

    # ---- what readers call

    def before_forward(self, parameters):
        """A module that owns these parameters begins its forward."""
        for parameter in parameters:
            if self.used is not None:
                self.used(parameter)
            self.before_read(parameter)

    def before_read(self, parameter):
        """Somebody is about to read this parameter."""
        bundle = self.bundle_of.get(parameter)
        if bundle in self.pending:
            self.open_bundle(bundle)

    def before_read_all(self, parameters):
        """Somebody is about to see these parameters, and perhaps their gradients."""
        if self.reading:
            self.settle()
            if self.pending:
                for parameter in parameters:
                    self.before_read(parameter)

    # ---- making and removing

    def install(self, model):
        """Puts gates on every module of `model` that owns a parameter of a bundle.

        Raises:
            ValueError: a module has gates of another optimizer that owns parameters which this one does not.
        """
        for module in model.modules():
            if any(parameter in self.bundle_of for parameter in dict.values(module._parameters)):
                self._gate_module(module)
        self._removals.append(model.register_forward_pre_hook(_Enter(self), prepend=True).remove)
        self._removals.append(model.register_forward_hook(_Leave(self), always_call=True).remove)
        # A bound method, not a closure: in a deep copy of the model it is bound to the copy.
        model.zero_grad = types.MethodType(zero_grad, model)

    def _gate_module(self, module):
        parameters = module._parameters
        if isinstance(parameters, GatedParameters):
            if any(parameter not in self.bundle_of for parameter in parameters.gates.bundle_of):
                raise ValueError(
                    f"{type(module).__name__} already has gates of another DistributedOptimizer, which owns parameters "
                    "that this one does not: use one optimizer with several parameter groups, or named_parameters="
                )
            parameters.gates.remove()
        module._parameters = GatedParameters(module._parameters, self)
        self._removals.append(lambda: setattr(module, "_parameters", dict(module._parameters)))
        self._removals.append(module.register_forward_pre_hook(_Gate(self), prepend=True).remove)

    def remove(self):
        """Finishes what is pending and makes the modules ordinary again."""
        for bundle in list(self.pending):
            self.open_bundle(bundle)
        while self._removals:
            self._removals.pop()()


class GatedParameters(dict):
    """A module's dict of parameters, whose readers wait. Its copies are plain dicts."""

    __slots__ = ("gates",)

    def __init__(self, parameters, gates):
        super().__init__(parameters)
        self.gates = gates

    def __getitem__(self, name):
        parameter = super().__getitem__(name)
        gates = self.gates
        if gates.pending:
            gates.before_read(parameter)
        if gates.forward_depth and gates.used is not None:
            gates.used(parameter)
        return parameter

    def get(self, name, default=None):
        return self[name] if name in self else default

    def items(self):
        self.gates.before_read_all(super().values())
        return super().items()

    def values(self):
        self.gates.before_read_all(super().values())
        return super().values()

    def copy(self):
        return dict(self.items())

    def __reduce_ex__(self, protocol):
        return (dict, (self.copy(),))


class _ModelHook:
    """A hook on a gated module. In a copy it does nothing, as the copy's weights are pending for nobody."""

    def __init__(self, gates):
        self.gates = gates

    def __reduce__(self):
        return (_NoHook, ())


class _NoHook:
    """What a hook becomes in a copy."""

    def __call__(self, *arguments):
        return None


class _Gate(_ModelHook):
    def __call__(self, module, arguments):
        if torch.compiler.is_compiling():
            raise RuntimeError(COMPILED)
        if self.gates.pending or self.gates.used is not None:
            self.gates.before_forward([p for p in dict.values(module._parameters) if p is not None])


class _Enter(_ModelHook):
    def __call__(self, module, arguments):
        self.gates.forward_depth += 1


class _Leave(_ModelHook):
    def __call__(self, module, arguments, result):
        self.gates.forward_depth -= 1


def zero_grad(model, set_to_none=True):
    """As the model's own zero_grad, without waiting for weights, which it does not read."""
    gated = [m._parameters for m in nn.Module.modules(model) if isinstance(m._parameters, GatedParameters)]
    all_gates = {id(parameters.gates): parameters.gates for parameters in gated}.values()
    for gates in all_gates:
        gates.reading = False
    try:
        type(model).zero_grad(model, set_to_none)
    finally:
        for gates in all_gates:
            gates.reading = True
