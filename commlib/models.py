"""Layer tables of known networks: parameters in order of first use, and the work of every layer.

They are for benchmarks and bounds. This file knows shapes of layers, and derives sizes and work from them by formula;
it knows no framework, no seconds and no bytes per parameter. Work is counted in floating-point operations of one forward
pass of one sample (a multiply-add is two); a backward pass is twice that, because it makes the gradients of both the
input and the weights.
"""
from __future__ import annotations

from types import MappingProxyType
from typing import Callable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from .schedule import LayerTime


class Tensor(NamedTuple):
    """One parameter tensor: a gradient that is reduced by itself."""

    name: str
    parameters: int


class Layer(NamedTuple):
    """What runs as one in the forward pass. Some layers have no parameters."""

    name: str
    tensors: Tuple[Tensor, ...]
    forward_flops: int

    @property
    def parameters(self) -> int:
        """Parameters of all tensors."""
        return sum(tensor.parameters for tensor in self.tensors)


def parameters(layers: Sequence[Layer]) -> int:
    """Parameters of a network.

    Example:
        >>> parameters(vgg16())
        138357544
    """
    return sum(layer.parameters for layer in layers)


def tensors(layers: Sequence[Layer]) -> List[Tensor]:
    """All parameter tensors of a network in order of first use: the position is the priority."""
    return [tensor for layer in layers for tensor in layer.tensors]


def layer_times(layers: Sequence[Layer], compute_s: float, communication_s: float) -> List[LayerTime]:
    """Spreads the compute and communication of a step over the layers, by their work and their parameters.

    Args:
        layers: a network, in forward order.
        compute_s: seconds of all forward and backward passes of a step; a third of it is forward.
        communication_s: seconds in which the link carries all gradients.

    Example:
        >>> from commlib.schedule import ideal_step_time
        >>> round(ideal_step_time(layer_times(alexnet(), compute_s=1.0, communication_s=1.0)).step_s, 3)
        1.006
    """
    total_flops, total_parameters = sum(layer.forward_flops for layer in layers), parameters(layers)
    return [LayerTime(compute_s / 3 * layer.forward_flops / total_flops,
                      compute_s * 2 / 3 * layer.forward_flops / total_flops,
                      communication_s * layer.parameters / total_parameters) for layer in layers]


# ---- kinds of layers ------------------------------------------------------------------------------------------------


def conv(
    name: str, channels_in: int, channels_out: int, kernel: int, output: int, groups: int = 1, bias: bool = True
) -> Layer:
    """A square convolution to an output of `output` x `output` pixels."""
    weights = channels_out * (channels_in // groups) * kernel * kernel
    return Layer(name, _weight_and_bias(name, weights, channels_out, bias), 2 * weights * output * output)


def linear(name: str, inputs: int, outputs: int, tokens: int = 1) -> Layer:
    """A fully connected layer, applied to each token."""
    return Layer(name, _weight_and_bias(name, inputs * outputs, outputs, True), 2 * inputs * outputs * tokens)


def norm(name: str, width: int, positions: int) -> Layer:
    """Batch or layer normalization: mean, deviation, scale and shift, about 8 operations per value."""
    return Layer(name, _weight_and_bias(name, width, width, True), 8 * width * positions)


def embedding(name: str, rows: int, width: int, tokens: int) -> Layer:
    """A table from which one row per token is taken and added to the others."""
    return Layer(name, (Tensor(f"{name}.weight", rows * width),), width * tokens)


def attention(name: str, width: int, tokens: int) -> Layer:
    """Scores of all pairs of tokens, and the values weighted by them: no parameters."""
    return Layer(name, (), 2 * 2 * width * tokens * tokens)


def _weight_and_bias(name: str, weights: int, biases: int, bias: bool) -> Tuple[Tensor, ...]:
    weight = Tensor(f"{name}.weight", weights)
    return (weight, Tensor(f"{name}.bias", biases)) if bias else (weight,)


# ---- networks -------------------------------------------------------------------------------------------------------


def alexnet() -> List[Layer]:
    """AlexNet with its two groups, as in Caffe, for 227 x 227 images.

    References:
        Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks", NIPS 2012.
    """
    return [
        conv("conv1", 3, 96, kernel=11, output=55),
        conv("conv2", 96, 256, kernel=5, output=27, groups=2),
        conv("conv3", 256, 384, kernel=3, output=13),
        conv("conv4", 384, 384, kernel=3, output=13, groups=2),
        conv("conv5", 384, 256, kernel=3, output=13, groups=2),
        linear("fc6", 256 * 6 * 6, 4096),
        linear("fc7", 4096, 4096),
        linear("fc8", 4096, 1000),
    ]


def vgg16() -> List[Layer]:
    """VGG-16 for 224 x 224 images.

    References:
        Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015.
    """
    return [
        *_vgg_convolutions(),
        linear("fc6", 512 * 7 * 7, 4096),
        linear("fc7", 4096, 4096),
        linear("fc8", 4096, 1000),
    ]


def _vgg_convolutions() -> Iterator[Layer]:
    channels, output = 3, 224
    for block, (convolutions, width) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)], start=1):
        for number in range(1, convolutions + 1):
            yield conv(f"conv{block}_{number}", channels, width, kernel=3, output=output)
            channels = width
        output //= 2  # pooling


