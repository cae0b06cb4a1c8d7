"""The types of what users of Keras call; see ../__init__.pyi."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tensorflow import Tensor, Variable

from commlib import ReduceOp
from commlib.tensorflow import (
    Adasum as Adasum, Average as Average, CommlibError as CommlibError, Compression as Compression,
    HorovodInternalError as HorovodInternalError, Max as Max, Min as Min, ProcessSet as ProcessSet, Product as Product, Sum as Sum,
    add_process_set as add_process_set, allgather_object as allgather_object, broadcast_ as broadcast_,
    broadcast_global_variables as broadcast_global_variables, broadcast_object as broadcast_object,
    broadcast_variables as broadcast_variables, ccl_built as ccl_built, cross_rank as cross_rank, cross_size as cross_size,
    cuda_built as cuda_built, ddl_built as ddl_built, global_process_set as global_process_set, gloo_built as gloo_built,
    gloo_enabled as gloo_enabled, init as init, is_homogeneous as is_homogeneous, is_initialized as is_initialized,
    local_rank as local_rank, local_size as local_size, mpi_built as mpi_built, mpi_enabled as mpi_enabled,
    mpi_threads_supported as mpi_threads_supported, nccl_built as nccl_built, rank as rank,
    remove_process_set as remove_process_set, rocm_built as rocm_built, shutdown as shutdown, size as size,
    start_timeline as start_timeline, stop_timeline as stop_timeline,
)  # fmt: skip
from commlib.tensorflow import Compressor
from commlib.tensorflow.keras import callbacks as callbacks

_Model = TypeVar("_Model")
_Optimizer = TypeVar("_Optimizer")
_Compression = type[Compressor] | Compressor | None
_Groups = int | Sequence[Sequence[Variable]] | None

def allreduce(value: Any, name: str | None = None, average: bool | None = None, prescale_factor: float = 1.0,
              postscale_factor: float = 1.0, op: ReduceOp | None = None, compression: _Compression = ...,
              process_set: ProcessSet = ...) -> Tensor: ...
def allgather(value: Any, name: str | None = None, process_set: ProcessSet = ...) -> Tensor: ...
def broadcast(value: Any, root_rank: int, name: str | None = None, process_set: ProcessSet = ...) -> Tensor: ...
def reducescatter(value: Any, name: str | None = None, op: ReduceOp = ..., process_set: ProcessSet = ...) -> Tensor: ...
def load_model(filepath: str, custom_optimizers: Iterable[type[Any]] | None = None,
               custom_objects: Mapping[str, Any] | None = None, compression: _Compression = ...,
               legacy_opts: bool = False) -> Any: ...
def enable_forward_overlap(model: _Model) -> _Model: ...
def synchronize(model: Any) -> None: ...
def DistributedOptimizer(optimizer: _Optimizer, name: str | None = None, device_dense: str = "", device_sparse: str = "",
                         compression: _Compression = ..., sparse_as_dense: bool = False, gradient_predivide_factor: float = 1.0,
                         op: ReduceOp = ..., backward_passes_per_step: int = 1, average_aggregated_gradients: bool = False,
                         num_groups: int = 0, groups: _Groups = None, process_set: ProcessSet = ...,
                         scale_local_gradients: bool = True) -> _Optimizer: ...
def PartialDistributedOptimizer(optimizer: _Optimizer, name: str | None = None, device_dense: str = "", device_sparse: str = "",
                                compression: _Compression = ..., sparse_as_dense: bool = False,
                                gradient_predivide_factor: float = 1.0, op: ReduceOp = ..., backward_passes_per_step: int = 1,
                                average_aggregated_gradients: bool = False, num_groups: int = 0, groups: _Groups = None,
                                process_set: ProcessSet = ..., local_layers: Any = None,
                                scale_local_gradients: bool = True) -> _Optimizer: ...
