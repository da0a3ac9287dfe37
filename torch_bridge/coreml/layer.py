"""The 2-D layer as Core ML packages: its convolutions alone, or the whole of it."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pallas_kernels.common.types import Tree
from torch_bridge.coreml.evaluator import Package
from torch_bridge.coreml.package import About, Input, converted, hash_of
from torch_bridge.coreml.program import Argument

Float32 = NDArray[np.float32]

KINDS = "convs", "whole"
"""The packages that `export` makes of a layer."""
_HAAR = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
"""A row a subband LL, LH, HL, HH, a column a pixel of a block of 2 x 2."""
_MOST_SIDES = 11
"""Sides along an axis of a flexible package: 11 times 11 are fewer than the 128 shapes allowed."""


class Layer(NamedTuple):
    """A layer whose scales are multiplied into its taps, laid out as MIL has them.

    Attributes:
        base: `[C, 1, k, k]`.
        bias: `[C]`.
        wavelet: `[4 * C, 1, k, k]` a level; channel `4 * c + s` is subband s of channel c.
    """

    base: Float32
    bias: Float32
    wavelet: tuple[Float32, ...]

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return len(self.base)

    @property
    def kernel_size(self) -> int:
        """Taps along an axis."""
        return self.base.shape[-1]

    @property
    def levels(self) -> int:
        """Number of wavelet levels."""
        return len(self.wavelet)


def folded(params: Mapping[str, Tree]) -> Layer:
    """The layer with its scales in its taps.

    Args:
        params: Parameters of a Flax `WTConv2d`, without a bias perhaps.

    Returns:
        The layer in float32.

    Example:
        >>> params = {"base_kernel": np.ones((3, 3, 1, 2)), "base_scale": np.array([1.0, 2.0])}
        >>> folded(params).base[:, 0, 0, 0]
        array([1., 2.], dtype=float32)
    """
    wide = {name: np.asarray(value, np.float64) for name, value in params.items()}
    scale = wide["base_scale"]
    levels = sum(name.startswith("wavelet_kernel_") for name in wide)
    wavelet = []
    for i in range(levels):
        taps = wide[f"wavelet_kernel_{i}"] * wide[f"wavelet_scale_{i}"]
        k = len(taps)
        wavelet.append(taps.transpose(3, 2, 0, 1).reshape(-1, 1, k, k).astype(np.float32))
    return Layer(
        (wide["base_kernel"] * scale).transpose(3, 2, 0, 1).astype(np.float32),
        (wide.get("base_bias", np.zeros_like(scale)) * scale).astype(np.float32),
        tuple(wavelet),
    )


def convs(
    params: Mapping[str, Tree], height: int, width: int, *, precision: str, flexible: bool = False
) -> Any:
    """The convolutions of a layer, to stand between the Haar kernels of `wtconv.metal`.

    Inputs are `x [1, C, H, W]` and of each level from 1 on `bands_{level} [1, 4 * C, h, w]`, each
    size half of that before, rounded up; channel `4 * c + s` is subband s, in the order LL, LH,
    HL, HH, of channel c. Outputs are `base` and `filtered_{level}` of the same shapes: the sum of
    `base` and of the inverse Haar transforms of `filtered_{level}` is the layer's output.

    Args:
        params: Parameters of a Flax `WTConv2d`, of any number of levels.
        height: Rows H of x.
        width: Its columns W.
        precision: One of `package.PRECISIONS`.
        flexible: Whether H and W may be anything up to twice those; the inputs must fit each other.

    Returns:
        A model of coremltools.
    """
    layer = folded(params)
    inputs = {"x": Input((1, layer.channels, height, width), ranged=flexible)}
    for level, (h, w) in enumerate(level_sizes(height, width, layer.levels), 1):
        inputs[f"bands_{level}"] = Input((1, 4 * layer.channels, h, w), ranged=flexible)

    def build(x: Any, **bands: Any) -> dict[str, Any]:
        outputs = {"base": depthwise(x, layer.base, layer.bias, name="base")}
        for level, taps in enumerate(layer.wavelet, 1):
            name = f"filtered_{level}"
            outputs[name] = depthwise(bands[f"bands_{level}"], taps, name=name)
        return outputs

    text = "Convolutions of a wavelet convolution; Haar transforms stand before and after them."
    about = _about("convs", layer, params, height, width, precision, text)
    return converted(inputs, build, about)


def whole(
    params: Mapping[str, Tree], height: int, width: int, *, precision: str, flexible: bool = False
) -> Any:
    """The complete layer, from `x [1, C, H, W]` to `y` of its shape, which needs no Metal.

    Args:
        params: Parameters of a Flax `WTConv2d`, of any number of levels.
        height: Rows H of x.
        width: Its columns W.
        precision: One of `package.PRECISIONS`.
        flexible: Whether x may have other sizes too, those of `flexible_shapes`.

    Returns:
        A model of coremltools.

    Raises:
        ValueError: A flexible package whose size some level does not halve evenly.
    """
    layer = folded(params)
    shape = 1, layer.channels, height, width
    others = flexible_shapes(shape, 2**layer.levels) if flexible else ()

    def build(x: Any) -> dict[str, Any]:
        return {"y": wtconv(x, layer, name="y")}

    about = _about(
        "whole", layer, params, height, width, precision, "A complete wavelet convolution."
    )
    return converted({"x": Input(shape, others)}, build, about)


def params_of(package: Package) -> dict[str, Float32]:
    """The parameters of the layer in a package of either kind, its scales within its taps.

    Args:
        package: The package.

    Returns:
        Parameters of a Flax `WTConv2d` in float32, every scale 1.

    Raises:
        ValueError: It is that of no layer.
    """
    kind = package.metadata.get("flash_wtconv.kind")
    if kind not in KINDS:
        raise ValueError(f"the package is of kind {kind}, expected one of {', '.join(KINDS)}")
    channels = package.inputs["x"][1]
    params: dict[str, Float32] = {"base_scale": np.ones(channels, np.float32)}
    wavelet = []
    for arguments in _convolutions(package):
        taps = _constant(package, arguments["weight"])
        if len(taps) == channels:
            params["base_kernel"] = taps.transpose(2, 3, 1, 0)
            params["base_bias"] = _constant(package, arguments["bias"])
        else:
            wavelet.append(taps)
    for i, taps in enumerate(wavelet):
        k = taps.shape[-1]
        params[f"wavelet_kernel_{i}"] = taps.reshape(channels, 4, k, k).transpose(2, 3, 1, 0)
        params[f"wavelet_scale_{i}"] = np.ones((4, channels), np.float32)
    return params


def _convolutions(package: Package) -> list[dict[str, Argument]]:
    """The arguments of the depthwise convolutions, finest level first: Haar's halve sizes."""
    found = [one.arguments for one in package.operations if one.type == "conv"]
    return [one for one in found if np.all(_constant(package, one["strides"]) == 1)]


