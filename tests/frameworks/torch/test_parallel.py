"""DDP, FSDP2, DTensor and torch.distributed.nn over commlib learn and compute what they do over gloo."""

import pytest
from starting import start
from support import Died


def needs_dtensor():
    """Skips where torch has no public names for FSDP2, DTensor and pipelines, as 2.4."""
    import torch.distributed.tensor

    if not hasattr(torch.distributed.tensor, "DTensor"):
        pytest.skip("this torch has no public torch.distributed.tensor.DTensor")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two ranks with default groups of commlib's and of gloo's."""
    with start(2, initialize=False) as ranks:
        ranks.call("c10d_collectives:begin", str(tmp_path_factory.mktemp("parallel") / "store"))
        yield ranks
        ranks.call("c10d_collectives:end")


@pytest.mark.parametrize("case", ["ddp", "hook", "ends", "ddp_features", "fsdp", "dtensor", "functional", "zero", "pipeline"])
def test_beside_gloo(ranks, case):
    if case in ("fsdp", "dtensor", "pipeline"):
        needs_dtensor()
    ranks.call(f"parallel_cases:{case}")


def test_checkpoints(ranks, tmp_path):
    needs_dtensor()
    ranks.call("parallel_cases:checkpoints", str(tmp_path))


def test_ddp_says_who_was_lost(tmp_path):
    with start(2, initialize=False) as ranks:
        text, died = ranks.outcomes("parallel_cases:losing", str(tmp_path / "store"))
        assert "rank 1 was lost: its process died" in text and isinstance(died, Died)


def test_the_examples_of_the_pages():
    import doctest
    import importlib

    module = importlib.import_module("commlib.torch.distributed.hook")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed
