"""What ranks run for test_keras_overlap.py: models whose updates are pending between steps, beside models that wait."""

import os
import signal

import keras
import numpy as np
import tensorflow as tf
from keras_cases import (
    BATCH, CLASSES, FEATURES, STEPS, X, Y, _text_of, digest, fit, functional, made, overlapped, share, state, trained,
)  # fmt: skip

import commlib.keras as comm


def against_waiting(case):
    """(whether forward overlap gives the same bits, whether updates were pending after every step, digest)."""
    model, pending = overlapped(case)
    bits = digest(state(model))
    return bits == digest(state(trained(case))), all(pending), bits


# ---- every way to read, or to write


def _batch(number):
    each = BATCH // comm.size()
    part = slice(each * number, each * (number + 1))
    return share(X, comm.rank(), comm.size())[part], share(Y, comm.rank(), comm.size())[part]


def _saved(model, folder):
    path = f"{folder}/{comm.rank()}.keras"
    model.save(path)
    return keras.models.load_model(path).get_weights()


def _weights_saved(model, folder):
    path = f"{folder}/{comm.rank()}.weights.h5"
    model.save_weights(path)
    again = functional()
    again.load_weights(path)
    return again.get_weights()


def _checkpointed(model, folder):
    path = tf.train.Checkpoint(model=model).write(f"{folder}/{comm.rank()}.checkpoint")
    again = functional()
    tf.train.Checkpoint(model=again).read(path).expect_partial()
    return again.get_weights()


def _set_rate(model, folder):
    model.optimizer.learning_rate = 0.05
    return model.get_weights()


READERS = {
    "get_weights": lambda model, folder: model.get_weights(),
    "numpy": lambda model, folder: [variable.numpy() for variable in model.trainable_variables],
    "value": lambda model, folder: [model.trainable_variables[0].value],
    "call": lambda model, folder: [model(X)],
    "evaluate": lambda model, folder: model.evaluate(X, Y, verbose=0),
    "predict": lambda model, folder: [model.predict(X, verbose=0)],
    "predict_on_batch": lambda model, folder: [model.predict_on_batch(X)],
    "test_on_batch": lambda model, folder: model.test_on_batch(X, Y),
    "iterations": lambda model, folder: [model.optimizer.iterations.numpy()],
    "momentum": lambda model, folder: [model.optimizer.momentums[0].numpy()],
    "save": _saved,
    "save_weights": _weights_saved,
    "checkpoint": _checkpointed,
    "learning rate": _set_rate,
    "synchronize": lambda model, folder: comm.synchronize(model) or [],
}  # fmt: skip


def read(folder):
    """What each reader found wrong after a step, compared with a model that waits."""
    pair = [comm.enable_forward_overlap(made("momentum", comm.DistributedOptimizer)), made("momentum", comm.DistributedOptimizer)]
    wrong = []
    for number, (name, reader) in enumerate(READERS.items()):
        for model in pair:
            model.train_on_batch(*_batch(number % (STEPS // 2)))
        overlap = pair[0]._commlib_overlap
        if not overlap.is_pending:
            wrong.append(f"{name}: nothing was pending")
        first, second = (reader(model, folder) for model in pair)
        if digest(map(np.asarray, first)) != digest(map(np.asarray, second)):
            wrong.append(f"{name}: other numbers")
        if overlap.is_pending:
            wrong.append(f"{name}: still pending")
    return wrong


def callbacks(folder):
    """Digests of training with callbacks that read and write at batches and epochs, with overlap and without: what they saw."""
    seen = []
    for distribute in (comm.enable_forward_overlap, lambda model: model):
        mine = []

        class Look(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None, mine=mine):
                if batch % 3 == 0:
                    mine.append(digest(self.model.get_weights()))

            def on_epoch_end(self, epoch, logs=None, mine=mine):
                mine.append(digest(state(self.model)))

        model = distribute(made("momentum", comm.DistributedOptimizer))
        path = f"{folder}/{comm.rank()}-{len(seen)}.weights.h5"
        history = fit(model, "momentum", comm.rank(), comm.size(), validation_data=(X, Y), callbacks=[
            Look(), comm.callbacks.BroadcastGlobalVariablesCallback(0), comm.callbacks.MetricAverageCallback(),
            comm.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=1),
            keras.callbacks.ModelCheckpoint(path, save_freq=4, save_weights_only=True)])  # fmt: skip
        mine.append({name: list(map(float, values)) for name, values in history.history.items()})
        model.load_weights(path)
        mine.append(digest(state(model)))
        seen.append(mine)
    return seen


def unknown_length():
    """Whether a data set that says nothing of its length ends well: the last updates are made, none twice.

    Only weights are compared: Keras's own train function counts one iteration too many when such data end.
    """
    digests = []
    for distribute in (comm.enable_forward_overlap, lambda model: model):
        model = distribute(made("momentum", comm.DistributedOptimizer))
        x, y = share(X, comm.rank(), comm.size()), share(Y, comm.rank(), comm.size())
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH // comm.size()).filter(lambda x, y: True)
        model.fit(data, epochs=3, verbose=0)
        digests.append(digest(model.get_weights()))
    return digests[0] == digests[1]


# ---- what goes wrong


class ReadsAfterwards(keras.Model):
    """Looks at its weights after the update."""

    def train_step(self, data):
        logs = super().train_step(data)
        return {**logs, "norm": tf.reduce_sum(self.trainable_variables[0])}


class UpdatesTwice(keras.Model):
    """Two updates in one step."""

    def train_step(self, data):
        super().train_step(data)
        return super().train_step(data)


def refused():
    """What enable_forward_overlap and fit say of models that it cannot serve."""
    said = [_text_of(lambda: comm.enable_forward_overlap("model"))]
    for cls in (ReadsAfterwards, UpdatesTwice):
        base = functional()
        model = cls(base.inputs, base.outputs)
        model.compile(comm.DistributedOptimizer(keras.optimizers.SGD(0.1)), keras.losses.SparseCategoricalCrossentropy(True))
        comm.enable_forward_overlap(model)
        said.append(_text_of(lambda model=model: fit(model, "sgd", comm.rank(), comm.size())))
    return said


def mismatched():
    """What fit says if one rank's model has another shape, and that all is well afterwards."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES + comm.rank())(inputs))
    model.compile(comm.DistributedOptimizer(keras.optimizers.SGD(0.1)), keras.losses.SparseCategoricalCrossentropy(True))
    text = _text_of(lambda: fit(comm.enable_forward_overlap(model), "sgd", comm.rank(), comm.size()))
    return text, digest(state(overlapped("sgd")[0]))


def lost():
    """What fit says if rank 1 dies in it."""

    class Die(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3 and comm.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    model = comm.enable_forward_overlap(made("sgd", comm.DistributedOptimizer))
    return _text_of(lambda: fit(model, "sgd", comm.rank(), comm.size(), callbacks=[Die()]))
