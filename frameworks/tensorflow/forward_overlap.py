"""Keras models whose next step begins while gradients of the last one still travel.

The train function only begins the reductions. The next call of it finishes them: each variable is updated when its own gradient
has come, and TensorFlow lets only that variable's readers wait for it, so the forward pass follows layer by layer. The update is
the optimizer's own, in one piece, which TensorFlow takes apart.

Between two calls some updates are pending. Whoever reads or writes weights or the optimizer's variables then, by a method of the
model or by a variable's value, has them made first: the model's methods and the variables' classes are subclassed for that. This
file knows Keras's train functions; what a gradient travels as is `exchange`'s.
"""

import functools
import inspect
import logging
import threading

import keras
import tensorflow as tf

from commlib import Adasum, CommlibError
from commlib.tensorflow.exchange import known
from commlib.tensorflow.first_use import places_by_first_use
from commlib.tensorflow.native import drop_begun
from commlib.tensorflow.operations import as_it_is, begin, finish, translating
from commlib.tensorflow.optimizer import apply_reduced, move_outward, state_of
from commlib.tensorflow.reduction import variable_of

_log = logging.getLogger("commlib.tensorflow")

_OVERLAP = "_commlib_overlap"
# Methods of a model that read or write weights in ways that a variable does not notice, such as functions traced before.
_READERS = ("evaluate", "predict", "test_on_batch", "predict_on_batch", "save", "save_weights", "load_weights", "export",
            "get_weights", "set_weights")  # fmt: skip


class _Record:
    """What a train step has begun: enough to finish it in any graph."""

    def __init__(self, variables, gradients, parcels):
        self.variables = variables
        self.has_gradient = [gradient is not None for gradient in gradients]
        self.parcels = parcels
        self.forms = [[(tensor.dtype, tensor.shape) for tensor in parcel.tensors] for parcel in parcels]
        for parcel in parcels:
            parcel.tensors = None  # of a graph that is gone by then

    def signature(self):
        """Equal for steps that one and the same function can finish."""
        return [id(variable_of(variable)) for variable in self.variables], self.has_gradient, self.forms


