"""Ranks that do different things: all learn the same, or all are told the same; nobody waits for ever."""

import re

import pytest
from hard_check import same_bits

FORMS = ("overlapped", "waiting", "horovod")


def outcomes(torch_ranks, size, case, *args, forms=FORMS):
    """form -> what every rank has, which is the same on all."""
    ranks = torch_ranks(size)
    results = {}
    for form in forms:
        first, *others = results[form] = ranks.call("hard_ranks:told", case, form, *args)
        for rank, other in enumerate(others, 1):
            assert type(other) is type(first), f"rank {rank}: {other}, rank 0: {first}"
            assert other == first if isinstance(first, str) else same_bits(first, other) is None, f"{form}: rank {rank}"
    return {form: result[0] for form, result in results.items()}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("reach", [["last"], ["first", "middle"]])
def test_ranks_that_use_different_layers_clip_alike(torch_ranks, size, reach):
    results = outcomes(torch_ranks, size, "clipped", reach)
    for form in FORMS[1:]:
        assert same_bits(results["overlapped"], results[form]) is None


@pytest.mark.parametrize("size", [2, 3])
def test_clipping_without_any_gradient_is_told_to_all(torch_ranks, size):
    for form, result in outcomes(torch_ranks, size, "clipped", [], forms=FORMS[:2]).items():
        assert re.match("rank [0-2] changed its reduced gradients before step.* and rank [0-2] did not", result), (form, result)
    # Horovod's form says synchronize() on every rank, so there is nothing to guess.
    assert not isinstance(outcomes(torch_ranks, size, "clipped", [], forms=FORMS[2:])["horovod"], str)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", ["empty_batches", "frozen_after_backward"])
def test_what_ranks_may_do_differently(torch_ranks, size, case):
    results = outcomes(torch_ranks, size, case)
    for form in FORMS[1:]:
        assert same_bits(results["overlapped"], results[form]) is None


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("when, parameter, frozen, trained", [
    ("at the start", "middle.weight", 1, 0), ("freezes later", "middle.weight", 1, 0), ("unfreezes later", "first.weight", 0, 1),
])  # fmt: skip
def test_freezing_on_one_rank_is_told_to_all(torch_ranks, size, when, parameter, frozen, trained):
    for form, result in outcomes(torch_ranks, size, "freezing", when).items():
        expected = f"parameter '{parameter}' is frozen on rank {frozen} (requires_grad is False) and trained on rank {trained}"
        assert expected in str(result), (form, result)
