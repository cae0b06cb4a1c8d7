"""Collectives on TensorFlow's tensors over real ranks, in eager mode and in functions, and their gradients."""

import pytest


@pytest.fixture(params=[False, True], ids=["eager", "function"])
def graph(request):
    return request.param


@pytest.mark.parametrize("size", [1, 2, 3])
def test_allreduce(tensorflow_ranks, size, graph):
    assert tensorflow_ranks(size).call("collectives_cases:allreduces", graph) == [10 * 5 * 6 - 6] * size


@pytest.mark.parametrize("size", [1, 2, 3])
def test_other_collectives(tensorflow_ranks, size, graph):
    tensorflow_ranks(size).call("collectives_cases:others", graph)


@pytest.mark.parametrize("size", [1, 3])
def test_lists(tensorflow_ranks, size, graph):
    tensorflow_ranks(size).call("collectives_cases:groups", graph)


def test_sparse_tensors(tensorflow_ranks, graph):
    tensorflow_ranks(3).call("collectives_cases:sparse", graph)


def test_numbers_in_graphs(tensorflow_ranks, graph):
    results = tensorflow_ranks(3).call("collectives_cases:numbers_of_ranks", graph)
    assert results == [[rank, 3, rank, 3, 1] for rank in range(3)]


def test_compression(tensorflow_ranks, graph):
    for exact, fp16, bf16 in tensorflow_ranks(2).call("collectives_cases:compressed", graph):
        assert exact[1] > 1.0 and exact[2] > 0.0
        assert fp16 == [1.0, 1.0, 0.0]
        assert bf16[:2] == [1.0, 1.0] and 0.0 < bf16[2] < 1.1e-9


def test_gradients(tensorflow_ranks, graph):
    # Weights are 1, 2 and 3: their sum is 6, their mean 2.
    for rank, result in enumerate(tensorflow_ranks(3).call("collectives_cases:differentiate", graph)):
        assert result["sum"] == [6.0]
        assert result["average"] == [2.0]
        assert result["scaled"] == [3.0]
        assert result["group"] == [12.0]
        assert result["broadcast"] == ([2.0] if rank == 0 else [0.0])
        assert result["allgather"] == [2.0] * (rank + 1)
        assert result["reducescatter"] == [1.0, 2.0, 3.0]
        assert result["reducescatter average"] == pytest.approx([1 / 3, 2 / 3, 1.0])
        assert result["alltoall"] == [1.0, 2.0, 3.0]
        assert result["alltoall with splits"] == [1.0, 2.0, 3.0, 0.0]


def test_ranks_with_unequal_work(tensorflow_ranks, graph):
    assert tensorflow_ranks(3).call("collectives_cases:unequal_work", graph) == [[2, 2]] * 3


def test_ranks_whose_functions_differ_otherwise(tensorflow_ranks):
    tensorflow_ranks(3).call("collectives_cases:ranks_with_more_to_do")


def test_state(tensorflow_ranks):
    for values, told, gathered in tensorflow_ranks(3).call("collectives_cases:state"):
        assert values == [[1.0, 1.0], [1], True, [1]]
        assert told == ({"rank": 1}, 1)
        assert gathered == ["", "x", "xx"]


def test_process_sets(tensorflow_ranks):
    for of_function, of_call in tensorflow_ranks(3).call("collectives_cases:in_sets"):
        assert "there is no process set of number" in of_function
        assert "is not registered" in of_call
