"""`Conv2d` for any layer library: the kernel's shape, the checks and the one call.

This module knows JAX and `pallas_kernels`, but no layer library.
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flash_wtconv_jax.functional import arguments
from pallas_kernels.common.arguments import checked_array, checked_integer, checked_pair
from pallas_kernels.common.sharding import OutSharding
from pallas_kernels.common.types import Keywords
from pallas_kernels.conv2d.api import OPERATOR, Padding, conv2d
from pallas_kernels.dispatch import Operator

PerAxis = int | Sequence[int]
"""One integer for both axes of an image, or one for each."""

_NAMES = ("SAME", "VALID", "REFLECT", "CIRCULAR")


class Windowed(arguments.Computation, Protocol):
    """The arguments that a dense or depthwise layer of any library keeps as attributes."""

    kernel_size: PerAxis
    strides: PerAxis | None
    padding: Padding
    input_dilation: PerAxis | None
    kernel_dilation: PerAxis | None
    mask: ArrayLike | None


class Layer(Windowed, Protocol):
    """The arguments that a `Conv2d` of any library keeps as attributes."""

    feature_group_count: int
    activation: str | None


def check_layer(layer: Layer) -> None:
    """Check the arguments of a `Conv2d` that do not depend on its input.

    Args:
        layer: `kernel_size`, `strides` and both dilations must be an int >= 1 or two of them, the
            last three may also be None, which is 1; `feature_group_count` must be an int >= 1 and
            `padding`, where it is a name, one of Flax's; see `arguments.check_computation` for the
            others. The operator checks padding in numbers and the activation.

    Raises:
        ValueError: naming the first argument that is out of range.

    Example:
        >>> from flash_wtconv_jax import Conv2d
        >>> check_layer(Conv2d(features=8, kernel_size=3, strides=(2, 1)))
    """
    arguments.check_constructor(feature_group_count=layer.feature_group_count)
    check_window(OPERATOR, layer)


def check_window(operator: Operator, layer: Windowed) -> None:
    """Check the arguments of a layer that a dense convolution and a depthwise one share.

    Args:
        operator: The operator that computes the layer.
        layer: See `check_layer`.

    Raises:
        ValueError: naming the first argument that is out of range.
    """
    checked_pair(layer.kernel_size, "kernel_size", least=1)
    for name in ("strides", "input_dilation", "kernel_dilation"):
        value = getattr(layer, name)
        checked_pair(1 if value is None else value, name, least=1)
    if isinstance(layer.padding, str) and layer.padding not in _NAMES:
        raise ValueError(f"padding={layer.padding!r}: the names are {', '.join(_NAMES)}")
    arguments.check_computation(operator, layer)


def kernel_shape(
    in_features: int, features: int, kernel_size: PerAxis, groups: int
) -> tuple[int, int, int, int]:
    """The shape `[*kernel_size, in_features / groups, features]` of a layer's kernel.

    Args:
        in_features: Channels of the input.
        features: Channels of the output.
        kernel_size: Taps along both axes, or along each.
        groups: Groups that both fall into.

    Returns:
        The shape.

    Raises:
        ValueError: If a number is not an int >= 1, or the groups divide one of them unevenly.

    Example:
        >>> kernel_shape(4, 6, 3, 2)
        (3, 3, 2, 6)
    """
    counts = {"in_features": in_features, "features": features, "feature_group_count": groups}
    for name, value in counts.items():
        checked_integer(value, name, least=1)
    if in_features % groups or features % groups:
        raise ValueError(
            f"feature_group_count={groups}: expected a divisor of the {in_features} channels of "
            f"the input and of the {features} features"
        )
    return (*checked_pair(kernel_size, "kernel_size", least=1), in_features // groups, features)


def apply(
    layer: Layer,
    x: ArrayLike,
    kernel: jax.Array,
    bias: jax.Array | None,
    out_sharding: OutSharding = None,
) -> jax.Array:
    """Cast input and kernel as a Flax layer does, then call the operator.

    Args:
        layer: The layer, of which the arguments are read.
        x: Input `[*batch, H, W, C]`.
        kernel: `[HF, WF, C / feature_group_count, features]`.
        bias: `[features]`, or None; it is added in its own dtype.
        out_sharding: As the operator takes it.

    Returns:
        Output `[*batch, H_out, W_out, features]`.

    Raises:
        ValueError: If `x` is not floating point, a shape does not fit, or the operator refuses.
    """
    x, kernel, window = prepared(layer, x, kernel, bias)
    groups, activation = layer.feature_group_count, layer.activation
    rest: Keywords = {"groups": groups, "activation": activation, "out_sharding": out_sharding}
    return conv2d(x, kernel, bias=bias, **rest, **window)


def prepared(
    layer: Windowed, x: ArrayLike, kernel: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array, Keywords]:
    """The input and the kernel of a layer, cast, masked and padded, and the operator's keywords.

    Args:
        layer: The layer, of which the arguments are read.
        x: Input `[*batch, H, W, C]`.
        kernel: The layer's kernel.
        bias: `[features]`, or None.

    Returns:
        Both arrays, and the `stride`, `padding`, `dilation`, `precision` and `implementation` of a
        dense or depthwise convolution.

    Raises:
        ValueError: If `x` is not floating point, or the mask's shape does not fit.
    """
    x = checked_array(x, "x")
    if layer.mask is not None:
        if jnp.shape(layer.mask) != kernel.shape:
            raise ValueError(
                f"mask: expected the kernel's shape, {kernel.shape}, got {jnp.shape(layer.mask)}"
            )
        kernel = kernel * layer.mask
    arrays = (x, kernel) if bias is None else (x, kernel, bias)
    dtype = jnp.result_type(*arrays) if layer.dtype is None else jnp.dtype(layer.dtype)
    x, kernel = (a if a.dtype == dtype else a.astype(dtype) for a in (x, kernel))
    spread = checked_pair(layer.input_dilation or 1, "input_dilation", least=1)
    if spread != (1, 1) and x.ndim > 2:
        between = [(0, 0, step - 1) for step in spread]
        x = lax.pad(x, jnp.zeros((), dtype), [(0, 0, 0)] * (x.ndim - 3) + [*between, (0, 0, 0)])
    dilation = checked_pair(layer.kernel_dilation or 1, "kernel_dilation", least=1)
    padding = layer.padding
    if padding == "REFLECT":
        padding = "reflect"
    elif padding == "CIRCULAR" and x.ndim > 2:
        halo = [d * (k - 1) for d, k in zip(dilation, kernel.shape, strict=False)]
        sides = [(n // 2, n - n // 2) for n in halo]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [*sides, (0, 0)], mode="wrap")
        padding = "VALID"
    window: Keywords = {
        "stride": layer.strides or 1,
        "padding": padding,
        "dilation": dilation,
        "precision": layer.precision,
        "implementation": layer.implementation,
    }
    return x, kernel, window
