"""What ranks run for test_keras_callbacks.py."""

import os

import keras
import numpy as np
from keras_cases import _text_of, digest, fit, made, state

import commlib.keras as comm


def starts():
    """Digests of models that start from other weights on every rank, before training, and after one that lasted no epoch."""
    model = made("momentum", comm.DistributedOptimizer)
    model.set_weights([weight + comm.rank() for weight in model.get_weights()])
    before = digest(model.get_weights())
    fit(model, "momentum", comm.rank(), comm.size(), epochs=0,
        callbacks=[comm.callbacks.BroadcastGlobalVariablesCallback(1)])  # fmt: skip
    built = digest(model.get_weights())
    late = made("subclassed", comm.DistributedOptimizer)  # which has no weights before its first batch
    keras.utils.set_random_seed(comm.rank())
    fit(late, "subclassed", comm.rank(), comm.size(), callbacks=[comm.callbacks.BroadcastGlobalVariablesCallback(0)])
    return before, built, digest(state(late))


def averages():
    """Metrics after the callback has seen this rank's."""
    logs = {"loss": float(comm.rank()), "accuracy": np.float32(1.0), "text": "stays"}
    comm.callbacks.MetricAverageCallback().on_epoch_end(0, logs)
    return logs


def rates():
    """(learning rates at every batch, what the velocity became) of a staircase, then of a slope, with SGD's correction."""

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen.append(round(float(self.model.optimizer.learning_rate.numpy()), 6))

    made_of = {"staircase": lambda: comm.callbacks.LearningRateScheduleCallback(0.1, lambda epoch: 0.5**epoch, start_epoch=1),
               "constant": lambda: comm.callbacks.LearningRateScheduleCallback(0.1, 0.3, end_epoch=1),
               "warmup": lambda: comm.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=2)}  # fmt: skip
    results = {}
    for name, make in made_of.items():
        seen = []
        model = made("momentum", comm.DistributedOptimizer)
        fit(model, "momentum", comm.rank(), comm.size(), callbacks=[make(), Look()])
        results[name] = seen
    callback = comm.callbacks.LearningRateScheduleCallback(0.1, 0.5)
    callback.set_model(model)
    model.optimizer.learning_rate = 0.1
    before = model.optimizer.momentums[0].numpy()
    callback._set(0.5)
    return results, bool(np.allclose(model.optimizer.momentums[0].numpy(), before * 0.5, rtol=1e-6))


def best(folder):
    """(what it says without a path, whether the best model is there)."""
    model = made("sgd", comm.DistributedOptimizer)
    text = _text_of(lambda: fit(model, "sgd", comm.rank(), comm.size(), callbacks=[comm.callbacks.BestModelCheckpoint("loss")]))
    callback = comm.callbacks.BestModelCheckpoint(monitor="loss")
    callback.filepath = f"{folder}/{comm.rank()}.keras"
    fit(model, "sgd", comm.rank(), comm.size(), callbacks=[callback])
    nothing = _text_of(lambda: comm.callbacks.LearningRateScheduleCallback(None, 1.0))
    return text, os.path.exists(callback.filepath), nothing
