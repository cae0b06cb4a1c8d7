"""Variables made equal on all ranks, and Python objects, which travel as pickles over the collectives of tensors."""

import pickle

import tensorflow as tf

import commlib
from commlib.process_sets import global_process_set
from commlib.tensorflow.collectives import allgather, broadcast
from commlib.tensorflow.operations import DTYPES, as_it_is, make_all, place_of

# What commlib does not reduce still has bits that can be sent.
_CARRIERS = {tf.uint16: tf.int16, tf.uint32: tf.int32, tf.uint64: tf.int64, tf.complex64: tf.float32, tf.complex128: tf.float64}


def _told(variables, root_rank, process_set):
    """The root's values of all variables."""
    values = [tf.convert_to_tensor(variable) for variable in variables]
    for place, value in enumerate(values):
        if value.dtype not in DTYPES and value.dtype not in _CARRIERS:
            raise ValueError(f"variable {place} has dtype {value.dtype.name}, which cannot be broadcast: use broadcast_object")
    wires = [tf.bitcast(value, _CARRIERS[value.dtype]) if value.dtype in _CARRIERS else value for value in values]
    name = place_of("broadcast_variables", process_set)
    names = [f"{name}.{place}" for place in range(len(values))]
    told = make_all("broadcast", wires, names, process_set, root=root_rank)
    return [tf.bitcast(one, value.dtype) if value.dtype in _CARRIERS else one for one, value in zip(told, values)]


@as_it_is
def broadcast_(variables, root_rank, name=None, process_set=global_process_set):
    """Overwrites variables with the root's; returns them.

    Args:
        variables: a list of tf.Variable or keras.Variable, of the same shapes and dtypes in the same order on all ranks.
        root_rank: whose values everybody gets; its rank among all, also with a process set.
        name: accepted for Horovod's sake.
        process_set: the ranks that take part.
    """
    broadcast_variables(variables, root_rank, process_set)
    return variables


@as_it_is
def broadcast_variables(variables, root_rank, process_set=global_process_set, inplace=False):
    """As `broadcast_`, without a result; in a graph of TensorFlow 1 it returns the Operation that does it.

    Args:
        inplace: accepted for Horovod's sake.

    Example:
        >>> import tensorflow as tf, commlib.tensorflow as comm
        >>> comm.init()
        >>> comm.broadcast_variables([tf.Variable(1.0)], root_rank=0)
        >>> comm.shutdown()
    """
    variables = list(variables)
    assigned = [variable.assign(value) for variable, value in zip(variables, _told(variables, root_rank, process_set))]
    return None if tf.compat.v1.executing_eagerly_outside_functions() else tf.group(*assigned)


def broadcast_global_variables(root_rank):
    """As `broadcast_variables` of all that TensorFlow 1's graphs know.

    Raises:
        RuntimeError: in eager mode, where there is no such list.
    """
    if tf.executing_eagerly():
        raise RuntimeError("hvd.broadcast_global_variables() does not support eager execution. Please use "
                           "`hvd.broadcast_variables(<model/optimizer variables>)` instead.")  # fmt: skip
    return broadcast_variables(tf.compat.v1.global_variables(), root_rank)


def broadcast_object(obj, root_rank=0, session=None, name=None, process_set=global_process_set):
    """The root's object, on every rank; it must be picklable. In eager mode.

    Args:
        obj: what the root has; ignored on the other ranks.
        root_rank: whose object everybody gets.
        session: accepted for Horovod's sake.
        name: matches the operation between ranks; None: by sequence number.

    Returns:
        The root's own object there, a copy of it elsewhere.
    """
    is_root = commlib.rank() == root_rank
    payload = _bytes_of(obj) if is_root else tf.zeros([0], tf.uint8)
    nbytes = broadcast(tf.size(payload, tf.int64), root_rank, name and f"{name}.nbytes", process_set=process_set)
    payload = payload if is_root else tf.zeros([nbytes], tf.uint8)
    payload = broadcast(payload, root_rank, name and f"{name}.payload", process_set=process_set)
    return obj if is_root else pickle.loads(payload.numpy().tobytes())


def broadcast_object_fn(root_rank=0, session=None, name=None, process_set=global_process_set):
    """A function of an object that does as `broadcast_object`."""
    return lambda obj: broadcast_object(obj, root_rank, session, name, process_set)


def allgather_object(obj, session=None, name=None, process_set=global_process_set):
    """The object of every rank of the process set, as a list in rank order; they must be picklable. In eager mode."""
    payload = _bytes_of(obj)
    nbytes = allgather(tf.size(payload, tf.int64)[tf.newaxis], name and f"{name}.nbytes", process_set=process_set)
    parts = tf.split(allgather(payload, name and f"{name}.payload", process_set=process_set), nbytes)
    return [pickle.loads(part.numpy().tobytes()) for part in parts]


def _bytes_of(obj):
    return tf.io.decode_raw(tf.constant(pickle.dumps(obj)), tf.uint8)
