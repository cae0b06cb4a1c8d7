"""Gates: whoever reads a module's weights first waits for their pending update, and for no other.

Reading happens in two ways. Somebody takes a parameter out of a module, by attribute (`self.decoder.weight`), by
`parameters()`, `state_dict()` or anything built on them: the module's dict of parameters is replaced by one that opens the
gate first. Or a module's forward begins that may hold its parameters in other ways: a forward pre-hook. This file knows
modules; what opening means it is told by functions, so it knows neither gradients nor optimizers.

A deep copy or a pickle of a gated module is an ordinary module without gates.
"""

import threading
import types
import warnings
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from torch import nn

from commlib.torch.private import has_parameter_dicts, parameters_of, set_parameters, without_dynamo
from commlib.torch.regions import compiled_regions, gate_entry

COMPILED = (
    "torch.compile met the gates of a DistributedOptimizer(model=...) inside of the code that it compiles, which cuts that "
    "code into pieces: compile the model first, and pass the compiled one as model="
)


class Gates:
    """All gates of one optimizer in one model.

    Args:
        open_group: open_group(group) is called before a parameter of a pending group is read.
        settle: settle() is called before gradients are seen together with weights, as `parameters()` makes possible.
        listing: a context manager within which parameters are listed for other reasons than their values.

    Attributes:
        member_of: parameter -> an object whose `group` is what it is updated with; groups are any hashable objects.
        pending: the groups whose update is still to come, as keys in the order of need.
        read: parameters that somebody read through a gate are added to it; None: nobody wants to know.
    """

    def __init__(self, open_group, settle, listing=nullcontext):
        self.member_of = {}
        self.open_group = open_group
        self.settle = settle
        self.pending = {}
        self.read = set()
        self.listing = listing
        self.listing_in = None  # the thread that lists parameters for another reason than their values
        self.replaced = []  # members that somebody has taken out of a module's dict
        self._model = None
        self._others = set()  # what the model had beside the members when gates were installed
        self._removals = []
        self._regions = set()  # compiled modules with a gate at their entry
        self._dicts = []  # the gated modules' dicts of parameters

    @property
    def is_listing(self):
        """Whether this thread lists parameters for another reason than their values."""
        return self.listing_in == threading.get_ident()

    # ---- what the owner of the groups calls

    def shut(self, groups):
        """Whoever reads a parameter of these groups opens the group first; groups are in the order of need."""
        self.pending.update(dict.fromkeys(groups))
        self._watch(True)

    def opened(self, group):
        """The group's parameters may be read."""
        del self.pending[group]
        if not self.pending:
            self._watch(self.read is not None)

    def note_reads(self, wanted):
        """Begins or ends to collect in `read` who was read."""
        self.read = set() if wanted else None
        self._watch(wanted or bool(self.pending))

    def _watch(self, wanted):
        """A dict that need not watch is looked up without any call of Python."""
        kind = WatchingParameters if wanted else GatedParameters
        for parameters in self._dicts:
            parameters.__class__ = kind

    # ---- what readers call

    def before_forward(self, parameters):
        """A module that owns these parameters begins its forward."""
        for parameter in parameters:
            if parameter is not None:
                self.before_read(parameter)

    def before_read(self, parameter):
        """Somebody is about to read this parameter."""
        if torch.compiler.is_compiling():
            cut_compiled_code()
        if self.read is not None:
            self.read.add(parameter)
        member = self.member_of.get(parameter)
        if member is not None and member.group in self.pending:
            self.open_group(member.group)

    def before_read_all(self, parameters):
        """Somebody is about to see these parameters, and perhaps their gradients."""
        if not self.is_listing:
            self.settle()
            if self.pending:
                self.before_forward(parameters)

    # ---- making and removing

    def install(self, model, member_of):
        """Puts gates on every module of `model` that owns one of the parameters and has none yet.

        Returns:
            The parameters that have a gate now.

        Raises:
            ValueError: a module has gates of another optimizer that owns parameters which this one does not.
        """
        self.member_of = member_of
        self._model = model
        self._others = {id(parameter) for parameter in _parameters_in(model).values() if parameter not in member_of}
        gated = set()
        inside = set()
        for region in compiled_regions(model):
            inside.update(region.modules())
            self._gate_region(region)
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            parameters = parameters_of(module)
            own = [p for p in dict.values(parameters) if p is not None and p in member_of]
            gated.update(own)
            if own and has_parameter_dicts and module not in inside and getattr(parameters, "gates", None) is not self:
                self._gate_module(module)
        if "zero_grad" not in vars(model):
            # A bound method, not a closure: in a deep copy of the model it is bound to the copy.
            model.zero_grad = types.MethodType(zero_grad, model)
        return gated

    def _gate_region(self, region):
        parameters = [parameter for parameter in nn.Module.parameters(region) if parameter in self.member_of]
        if parameters and region not in self._regions:
            self._regions.add(region)
            self._removals.append(gate_entry(region, partial(self.before_forward, parameters)))

    def _gate_module(self, module):
        parameters = parameters_of(module)
        if isinstance(parameters, GatedParameters):
            still = set(_parameters_in(self._model).values())
            if any(parameter in still and parameter not in self.member_of for parameter in parameters.gates.member_of):
                raise ValueError(
                    f"{type(module).__name__} already has gates of another DistributedOptimizer, which owns parameters "
                    "that this one does not: use one optimizer with several parameter groups, or named_parameters="
                )
            parameters.gates.remove()
        watching = WatchingParameters(parameters_of(module), self)
        set_parameters(module, watching)
        self._dicts.append(watching)
        self._removals.append(lambda: set_parameters(module, dict(parameters_of(module))))
        if not _reads_by_attribute(module):
            self._removals.append(module.register_forward_pre_hook(_Gate(self), prepend=True).remove)

    def gone(self):
        """Members that were taken out of a module and are nowhere in the model any more."""
        still = set(_parameters_in(self._model).values())
        return [parameter for parameter in self.replaced if parameter not in still]

    def new_names(self, is_known):
        """Names of parameters that are trained, came into the model after the gates, and are not known to is_known(p)."""
        return [
            name for name, parameter in _parameters_in(self._model).items()
            if parameter.requires_grad and parameter not in self.member_of and id(parameter) not in self._others
            and not is_known(parameter)
        ]  # fmt: skip

    def remove(self):
        """Finishes what is pending and makes the modules ordinary again."""
        while self.pending:
            self.open_group(next(iter(self.pending)))
        while self._removals:
            self._removals.pop()()
        self._dicts.clear()


