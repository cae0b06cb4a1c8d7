"""Process sets: collectives and training within some of the ranks, and what is refused, on every rank alike."""

import pytest
import torch


@pytest.fixture(scope="module")
def ranks(torch_ranks):
    return torch_ranks(3)


def test_every_collective_within_subsets(ranks):
    for rank, messages in enumerate(ranks.call("process_set_cases:in_sets")):
        assert len(messages) == (6, 3, 3)[rank]
        assert all("process is not part of provided process set" in message for message in messages)


def test_modules_with_sets_are_copied_and_saved(ranks):
    ranks.call("process_set_cases:copied")


def test_what_is_refused_is_refused_on_all_ranks(ranks):
    first, *others = ranks.call("process_set_cases:different_sets")
    assert others == [first] * 2
    for message, words in zip(first, ("want different process sets: rank 0 [[0, 1]], rank 1 [[0, 2]]", "is there already",
                                      "each once, not [0, 0]", "is there already", "want different")):  # fmt: skip
        assert words in message


def test_sets_given_to_init(ranks):
    for rank, (sums, message) in enumerate(ranks.call("process_set_cases:sets_at_init")):
        assert sums == [(2.0, 2.0, 1.0)[rank]] * 2
        assert "want different process sets" in message


def test_training_within_a_set(ranks):
    """Ranks 0 and 2 learn from halves what one process learns from all; rank 1 trains by itself."""
    for rank, (results, alone) in enumerate(ranks.call("process_set_cases:train_in_sets")):
        for form, weights in results.items():
            wanted = alone[2 if rank == 1 and form == "overlapped" else 1]
            for name, tensor in weights.items():
                torch.testing.assert_close(tensor, wanted[name], msg=lambda text: f"{form} {name}: {text}")
