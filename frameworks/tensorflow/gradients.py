"""Gradients of the ops, as Horovod defines them, registered with TensorFlow when this file is imported.

The loss that a program means is the mean of the ranks' losses. So the gradient of a broadcast or an all-gather is the
average of what the ranks say; that of a sum is a sum, as each rank's input went into every rank's output.
"""

import tensorflow as tf

import commlib
from commlib.process_sets import process_set_of_id
from commlib.tensorflow.native import wish_of
from commlib.tensorflow.operations import make, number


def _wish(op):
    """What the op was asked for, and its process set."""
    wish = wish_of(op.get_attr("call"))
    return wish, process_set_of_id(wish.set)


def _check_reduction(wish):
    if wish.op not in (commlib.Average, commlib.Sum):
        raise ValueError(f"{wish.kind} with op={wish.op!r} is not differentiable: pass tf.stop_gradient(tensor)")


@tf.RegisterGradient("CommlibAllreduce")
def _allreduce(op, gradient):
    """Sum and Average: the same reduction of the gradients."""
    wish, process_set = _wish(op)
    _check_reduction(wish)
    return make("allreduce", gradient, process_set=process_set, op=wish.op, scales=wish.scales)


@tf.RegisterGradient("CommlibAdasum")
def _adasum(op, gradient):
    raise ValueError("allreduce with op=commlib.Adasum is not differentiable: pass tf.stop_gradient(tensor)")


@tf.RegisterGradient("CommlibBroadcast")
def _broadcast(op, gradient):
    """The root's gradient is the average of all; the others' tensors had no influence."""
    wish, process_set = _wish(op)
    reduced = make("allreduce", gradient, process_set=process_set)
    return tf.where(number("rank") == wish.root, reduced, tf.zeros_like(reduced))


@tf.RegisterGradient("CommlibAllgather")
def _allgather(op, gradient):
    """The average of all gradients, of which each rank takes its own rows."""
    wish, process_set = _wish(op)
    reduced = make("allreduce", gradient, process_set=process_set)
    mine = tf.shape(op.inputs[0], out_type=tf.int64)[0]
    ends = tf.cumsum(make("allgather", mine[tf.newaxis], process_set=process_set))
    end = ends[number("place", wish.set)]
    return reduced[end - mine : end]


@tf.RegisterGradient("CommlibReducescatter")
def _reducescatter(op, gradient):
    """Every rank's rows went into each rank's share: gradients of the shares are gathered."""
    wish, process_set = _wish(op)
    _check_reduction(wish)
    gathered = make("allgather", gradient, process_set=process_set)
    gathered.set_shape(op.inputs[0].shape)
    factor = tf.constant(wish.scales[0] * wish.scales[1], tf.float64)
    if wish.op is commlib.Average:
        factor /= tf.cast(number("size", wish.set), tf.float64)
    return gathered * tf.cast(factor, gathered.dtype)


@tf.RegisterGradient("CommlibAlltoall")
def _alltoall(op, gradient, _):
    """Gradients go back the way that the rows came; those of rows that went nowhere are zero."""
    _, process_set = _wish(op)
    returned, _ = make("alltoall", gradient, process_set=process_set, splits=op.outputs[1])
    rest = tf.shape(op.inputs[0])[0] - tf.shape(returned)[0]
    padding = tf.concat([[[0, rest]], tf.zeros([tf.rank(returned) - 1, 2], tf.int32)], 0)
    returned = tf.pad(returned, padding)
    returned.set_shape(op.inputs[0].shape)
    return returned, None