class GatedParameters(dict):
    """A module's dict of parameters, of which nothing is pending. Its copies are plain dicts.

    It changes its class, also while another thread is in one of its methods: so none says super().
    """

    __slots__ = ("gates",)

    def __init__(self, parameters, gates):
        dict.__init__(self, parameters)
        self.gates = gates

    def get(self, name, default=None):
        return self[name] if name in self else default

    def __setitem__(self, name, parameter):
        self._leaves(name, parameter)
        dict.__setitem__(self, name, parameter)

    def __delitem__(self, name):
        self._leaves(name)
        dict.__delitem__(self, name)

    def pop(self, name, *default):
        self._leaves(name)
        return dict.pop(self, name, *default)

    def _leaves(self, name, for_parameter=None):
        parameter = dict.get(self, name)
        if parameter is not None and parameter is not for_parameter and parameter in self.gates.member_of:
            self.gates.replaced.append(parameter)

    def items(self):
        self.gates.before_read_all(dict.values(self))
        return dict.items(self)

    def values(self):
        self.gates.before_read_all(dict.values(self))
        return dict.values(self)

    def copy(self):
        return dict(self.items())

    def __reduce_ex__(self, protocol):
        return (dict, (self.copy(),))


class WatchingParameters(GatedParameters):
    """A module's dict of parameters, whose readers may have to wait."""

    __slots__ = ()

    def __getitem__(self, name):
        parameter = dict.__getitem__(self, name)
        self.gates.before_read(parameter)
        return parameter


def _parameters_in(model):
    """Name -> parameter, without asking any gate."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        for name, parameter in _own_items(module)
        if isinstance(parameter, torch.Tensor)
    }


def _own_items(module):
    """A scripted module keeps its parameters elsewhere, and what stands for its dict is none; no gates are there."""
    parameters = parameters_of(module)
    return dict.items(parameters) if isinstance(parameters, dict) else parameters.items()


def _reads_by_attribute(module):
    """Whether a module's forward is known to take its parameters as attributes: a hook would only cost time."""
    is_torchs = type(module).__module__.startswith("torch.nn.modules.")
    return is_torchs and not isinstance(module, nn.RNNBase) and "forward" not in vars(module)


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
        gates = self.gates
        if gates.pending or gates.read is not None:
            gates.before_forward(dict.values(parameters_of(module)))


def zero_grad(model, set_to_none=True):
    """As the model's own zero_grad, without waiting for weights, which it does not read."""
    gated = [parameters for parameters in map(parameters_of, nn.Module.modules(model)) if isinstance(parameters, GatedParameters)]
    with ExitStack() as stack:
        for gates in {id(parameters.gates): parameters.gates for parameters in gated}.values():
            gates.listing_in = threading.get_ident()
            stack.callback(setattr, gates, "listing_in", None)
            stack.enter_context(gates.listing())
        type(model).zero_grad(model, set_to_none)


@without_dynamo
def cut_compiled_code():
    """What compiled code meets where a gate is in its midst: it is cut here, or fails if it must be one graph."""
    warnings.warn(COMPILED, stacklevel=2)
