"""Keras 3 optimizers that apply the gradients of all ranks.

The user's optimizer stays the object that it is: only its class becomes, at run time, a subclass that reduces gradients before
it applies them. The subclass has the name and module of the original, so that saved models load where there is no commlib.
What commlib keeps with an optimizer is in its `__dict__`, past Keras's tracking, which would save it.
"""

import itertools

import keras
import tensorflow as tf

import commlib
from commlib.process_sets import global_process_set
from commlib.tensorflow.adasum import combined_step
from commlib.tensorflow.compression import Compression
from commlib.tensorflow.exchange import Exchange, checked_groups, waited_for
from commlib.tensorflow.first_use import places_by_first_use
from commlib.tensorflow.forms import NONE
from commlib.tensorflow.operations import as_it_is
from commlib.tensorflow.reduction import Reduction, weights_of

_STATE = "_commlib"
_numbers = itertools.count()  # every rank makes its optimizers in the same order


def state_of(optimizer):
    """What commlib keeps with an optimizer; None: it is not distributed."""
    return optimizer.__dict__.get(_STATE)


class State:
    """What commlib keeps with one optimizer.

    Attributes:
        exchange: an Exchange.
        reduction: its Reduction.
        factor: multiplies every reduced gradient.
        overlap: a forward_overlap.Overlap; None: gradients are waited for before they are applied.
        passed: the variables whose gradients Keras is about to clip, and their places in the forward pass.
    """

    def __init__(self, exchange, factor):
        self.exchange = exchange
        self.reduction = exchange.reduction
        self.factor = factor
        self.overlap = None
        self.passed = None

    def parcels(self, optimizer, gradients, variables, places=None):
        """The gradients that travel, as parcels; places in the forward pass, or None: as this graph has it."""
        places = places_by_first_use(variables) if places is None else places
        numbers = numbers_of(optimizer, variables)
        sent = {number: gradient for number, gradient, variable in zip(numbers, gradients, variables)
                if gradient is not None and not self.reduction.is_local(variable)}  # fmt: skip
        return self.exchange.parcels(sent, dict(zip(numbers, places)), optimizer._trainable_variables)

    def finish(self, optimizer, parcels, results, gradients, variables):
        """Reduced gradients, in the order of `variables`; None stays None.

        Args:
            results: of each parcel, a list.
        """
        reduced = {}
        for parcel, own in zip(parcels, results):
            reduced.update(parcel.open(own))
        numbers = numbers_of(optimizer, variables)
        gradients = self.reduction.scale_local(gradients, variables)
        return self.multiplied([reduced.get(number, gradient) for number, gradient in zip(numbers, gradients)])

    def agreed(self, optimizer, gradients, variables, *, zeros):
        """What all ranks have gradients of, for each variable of the optimizer; see agreement.agreed."""
        mine = dict(zip(numbers_of(optimizer, variables), gradients))
        return self.exchange.agreed(mine, optimizer._trainable_variables, zeros=zeros)

    def reduce(self, optimizer, gradients, variables, places=None):
        """As `parcels`, sent and waited for; on all ranks gradients are of the same variables, or none is sent."""
        told = self.agreed(optimizer, gradients, variables, zeros=False)
        return self._reduced(optimizer, gradients, variables, told, places)

    def fill_and_reduce(self, optimizer, gradients, variables):
        """As `reduce`; where this rank has no gradient and another one has, zeros take part.

        Returns:
            (gradients, a truth value: whether another rank has one where this rank has none).
        """
        told = self.agreed(optimizer, gradients, variables, zeros=True)
        numbers = numbers_of(optimizer, variables)
        lacking = self.lacking(gradients, variables)
        for number in lacking:
            gradients[number] = tf.zeros(variables[number].shape, variables[number].dtype)
        reduced = self._reduced(optimizer, gradients, variables, told)
        if not lacking:
            return reduced, False
        return reduced, tf.reduce_any(tf.gather(told, [numbers[number] for number in lacking]) > NONE)

    def lacking(self, gradients, variables):
        """Places of variables of which this rank has no gradient, and others may have one."""
        return [number for number, (gradient, variable) in enumerate(zip(gradients, variables))
                if gradient is None and not self.reduction.is_local(variable)]  # fmt: skip

    def _reduced(self, optimizer, gradients, variables, told, places=None):
        parcels = self.parcels(optimizer, gradients, variables, places)
        results = waited_for(parcels, self.reduction.process_set, told)
        return self.finish(optimizer, parcels, results, gradients, variables)

    def multiplied(self, gradients):
        """Gradients times the factor; None stays None."""
        return gradients if self.factor == 1 else [self._multiplied(gradient) for gradient in gradients]

    def _multiplied(self, gradient):
        if gradient is None:
            return None
        factor = tf.cast(self.factor, gradient.dtype)
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
        return gradient * factor


def numbers_of(optimizer, variables):
    """Places of variables in the list that the optimizer was built for."""
    return [optimizer._get_variable_index(variable) for variable in variables]


def build(optimizer, variables):
    """Makes the optimizer's own variables, if they are not there yet."""
    if not optimizer.built:
        with tf.init_scope(), keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(list(variables))
        optimizer.built = True


