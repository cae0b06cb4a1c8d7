"""commlib for TensorFlow: collectives that run beside compute, in eager mode and in graphs, for training on several ranks.

    import commlib.tensorflow as comm
    comm.init()
    tape = comm.DistributedGradientTape(tape)

Names, arguments and defaults are Horovod's: `import commlib.tensorflow as hvd` runs a script written for it.
"""

import commlib
import commlib.tensorflow.gradients  # noqa: F401  registers them
from commlib import (
    Average, CommlibError, Max, Min, Product, Sum, cross_rank, cross_size, is_homogeneous, is_initialized, local_rank,
    local_size, rank, shutdown, size, stop_timeline,
)  # fmt: skip
from commlib.built import (
    ccl_built, cuda_built, ddl_built, gloo_enabled, mpi_built, mpi_enabled, mpi_threads_supported, nccl_built, rocm_built,
)  # fmt: skip
from commlib.ops import Adasum
from commlib.process_sets import (
    ProcessSet, add_process_set, add_process_sets, global_process_set, remove_process_set,
)  # fmt: skip
from commlib.tensorflow import native
from commlib.tensorflow.any_optimizer import DistributedOptimizer
from commlib.tensorflow.collectives import (
    allgather, allreduce, alltoall, barrier, broadcast, grouped_allgather, grouped_allreduce, grouped_reducescatter,
    reducescatter,
)  # fmt: skip
from commlib.tensorflow.compression import Compression
from commlib.tensorflow.tape import DistributedGradientTape, PartialDistributedGradientTape
from commlib.tensorflow.values import local_rank_op, local_size_op, process_set_included_op, rank_op, size_op
from commlib.tensorflow.variables import (
    allgather_object, broadcast_, broadcast_global_variables, broadcast_object, broadcast_object_fn, broadcast_variables,
)  # fmt: skip

HorovodInternalError = CommlibError


def init(comm=None, process_sets=None):
    """Meets the other ranks; every other function needs it. Does nothing if it was called before.

    Args:
        comm: an mpi4py communicator, or a list of ranks of MPI_COMM_WORLD; see commlib.init.
        process_sets: a list of ProcessSet, the same on all ranks; or "dynamic": add_process_set may be called later, as it
            may be in every case.

    Raises:
        ValueError: on every rank: process_sets differ, or one comes twice, or they were given after the first call.
        StartError: a rank did not come in time.
    """
    is_first = not commlib.is_initialized()
    commlib.init(comm=comm)
    native.attach()
    try:
        add_process_sets(process_sets)
    except ValueError:
        if is_first:
            shutdown()
        raise


def join(device=-1):
    """This rank has no more batches: returns when all ranks have called it, and takes part in their all-reduces until then.

    Called outside of functions. It contributes zeros, and averages are divided by the number of all ranks. Other collectives fail
    on every rank meanwhile. A rank that joined early has made fewer steps: share the variables of the rank that joined last.

    Args:
        device: for Horovod's sake; there are CPU tensors only.

    Returns:
        The last rank that joined.

    Raises:
        CommlibError: a rank was lost, or shut down without joining.
    """
    return commlib.join()


def __getattr__(name):
    """SyncBatchNormalization is a Keras layer, and Keras takes a second to import."""
    if name == "SyncBatchNormalization":
        from commlib.tensorflow.sync_batch_norm import SyncBatchNormalization

        return SyncBatchNormalization
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def gloo_built():
    """False: gloo is torch's own; `commlib.torch.gloo_built` knows of it."""
    return False


def start_timeline(file_path, mark_cycles=False):
    """Records operations of all ranks, to be written as a Chrome trace by stop_timeline(); every rank calls it.

    Args:
        file_path: open the file in ui.perfetto.dev.
        mark_cycles: accepted for Horovod's sake; commlib has no cycles to mark.
    """
    commlib.start_timeline(file_path)


__all__ = [
    "Adasum", "Average", "CommlibError", "Compression", "DistributedGradientTape", "DistributedOptimizer",
    "HorovodInternalError", "Max", "Min", "PartialDistributedGradientTape", "ProcessSet", "Product", "Sum",
    "SyncBatchNormalization", "add_process_set", "allgather", "allgather_object", "allreduce", "alltoall", "barrier",
    "broadcast", "broadcast_", "broadcast_global_variables", "broadcast_object", "broadcast_object_fn",
    "broadcast_variables", "ccl_built", "cross_rank", "cross_size", "cuda_built", "ddl_built", "global_process_set",
    "gloo_built", "gloo_enabled", "grouped_allgather", "grouped_allreduce", "grouped_reducescatter", "init",
    "is_homogeneous", "is_initialized", "join", "local_rank", "local_rank_op", "local_size", "local_size_op", "mpi_built",
    "mpi_enabled", "mpi_threads_supported", "nccl_built", "process_set_included_op", "rank", "rank_op", "reducescatter",
    "remove_process_set", "rocm_built", "shutdown", "size", "size_op", "start_timeline", "stop_timeline",
]  # fmt: skip
