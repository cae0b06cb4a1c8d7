"""op=Adasum on TensorFlow's tensors, in tapes and in optimizers; and DistributedOptimizer for optimizers of TensorFlow 1."""

import pytest


@pytest.fixture(params=[False, True], ids=["eager", "function"])
def graph(request):
    return request.param


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives(tensorflow_ranks, size, graph):
    for wrong, count in tensorflow_ranks(size).call("tensorflow_adasum_cases:collectives", graph):
        assert not wrong and count >= 4 * 7


@pytest.mark.parametrize("size", [2, 3])
def test_tapes(tensorflow_ranks, size, graph):
    assert max(tensorflow_ranks(size).call("tensorflow_adasum_cases:of_tapes", graph)) < 1e-5


@pytest.mark.parametrize("kind", ["adam", "accumulating"])
@pytest.mark.parametrize("size", [2, 3])
def test_keras_optimizers(tensorflow_ranks, size, kind):
    for far in tensorflow_ranks(size).call("tensorflow_adasum_cases:of_keras", kind):
        assert max(far) < 1e-5


def test_fit_with_loss_scaling(tensorflow_ranks):
    assert tensorflow_ranks(2).call("tensorflow_adasum_cases:in_fit") == [True, True]


def test_optimizers_of_tensorflow_1(tensorflow_ranks):
    # Gradients (1, 0) and (0, 2) are orthogonal: Adasum adds them.
    assert tensorflow_ranks(2).call("tensorflow_adasum_cases:of_tensorflow_1", False) == [[[0.5, 0.0]] * 3] * 2
    assert tensorflow_ranks(2).call("tensorflow_adasum_cases:of_tensorflow_1", True) == [[[0.0, -1.0]] * 3] * 2


def test_wrong_calls(tensorflow_ranks, graph):
    texts = {
        "shapes": "ranks disagree", "integers": "op=commlib.Adasum is for float16, bfloat16, float32, float64, not int32",
        "sparse": "tf.IndexedSlices with op=commlib.Adasum: use Average or Sum", "scattered": "op=Adasum is not supported here",
        "not differentiable": "with op=commlib.Adasum is not differentiable", "ema": "use one",
        "passes": "use keras.optimizers", "twice": "is distributed already",
    }  # fmt: skip
    for errors in tensorflow_ranks(2).call("tensorflow_adasum_cases:wrong", graph):
        assert errors.keys() == texts.keys()
        for case, text in texts.items():
            assert errors[case] is not None and text in errors[case][1], (case, errors[case])
        assert errors["shapes"][0] == ("FailedPreconditionError" if graph else "MismatchError")


def test_what_is_in_flight_ends(tensorflow_ranks):
    first, second = tensorflow_ranks(2).call("tensorflow_adasum_cases:left")
    assert first[0] == "AbortedError" and "rank 1" in first[1] and second is None
