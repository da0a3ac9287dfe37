"""The dense convolution as one writes it in JAX without this package.

`lax.conv_general_dilated`, the bias and the activation, every array in x's dtype. It is a baseline
for the error of low precision.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.oracle import conv2d_pads, reflects
from pallas_kernels.oracle.conv2d import Padding


def conv2d(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = None,
    layout: str = "nhwc_hwcf",
    upsample: int = 1,
    out_dtype: str | None = None,
) -> jax.Array:
    """Dense 2-D convolution; arguments as `pallas_kernels.conv2d.conv2d`, one batch axis.

    Example:
        >>> x, w = jnp.ones((2, 9, 8, 4)), jnp.ones((3, 3, 4, 16))
        >>> conv2d(x, w, stride=2, padding="reflect", activation="relu").shape
        (2, 5, 4, 16)
    """
    last = layout == "nhwc_hwcf"
    if upsample > 1:
        for axis in (1, 2) if last else (2, 3):
            x = jnp.repeat(x, upsample, axis=axis)
    stride, dilation = ((v, v) if isinstance(v, int) else v for v in (stride, dilation))
    size, taps = (x.shape[1:3], w.shape[:2]) if last else (x.shape[2:], w.shape[2:])
    pads = conv2d_pads(padding, size, taps, stride, dilation)
    if reflects(padding):
        around = [(0, 0), *pads, (0, 0)] if last else [(0, 0), (0, 0), *pads]
        x, pads = jnp.pad(x, around, mode="reflect"), [(0, 0), (0, 0)]
    y = lax.conv_general_dilated(
        x,
        w,
        stride,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC") if last else ("NCHW", "OIHW", "NCHW"),
        feature_group_count=groups,
    )
    if bias is not None:
        bias = bias.astype(y.dtype)
        y = y + (bias if last else bias[:, None, None])
    if activation == "gelu":
        y = jax.nn.gelu(y, approximate=False)
    elif activation == "relu":
        y = jax.nn.relu(y)
    return y.astype(out_dtype or x.dtype)
