"""commlib for PyTorch: two lines make a training script train on all ranks, with communication hidden behind compute.

    import commlib.torch as comm
    comm.init()
    optimizer = comm.DistributedOptimizer(optimizer, model=model)

Names, arguments and defaults are Horovod's: `import commlib.torch as hvd` runs a script written for it.
"""

import commlib
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
from commlib.torch.collectives import (
    allgather, allreduce, allreduce_, alltoall, barrier, broadcast, broadcast_, reducescatter,
)  # fmt: skip
from commlib.torch.compression import Compression
from commlib.torch.grouped import (
    grouped_allgather, grouped_allgather_async, grouped_allreduce, grouped_allreduce_, grouped_allreduce_async,
    grouped_allreduce_async_, grouped_reducescatter, grouped_reducescatter_async,
)  # fmt: skip
from commlib.torch.information import gloo_built
from commlib.torch.joining import join
from commlib.torch.launching import job_secret
from commlib.torch.operations import (
    allgather_async, allreduce_async, allreduce_async_, alltoall_async, broadcast_async, broadcast_async_, poll,
    reducescatter_async, synchronize,
)  # fmt: skip
from commlib.torch.optimizer import DistributedOptimizer
from commlib.torch.recording import record_model
from commlib.torch.sparse import sparse_allreduce_async
from commlib.torch.state import allgather_object, broadcast_object, broadcast_optimizer_state, broadcast_parameters
from commlib.torch.sync_batch_norm import SyncBatchNorm
from commlib.torch.trace import trace_layers

HorovodInternalError = CommlibError


def init(comm=None, process_sets=None, *, backend=None):
    """Meets the other ranks; every other function needs it. Does nothing if it was called before.

    Args:
        comm: an mpi4py communicator, or a list of ranks of MPI_COMM_WORLD; see commlib.init.
        process_sets: a list of ProcessSet, the same on all ranks; or "dynamic": add_process_set may be called later, as it
            may be in every case.
        backend: who moves the bytes: "native", commlib's own engine, or "gloo", torch.distributed's gloo under commlib's
            scheduler; None: COMMLIB_BACKEND, or "native". Equal on all ranks.

    Raises:
        ValueError: on every rank: process_sets differ, or one comes twice, or they were given after the first call; another
            backend is in use.
        StartError: a rank did not come in time.
    """
    is_first = not commlib.is_initialized()
    communicator = commlib.init(backend=backend, backends={"gloo": _gloo_communicator}, secret=job_secret, comm=comm)
    if backend not in (None, communicator.backend):
        raise ValueError(f"commlib was initialized with backend={communicator.backend!r}: call shutdown() first")
    try:
        add_process_sets(process_sets)
    except ValueError:
        if is_first:
            shutdown()
        raise


def _gloo_communicator(*args):
    from commlib.torch.gloo import gloo_communicator  # builds of torch without torch.distributed can do without it

    return gloo_communicator(*args)


def start_timeline(file_path, mark_cycles=False):
    """Records operations of all ranks, to be written as a Chrome trace by stop_timeline(); every rank calls it.

    Args:
        file_path: open the file in ui.perfetto.dev.
        mark_cycles: accepted for Horovod's sake; commlib has no cycles to mark.
    """
    commlib.start_timeline(file_path)


__all__ = [
    "Adasum", "Average", "CommlibError", "Compression", "DistributedOptimizer", "HorovodInternalError", "Max", "Min",
    "ProcessSet", "Product", "Sum", "SyncBatchNorm", "add_process_set", "allgather", "allgather_async",
    "allgather_object", "allreduce", "allreduce_", "allreduce_async", "allreduce_async_", "alltoall", "alltoall_async",
    "barrier", "broadcast", "broadcast_", "broadcast_async", "broadcast_async_", "broadcast_object",
    "broadcast_optimizer_state", "broadcast_parameters", "ccl_built", "cross_rank", "cross_size", "cuda_built",
    "ddl_built", "global_process_set", "gloo_built", "gloo_enabled", "grouped_allgather", "grouped_allgather_async",
    "grouped_allreduce", "grouped_allreduce_", "grouped_allreduce_async", "grouped_allreduce_async_",
    "grouped_reducescatter", "grouped_reducescatter_async", "init", "is_homogeneous", "is_initialized", "join",
    "local_rank", "local_size", "mpi_built", "mpi_enabled", "mpi_threads_supported", "nccl_built", "poll", "rank",
    "record_model", "reducescatter", "reducescatter_async", "remove_process_set", "rocm_built", "shutdown", "size",
    "sparse_allreduce_async", "start_timeline", "stop_timeline", "synchronize", "trace_layers",
]  # fmt: skip
