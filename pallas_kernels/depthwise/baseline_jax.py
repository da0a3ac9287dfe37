"""The depthwise convolution as one writes it in JAX without this package.

`lax.conv_general_dilated` with as many groups as channels, and the bias, every array in x's dtype.
It is the baseline of benchmarks, and of the error of low precision.
"""

import jax

from pallas_kernels.conv2d.baseline_jax import conv2d
from pallas_kernels.oracle.conv2d import Padding


def depthwise_conv2d(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
) -> jax.Array:
    """Depthwise convolution; arguments as `pallas_kernels.depthwise.depthwise_conv2d`.

    Example:
        >>> import jax.numpy as jnp
        >>> depthwise_conv2d(jnp.ones((2, 9, 8, 4)), jnp.ones((3, 3, 1, 4)), stride=2).shape
        (2, 5, 4, 4)
    """
    groups = x.shape[-1]
    return conv2d(
        *(x, kernel, bias), stride=stride, padding=padding, dilation=dilation, groups=groups
    )
