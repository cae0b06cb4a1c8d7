"""Tapes whose gradients are those of all ranks, and Horovod's names, arguments and defaults."""

import pytest


@pytest.fixture(params=[False, True], ids=["eager", "function"])
def graph(request):
    return request.param


@pytest.mark.parametrize("size", [2, 3])
def test_training_by_hand(tensorflow_ranks, size, graph):
    tensorflow_ranks(size).call("tape_cases:as_one_process", graph)


def test_local_sources(tensorflow_ranks, graph):
    # Gradients are 1, 2 and 3; dictionaries are flattened by name: kernel, w.
    for rank, result in enumerate(tensorflow_ranks(3).call("tape_cases:local_sources", graph), 1):
        assert result["scaled"] == [2.0, pytest.approx(rank / 3)]
        assert result["unscaled"] == [2.0, rank]
        assert result["layers"] == [pytest.approx(rank / 3), 2.0]


def test_special_gradients(tensorflow_ranks, graph):
    tensorflow_ranks(3).call("tape_cases:special_gradients", graph)


SET = [("process_set", "global_process_set")]
SCALE = [("prescale_factor", 1.0), ("postscale_factor", 1.0)]
DEVICES = [("device_dense", ""), ("device_sparse", "")]
SCOPE = [("ignore_name_scope", False)]
COMPRESSION, OP = [("compression", "NoneCompressor")], [("op", "commlib.Average")]
TAPE = [("gradtape", "needed"), *DEVICES, *COMPRESSION, ("sparse_as_dense", False), *OP, ("gradient_predivide_factor", 1.0),
        ("num_groups", 0), ("groups", None), *SET]  # fmt: skip

# Function -> its arguments and their defaults, in order; commlib's own may come after them.
SIGNATURES = {
    "init": [("comm", None), ("process_sets", None)],
    "allreduce": [("tensor", "needed"), ("average", None), *DEVICES, *COMPRESSION, ("op", None), *SCALE, ("name", None), *SET],
    "grouped_allreduce": [("tensors", "needed"), ("average", None), *DEVICES, *COMPRESSION, ("op", None), *SCALE, *SET],
    "allgather": [("tensor", "needed"), ("name", None), *SCOPE, *SET],
    "grouped_allgather": [("tensors", "needed"), ("name", None), *SCOPE, *SET],
    "broadcast": [("tensor", "needed"), ("root_rank", "needed"), ("name", None), *SCOPE, *SET],
    "broadcast_": [("variables", "needed"), ("root_rank", "needed"), ("name", None), *SET],
    "alltoall": [("tensor", "needed"), ("splits", None), ("name", None), *SCOPE, *SET],
    "reducescatter": [("tensor", "needed"), ("device_dense", ""), *COMPRESSION, *OP, ("name", None), *SET, *SCALE],
    "grouped_reducescatter": [("tensors", "needed"), ("device_dense", ""), *COMPRESSION, *OP, *SET, *SCALE],
    "join": [("device", -1)], "barrier": SET, "rank_op": [("name", None)], "local_rank_op": [("name", None)],
    "local_size_op": [("name", None)],
    "size_op": [("process_set_id", 0), ("name", None)], "process_set_included_op": [("process_set_id", 0), ("name", None)],
    "broadcast_variables": [("variables", "needed"), ("root_rank", "needed"), *SET, ("inplace", False)],
    "broadcast_global_variables": [("root_rank", "needed")],
    "broadcast_object": [("obj", "needed"), ("root_rank", 0), ("session", None), ("name", None), *SET],
    "broadcast_object_fn": [("root_rank", 0), ("session", None), ("name", None), *SET],
    "allgather_object": [("obj", "needed"), ("session", None), ("name", None), *SET],
    "DistributedGradientTape": [*TAPE, ("scale_local_gradients", True)],
    "PartialDistributedGradientTape": [*TAPE, ("local_layers", None), ("scale_local_gradients", True)],
    "start_timeline": [("file_path", "needed"), ("mark_cycles", False)], "stop_timeline": [],
    "add_process_set": [("process_set", "needed")], "remove_process_set": [("process_set", "needed")],
    **{name: [] for name in ("shutdown", "is_initialized", "rank", "size", "local_rank", "local_size", "cross_rank", "cross_size",
                             "is_homogeneous", "mpi_threads_supported", "mpi_enabled", "mpi_built", "gloo_enabled", "gloo_built",
                             "nccl_built", "ddl_built", "ccl_built", "cuda_built", "rocm_built")},
}  # fmt: skip


def test_names_arguments_and_defaults(tensorflow_ranks):
    arguments, missing = tensorflow_ranks(1).call("tape_cases:arguments")[0]
    assert not missing
    for name, wanted in SIGNATURES.items():
        assert arguments[name][: len(wanted)] == wanted, name
        assert all(default != "needed" for _, default in arguments[name][len(wanted) :])


def test_examples(tensorflow_ranks):
    results = tensorflow_ranks(1).call("tape_cases:examples")[0]
    assert all(failed == 0 and attempted > 0 for failed, attempted in results.values()), results
