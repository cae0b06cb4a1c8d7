"""What ranks run for test_agreement.py: gradients that some ranks have and others do not."""

import keras
import numpy as np
import tensorflow as tf
from failure_cases import error_of

import commlib.keras as keras_comm
import commlib.tensorflow as comm


def of_tapes(graph):
    """Errors where only rank 0 has a gradient, or has a sparse one; then what all ranks have, or none has."""
    first, second, table = tf.Variable(1.0), tf.Variable(2.0), tf.Variable(tf.zeros([3, 2]))
    is_first = comm.rank() == 0

    def gradients(loss_of, **options):
        with tf.GradientTape() as tape:
            loss = loss_of()
        return comm.DistributedGradientTape(tape, op=comm.Sum).gradient(loss, [first, second, table], **options)

    def partly():
        return first * 3.0 + (second * 4.0 if is_first else 0.0)

    def sparsely():
        return tf.reduce_sum(tf.gather(table, [0])) if is_first else tf.reduce_sum(table)

    errors = [error_of(lambda: gradients(partly), graph), error_of(lambda: gradients(sparsely), graph)]
    wrap = (lambda one: tf.function(one, autograph=False)) if graph else (lambda one: one)
    zeros = wrap(lambda: gradients(partly, unconnected_gradients=tf.UnconnectedGradients.ZERO))()
    none = wrap(lambda: gradients(lambda: first * 3.0))()
    return errors, [one.numpy().tolist() for one in zeros[:2]], [none[0].numpy().tolist(), none[1], none[2]]


class Branches(keras.Model):
    """A body, one head for each rank or one for all, and weights that nobody uses."""

    def __init__(self, head):
        super().__init__()
        self.body = keras.layers.Dense(5, activation="tanh")
        self.heads = [keras.layers.Dense(2, name=f"head_{number}") for number in range(2)]
        self.unused = self.add_weight(shape=(4,), initializer="ones", name="unused")
        self.head = head

    def build(self, shape):
        self.body.build(shape)
        for head in self.heads:
            head.build((None, 5))

    def call(self, inputs):
        return self.heads[self.head](self.body(inputs))


X = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(2, 12, 2)).astype(np.float32)


def model_of(head, optimizer):
    keras.utils.set_random_seed(3)
    model = Branches(head)
    model.build((None, 3))
    model.compile(optimizer, "mse")
    return model


def optimizer_of():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def by_hand():
    """The same training in one process, in which every rank's loss is half of the loss."""
    model = model_of(0, optimizer_of())
    used = [one for one in model.trainable_variables if one is not model.unused]
    for first in range(0, 12, 4):
        with tf.GradientTape() as tape:
            losses = []
            for rank in range(2):
                model.head = rank
                losses.append(tf.reduce_mean(tf.square(model(X[rank, first : first + 4]) - Y[rank, first : first + 4])))
            loss = (losses[0] + losses[1]) / 2
        model.optimizer.apply(tape.gradient(loss, used), used)
    return model


def in_fit(way):
    """How far weights are from those by hand, where each rank has a head of its own; whether ranks are equal; what nobody used."""
    rank = comm.rank()
    model = model_of(rank, keras_comm.DistributedOptimizer(optimizer_of()))
    if way == "eager":
        model.compile(model.optimizer, "mse", run_eagerly=True)
    if way == "overlap":
        keras_comm.enable_forward_overlap(model)
    model.fit(X[rank], Y[rank], batch_size=4, shuffle=False, verbose=0)
    pairs = zip(model.trainable_variables, by_hand().trainable_variables)
    far = max(float(np.abs(one.numpy() - other.numpy()).max()) for one, other in pairs)
    everywhere = comm.allgather_object([one.numpy().tobytes() for one in model.weights])
    return far, everywhere[0] == everywhere[1], model.unused.numpy().tolist()


def one_of_two_overlaps():
    """Only rank 1 lacks a gradient: it waits where the other one overlaps; weights are equal."""
    rank = comm.rank()
    model = model_of(0, keras_comm.DistributedOptimizer(optimizer_of()))
    keras_comm.enable_forward_overlap(model)

    class Step:
        def __call__(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                hidden = model.body(x)
                loss = tf.reduce_mean(tf.square(model.heads[0](hidden) - y)) + tf.reduce_sum(model.unused)
                if rank == 0:
                    loss += tf.reduce_mean(model.heads[1](hidden))
            model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            return {"loss": loss}

    model.__dict__.pop("_commlib_overlap")
    model.__dict__["train_step"] = Step()
    keras_comm.enable_forward_overlap(model)
    model.fit(X[rank], Y[rank], batch_size=4, shuffle=False, verbose=0)
    everywhere = comm.allgather_object([one.numpy().tobytes() for one in model.weights])
    return everywhere[0] == everywhere[1]


def refused_in_fit(way):
    """What fit says where ranks cannot be brought together: sums of several steps, or sparse gradients; then all is well."""
    rank = comm.rank()
    options = {"gradient_accumulation_steps": 2} if way == "accumulating" else {}
    model = model_of(rank, keras_comm.DistributedOptimizer(keras.optimizers.SGD(0.1, **options)))
    if way == "sparse":
        table = keras.Variable(np.ones((4, 2), np.float32), name="table")

        def step(data):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.gather(table.value, [0]) if rank == 0 else table.value)
            model.optimizer.apply(tape.gradient(loss, [table.value]), [table])
            return {"loss": loss}

        model.__dict__["train_step"] = step
    error = error_of(lambda: model.fit(X[rank], Y[rank], batch_size=4, verbose=0), False)
    assert comm.allreduce(tf.ones(1), op=comm.Sum).numpy() == comm.size()
    return error


def with_less_work(graph):
    """Rank r has r + 1 steps, then joins: what the others' gradients add up to; the last rank that joined."""
    variables = [tf.Variable(1.0), tf.Variable([1.0, 2.0])]

    def gradients():
        with tf.GradientTape() as tape:
            loss = variables[0] + tf.reduce_sum(variables[1])
        return comm.DistributedGradientTape(tape, op=comm.Sum).gradient(loss, variables)

    step = tf.function(gradients, autograph=False) if graph else gradients
    for number in range(comm.rank() + 1):
        at_work = comm.size() - number
        assert [one.numpy().tolist() for one in step()] == [at_work, [at_work] * 2]
    return comm.join()
