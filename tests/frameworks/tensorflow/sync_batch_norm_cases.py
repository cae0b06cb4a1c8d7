"""What ranks run for test_sync_batch_norm_tensorflow.py: the layer beside Keras's own on the rows of all ranks."""

import itertools

import keras
import numpy as np
import tensorflow as tf

import commlib.tensorflow as comm

SHAPES = {2: (4,), 3: (5, 4), 4: (3, 2, 4)}
ROWS = (3, 0, 5)  # rank 1 has none


def check(process_set, dims, dtype, axis, offset, masked, graph):
    counts = [ROWS[rank] for rank in process_set.ranks]
    rng = np.random.default_rng(dims)
    x = (rng.standard_normal((sum(counts), *SHAPES[dims])) * 3 + offset).astype(dtype)
    weights = rng.standard_normal(x.shape).astype(dtype)
    mask = rng.integers(0, 2, x.shape[:-1]).astype(bool) if masked else None
    first = sum(counts[: process_set.rank()])
    mine = slice(first, first + counts[process_set.rank()])
    options = {"axis": axis, "momentum": 0.8, "epsilon": 1e-4, "dtype": dtype}
    whole = keras.layers.BatchNormalization(**options)
    part = comm.SyncBatchNormalization(process_set=process_set, **options)

    def train(layer, x, weights, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
            loss = tf.reduce_sum(y * weights)
        return y, *tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])

    for layer in (whole, part):
        layer.build((None, *SHAPES[dims]))
    wanted = train(whole, tf.constant(x), weights, mask)
    step = tf.function(train, autograph=False) if graph else train
    got = step(part, tf.constant(x[mine]), weights[mine], None if mask is None else mask[mine])
    tolerance = {"rtol": 1e-3, "atol": 1e-2 if offset else 1e-4} if dtype == "float32" else {"rtol": 1e-7, "atol": 1e-9}
    np.testing.assert_allclose(got[0], wanted[0][mine], **tolerance)
    np.testing.assert_allclose(got[1], wanted[1][mine], **tolerance)
    for mine_only, all_rows in zip(got[2:], wanted[2:]):
        summed = comm.allreduce(mine_only, op=comm.Sum, process_set=process_set)
        np.testing.assert_allclose(summed, all_rows, **tolerance)
    for one, other in zip(part.non_trainable_variables, whole.non_trainable_variables):
        np.testing.assert_allclose(one.numpy(), other.numpy(), **tolerance)
    np.testing.assert_allclose(part(x), whole(x), **tolerance)


def all_cases():
    """Every dimension, dtype and axis; with a mask; far from zero, too, where sums of squares would cancel."""
    pair = comm.add_process_set([0, 2])
    for process_set in (comm.global_process_set, pair):
        if process_set.included():
            for case in itertools.product((2, 4), ("float32", "float64"), (-1, 1), (0,), (False,), (True,)):
                check(process_set, *case)
            check(process_set, 4, "float32", -1, 1000, False, True)
            check(process_set, 3, "float32", -1, 0, True, False)
    comm.remove_process_set(pair)
    saved = comm.SyncBatchNormalization(momentum=0.5).get_config()
    assert comm.SyncBatchNormalization.from_config(saved).momentum == 0.5
    try:
        comm.SyncBatchNormalization(synchronized=True)
    except ValueError as error:
        return str(error)
