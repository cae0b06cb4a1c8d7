"""Collectives on tensors over real ranks, their gradients, and state made equal."""

import pytest
import torch

SIZE = 3


@pytest.fixture(scope="module")
def ranks(torch_ranks):
    return torch_ranks(SIZE)


def test_every_dtype(ranks):
    for result in ranks.call("torch_cases:reduce_all_dtypes"):
        assert len(result) == 9
        for dtype, reduced in result.items():
            assert reduced == [[6, 9], [1, 2], [3, 4], [2, 3]], dtype


def test_every_collective(ranks):
    shares = [[0.0, 3.0], [6.0, 9.0], [12.0]]
    for rank, result in enumerate(ranks.call("torch_cases:move_tensors")):
        assert result["in place"] == [[3.0, 3.0]] * 3
        assert result["product"] == [8.0] * 3
        assert result["bool"] == [True, True, False]
        assert result["broadcast"] == [2]
        assert result["allgather"] == [[0], [1], [1], [2], [2], [2]]
        assert result["empty"] == [0, 2]
        assert result["scalar"] == 2.0
        assert result["reducescatter"] == shares[rank]
        first = [0, 1, 3][rank]
        rows = [100 * sender + i for sender in range(3) for i in range(first, first + rank + 1)]
        assert result["alltoall"] == (rows, [rank + 1] * 3)
        assert result["object"] == {"rank": 1}
        assert result["objects"] == ["", "x", "xx"]


def test_gradients(ranks):
    # Weights are 1, 2 and 3: their sum is 6, their mean 2.
    for rank, result in enumerate(ranks.call("torch_cases:differentiate")):
        assert result["sum"] == [6.0]
        assert result["average"] == [2.0]
        assert result["broadcast"] == ([2.0] if rank == 0 else [0.0])
        assert result["allgather"] == [2.0] * (rank + 1)
        assert result["reducescatter"] == [1.0, 2.0, 3.0]
        assert result["alltoall"] == [1.0, 2.0, 3.0]
        assert result["alltoall with splits"] == [1.0, 2.0, 3.0, 0.0]


def test_optimizer_state_of_rank_0(ranks):
    (state, lr, betas, kind), *others = ranks.call("torch_cases:state_of_rank_0")
    assert (lr, betas, kind) == (0.5, (0.8, 0.9), "tuple")
    assert len(state) == 6
    for other, *options in others:
        assert options == [lr, betas, kind]
        for index in state:
            assert all(torch.equal(state[index][name], other[index][name]) for name in state[index])


def test_a_mismatch_is_told_to_every_rank_and_is_survived(ranks):
    for message, total in ranks.call("torch_cases:mismatched_parameter"):
        assert "weight" in message or "bias" in message
        assert "(3" in message and "(4" in message
        assert total == SIZE
