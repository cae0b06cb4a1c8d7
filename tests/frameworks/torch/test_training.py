"""N ranks learn what one process learns from the whole batch; all ranks and all forms have the same bits."""

import pytest
import torch
from torch_cases import DTYPES, FORMS, OPTIMIZERS, whole_batch

SIZES = (2, 3, 4)
LIMITS = {"fp32": 1e-5, "fp64": 1e-9}


@pytest.fixture(scope="module", params=SIZES, ids=[f"{size} ranks" for size in SIZES])
def trained(request, torch_ranks):
    """Results of torch_cases.train_all, by rank."""
    return torch_ranks(request.param).call("torch_cases:train_all")


def vector(weights):
    return torch.cat([tensor.flatten().double() for tensor in weights.values()])


def same_bits(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_as_one_process_on_the_whole_batch(trained, optimizer, dtype):
    one = vector(whole_batch(optimizer, dtype))
    many = vector(trained[0][optimizer, dtype, "overlapped"][0])
    assert torch.linalg.norm(many - one) <= LIMITS[dtype] * torch.linalg.norm(one)


def test_all_ranks_have_the_same_bits(trained):
    for case, (weights, _) in trained[0].items():
        for other in trained[1:]:
            assert same_bits(weights, other[case][0]), case


def test_all_forms_have_the_same_bits(trained):
    for (optimizer, dtype, form), (weights, overlap) in trained[0].items():
        assert overlap == ("backward and forward" if form == "overlapped" else "backward")
        assert same_bits(weights, trained[0][optimizer, dtype, "waiting"][0]), (optimizer, dtype, form)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_different_branches(torch_ranks, size):
    results = torch_ranks(size).call("torch_cases:train_branches")
    before, after = results[0]["overlapped"]
    assert not torch.equal(before["branches.0.weight"], after["branches.0.weight"])
    assert not torch.equal(before["branches.1.weight"], after["branches.1.weight"])
    assert torch.equal(before["branches.2.weight"], after["branches.2.weight"])  # no rank used it
    assert same_bits(after, results[0]["waiting"][1])
    horovod = results[0]["horovod"][1]
    assert not torch.equal(before["branches.2.weight"], horovod["branches.2.weight"])  # weight decay, as in Horovod
    for form in FORMS:
        assert all(same_bits(results[0][form][1], other[form][1]) for other in results)


def test_gradients_that_are_not_contiguous(torch_ranks):
    results = torch_ranks(2).call("torch_cases:train_channels_last")
    for form in FORMS:
        assert same_bits(results[0]["overlapped"], results[0][form])
        assert same_bits(results[0][form], results[1][form])


def test_a_step_that_one_rank_leaves_out_is_told_to_all(torch_ranks):
    for messages in torch_ranks(2).call("torch_cases:step_left_out_by_one_rank"):
        for form in FORMS:
            assert "ranks have made different numbers of steps" in messages[form]
