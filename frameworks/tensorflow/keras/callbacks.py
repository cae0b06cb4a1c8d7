"""Keras callbacks with Horovod's names and arguments: equal starts, averaged metrics, learning rates for several ranks."""

import keras
import tensorflow as tf

import commlib
from commlib.process_sets import global_process_set
from commlib.tensorflow.collectives import allreduce
from commlib.tensorflow.optimizer import move_outward
from commlib.tensorflow.variables import broadcast_variables


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Makes the model and its optimizer start from one rank's values: new ones from its random numbers, loaded ones from its file.

    It is done before the first batch, or after it for a model that is built by its first batch.

    Args:
        root_rank: whose values everybody gets; its rank among all, also with a process set.
        device: accepted for Horovod's sake.
        process_set: the ranks that take part.
    """

    def __init__(self, root_rank, device="", process_set=global_process_set):
        super().__init__()
        self.root_rank = root_rank
        self.process_set = process_set
        self.broadcast_done = False

    def on_train_begin(self, logs=None):
        """Before the first batch."""
        if self.model.built and self.model.weights:
            self._broadcast()

    def on_train_batch_end(self, batch, logs=None):
        """After the first one, if need be."""
        self._broadcast()

    def _broadcast(self):
        if self.broadcast_done:
            return
        optimizer = self.model.optimizer
        if optimizer is not None:
            move_outward(optimizer)
            if not optimizer.built:
                optimizer.build(self.model.trainable_variables)
        # Not `variables`: metrics and the seeds of random numbers stay the rank's own.
        state = [*self.model.weights, *(optimizer.variables if optimizer is not None else [])]
        broadcast_variables(state, self.root_rank, self.process_set)
        self.broadcast_done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages an epoch's metrics over the ranks, for all callbacks that come after it in the list.

    Args:
        device: accepted for Horovod's sake.
        process_set: the ranks that take part; all of them must have metrics of the same names.
    """

    def __init__(self, device="", process_set=global_process_set):
        super().__init__()
        self.process_set = process_set

    def on_epoch_end(self, epoch, logs=None):
        """Replaces the numbers among `logs`."""
        names = sorted(name for name, value in (logs or {}).items() if _is_number(value))
        if names:
            mine = tf.constant([float(logs[name]) for name in names], tf.float64)
            logs.update(zip(names, allreduce(mine, process_set=self.process_set).numpy().tolist()))


def _is_number(value):
    return isinstance(value, (int, float)) or (hasattr(value, "dtype") and not getattr(value, "shape", ()))


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to initial_lr * multiplier(epoch) between two epochs.

    Args:
        initial_lr: what the multiplier multiplies.
        multiplier: a function of the epoch, or a number. Of whole epochs if `staircase`, else of epoch + batch / steps_per_epoch.
        start_epoch: the first epoch in which it applies,
        end_epoch: and the one in which it does not any more; None: never.
        staircase: changes once an epoch, at its first batch; else at every batch.
        momentum_correction: when the rate changes, velocities of SGD change with it: they hold sums of rate * gradient
            (Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 3).
        steps_per_epoch: batches of an epoch; None: as fit() knows.

    Raises:
        ValueError: no initial_lr; or, at the start of training, steps_per_epoch is not known.
    """

    def __init__(self, initial_lr, multiplier, start_epoch=0, end_epoch=None, staircase=True, momentum_correction=True,
                 steps_per_epoch=None):  # fmt: skip
        super().__init__()
        if initial_lr is None:
            raise ValueError("Parameter `initial_lr` is required")
        is_function = callable(multiplier)
        self.initial_lr = initial_lr
        self.multiplier = multiplier if is_function else lambda epoch: multiplier
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase or not is_function
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = None

    def on_train_begin(self, logs=None):
        """Finds out how many batches an epoch has."""
        if self.staircase or self.steps_per_epoch:
            return
        self.steps_per_epoch = (self.params or {}).get("steps")
        if not self.steps_per_epoch:
            raise ValueError("Could not autodetect the number of steps per epoch. Please specify the steps_per_epoch parameter "
                             f"to the {type(self).__name__}()")  # fmt: skip

    def on_epoch_begin(self, epoch, logs=None):
        """Notes the epoch."""
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        """Sets the rate."""
        epoch = self.current_epoch
        if epoch < self.start_epoch or (self.end_epoch is not None and epoch >= self.end_epoch):
            return
        if not self.staircase:
            self._set(self.multiplier(epoch + batch / self.steps_per_epoch))
        elif batch == 0:
            self._set(self.multiplier(epoch))

    def on_epoch_end(self, epoch, logs=None):
        """Reports the rate."""
        if logs is not None:
            logs["lr"] = self._rate()

    def _rate(self):
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _set(self, multiple):
        old, new = self._rate(), self.initial_lr * multiple
        if new == old:
            return
        self.model.optimizer.learning_rate = new
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if self.momentum_correction and old > 0:
            for velocity in getattr(optimizer, "momentums", []) if isinstance(optimizer, keras.optimizers.SGD) else []:
                velocity.assign(velocity * (new / old))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from initial_lr / size to initial_lr, a little with every batch of the first epochs.

    Args:
        initial_lr: what it shall be, for all ranks together.
        warmup_epochs: after how many epochs.
        momentum_correction, steps_per_epoch: as for LearningRateScheduleCallback.
        verbose: 1: says when it is done.
    """

    def __init__(self, initial_lr, warmup_epochs=5, momentum_correction=True, steps_per_epoch=None, verbose=0):
        def multiplier(epoch):
            epoch += 1.0 / self.steps_per_epoch  # round numbers at the ends of epochs
            return 1.0 / commlib.size() * (epoch * (commlib.size() - 1) / warmup_epochs + 1)

        super().__init__(initial_lr, multiplier, 0, warmup_epochs, False, momentum_correction, steps_per_epoch)
        self.verbose = verbose

    def on_epoch_end(self, epoch, logs=None):
        """Reports the rate, and the end of the warm-up."""
        super().on_epoch_end(epoch, logs)
        if epoch == self.end_epoch - 1 and self.verbose > 0:
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {self._rate():g}.")


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """keras.callbacks.ModelCheckpoint that keeps the best model, whole.

    Args:
        monitor, verbose, mode, save_freq: as for ModelCheckpoint.
        filepath: where to, ending in .keras; None: set the attribute `filepath` before training begins.

    Raises:
        ValueError: at the start of training: there is no filepath.
    """

    def __init__(self, monitor="val_loss", verbose=0, mode="auto", save_freq="epoch", filepath=None):
        super().__init__(filepath or "unset.keras", monitor, verbose, save_best_only=True, save_weights_only=False, mode=mode,
                         save_freq=save_freq)  # fmt: skip
        self.filepath = filepath

    def on_train_begin(self, logs=None):
        """Looks whether there is a place to save to."""
        if self.filepath is None:
            raise ValueError("BestModelCheckpoint has no filepath: set callback.filepath, ending in .keras")
        super().on_train_begin(logs)
