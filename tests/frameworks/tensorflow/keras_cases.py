"""What ranks run for test_keras_*.py: one model, trained on the whole batch by one process and on shares of it by all ranks."""

import hashlib
import os
import signal

import keras
import numpy as np
import tensorflow as tf

import commlib.keras as comm
import commlib.tensorflow

BATCH, STEPS = 12, 20  # of all ranks together; every size of the tests divides it
FEATURES, CLASSES = 10, 4

rng = np.random.default_rng(20)
X = rng.normal(size=(BATCH * STEPS // 2, FEATURES)).astype("float32")
Y = rng.integers(0, CLASSES, BATCH * STEPS // 2)
WORDS = rng.integers(0, 50, (BATCH * STEPS // 2, 5))


# ---- models


def functional():
    """Layers of several sizes, one of them used twice."""
    inputs = keras.Input((FEATURES,))
    twice = keras.layers.Dense(FEATURES, activation="tanh")
    hidden = keras.layers.Dense(200, activation="relu")(twice(twice(inputs)))  # 8 kB
    hidden = keras.layers.Dense(100)(hidden)  # 80 kB: travels by itself
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(keras.layers.LayerNormalization()(hidden)))


class Subclassed(keras.Model):
    """Registers its layers in another order than it uses them in."""

    def __init__(self):
        super().__init__()
        self.last = keras.layers.Dense(CLASSES)
        self.first = keras.layers.Dense(30, activation="relu")

    def call(self, inputs):
        return self.last(self.first(inputs))


def embedding():
    """Gradients that are tf.IndexedSlices."""
    inputs = keras.Input((5,), dtype="int32")
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(keras.layers.Flatten()(keras.layers.Embedding(50, 6)(inputs))))


class OwnStep(keras.Model):
    """A train_step of the user's own, with a tape."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


class WrongStep(keras.Model):
    """A train_step with a call that is wrong."""

    def train_step(self, data):
        return {"loss": comm.allreduce(1.0, op="sum")}


class TapeStep(keras.Model):
    """Horovod's form: a tape whose gradients are those of all ranks, and an optimizer that knows nothing of them."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        tape = commlib.tensorflow.DistributedGradientTape(tape)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


def own_step():
    """The functional model with OwnStep's."""
    model = functional()
    return OwnStep(model.inputs, model.outputs)


# ---- cases: model, optimizer, options of compile


def _schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.7)


def _loss_scaled():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0, dynamic_growth_steps=3)


def _sgd(**options):
    return lambda: keras.optimizers.SGD(0.1, **options)


CASES = {
    "sgd": (functional, _sgd(), {}),
    "momentum": (functional, _sgd(momentum=0.9, nesterov=True), {}),
    "adam": (functional, lambda: keras.optimizers.Adam(0.001, epsilon=1e-3), {}),
    "adamw": (functional, lambda: keras.optimizers.AdamW(0.001, weight_decay=0.1, epsilon=1e-3), {}),
    "clipnorm": (functional, _sgd(clipnorm=0.1), {}),
    "clipvalue": (functional, _sgd(clipvalue=0.01), {}),
    "global_clipnorm": (functional, _sgd(global_clipnorm=0.2, weight_decay=0.01), {}),
    "ema": (functional, _sgd(use_ema=True, ema_momentum=0.8), {}),
    "ema that overwrites": (functional, _sgd(use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3), {}),
    "schedule": (functional, lambda: keras.optimizers.SGD(_schedule(), momentum=0.9), {}),
    "loss scaling": (functional, _loss_scaled, {}),
    "loss scale factor": (functional, _sgd(loss_scale_factor=16.0), {}),
    "accumulation": (functional, _sgd(gradient_accumulation_steps=5, momentum=0.9), {}),
    "loop": (functional, _sgd(momentum=0.9), {"steps_per_execution": 4}),
    "eager": (functional, _sgd(momentum=0.9), {"run_eagerly": True}),
    "subclassed": (Subclassed, _sgd(momentum=0.9), {}),
    "embedding": (embedding, lambda: keras.optimizers.Adam(0.01, epsilon=1e-2), {}),
    "own step": (own_step, _sgd(momentum=0.9), {"metrics": None}),
}


def made(case, distribute=None):
    """A compiled model, the same on every rank, its optimizer passed through `distribute`."""
    new_model, new_optimizer, options = CASES[case]
    keras.utils.set_random_seed(7)
    model, optimizer = new_model(), new_optimizer()
    optimizer = optimizer if distribute is None else distribute(optimizer)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **{"metrics": ["accuracy"], **options})
    return model


