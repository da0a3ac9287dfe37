"""Whole networks as Core ML packages: WTConvNeXt and ConvNeXt from images, TransformerNet to them.

Channels stay the second axis throughout, so that linear layers are convolutions of one tap.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from torch_bridge.coreml.layer import depthwise, flexible_shapes, folded, named, wtconv
from torch_bridge.coreml.package import About, Input, converted, hash_of
from torch_bridge.coreml.program import Array
from torch_bridge.coreml.weights import Params, below

_MEAN, _DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
"""The statistics of ImageNet's red, green and blue from 0 to 1, which published weights expect."""
_CONVNEXT_EPSILON, _INSTANCE_EPSILON = 1e-6, 1e-5


class Size(NamedTuple):
    """Sizes of the images that a network takes.

    Attributes:
        height: Default height.
        width: Default width.
        flexible: Whether there are others, those of `layer.flexible_shapes`.
    """

    height: int
    width: int
    flexible: bool


def convnext(
    name: str,
    params: Params,
    config: Any,
    size: Size,
    *,
    precision: str,
    labels: Sequence[str] = (),
    features: bool = False,
) -> Any:
    """A WTConvNeXt or ConvNeXt from `image`, RGB of numbers from 0 to 255.

    Args:
        name: What the package's metadata calls it.
        params: Parameters by dotted names, as `weights.of_convnext` returns them.
        config: Its `ConvNeXtConfig`.
        size: Sizes of the image.
        precision: One of `package.PRECISIONS`.
        labels: The classes in the order of the logits; outputs are then `classLabel` and
            `classLabel_probs`. Without them the output is `logits`.
        features: Whether the outputs are the maps `features_0`, … of the stages instead, or those
            of a network without a head.

    Returns:
        A model of coremltools.

    Raises:
        ValueError: A size that the network does not take, labels that are not one a class, or a
            network of other channels than images have.
    """
    features = features or config.features_only
    if config.in_channels != 3:
        raise ValueError(f"the network takes {config.in_channels} channels, but images have 3")
    if labels and (features or len(labels) != config.num_classes):
        classes = "no classes" if features else f"{config.num_classes} classes"
        raise ValueError(f"there are {len(labels)} labels, but the output is of {classes}")
    levels = config.levels or (0,) * len(config.depths)
    multiple = max(_stride(config, s) * 2**level for s, level in enumerate(levels))
    shape = _image(size, config.total_stride, multiple)

    def build(image: Any) -> dict[str, Any]:
        maps = _maps(_normalised(image), params, config)
        if features:
            return {f"features_{s}": value for s, value in enumerate(_normed(maps, params))}
        return _head(maps[-1], params, bool(labels))

    text = f"{name}, {'the maps of its stages' if features else 'a classifier of images'}."
    about = About(
        name,
        (3, size.height, size.width),
        precision,
        hash_of(params),
        levels,
        config.kernel_sizes,
        text,
    )
    return converted({"image": shape}, build, about, labels=labels)


def transformer_net(params: Params, size: Size, *, precision: str) -> Any:
    """A TransformerNet from `image` to `stylized`, RGB both.

    Args:
        params: Parameters by dotted names, as `weights.of_transformer_net` returns them.
        size: Sizes of the image; that of the result is rounded up to multiples of 4.
        precision: One of `package.PRECISIONS`.

    Returns:
        A model of coremltools.

    Raises:
        ValueError: A size that the network does not take.
    """
    shape = _image(size, 5, 4)

    def build(image: Any) -> dict[str, Any]:
        return {"stylized": _stylized(image, params)}

    about = About(
        "transformer_net",
        (3, size.height, size.width),
        precision,
        hash_of(params),
        0,
        (9, 3),
        "transformer_net, an image in the style that it was trained for.",
    )
    return converted({"image": shape}, build, about, images=["stylized"])


def _image(size: Size, least: int, multiple: int) -> Input:
    if min(size.height, size.width) < least:
        raise ValueError(
            f"--height and --width are {size.height} and {size.width}, expected at least {least}, "
            "so that the last map has a pixel left"
        )
    shape = 1, 3, size.height, size.width
    return Input(shape, flexible_shapes(shape, multiple) if size.flexible else (), image=True)


def _stride(config: Any, stage: int) -> int:
    """Pixels of the image for each unit of a stage's map, along an axis."""
    return config.total_stride // 2 ** (len(config.depths) - 1 - stage)


def _normalised(image: Any) -> Any:
    """The image as the networks were trained to take it."""
    from coremltools.converters.mil import Builder as mb

    # In this order: coremltools' compression fails where a factor comes before a term.
    centred = mb.sub(x=image, y=_per_channel(255 * _MEAN))
    return mb.mul(x=centred, y=_per_channel(1 / (255 * _DEVIATION)))


def _maps(x: Any, params: Params, config: Any) -> list[Any]:
    """The map of each stage."""
    from coremltools.converters.mil import Builder as mb

    if config.stem_type == "patch":
        x = _conv(x, below(params, "stem.conv"), stride=config.patch_size)
    else:
        first, second = sorted(
            {name.split(".")[1] for name in params if name.startswith("stem.conv")}
        )
        x = _conv(x, below(params, f"stem.{first}"), stride=2, padding=1)
        if config.stem_type == "overlap_act":
            x = mb.gelu(x=x, mode="EXACT")
        x = _conv(x, below(params, f"stem.{second}"), stride=2, padding=1)
    x = _layer_norm(x, below(params, "stem.norm"))
    maps = []
    for s, depth in enumerate(config.depths):
        if downsample := below(params, f"stages.{s}.downsample"):
            x = _layer_norm(x, below(downsample, "norm"))
            x = _conv(x, below(downsample, "conv"), stride=2)
        for b in range(depth):
            x = mb.add(x=x, y=_block(x, below(params, f"stages.{s}.blocks.{b}")))
        maps.append(x)
    return maps


