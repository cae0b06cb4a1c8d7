"""Horovod's callbacks for Keras."""

import pytest


def test_all_ranks_start_from_one(tensorflow_ranks):
    first, second = tensorflow_ranks(2).call("keras_callback_cases:starts")
    assert first[0] != second[0]
    assert first[1:] == second[1:]
    assert first[1] == second[0]  # rank 1 was the root


def test_metrics_are_averaged(tensorflow_ranks):
    assert tensorflow_ranks(2).call("keras_callback_cases:averages") == [{"loss": 0.5, "accuracy": 1.0, "text": "stays"}] * 2


def test_learning_rates(tensorflow_ranks):
    for results, is_corrected in tensorflow_ranks(2).call("keras_callback_cases:rates"):
        assert results["staircase"] == [0.1] * 10 + [0.05] * 10
        assert results["constant"] == pytest.approx([0.03] * 20)
        # From 0.1 / 2, by the same amount with each of 20 batches.
        assert results["warmup"] == pytest.approx([0.05 + 0.0025 * batch for batch in range(1, 21)], abs=1e-5)
        assert is_corrected


def test_best_model(tensorflow_ranks, tmp_path):
    for without_path, is_there, without_rate in tensorflow_ranks(2).call("keras_callback_cases:best", str(tmp_path)):
        assert "set callback.filepath" in without_path and is_there
        assert "`initial_lr` is required" in without_rate
