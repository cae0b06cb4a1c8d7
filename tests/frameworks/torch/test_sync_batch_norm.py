"""SyncBatchNorm on uneven parts of a batch equals torch's batch normalisation on the whole."""

import pytest
import torch

import commlib.torch as comm


@pytest.fixture(scope="module")
def ranks(torch_ranks):
    return torch_ranks(3)


def test_as_the_whole_batch(ranks):
    ranks.call("sync_batch_norm_cases:all_cases")


def test_too_few_values_are_refused_on_all_ranks(ranks):
    for message in ranks.call("sync_batch_norm_cases:too_few"):
        assert "Expected more than 1 value per channel when training" in message


def test_training(ranks):
    for parts, whole in ranks.call("sync_batch_norm_cases:trained"):
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def test_arguments():
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        comm.SyncBatchNorm(2)(torch.ones(2))
    norm = comm.SyncBatchNorm(2, 1e-3, 0.2, False, False)
    assert (norm.eps, norm.momentum, norm.weight, norm.running_mean) == (1e-3, 0.2, None, None)
    with pytest.raises(ValueError, match="init"):
        norm(torch.ones(2, 2))