def _block(x: Any, params: Params) -> Any:
    """The branch that a residual block adds to its input."""
    from coremltools.converters.mil import Builder as mb

    convolution = below(params, "conv_dw")
    if "kernel" in convolution:
        taps = convolution["kernel"].transpose(3, 2, 0, 1)
        x = depthwise(x, taps, convolution.get("bias"))
    else:
        x = wtconv(x, folded(convolution))
    x = _layer_norm(x, below(params, "norm"))
    x = mb.gelu(x=linear(x, below(params, "mlp.fc1")), mode="EXACT")
    if grn := below(params, "mlp.grn"):
        x = _response_norm(x, grn)
    x = linear(x, below(params, "mlp.fc2"))
    return mb.mul(x=x, y=_per_channel(params["gamma"])) if "gamma" in params else x


def _response_norm(x: Any, params: Params) -> Any:
    """Global response normalisation, as ConvNeXt V2 has it."""
    from coremltools.converters.mil import Builder as mb

    norm = mb.reduce_l2_norm(x=x, axes=[2, 3], keep_dims=True)
    mean = mb.reduce_mean(x=norm, axes=[1], keep_dims=True)
    share = mb.real_div(x=norm, y=mb.add(x=mean, y=np.float32(_CONVNEXT_EPSILON)))
    scaled = mb.mul(x=mb.mul(x=x, y=share), y=_per_channel(params["scale"]))
    # In this order for the same reason as in `_normalised`.
    return mb.add(x=mb.add(x=x, y=_per_channel(params["bias"])), y=scaled)


def _normed(maps: list[Any], params: Params) -> list[Any]:
    """The maps under the names of outputs, normalised where the network has norms for them."""
    from coremltools.converters.mil import Builder as mb

    named = []
    for s, value in enumerate(maps):
        norm = below(params, f"norms.{s}")
        value = _layer_norm(value, norm) if norm else value
        named.append(mb.identity(x=value, name=f"features_{s}"))
    return named


def _head(x: Any, params: Params, softmax: bool) -> dict[str, Any]:
    """The output for the last map: logits or their softmax, or what their layer would take."""
    from coremltools.converters.mil import Builder as mb

    if norm := below(params, "norm_pre"):
        x = _layer_norm(x, norm)
    x = mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True)
    if norm := below(params, "head.norm"):
        x = _layer_norm(x, norm)
    if hidden := below(params, "head.pre_logits"):
        x = mb.gelu(x=linear(x, hidden), mode="EXACT")
    name = "embedding"
    if classifier := below(params, "head.fc"):
        x, name = linear(x, classifier), "logits"
    x = mb.squeeze(x=x, axes=[2, 3], name=name)
    if not softmax:
        return {name: x}
    return {"probabilities": mb.softmax(x=x, axis=-1, name="probabilities")}


def _stylized(x: Any, params: Params) -> Any:
    """The image that TransformerNet makes, in the range that images have."""
    from coremltools.converters.mil import Builder as mb

    def normed(x: Any, conv: str, norm: str, stride: int = 1) -> Any:
        x = _reflected(x, below(params, conv), stride)
        own = below(params, norm)
        return mb.instance_norm(
            x=x, gamma=own["scale"], beta=own["bias"], epsilon=_INSTANCE_EPSILON
        )

    for i, stride in enumerate((1, 2, 2), 1):
        x = mb.relu(x=normed(x, f"conv{i}", f"in{i}", stride))
    for b in range(1, 6):
        inner = mb.relu(x=normed(x, f"res{b}.conv1", f"res{b}.in1"))
        x = mb.add(x=x, y=normed(inner, f"res{b}.conv2", f"res{b}.in2"))
    for i in (1, 2):
        x = mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=2)
        x = mb.relu(x=normed(x, f"deconv{i}", f"in{i + 3}"))
    x = _reflected(x, below(params, "deconv3"), 1)
    return mb.clip(x=x, alpha=np.float32(0), beta=np.float32(255), name="stylized")


def _reflected(x: Any, params: Params, stride: int) -> Any:
    """A convolution of x with its border mirrored."""
    from coremltools.converters.mil import Builder as mb

    around = [len(params["kernel"]) // 2] * 4
    return _conv(mb.pad(x=x, pad=around, mode="reflect"), params, stride=stride)


def _conv(x: Any, params: Params, *, stride: int, padding: int = 0, name: str | None = None) -> Any:
    """A dense convolution, with a bias or without."""
    from coremltools.converters.mil import Builder as mb

    biased = {"bias": params["bias"]} if "bias" in params else {}
    return mb.conv(
        x=x,
        weight=params["kernel"].transpose(3, 2, 0, 1),
        strides=[stride, stride],
        pad_type="custom",
        pad=[padding] * 4,
        **biased,
        **named(name),
    )


def linear(x: Any, params: Params, *, name: str | None = None) -> Any:
    """The variable of a linear layer on the channels of `[N, C, H, W]`."""
    return _conv(x, {**params, "kernel": params["kernel"][None, None]}, stride=1, name=name)


def _layer_norm(x: Any, params: Params) -> Any:
    """LayerNorm over channels."""
    from coremltools.converters.mil import Builder as mb

    return mb.layer_norm(
        x=x, axes=[1], gamma=params["scale"], beta=params["bias"], epsilon=_CONVNEXT_EPSILON
    )


def _per_channel(values: Array) -> Array:
    """Values of channels, to be combined with `[N, C, H, W]`."""
    return np.asarray(values, np.float32).reshape(1, -1, 1, 1)