def either(condition, first, second):
    """One of two functions that have effects, by a truth value or a tensor."""
    if isinstance(condition, bool) or tf.executing_eagerly():
        (first if bool(condition) else second)()
    else:
        tf.cond(condition, lambda: (first(), True)[1], lambda: (second(), True)[1])


def apply_reduced(optimizer, gradients, variables):
    """A distributed optimizer's update with gradients that are all ranks' already."""
    optimizer._commlib_apply(gradients, variables)


class _Distributed:
    """What becomes an optimizer's own."""

    @as_it_is
    def apply(self, grads, trainable_variables=None):
        """As keras.Optimizer.apply, of the gradients of all ranks."""
        state, gradients = state_of(self), list(grads)
        if trainable_variables is None and not self.built:
            return super().apply(gradients, None)  # which says what is wrong
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        build(self, variables)
        self._check_variables_are_known(variables)
        if len(gradients) != len(variables) or all(gradient is None for gradient in gradients):
            return super().apply(gradients, variables)  # ditto
        if state.overlap is not None and state.overlap.takes(gradients, variables):
            return None
        if state.reduction.op is commlib.Adasum:
            gradients = state.reduction.scale_local(gradients, variables)
            gradients = gradients if self.gradient_accumulation_steps else state.multiplied(gradients)
            return combined_step(lambda: self._commlib_apply(gradients, variables), variables, state.reduction, state.exchange.name)
        if self.gradient_accumulation_steps:
            return super().apply(gradients, variables)
        reduced, others_have = state.fill_and_reduce(self, list(gradients), variables)
        return either(others_have, lambda: self._commlib_apply(reduced, variables), lambda: self._commlib_apply(
            [None if gradient is None else one for gradient, one in zip(gradients, reduced)], variables))  # fmt: skip

    def _commlib_apply(self, gradients, variables):
        super().apply(gradients, variables)

    def _backend_apply_gradients(self, grads, trainable_variables):
        if self.gradient_accumulation_steps:
            state_of(self).passed = list(trainable_variables), places_by_first_use(trainable_variables)
        super()._backend_apply_gradients(grads, trainable_variables)

    def _clip_gradients(self, grads):
        # With gradient accumulation Keras comes here in the last pass only, with the sums.
        if self.gradient_accumulation_steps:
            state = state_of(self)
            is_own_step = state.reduction.op is commlib.Adasum
            grads = state.multiplied(grads) if is_own_step else state.reduce(self, grads, *state.passed)
        return super()._clip_gradients(grads)

    def register_local_var(self, variable):
        """The gradient of this variable stays the rank's own."""
        state_of(self).reduction.add_local(variable)


def _subclass_of(cls):
    """A subclass that reduces, for Keras's serialization the same as the class itself."""
    is_keras_own = getattr(keras.optimizers, cls.__name__, None) is cls
    module = "keras.optimizers" if is_keras_own else cls.__module__
    made = type(cls.__name__, (_Distributed, cls), {"__module__": module, "__doc__": cls.__doc__})
    registered = keras.saving.get_registered_name(cls)
    if registered != cls.__name__:
        from keras.src.saving import object_registration

        object_registration.GLOBAL_CUSTOM_NAMES[made] = registered
    return made


def _swap(optimizer, state):
    optimizer.__dict__[_STATE] = state
    optimizer.__class__ = _subclass_of(type(optimizer))


def _restore(optimizer):
    """The optimizer as the user made it; returns its State."""
    optimizer.__class__ = type(optimizer).__mro__[2]  # after ours, and _Distributed
    return optimizer.__dict__.pop(_STATE)


