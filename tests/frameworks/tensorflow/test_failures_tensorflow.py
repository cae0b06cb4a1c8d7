"""What goes wrong ends in an exception on every rank that it concerns, with the same words as elsewhere; nothing hangs."""

import re

import pytest
from support import Died
from tensorflow_starting import start

SIZE = 3


@pytest.fixture
def ranks(tensorflow_ranks):
    return tensorflow_ranks(SIZE)


@pytest.fixture(params=[False, True], ids=["eager", "function"])
def graph(request):
    return request.param


def of_any_ranks(text):
    """Which two of the ranks that disagree are named is a matter of time."""
    return re.sub("rank [01]", "rank N", text)


def test_mismatches(ranks, graph):
    for errors, told in ranks.call("failure_cases:mismatches", graph):
        assert "ranks disagree: " in told
        for case, (kind, text) in errors.items():
            assert kind == ("FailedPreconditionError" if graph else "MismatchError")
            assert "ranks disagree: " in text and "submit the same on every rank" in text, (case, text)
        if graph:
            assert of_any_ranks(told) in of_any_ranks(errors["shape"][1])
        else:
            assert of_any_ranks(errors["shape"][1]) == of_any_ranks(told)


MESSAGES = {
    "dtype": "dtype string is not supported; use one of uint8", "complex": "dtype complex64 is not supported",
    "op": "op must be commlib.Average, Sum, Min, Max, Product or Adasum, not 'sum'",
    "average and op": "The op parameter supersedes average", "average of bool": "the average of bool has no meaning",
    "scalar": "works along the first dimension, and a scalar has none", "scalar scattered": "and a scalar has none",
    "splits": "splits must be 3 numbers of rows",
    "no even splits": "alltoall cannot share 4 rows evenly among 3 ranks: pass splits",
    "root": "root_rank must be a rank of the process set, one of [0, 1, 2], not 3",
    "process set": "process_set must be a ProcessSet", "compression": "compression must be one of comm.Compression",
    "sparse": "tf.IndexedSlices with op=commlib.Max: use Average or Sum",
    "predivide": "gradient_predivide_factor not supported with op != Average",
    "not differentiable": "allreduce with op=commlib.Max is not differentiable: pass tf.stop_gradient(tensor)",
}  # fmt: skip


def test_wrong_calls(ranks, graph):
    for errors in ranks.call("failure_cases:wrong_calls", graph):
        assert errors.keys() == MESSAGES.keys()
        for case, message in MESSAGES.items():
            assert errors[case] is not None and message in errors[case][1], (case, errors[case])
            assert errors[case][0] in ("ValueError", "TypeError", "InvalidArgumentError", "LookupError"), errors[case]
            assert graph or errors[case][0] in ("ValueError", "TypeError"), errors[case]


def test_xla_is_refused(ranks):
    for kind, text in ranks.call("failure_cases:compiled"):
        assert kind == "ValueError" and "allreduce cannot be compiled by XLA: use tf.function without jit_compile=True" in text


def test_without_init(ranks):
    for errors, result in ranks.call("failure_cases:without_init"):
        assert all("commlib is not initialized: call commlib.init() first" in text for _, text in errors), errors
        assert [kind for kind, _ in errors] == ["InvalidArgumentError"] + ["ValueError"] * 5
        assert result == [SIZE] * 2


def test_no_op_waits_for_another(ranks):
    ranks.call("failure_cases:orders")


def test_many_lives(ranks):
    ranks.call("failure_cases:cycles", 25)


def test_beside_torch(ranks):
    for of_tensorflow, of_torch in ranks.call("failure_cases:beside_torch"):
        assert of_any_ranks(of_tensorflow) == of_any_ranks(of_torch) and "allreduce 'both' float32" in of_torch


def test_a_rank_that_leaves_and_one_that_dies():
    with start(SIZE) as ranks:
        for kind, text in ranks.call("failure_cases:leave")[::2]:
            assert kind == "AbortedError" and "rank 1" in text, text
        ranks.call("failure_cases:again")
        eager, died, function = ranks.outcomes("failure_cases:lose_rank_1")
        assert isinstance(died, Died)
        for (errors, health), wanted in ((eager, "PeerLostError"), (function, "AbortedError")):
            for kind, text in errors:
                assert kind == wanted and "rank 1" in text and "lost" in text, text
            assert "rank 1" in health