def share(array, rank, size):
    """One rank's part of every batch."""
    batches = array.reshape(-1, BATCH, *array.shape[1:])
    return batches[:, rank::size].reshape(-1, *array.shape[1:])


def fit(model, case, rank, size, **options):
    """20 steps, in two epochs."""
    x = WORDS if case == "embedding" else X
    options = {"verbose": 0, "shuffle": False, "epochs": 2, **options}
    return model.fit(share(x, rank, size), share(Y, rank, size), batch_size=BATCH // size, **options)


def state(model):
    """All numbers of a model and its optimizer."""
    return [keras.ops.convert_to_numpy(variable) for variable in [*model.weights, *model.optimizer.variables]]


def digest(arrays):
    """Equal for equal bits."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def difference(mine, reference):
    """The largest difference of two lists of arrays, relative to the largest number of its array."""
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3)) if a.size else 0.0 for a, b in zip(mine, reference))


def trained(case, distribute=comm.DistributedOptimizer):
    """A model that all ranks have trained."""
    model = made(case, distribute)
    fit(model, case, comm.rank(), comm.size())
    return model


def against_one_process(case):
    """(difference from one process that sees the whole batch, digest)."""
    model = trained(case)
    if comm.rank() != 0:
        return 0.0, digest(state(model))
    alone = made(case)
    fit(alone, case, 0, 1)
    return difference(model.get_weights(), alone.get_weights()), digest(state(model))


def tape_in_fit():
    """(difference from one process that sees the whole batch, digest) of a train_step with a DistributedGradientTape."""
    keras.utils.set_random_seed(7)
    model = functional()
    model = TapeStep(model.inputs, model.outputs)
    model.compile(CASES["momentum"][1](), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model, "momentum", comm.rank(), comm.size())
    alone = made("momentum")
    fit(alone, "momentum", 0, 1)
    return difference(model.get_weights(), alone.get_weights()), digest(state(model))


def wrong_step():
    """What fit says of a wrong call in it, in a function and eagerly."""
    said = []
    for eagerly in (False, True):
        model = functional()
        model = WrongStep(model.inputs, model.outputs)
        model.compile(comm.DistributedOptimizer(keras.optimizers.SGD(0.1)), run_eagerly=eagerly)
        said.append(_text_of(lambda model=model: fit(model, "sgd", comm.rank(), comm.size())))
    return said


def overlapped(case):
    """The same as `trained`, with forward overlap; and whether updates were pending between steps."""
    pending = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            pending.append(self.model._commlib_overlap.is_pending)

    model = comm.enable_forward_overlap(made(case, comm.DistributedOptimizer))
    fit(model, case, comm.rank(), comm.size(), callbacks=Watch())
    return model, pending


def names():
    """Of all cases."""
    return list(CASES)


# ---- what is not a matter of numbers only


def half_precision():
    """mixed_float16, for which compile() itself puts a LossScaleOptimizer around ours; one rank has a gradient too large."""
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        model = made("sgd", comm.DistributedOptimizer)
    finally:
        keras.mixed_precision.set_dtype_policy("float32")
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    fit(model, "sgd", comm.rank(), comm.size(), epochs=1)
    before = state(model)
    scale = float(model.optimizer.dynamic_scale)
    x = share(X, comm.rank(), comm.size())[: BATCH // comm.size()].copy()
    if comm.rank() == 1:
        x[0] = np.inf
    model.train_on_batch(x, share(Y, comm.rank(), comm.size())[: BATCH // comm.size()])
    after = state(model)
    skipped = all(np.array_equal(a, b) for a, b in zip(before[: len(model.weights)], after))
    fit(model, "sgd", comm.rank(), comm.size(), epochs=1)
    return skipped, float(model.optimizer.dynamic_scale) < scale, digest(state(model))


def passes(average):
    """Horovod's backward_passes_per_step against the same number of larger batches: weights, and how many steps were made."""
    model = trained("sgd", lambda optimizer: comm.DistributedOptimizer(
        optimizer, backward_passes_per_step=5, average_aggregated_gradients=average))  # fmt: skip
    keras.utils.set_random_seed(7)
    alone = functional()
    rate = 0.1 if average else 0.5
    alone.compile(keras.optimizers.SGD(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    alone.fit(X, Y, batch_size=5 * BATCH, shuffle=False, epochs=2, verbose=0)
    return difference(model.get_weights(), alone.get_weights()), int(model.optimizer.iterations)


def partly():
    """Digests of the weights of layers that are the rank's own, and of the others; then of two groups and of three lists."""
    model = made("sgd")
    own = model.layers[-1]
    model.compile(comm.PartialDistributedOptimizer(keras.optimizers.SGD(0.1), local_layers=own), model.loss)
    fit(model, "sgd", comm.rank(), comm.size())
    others = [weight for layer in model.layers[:-1] for weight in layer.get_weights()]
    whole = digest(state(trained("sgd")))
    grouped = digest(state(trained("sgd", lambda optimizer: comm.DistributedOptimizer(optimizer, groups=2))))
    model_of_lists = made("sgd")
    lists = [layer.trainable_weights for layer in model_of_lists.layers if layer.trainable_weights][1:]
    model_of_lists.compile(comm.DistributedOptimizer(keras.optimizers.SGD(0.1), groups=lists), model_of_lists.loss)
    fit(model_of_lists, "sgd", comm.rank(), comm.size())
    compressed = trained("sgd", lambda o: comm.DistributedOptimizer(o, compression=comm.Compression.bf16, name="bf16"))
    return (digest(own.get_weights()), digest(others), whole == grouped, digest(state(model_of_lists)) == whole,
            digest(state(compressed)))  # fmt: skip


def saved(folder):
    """Rank 0 saves; returns what a program without commlib must find in the file."""
    model = trained("adam")
    if comm.rank() == 0:
        model.save(f"{folder}/model.keras")
    comm.allreduce(0.0)  # it is there
    again = comm.load_model(f"{folder}/model.keras")
    same = digest(state(model)) == digest(state(again))
    fit(model, "adam", comm.rank(), comm.size())
    fit(again, "adam", comm.rank(), comm.size())
    return same, digest(state(model)) == digest(state(again)), type(again.optimizer).__name__, int(again.optimizer.iterations)


def refused():
    """What wrong calls say."""
    sgd = keras.optimizers.SGD
    built = sgd(0.1)
    built.build([keras.Variable([1.0])])
    compiled = made("sgd", comm.DistributedOptimizer)
    compiled.jit_compile = True
    calls = {
        "no optimizer": lambda: comm.DistributedOptimizer("sgd"),
        "twice": lambda: comm.DistributedOptimizer(comm.DistributedOptimizer(sgd(0.1))),
        "tf 1": lambda: comm.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(0.1)),
        "passes": lambda: comm.DistributedOptimizer(built, backward_passes_per_step=2),
        "no passes": lambda: comm.DistributedOptimizer(sgd(0.1), backward_passes_per_step=0),
        "both": lambda: comm.DistributedOptimizer(sgd(0.1, gradient_accumulation_steps=2), backward_passes_per_step=3),
        "predivide": lambda: comm.DistributedOptimizer(sgd(0.1), op=comm.Sum, gradient_predivide_factor=2.0),
        "adasum": lambda: comm.DistributedOptimizer(sgd(0.1, use_ema=True), op=comm.Adasum),
        "groups": lambda: comm.DistributedOptimizer(sgd(0.1), groups="all"),
        "layer": lambda: comm.PartialDistributedOptimizer(sgd(0.1), local_layers=keras.layers.Dense(1)),
        "xla": lambda: fit(compiled, "sgd", comm.rank(), comm.size()),
    }
    return {name: _text_of(call) for name, call in calls.items()}


def _text_of(call):
    try:
        call()
    except (TypeError, ValueError, RuntimeError, tf.errors.OpError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def mismatched():
    """What fit says if one rank's model has another shape, and that all is well afterwards."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES + comm.rank())(inputs))
    model.compile(comm.DistributedOptimizer(keras.optimizers.SGD(0.1)), keras.losses.SparseCategoricalCrossentropy(True))
    text = _text_of(lambda: fit(model, "sgd", comm.rank(), comm.size()))
    return text, digest(state(trained("sgd")))


def lost():
    """What fit says if rank 1 dies in it."""

    class Die(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3 and comm.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    model = made("sgd", comm.DistributedOptimizer)
    return _text_of(lambda: fit(model, "sgd", comm.rank(), comm.size(), callbacks=[Die()]))
