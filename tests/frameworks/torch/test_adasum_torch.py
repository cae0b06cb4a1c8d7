"""op=Adasum on tensors, and DistributedOptimizer's form of it: Horovod's, which combines the changes of weights."""

import adasum_cases
import pytest


@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives(torch_ranks, size):
    torch_ranks(size).call(adasum_cases.collectives)


@pytest.mark.parametrize("form", ["horovod", "overlapped"])
@pytest.mark.parametrize("size", [2, 3])
def test_optimizer(torch_ranks, size, form):
    for distances in torch_ranks(size).call(adasum_cases.train, form):
        assert max(distances) < 1e-10, distances
