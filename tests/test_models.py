"""Layer tables: totals that the literature and the frameworks agree on."""
import pytest

from commlib.models import MODELS, alexnet, bert_base, layer_times, parameters, resnet50, tensors
from commlib.schedule import backward_overlap_step_time, ideal_step_time, no_overlap_step_time

PARAMETERS = {"alexnet": 60_965_224, "vgg16": 138_357_544, "resnet50": 25_557_032, "bert_base": 109_482_240,
              "bert_large": 335_141_888, "gpt2_small": 124_439_808, "gpt2_medium": 354_823_168,
              "gpt2_large": 774_030_080}  # fmt: skip
TENSORS = {"alexnet": 16, "vgg16": 32, "resnet50": 161, "bert_base": 199, "bert_large": 391, "gpt2_small": 148,
           "gpt2_medium": 292, "gpt2_large": 436}  # fmt: skip


def transformer_multiply_adds(blocks, width, tokens, vocabulary=0):
    """Kaplan et al., "Scaling laws for neural language models", 2020: 12 blocks width^2 parameters, and the attention."""
    return tokens * (12 * blocks * width**2 + 2 * blocks * tokens * width + vocabulary * width)


# Published, per sample, or by the published formula.
MULTIPLY_ADDS = {"alexnet": 0.724e9, "vgg16": 15.47e9, "resnet50": 4.09e9, "bert_base": 11.2e9,
                 "bert_large": transformer_multiply_adds(24, 1024, 128),
                 "gpt2_small": transformer_multiply_adds(12, 768, 1024, 50257),
                 "gpt2_medium": transformer_multiply_adds(24, 1024, 1024, 50257),
                 "gpt2_large": transformer_multiply_adds(36, 1280, 1024, 50257)}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    assert parameters(MODELS[name]()) == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_tensors_have_names_of_their_own(name):
    names = [tensor.name for tensor in tensors(MODELS[name]())]
    assert len(set(names)) == len(names) == TENSORS[name]


@pytest.mark.parametrize("name", MODELS)
def test_work(name):
    flops = sum(layer.forward_flops for layer in MODELS[name]())
    assert flops == pytest.approx(2 * MULTIPLY_ADDS[name], rel=0.02)


def test_order_is_that_of_the_forward_pass():
    assert tensors(alexnet())[0].name == "conv1.weight" and tensors(alexnet())[-1].name == "fc8.bias"
    names = [layer.name for layer in resnet50()[:10]]
    assert names == ["conv1", "bn1"] + [f"layer1.0.{part}" for part in (
        "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample.0", "downsample.1")]


def test_longer_sequences_are_more_work_and_no_more_parameters():
    assert parameters(bert_base(512)) == parameters(bert_base(128))
    short, long = (sum(layer.forward_flops for layer in bert_base(count)) for count in (128, 512))
    assert long > 4 * short


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ratio", [0.5, 1, 2])
def test_layer_times_add_up(name, ratio):
    times = layer_times(MODELS[name](), compute_s=1.0, communication_s=ratio)
    assert sum(time.forward_s for time in times) == pytest.approx(1 / 3)
    assert sum(time.backward_s for time in times) == pytest.approx(2 / 3)
    assert sum(time.communication_s for time in times) == pytest.approx(ratio)
    ideal, backward, none = (bound(times).step_s for bound in (
        ideal_step_time, backward_overlap_step_time, no_overlap_step_time))
    slack = 1e-12
    assert max(1.0, ratio) <= ideal + slack
    assert ideal <= backward + slack
    assert none == pytest.approx(1 + ratio)
