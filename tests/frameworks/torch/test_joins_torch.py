"""join() in training: uneven data with both forms of the optimizer, process sets, groups, what is refused; on every backend."""

import join_cases
import pytest


@pytest.mark.parametrize("form", ["horovod", "overlapped"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_uneven_data(own_torch_ranks, size, form):
    for distances in own_torch_ranks(size).call(join_cases.train, form):
        assert max(distances) < 1e-12, distances


def test_sparse_gradients(own_torch_ranks):
    (dense_0, sparse_0), (dense_1, sparse_1) = own_torch_ranks(2).call(join_cases.sparse)
    assert dense_0 == [0.0, 0.5, 1.0, 1.0, 1.0] and dense_1 == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert "rank 1 has joined" in sparse_0 and sparse_1 == [0.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(own_torch_ranks, size):
    results = own_torch_ranks(size).call(join_cases.collectives)
    share = (size - 1) / size
    assert [grouped for grouped, _, _ in results] == [None] + [[pytest.approx(share), pytest.approx(2 * share)]] * (size - 1)
    assert len({last for _, last, _ in results}) == 1 and results[0][1] != 0
    assert all(ranks == list(range(size)) for _, _, ranks in results)


def test_process_sets(own_torch_ranks):
    results = own_torch_ranks(3).call(join_cases.process_sets)
    assert results[0] == results[2] == [] and results[1][-1] == 1.0
