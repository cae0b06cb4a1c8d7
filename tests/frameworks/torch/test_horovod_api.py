"""Horovod's names, arguments and defaults, and what its users' scripts get from them, on real ranks."""

import inspect
import pathlib
import re

import pytest

import commlib.torch as comm

SCALE = {"prescale_factor": 1.0, "postscale_factor": 1.0}
SET = {"process_set": comm.global_process_set}
NO = inspect.Parameter.empty

# Function -> its arguments and their defaults, in order; commlib's own may come after them.
SIGNATURES = {
    "init": {"comm": None, "process_sets": None},
    "allreduce": {"tensor": NO, "average": None, "name": None, "compression": comm.Compression.none, "op": None, **SCALE, **SET},
    "allreduce_": {"tensor": NO, "average": None, "name": None, "op": None, **SCALE, **SET},
    "grouped_allreduce": {"tensors": NO, "average": None, "name": None, "compression": comm.Compression.none, "op": None,
                          **SCALE, **SET},
    "grouped_allreduce_": {"tensors": NO, "average": None, "name": None, "op": None, **SCALE, **SET},
    "sparse_allreduce_async": {"tensor": NO, "name": NO, "op": NO, **SET},
    "allgather": {"tensor": NO, "name": None, **SET},
    "grouped_allgather": {"tensors": NO, "name": None, **SET},
    "broadcast": {"tensor": NO, "root_rank": NO, "name": None, **SET},
    "broadcast_": {"tensor": NO, "root_rank": NO, "name": None, **SET},
    "alltoall": {"tensor": NO, "splits": None, "name": None, **SET},
    "reducescatter": {"tensor": NO, "name": None, "compression": comm.Compression.none, "op": comm.Average, **SET, **SCALE},
    "grouped_reducescatter": {"tensors": NO, "name": None, "compression": comm.Compression.none, "op": comm.Average, **SET,
                              **SCALE},
    "join": {"device": -1}, "barrier": {**SET}, "poll": {"handle": NO}, "synchronize": {"handle": NO},
    "DistributedOptimizer": {
        "optimizer": NO, "named_parameters": None, "compression": comm.Compression.none, "backward_passes_per_step": 1,
        "op": comm.Average, "gradient_predivide_factor": 1.0, "num_groups": 0, "groups": None, "sparse_as_dense": False, **SET,
    },
    "broadcast_parameters": {"params": NO, "root_rank": NO},
    "broadcast_optimizer_state": {"optimizer": NO, "root_rank": NO, "model": None},
    "broadcast_object": {"obj": NO, "root_rank": 0, "name": None, **SET},
    "allgather_object": {"obj": NO, "name": None},
    "ProcessSet": {"ranks_or_comm": NO}, "add_process_set": {"process_set": NO}, "remove_process_set": {"process_set": NO},
    "start_timeline": {"file_path": NO, "mark_cycles": False}, "stop_timeline": {}, "shutdown": {}, "is_initialized": {},
    **{name: {} for name in ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size", "is_homogeneous",
                             "mpi_threads_supported", "mpi_enabled", "mpi_built", "gloo_enabled", "gloo_built", "nccl_built",
                             "ddl_built", "ccl_built", "cuda_built", "rocm_built")},
}  # fmt: skip
ASYNC = ("allreduce", "allreduce_", "grouped_allreduce", "grouped_allreduce_", "allgather", "grouped_allgather", "broadcast",
         "broadcast_", "alltoall", "reducescatter", "grouped_reducescatter")  # fmt: skip


def arguments_of(name):
    return {one.name: one.default for one in inspect.signature(getattr(comm, name)).parameters.values()}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_arguments_and_defaults(name):
    wanted = SIGNATURES[name]
    assert list(arguments_of(name).items())[: len(wanted)] == list(wanted.items())
    assert all(default is not NO for default in list(arguments_of(name).values())[len(wanted) :])
    assert name in comm.__all__


@pytest.mark.parametrize("name", ASYNC)
def test_asynchronous_forms(name):
    asynchronous = name[:-1] + "_async_" if name.endswith("_") else name + "_async"
    wanted = {argument: default for argument, default in SIGNATURES[name].items() if argument != "compression"}
    assert list(arguments_of(asynchronous).items()) == list(wanted.items())
    assert asynchronous in comm.__all__


def test_questions_about_the_build():
    assert [comm.ddl_built(), comm.ccl_built(), comm.cuda_built(), comm.rocm_built()] == [False] * 4
    assert type(comm.nccl_built()) is int and comm.gloo_built() is True
    assert not comm.mpi_enabled() and not comm.gloo_enabled()
    comm.init()
    assert comm.mpi_threads_supported() in (True, False) and comm.mpi_built() in (True, False)
    comm.shutdown()


MISSING = ("HostsUpdatedInterrupt", "elastic.run", "elastic.TorchState", "elastic.ElasticSampler")


def test_every_name_is_in_the_table_of_the_docs():
    page = (pathlib.Path(__file__).parents[3] / "docs" / "migrating-from-horovod.md").read_text()
    words = set(re.findall(r"[\w.]+", " ".join(line for line in page.splitlines() if line.startswith("|"))))
    # "and its forms" stands for those that end with an underscore.
    others = {"Average", "Sum", "Min", "Max", "Product", "HorovodInternalError", "SyncBatchNorm", "Adasum"}
    assert not (others | {name.rstrip("_") for name in SIGNATURES}) - words
    for name in MISSING:
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert "| missing |" in row
        assert not hasattr(comm, name.partition(".")[0]) 


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, torch_ranks):
    return torch_ranks(request.param)


def test_grouped_forms(ranks):
    ranks.call("horovod_cases:grouped")


def test_gradients_of_grouped_forms(ranks):
    ranks.call("horovod_cases:grouped_gradients")


def test_one_of_a_group_fails(ranks):
    for message in ranks.call("horovod_cases:one_of_a_group_fails"):
        assert "torn.1" in message and "ranks disagree: rank" in message


def test_compression(ranks):
    ranks.call("horovod_cases:compressed")


def test_sparse_allreduce(ranks):
    ranks.call("horovod_cases:sparse")