def move_outward(optimizer):
    """Moves what commlib does from an optimizer to the LossScaleOptimizer that Keras has put around it; says if it did.

    That one skips a step if a gradient is not finite: all ranks must see the same gradients there, the reduced ones, or some
    would skip it and others wait for them.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is None or state_of(inner) is None:
        return False
    _swap(optimizer, _restore(inner))
    return True


def _watch_loss_scaling():
    """From now on a LossScaleOptimizer around a distributed optimizer, as `compile` makes them, takes its part over."""
    cls = keras.optimizers.LossScaleOptimizer
    original = cls.apply
    if hasattr(original, "commlib_original"):
        return

    @as_it_is
    def apply(self, grads, trainable_variables=None):
        if move_outward(self):
            return self.apply(grads, trainable_variables)  # which is another method now
        return original(self, grads, trainable_variables)

    apply.commlib_original = original
    cls.apply = apply


def _check_optimizer(optimizer):
    if isinstance(optimizer, tf.compat.v1.train.Optimizer):
        raise ValueError("commlib.tensorflow works with Keras 3's optimizers, not with tf.compat.v1.train: use keras.optimizers, "
                         "or a DistributedGradientTape")  # fmt: skip
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(f"DistributedOptimizer takes an optimizer of keras.optimizers, not {optimizer!r}; by name: "
                         "keras.optimizers.get(name)")  # fmt: skip
    if keras.config.backend() != "tensorflow":
        raise ValueError(f"Keras runs on {keras.config.backend()}: set KERAS_BACKEND=tensorflow before it is imported")
    inner = getattr(optimizer, "inner_optimizer", None)
    if state_of(optimizer) is not None or (inner is not None and state_of(inner) is not None):
        raise ValueError(f"the optimizer {optimizer.name} is distributed already")


def _accumulating(optimizer, passes):
    """Lets Keras add up gradients of several backward passes.

    Raises:
        ValueError: no such number, or too late.
    """
    if type(passes) is not int or passes < 1:
        raise ValueError(f"backward_passes_per_step must be an int of at least 1, not {passes!r}")
    if passes == 1:
        return
    target = getattr(optimizer, "inner_optimizer", optimizer)
    if target.gradient_accumulation_steps not in (None, passes):
        raise ValueError(f"backward_passes_per_step={passes}, but the optimizer has gradient_accumulation_steps="
                         f"{target.gradient_accumulation_steps}: give one of them")  # fmt: skip
    if optimizer.built or target.built:
        raise ValueError("backward_passes_per_step needs an optimizer that has made no step yet: make a new one")
    target.gradient_accumulation_steps = passes


def DistributedOptimizer(optimizer, name=None, device_dense="", device_sparse="", compression=Compression.none,
                         sparse_as_dense=False, gradient_predivide_factor=1.0, op=commlib.Average, backward_passes_per_step=1,
                         average_aggregated_gradients=False, num_groups=0, groups=None, process_set=global_process_set,
                         scale_local_gradients=True):  # fmt: skip
    """Makes a Keras optimizer apply the gradients of all ranks, each sent as soon as backward has made it.

    Args:
        optimizer: of keras.optimizers, also one that was loaded. It stays the same object.
        name: the first part of the operations' names; None: by the number of optimizers that were made. Equal on all ranks.
        compression: what travels; one of Compression.
        sparse_as_dense: gradients that are tf.IndexedSlices are made dense, and summed by rows, before they travel.
        gradient_predivide_factor: with Average: divides each contribution before the sum; the rest of it after.
        op: Average (the default) or Sum, or another. Adasum: each rank makes its own step, and the changes of weights are combined.
        backward_passes_per_step: gradients of so many calls are added up and reduced once: Keras's gradient_accumulation_steps.
        average_aggregated_gradients: they are divided by that number; else, as in Horovod, not.
        groups: gradients that travel together: their number, or lists of variables. None: small neighbours do.
        num_groups: deprecated: as groups, a number.
        process_set: the ranks that take part.
        scale_local_gradients: gradients of variables given to register_local_var are divided by the number of ranks.
        device_dense, device_sparse: accepted for Horovod's sake.

    Returns:
        The optimizer itself.

    Raises:
        ValueError: an optimizer or an argument that is not supported.

    Example:
        >>> import keras, commlib.keras as comm
        >>> comm.init()
        >>> optimizer = comm.DistributedOptimizer(keras.optimizers.SGD(0.1))
        >>> type(optimizer).__name__
        'SGD'
        >>> comm.shutdown()
    """
    _check_optimizer(optimizer)
    reduction = Reduction(compression, sparse_as_dense, op, gradient_predivide_factor, process_set, scale_local_gradients)
    groups = checked_groups(num_groups if groups is None and num_groups else groups)
    _accumulating(optimizer, backward_passes_per_step)
    name = f"DistributedOptimizer.{next(_numbers)}" if name is None else str(name)
    factor = 1 if average_aggregated_gradients else backward_passes_per_step
    if op is commlib.Adasum and getattr(optimizer, "inner_optimizer", optimizer).use_ema:
        raise ValueError("op=Adasum combines changes of weights after the step, and use_ema averages weights in it: use one")
    _watch_loss_scaling()
    _swap(optimizer, State(Exchange(name, reduction, groups), factor))
    return optimizer


def PartialDistributedOptimizer(optimizer, name=None, device_dense="", device_sparse="", compression=Compression.none,
                                sparse_as_dense=False, gradient_predivide_factor=1.0, op=commlib.Average,
                                backward_passes_per_step=1, average_aggregated_gradients=False, num_groups=0, groups=None,
                                process_set=global_process_set, local_layers=None, scale_local_gradients=True):  # fmt: skip
    """As DistributedOptimizer, with layers whose gradients stay the rank's own.

    Args:
        local_layers: a Keras layer, or several; built, so that they have weights.

    Raises:
        ValueError: also for a layer that is not built yet.
    """
    layers = local_layers if isinstance(local_layers, (list, tuple)) else [] if local_layers is None else [local_layers]
    for layer in layers:
        if not layer.built:
            raise ValueError(f"the layer {layer.name} has no weights yet: build the model first, or use register_local_var")
    optimizer = DistributedOptimizer(optimizer, name, device_dense, device_sparse, compression, sparse_as_dense,
                                     gradient_predivide_factor, op, backward_passes_per_step, average_aggregated_gradients,
                                     num_groups, groups, process_set, scale_local_gradients)  # fmt: skip
    for variable in weights_of(layers):
        optimizer.register_local_var(variable)
    return optimizer
