"""Horovod's arguments of DistributedOptimizer, in its form and with model=, on real ranks."""

import pytest
import torch


@pytest.fixture(scope="module")
def ranks(torch_ranks):
    return torch_ranks(2)


DTYPES = {"fp16": {"float16"}, "bf16": {"bfloat16"}, "own": {"float16"}}


def test_compression(ranks):
    """Two ranks: a sum of two 16-bit numbers is rounded once, so the bits are those of compressing by hand."""
    results = ranks.call("optimizer_cases:compressed")
    for (form, name), (weights, wanted, dtypes, nbytes) in results[0].items():
        assert dtypes == DTYPES[name], (form, name)
        assert nbytes == 2 * sum(tensor.numel() for tensor in weights.values())
        for key, tensor in weights.items():
            assert torch.equal(tensor, wanted[key]), (form, name, key)
            assert torch.equal(tensor, results[1][form, name][0][key]), (form, name, key)


def test_groups_that_the_user_chose(ranks):
    halves = [["first.bias", "middle.bias", "middle.weight"], ["first.weight", "last.bias", "last.weight"]]
    lists = [["first.bias", "last.weight"], ["first.weight"], ["last.bias"], ["middle.bias", "middle.weight"]]
    alone = sorted([name] for group in halves for name in group)
    for results in ranks.call("optimizer_cases:chosen_groups"):
        for (what, form), (groups, is_equal) in results.items():
            assert groups == {"two": halves, "deprecated": halves, "lists": lists, "many": alone}[what], (what, form)
            assert is_equal, (what, form)


def test_accumulation_and_predivision(ranks):
    for results, wanted in ranks.call("optimizer_cases:accumulated"):
        for form, weights in results.items():
            for name, tensor in weights.items():
                torch.testing.assert_close(tensor, wanted[name], msg=lambda text: f"{form} {name}: {text}")


def test_sparse_as_dense(ranks):
    torch.manual_seed(4)
    wanted = torch.nn.Embedding(8, 2).weight.detach().clone()
    wanted[0] -= 0.5
    wanted[1] -= 0.5
    wanted[5] -= 1.0  # two steps, half of the ranks for rows 0 and 1, all of them for row 5
    for results in ranks.call("optimizer_cases:sparse_as_dense"):
        for (as_dense, name), (rows, is_sparse) in results.items():
            torch.testing.assert_close(rows, wanted)
            assert is_sparse != as_dense, name
