"""enable_forward_overlap: the same bits as training that waits, complete weights for whoever reads them, and clear refusals."""

import pytest
from support import Died
from tensorflow_starting import start

# Whose updates can stay pending, and for whom everything goes on as without.
OVERLAPPED = ["sgd", "momentum", "adam", "adamw", "clipnorm", "clipvalue", "ema that overwrites", "schedule", "loss scale factor",
              "subclassed", "own step"]  # fmt: skip
WAITING = ["global_clipnorm", "loss scaling", "accumulation", "loop", "eager", "embedding"]


@pytest.mark.parametrize("case", OVERLAPPED + WAITING)
def test_same_bits(tensorflow_ranks, case):
    results = tensorflow_ranks(2).call("keras_overlap_cases:against_waiting", case)
    assert [result[:2] for result in results] == [(True, case in OVERLAPPED)] * 2
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("case", ["sgd", "adam", "adamw"])
def test_same_bits_of_three(tensorflow_ranks, case):
    results = tensorflow_ranks(3).call("keras_overlap_cases:against_waiting", case)
    assert [result[:2] for result in results] == [(True, True)] * 3
    assert len({result[2] for result in results}) == 1


def test_who_reads_finds_complete_weights(tensorflow_ranks, tmp_path):
    assert tensorflow_ranks(2).call("keras_overlap_cases:read", str(tmp_path)) == [[], []]


def test_callbacks(tensorflow_ranks, tmp_path):
    first, second = tensorflow_ranks(2).call("keras_overlap_cases:callbacks", str(tmp_path))
    for overlapped, waiting in (first, second):
        assert overlapped == waiting
    # All ranks saw the same, averaged metrics included.
    assert first == second
    rates = first[0][-2]["lr"]
    assert rates == pytest.approx([0.1, 0.1])


def test_data_of_unknown_length(tensorflow_ranks):
    assert tensorflow_ranks(2).call("keras_overlap_cases:unknown_length") == [True, True]


def test_models_that_it_cannot_serve(tensorflow_ranks):
    for no_model, reads, twice in tensorflow_ranks(2).call("keras_overlap_cases:refused"):
        assert "takes a keras.Model" in no_model
        assert "after the optimizer's update" in reads
        assert "applies gradients twice" in twice


def test_models_that_differ(tensorflow_ranks):
    results = tensorflow_ranks(2).call("keras_overlap_cases:mismatched")
    for text, _ in results:
        assert text.startswith("MismatchError") and "submit the same on every rank" in text, text
    assert results[0][1] == results[1][1]


def test_lost_rank():
    with start(2) as ranks:
        first, second = ranks.outcomes("keras_overlap_cases:lost")
        assert isinstance(second, Died)
        assert "rank 1" in first and "lost" in first