class Overlap:
    """The pending updates of one model, and how its train function makes and leaves them.

    Attributes:
        model: which it is.
        is_pending: whether reductions were begun whose updates are not made.
    """

    def __init__(self, model):
        self.model = model
        self.is_pending = False
        self._optimizer = None
        self._record = None
        self._places = None  # in the forward pass, as the first trace had it: later ones begin with updates
        self._graph = None  # that is being traced
        self._begun = False  # how many ops it had when the step's reductions were begun; False: they were not
        self._landing = False  # whether the step that is being traced makes the updates of the one before
        self._inside = None  # the thread in which weights are read and written by ourselves
        self._functions = ()  # first, later
        self._flush = None
        self._said = set()

    # ---- the train function

    def make(self, force=False):
        """As the model's make_train_function, which this calls."""
        model = self.model
        if model.train_function is not None and not force:
            return model.train_function
        self.flush()
        make = functools.partial(type(model).make_train_function, model, force=True)
        reason = self._unfit()
        if reason is not None:
            self._say(reason)
            make()
            return model.train_function
        self._record, self._places, self._flush = None, None, None
        self._functions = (self._made(make), self._made(make))
        model.train_function = self._run
        return model.train_function

    def _made(self, make):
        make()
        return self.model.train_function

    def _unfit(self):
        """Why this model cannot leave updates pending; None: it can."""
        model, self._optimizer = self.model, None
        if model.optimizer is None:
            return "the model has no optimizer"
        move_outward(model.optimizer)
        state = state_of(model.optimizer)
        if state is None:
            return "the model's optimizer is not a DistributedOptimizer"
        state.overlap = None
        if model.steps_per_execution != 1:
            return "steps_per_execution is not 1"
        if model.run_eagerly:
            return "run_eagerly is on"
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if optimizer.gradient_accumulation_steps:
            return "the optimizer accumulates gradients"
        if optimizer.global_clipnorm or optimizer is not model.optimizer:
            return "the update needs all gradients at once (global_clipnorm, loss scaling)"
        if state.reduction.has_local():
            return "some layers are the rank's own"
        if state.reduction.op is Adasum:
            return "Adasum combines whole steps"
        self._optimizer, state.overlap = model.optimizer, self
        return None

    def _say(self, reason):
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("commlib: no forward overlap, gradients are waited for in every step: %s", reason)

    def _run(self, iterator):
        """The model's train function."""
        landing, self._landing, self._begun = self.is_pending, self.is_pending, False
        self.is_pending = False  # other threads find nothing to do meanwhile
        try:
            with _Inside(self), translating():
                result = self._functions[1 if landing else 0](iterator)
        except (CommlibError, tf.errors.OpError) as error:
            if isinstance(error, tf.errors.OutOfRangeError):
                self.is_pending = landing  # the data ended before anything was done
            else:
                drop_begun()
            raise
        except BaseException:
            self.is_pending = landing  # ditto, or the step could not be traced
            raise
        self.is_pending = self._record is not None
        return result

    def train_step(self, step, data):
        """One step of the model, `step`, as part of a function that TensorFlow traces."""
        if self._inside != threading.get_ident() or self._optimizer is None:
            return step(data)
        if self._landing:
            self._land_after(data)
        self._graph, self._begun = tf.compat.v1.get_default_graph(), False
        result = step(data)
        if self._begun:
            self._check_readers()
        return result

    def takes(self, gradients, variables):
        """Begins the reductions of a step's gradients instead of its optimizer; False: it must wait for them."""
        if self._inside != threading.get_ident():
            self.flush()
            return False
        if self._begun:
            raise ValueError("train_step applies gradients twice: train this model without enable_forward_overlap")
        state = state_of(self._optimizer)
        if state.lacking(gradients, variables):
            self._say("some variables have no gradients")
            self._refuse_change()
            return False
        if self._places is None:
            self._places = places_by_first_use(variables)
        parcels = state.parcels(self._optimizer, gradients, variables, self._places)
        if any(parcel.kind != "allreduce" for parcel in parcels):
            self._say("some gradients are tf.IndexedSlices (sparse_as_dense=True makes them dense)")
            self._refuse_change()
            return False
        with tf.control_dependencies([state.agreed(self._optimizer, gradients, variables, zeros=True)]):
            for parcel in parcels:
                begin(parcel.tensors[0], parcel.names[0], state.reduction.process_set, priority=parcel.priority, **parcel.wish)
        record = _Record(list(variables), gradients, parcels)
        if self._record is not None and record.signature() != self._record.signature():
            self._refuse_change()
        self._record = record
        self._guard(variables)
        self._begun = len(self._graph.get_operations())
        return True

    def _refuse_change(self):
        if self._record is not None:
            raise ValueError("train_step gives gradients of other variables, or of other shapes, than it did before: train this "
                             "model without enable_forward_overlap")  # fmt: skip

    def _check_readers(self):
        """Refuses a step that uses, after its update, weights which are updated later."""
        handles = {id(self._graph.capture(variable_of(variable).handle)): variable
                   for variable in [*self._record.variables, *self._optimizer.variables]}  # fmt: skip
        for operation in self._graph.get_operations()[self._begun :]:
            for tensor in operation.inputs:
                if id(tensor) in handles:
                    path = handles[id(tensor)].path
                    raise ValueError(f"train_step uses the variable {path} after the optimizer's update, which forward overlap "
                                     "makes only later: train this model without enable_forward_overlap")  # fmt: skip

    # ---- pending updates

    def _land_after(self, data):
        """Makes them in the graph that is being traced. No batch, no updates: they stay pending when the data end.

        Only ops with effects are made to wait for the batch: how TensorFlow may rewrite arithmetic, and so the bits, depends on
        what it waits for.
        """
        # What waits for a function's argument itself waits for nothing once TensorFlow has inlined the function.
        batch = [tf.identity(part).op for part in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(part)]
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        self._land()
        for operation in graph.get_operations()[before:]:
            if operation.op_def.is_stateful and operation.type != "Placeholder":
                operation._add_control_inputs(batch)

    def _land(self):
        """Makes them, in the graph that is being traced or at once."""
        record, state = self._record, state_of(self._optimizer)
        results = [[self._finished(parcel, *forms[0])] for parcel, forms in zip(record.parcels, record.forms)]
        nothing = [None] * len(record.variables)
        reduced = state.finish(self._optimizer, record.parcels, results, nothing, record.variables)
        apply_reduced(self._optimizer, reduced, record.variables)

    def _finished(self, parcel, dtype, shape):
        process_set = state_of(self._optimizer).reduction.process_set
        return known(finish(parcel.names[0], dtype, shape, process_set, priority=parcel.priority, **parcel.wish), shape)

    def flush(self):
        """Makes the pending updates now; returns when they are made.

        Raises:
            CommlibError: a reduction has failed.
        """
        if not self.is_pending or self._inside == threading.get_ident():
            return
        self.is_pending = False
        if self._flush is None:
            self._flush = tf.function(self._land, autograph=False)
        with _Inside(self), translating():
            try:
                self._flush()
            except BaseException:
                drop_begun()
                raise

    def _guard(self, variables):
        for variable in [*variables, *self._optimizer.variables]:
            if isinstance(variable, keras.Variable) and not isinstance(variable, _Guarded):
                variable.__dict__[_OVERLAP] = self
                variable.__class__ = _guarded(type(variable))
            elif isinstance(variable, _Guarded):
                variable.__dict__[_OVERLAP] = self


