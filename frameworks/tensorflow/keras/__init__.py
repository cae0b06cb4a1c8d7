"""commlib for Keras 3 on TensorFlow: optimizers that reduce, callbacks, and collectives on Keras's values.

    import commlib.keras as comm
    comm.init()
    model.compile(comm.DistributedOptimizer(keras.optimizers.SGD(0.1 * comm.size())), ...)
    model.fit(..., callbacks=[comm.callbacks.BroadcastGlobalVariablesCallback(0)])

Names, arguments and defaults are Horovod's: `import commlib.tensorflow.keras as hvd` runs a script written for it.
"""

import keras as _keras

import commlib.tensorflow as _tensorflow
from commlib.tensorflow import (
    Adasum, Average, CommlibError, Compression, HorovodInternalError, Max, Min, ProcessSet, Product, Sum, add_process_set,
    allgather_object, broadcast_, broadcast_global_variables, broadcast_object, broadcast_variables, ccl_built, cross_rank,
    cross_size, cuda_built, ddl_built, global_process_set, gloo_built, gloo_enabled, init, is_homogeneous, is_initialized,
    local_rank, local_size, mpi_built, mpi_enabled, mpi_threads_supported, nccl_built, rank, remove_process_set, rocm_built,
    shutdown, size, start_timeline, stop_timeline,
)  # fmt: skip
from commlib.tensorflow.forward_overlap import enable_forward_overlap, synchronize
from commlib.tensorflow.keras import callbacks
from commlib.tensorflow.optimizer import DistributedOptimizer, PartialDistributedOptimizer


def allreduce(value, name=None, average=None, prescale_factor=1.0, postscale_factor=1.0, op=None, compression=Compression.none,
              process_set=global_process_set):  # fmt: skip
    """As commlib.tensorflow.allreduce, of anything that TensorFlow can make a tensor of."""
    return _tensorflow.allreduce(value, average, compression=compression, op=op, prescale_factor=prescale_factor,
                                 postscale_factor=postscale_factor, name=name, process_set=process_set)  # fmt: skip


def allgather(value, name=None, process_set=global_process_set):
    """As commlib.tensorflow.allgather, of anything that TensorFlow can make a tensor of."""
    return _tensorflow.allgather(value, name=name, process_set=process_set)


def broadcast(value, root_rank, name=None, process_set=global_process_set):
    """As commlib.tensorflow.broadcast, of anything that TensorFlow can make a tensor of."""
    return _tensorflow.broadcast(value, root_rank, name=name, process_set=process_set)


def reducescatter(value, name=None, op=Average, process_set=global_process_set):
    """As commlib.tensorflow.reducescatter, of anything that TensorFlow can make a tensor of."""
    return _tensorflow.reducescatter(value, name=name, op=op, process_set=process_set)


def load_model(filepath, custom_optimizers=None, custom_objects=None, compression=Compression.none, legacy_opts=False):
    """As keras.models.load_model, with the model's optimizer distributed and its state kept.

    Args:
        filepath: what model.save made, on any number of ranks, with commlib or without.
        custom_optimizers: optimizer classes that Keras does not know.
        custom_objects: other things that it does not know, by name.
        compression: what travels; one of Compression.
        legacy_opts: accepted for Horovod's sake.

    Returns:
        The model; its optimizer is None if none was saved.
    """
    objects = {cls.__name__: cls for cls in custom_optimizers or ()}
    model = _keras.models.load_model(filepath, custom_objects={**objects, **(custom_objects or {})})
    if getattr(model, "optimizer", None) is not None:
        DistributedOptimizer(model.optimizer, compression=compression)
    return model


__all__ = [
    "Adasum", "Average", "CommlibError", "Compression", "DistributedOptimizer", "HorovodInternalError", "Max", "Min",
    "PartialDistributedOptimizer", "ProcessSet", "Product", "Sum", "add_process_set", "allgather", "allgather_object",
    "allreduce", "broadcast", "broadcast_", "broadcast_global_variables", "broadcast_object", "broadcast_variables",
    "callbacks", "ccl_built", "cross_rank", "cross_size", "cuda_built", "ddl_built", "enable_forward_overlap",
    "global_process_set", "gloo_built", "gloo_enabled", "init", "is_homogeneous", "is_initialized", "load_model",
    "local_rank", "local_size", "mpi_built", "mpi_enabled", "mpi_threads_supported", "nccl_built", "rank",
    "reducescatter", "remove_process_set", "rocm_built", "shutdown", "size", "start_timeline", "stop_timeline",
    "synchronize",
]  # fmt: skip