def _constant(package: Package, argument: Argument) -> Float32:
    value = package.constants[argument] if isinstance(argument, str) else argument
    return np.asarray(value, np.float32)


def level_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """The sizes of the bands of each level, half of those before, rounded up.

    Example:
        >>> level_sizes(7, 12, 2)
        [(4, 6), (2, 3)]
    """
    sizes = []
    for _ in range(levels):
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes


def flexible_shapes(
    shape: tuple[int, int, int, int], multiple: int
) -> tuple[tuple[int, int, int, int], ...]:
    """The other shapes of a flexible package: up to twice the size, in steps that divide it.

    Args:
        shape: The default shape `(1, C, H, W)`.
        multiple: What every H and W must be a multiple of.

    Raises:
        ValueError: H or W is no multiple of it.

    Example:
        >>> flexible_shapes((1, 3, 128, 128), 128)
        ((1, 3, 128, 256), (1, 3, 256, 128), (1, 3, 256, 256))
    """
    _, channels, height, width = shape
    sides = [_sides(name, n, multiple) for name, n in (("height", height), ("width", width))]
    shapes = ((1, channels, h, w) for h in sides[0] for w in sides[1])
    return tuple(other for other in shapes if other != shape)


def _sides(name: str, size: int, multiple: int) -> range:
    if size % multiple:
        raise ValueError(
            f"{name} is {size}, but in a flexible package every size is a multiple of {multiple}, "
            f"which all levels halve evenly: give one, such as {-(-size // multiple) * multiple}, "
            "or make a package of fixed size; of a layer, fewer levels do too"
        )
    steps = (n for n in range(multiple, size + 1, multiple) if size % n == 0)
    step = next(n for n in steps if 2 * size // n <= _MOST_SIDES)
    return range(step, 2 * size + 1, step)


def wtconv(x: Any, layer: Layer, *, name: str | None = None) -> Any:
    """The variable of a layer's output, all of it convolutions of rank 4.

    Filtered bands are added to what comes from the level below after the inverse transform, which
    is linear, so that no band is ever taken apart.

    Args:
        x: The variable `[N, C, H, W]` of its input; H and W are numbers, or told when the program
            runs and then multiples of `2**levels`.
        layer: The layer.
        name: The name of the output.
    """
    from coremltools.converters.mil import Builder as mb

    if not layer.levels:
        return depthwise(x, layer.base, layer.bias, name=name)
    analysis = np.tile(_HAAR.astype(np.float32).reshape(4, 1, 2, 2), (layer.channels, 1, 1, 1))
    shared = {"strides": [2, 2], "groups": layer.channels}
    halve = partial(mb.conv, **shared, pad_type="custom")
    double = partial(mb.conv_transpose, **shared, pad_type="valid")
    low, filtered, above = x, [], []
    for i, taps in enumerate(layer.wavelet):
        pad = [0, _odd(low.shape[2]), 0, _odd(low.shape[3])]
        filtered.append(depthwise(halve(x=low, weight=analysis, pad=pad), taps))
        above.append(low)
        if i + 1 < layer.levels:
            low = halve(x=low, weight=analysis[::4], pad=pad)
    z = None
    for bands, low in reversed(list(zip(filtered, above, strict=True))):
        up = double(x=bands, weight=analysis)
        if z is not None:
            up = mb.add(x=up, y=double(x=z, weight=analysis[::4]))
        if _odd(low.shape[2]) or _odd(low.shape[3]):
            up = mb.slice_by_size(x=up, begin=[0, 0, 0, 0], size=[-1, -1, *low.shape[2:]])
        z = up
    return mb.add(x=depthwise(x, layer.base, layer.bias), y=z, **named(name))


def _odd(size: Any) -> int:
    """1 of an odd number, 0 of an even one and of a size that is told when the program runs."""
    return int(size) % 2 if isinstance(size, (int, np.integer)) else 0


def depthwise(
    x: Any, taps: Float32, bias: Float32 | None = None, *, name: str | None = None
) -> Any:
    """The variable of a depthwise convolution of the same size; even k pads less before."""
    from coremltools.converters.mil import Builder as mb

    k = taps.shape[-1]
    before, after = (k - 1) // 2, k // 2
    biased = {} if bias is None else {"bias": bias}
    return mb.conv(
        x=x,
        weight=taps,
        groups=len(taps),
        pad_type="custom",
        pad=[before, after, before, after],
        **biased,
        **named(name),
    )


def named(name: str | None) -> dict[str, str]:
    """The argument that names what an operation computes; none where coremltools may name it."""
    return {} if name is None else {"name": name}


def _about(
    kind: str,
    layer: Layer,
    params: Mapping[str, Tree],
    height: int,
    width: int,
    precision: str,
    description: str,
) -> About:
    return About(
        kind,
        (layer.channels, height, width),
        precision,
        hash_of(params),
        layer.levels,
        layer.kernel_size,
        description,
    )