class _Inside:
    """Within it weights are read and written by the train function, or by the updates."""

    def __init__(self, overlap):
        self._overlap = overlap

    def __enter__(self):
        self._overlap._inside = threading.get_ident()

    def __exit__(self, kind, error, traceback):
        self._overlap._inside = None


# ---- variables and models that have pending updates made first


class _Guarded:
    """What becomes a variable's own."""

    @property
    def value(self):
        """As keras.Variable.value, after all updates."""
        self.__dict__[_OVERLAP].flush()
        return super().value

    def assign(self, value):
        """As keras.Variable.assign, after all updates."""
        self.__dict__[_OVERLAP].flush()
        return super().assign(value)


@functools.lru_cache(maxsize=None)
def _guarded(cls):
    return type(cls.__name__, (_Guarded, cls), {"__module__": cls.__module__})


class _Flush(keras.callbacks.Callback):
    """Makes updates before other callbacks see the end of an epoch or of training."""

    def __init__(self, overlap):
        super().__init__()
        self._flush = overlap.flush

    def on_epoch_end(self, epoch, logs=None):
        self._flush()

    def on_train_end(self, logs=None):
        self._flush()


def _flushing(overlap, method):
    @functools.wraps(method)
    def flushing(*args, **kwargs):
        overlap.flush()
        return method(*args, **kwargs)

    return flushing


def _fitting(overlap, method):
    @functools.wraps(method)
    def fit(*args, **kwargs):
        bound = inspect.signature(method).bind(*args, **kwargs)
        given, flush = bound.arguments.get("callbacks"), _Flush(overlap)
        if isinstance(given, keras.callbacks.CallbackList):
            flush.set_model(overlap.model)
            given.callbacks.insert(0, flush)
        else:
            bound.arguments["callbacks"] = [flush, *tf.nest.flatten(given if given is not None else [])]
        result = method(*bound.args, **bound.kwargs)
        overlap.flush()
        return result

    return fit


def enable_forward_overlap(model):
    """Lets every layer's forward pass start as soon as its own weights are updated, while other gradients still travel.

    Weights after any number of steps are bit by bit those of training without it. They are complete whenever Keras lets you
    read them: in callbacks, by evaluate, predict, save, get_weights and `variable.value`. Functions of your own that were
    compiled with tf.function and read weights between two steps need `synchronize(model)` first.

    Where there is nothing to gain (global_clipnorm and loss scaling need all gradients at once) or updates cannot wait
    (steps_per_execution, run_eagerly, gradient accumulation, sparse gradients, local layers) training goes on as without it, and
    the log says so once.

    Args:
        model: a keras.Model, before or after compile() with a DistributedOptimizer, not while it trains.

    Returns:
        The model.

    Raises:
        ValueError: no Keras model. In fit: a train_step of your own that uses weights after its update, or updates twice.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"enable_forward_overlap takes a keras.Model, not {model!r}")
    if _OVERLAP in model.__dict__:
        return model
    overlap = Overlap(model)
    step = model.train_step
    own = {name: _flushing(overlap, getattr(model, name)) for name in _READERS if hasattr(model, name)}
    own["fit"] = _fitting(overlap, model.fit)
    own["train_step"] = as_it_is(lambda data: overlap.train_step(step, data))
    own["make_train_function"] = overlap.make
    # Past Keras's tracking, which would take these for the model's parts.
    model.__dict__.update({**own, _OVERLAP: overlap})
    model.train_function = None
    return model


def synchronize(model):
    """Returns when all updates of a model are made; with enable_forward_overlap some may be pending after a batch.

    Raises:
        CommlibError: a reduction has failed.
    """
    overlap = model.__dict__.get(_OVERLAP)
    if overlap is not None:
        overlap.flush()