def resnet50() -> List[Layer]:
    """ResNet-50 for 224 x 224 images, with the stride in the 3 x 3 convolution (as in torchvision and MLPerf).

    References:
        He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016.
    """
    layers = [*_conv_norm("conv1", "bn1", 3, 64, kernel=7, output=112)]
    channels, size = 64, 56
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            output = 56 >> (stage - 1)
            layers += _bottleneck(f"layer{stage}.{block}", channels, width, size, output, projects=block == 0)
            channels, size = 4 * width, output
    return [*layers, linear("fc", channels, 1000)]


def _bottleneck(name: str, channels: int, width: int, size: int, output: int, projects: bool) -> Iterator[Layer]:
    yield from _conv_norm(f"{name}.conv1", f"{name}.bn1", channels, width, kernel=1, output=size)
    yield from _conv_norm(f"{name}.conv2", f"{name}.bn2", width, width, kernel=3, output=output)
    yield from _conv_norm(f"{name}.conv3", f"{name}.bn3", width, 4 * width, kernel=1, output=output)
    if projects:
        shortcut = f"{name}.downsample"
        yield from _conv_norm(f"{shortcut}.0", f"{shortcut}.1", channels, 4 * width, kernel=1, output=output)


def _conv_norm(
    conv_name: str, norm_name: str, channels_in: int, channels_out: int, kernel: int, output: int
) -> Iterator[Layer]:
    yield conv(conv_name, channels_in, channels_out, kernel, output, bias=False)
    yield norm(norm_name, channels_out, output * output)


def bert_base(tokens: int = 128) -> List[Layer]:
    """BERT-base, uncased, with its pooler, for sequences of `tokens` tokens.

    References:
        Devlin, Chang, Lee and Toutanova, "BERT: pre-training of deep bidirectional transformers", NAACL 2019.
    """
    return _bert(tokens, width=768, encoders=12)


def bert_large(tokens: int = 128) -> List[Layer]:
    """BERT-large, uncased, with its pooler; otherwise as `bert_base`."""
    return _bert(tokens, width=1024, encoders=24)


def _bert(tokens: int, width: int, encoders: int) -> List[Layer]:
    layers = [
        embedding("embeddings.word", 30522, width, tokens),
        embedding("embeddings.position", 512, width, tokens),
        embedding("embeddings.token_type", 2, width, tokens),
        norm("embeddings.norm", width, tokens),
    ]
    for number in range(encoders):
        layers += _encoder(f"encoder.{number}", width, tokens)
    return [*layers, linear("pooler", width, width)]


def _encoder(name: str, width: int, tokens: int) -> Iterator[Layer]:
    for projection in ("query", "key", "value"):
        yield linear(f"{name}.attention.{projection}", width, width, tokens)
    yield attention(f"{name}.attention", width, tokens)
    yield linear(f"{name}.attention.output", width, width, tokens)
    yield norm(f"{name}.attention.norm", width, tokens)
    yield linear(f"{name}.intermediate", width, 4 * width, tokens)
    yield linear(f"{name}.output", 4 * width, width, tokens)
    yield norm(f"{name}.norm", width, tokens)


def gpt2_small(tokens: int = 1024) -> List[Layer]:
    """GPT-2 small (124 M parameters) for sequences of `tokens` tokens.

    The output projection shares its weights with the token embedding: the gradient of both is one tensor, which is complete
    only when backward has come to the embedding, and is listed there.

    References:
        Radford et al., "Language models are unsupervised multitask learners", 2019; counts as of the published weights.
    """
    return _gpt2(tokens, width=768, blocks=12)


def gpt2_medium(tokens: int = 1024) -> List[Layer]:
    """GPT-2 medium (355 M parameters); otherwise as `gpt2_small`."""
    return _gpt2(tokens, width=1024, blocks=24)


def gpt2_large(tokens: int = 1024) -> List[Layer]:
    """GPT-2 large (774 M parameters); otherwise as `gpt2_small`."""
    return _gpt2(tokens, width=1280, blocks=36)


def _gpt2(tokens: int, width: int, blocks: int) -> List[Layer]:
    vocabulary = 50257
    layers = [embedding("wte", vocabulary, width, tokens), embedding("wpe", 1024, width, tokens)]
    for number in range(blocks):
        layers += _decoder(f"h.{number}", width, tokens)
    return [*layers, norm("ln_f", width, tokens), Layer("lm_head", (), 2 * vocabulary * width * tokens)]


def _decoder(name: str, width: int, tokens: int) -> Iterator[Layer]:
    yield norm(f"{name}.ln_1", width, tokens)
    yield linear(f"{name}.attn.c_attn", width, 3 * width, tokens)
    yield attention(f"{name}.attn", width, tokens)
    yield linear(f"{name}.attn.c_proj", width, width, tokens)
    yield norm(f"{name}.ln_2", width, tokens)
    yield linear(f"{name}.mlp.c_fc", width, 4 * width, tokens)
    yield linear(f"{name}.mlp.c_proj", 4 * width, width, tokens)


MODELS: Mapping[str, Callable[[], List[Layer]]] = MappingProxyType({
    "alexnet": alexnet,
    "vgg16": vgg16,
    "resnet50": resnet50,
    "bert_base": bert_base,
    "bert_large": bert_large,
    "gpt2_small": gpt2_small,
    "gpt2_medium": gpt2_medium,
    "gpt2_large": gpt2_large,
})
