"""`DepthwiseConv2d` for any layer library: the kernel's shape, the checks and the one call.

This module knows JAX and `pallas_kernels`, but no layer library.
"""

import jax
from jax.typing import ArrayLike

from flash_wtconv_jax.functional import conv2d
from flash_wtconv_jax.functional.conv2d import PerAxis, Windowed
from pallas_kernels.common.arguments import checked_array, checked_integer, checked_pair
from pallas_kernels.common.sharding import OutSharding
from pallas_kernels.depthwise.api import OPERATOR, depthwise_conv2d


def check_layer(layer: Windowed) -> None:
    """Check the arguments of a `DepthwiseConv2d`: those that a `Conv2d` has too.

    Args:
        layer: See `conv2d.check_layer`.

    Raises:
        ValueError: naming the first argument that is out of range.

    Example:
        >>> from flash_wtconv_jax import DepthwiseConv2d
        >>> check_layer(DepthwiseConv2d(features=8, kernel_size=7))
    """
    conv2d.check_window(OPERATOR, layer)


def kernel_shape(features: int, kernel_size: PerAxis) -> tuple[int, int, int, int]:
    """The shape `[*kernel_size, 1, features]` of a layer's kernel.

    Args:
        features: Channels of input and output.
        kernel_size: Taps along both axes, or along each.

    Returns:
        The shape.

    Raises:
        ValueError: If a number is not an int >= 1.

    Example:
        >>> kernel_shape(8, 7)
        (7, 7, 1, 8)
    """
    features = checked_integer(features, "features", least=1)
    return (*checked_pair(kernel_size, "kernel_size", least=1), 1, features)


def apply(
    layer: Windowed,
    x: ArrayLike,
    kernel: jax.Array,
    bias: jax.Array | None,
    out_sharding: OutSharding = None,
) -> jax.Array:
    """Cast input and kernel as a Flax layer does, then call the operator.

    Args:
        layer: The layer, of which the arguments are read.
        x: Input `[*batch, H, W, features]`.
        kernel: `[*kernel_size, 1, features]`.
        bias: `[features]`, or None; it is added in its own dtype.
        out_sharding: As the operator takes it.

    Returns:
        Output `[*batch, H_out, W_out, features]`.

    Raises:
        ValueError: If `x` is not floating point, a shape does not fit, or the operator refuses.
    """
    x = checked_array(x, "x")
    if x.ndim > 2 and x.shape[-1] != kernel.shape[-1]:
        raise ValueError(
            f"x: expected features={kernel.shape[-1]} channels, which come last, got shape "
            f"{x.shape}"
        )
    x, kernel, window = conv2d.prepared(layer, x, kernel, bias)
    return depthwise_conv2d(x, kernel, bias, out_sharding=out_sharding, **window)
