"""fit() with DistributedOptimizer on several ranks: against one process that sees the whole batch, and what else must hold."""

import subprocess
import sys

import pytest
from support import Died
from tensorflow_starting import start

CASES = ["sgd", "momentum", "adam", "adamw", "clipnorm", "clipvalue", "global_clipnorm", "ema", "ema that overwrites", "schedule",
         "loss scaling", "loss scale factor", "accumulation", "loop", "eager", "subclassed", "embedding", "own step"]  # fmt: skip

NEAR = 1e-5  # rounding: the mean of means is not bit by bit the mean of all


def check(results):
    assert results[0][0] <= NEAR
    assert len({digest for _, digest in results}) == 1


@pytest.mark.parametrize("case", CASES)
def test_fit(tensorflow_ranks, case):
    check(tensorflow_ranks(2).call("keras_cases:against_one_process", case))


@pytest.mark.parametrize("case", ["sgd", "adam", "adamw", "embedding"])
def test_fit_of_three(tensorflow_ranks, case):
    check(tensorflow_ranks(3).call("keras_cases:against_one_process", case))


def test_every_case_is_here(tensorflow_ranks):
    assert tensorflow_ranks(2).call("keras_cases:names")[0] == CASES


def test_ranks_skip_steps_together(tensorflow_ranks):
    results = tensorflow_ranks(2).call("keras_cases:half_precision")
    assert [result[:2] for result in results] == [(True, True)] * 2
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("average", [True, False])
def test_several_passes(tensorflow_ranks, average):
    for far, iterations in tensorflow_ranks(2).call("keras_cases:passes", average):
        assert far <= NEAR and iterations == 4


def test_local_layers_groups_and_compression(tensorflow_ranks):
    first, second = tensorflow_ranks(2).call("keras_cases:partly")
    assert first[0] != second[0]
    assert first[1] == second[1]
    # With two ranks a sum has one order of its terms, however gradients are grouped.
    assert first[2:4] == second[2:4] == (True, True)
    assert first[4] == second[4]


def test_saved_models_need_no_commlib(tensorflow_ranks, tmp_path):
    for same, same_later, name, iterations in tensorflow_ranks(2).call("keras_cases:saved", str(tmp_path)):
        assert same and same_later and name == "Adam" and iterations == 40
    text = ("import sys; sys.modules['commlib'] = None\n"
            f"import keras; model = keras.models.load_model({str(tmp_path / 'model.keras')!r})\n"
            "print(type(model.optimizer), int(model.optimizer.iterations))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert "keras.src.optimizers.adam.Adam'> 20" in done.stdout, done.stderr


def test_wrong_calls(tensorflow_ranks):
    parts = {
        "no optimizer": "takes an optimizer of keras.optimizers", "twice": "is distributed already",
        "tf 1": "not with tf.compat.v1.train", "passes": "has made no step yet", "no passes": "an int of at least 1",
        "both": "give one of them", "predivide": "not supported with op != Average", "adasum": "use_ema averages weights in it",
        "groups": "a non-negative integer or a list", "layer": "has no weights yet", "xla": "jit_compile=False",
    }  # fmt: skip
    for said in tensorflow_ranks(2).call("keras_cases:refused"):
        assert set(said) == set(parts)
        for name, part in parts.items():
            assert said[name] is not None and part in said[name], (name, said[name])


def test_a_tape_in_a_train_step(tensorflow_ranks):
    check(tensorflow_ranks(2).call("keras_cases:tape_in_fit"))


def test_a_wrong_call_in_fit(tensorflow_ranks):
    for said in tensorflow_ranks(2).call("keras_cases:wrong_step"):
        for text in said:
            assert "op must be commlib.Average, Sum, Min, Max, Product or Adasum, not 'sum'" in text, text


def test_models_that_differ(tensorflow_ranks):
    results = tensorflow_ranks(2).call("keras_cases:mismatched")
    for text, _ in results:
        assert "submit the same on every rank" in text, text
    assert results[0][1] == results[1][1]


def test_lost_rank():
    with start(2) as ranks:
        first, second = ranks.outcomes("keras_cases:lost")
        assert isinstance(second, Died)
        assert "rank 1" in first and "lost" in first
