"""What the linen and nnx `Conv2D` share: the kernel's shape, the checks, the one call.

This module knows JAX and `pallas_kernels`, but no layer library.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional.arguments import (
    ImplementationLike,
    PrecisionLike,
    check_computation,
)
from pallas_kernels.common.arguments import checked_array, checked_integer, checked_pair
from pallas_kernels.conv2d.api import OPERATOR, Padding, conv2d

Pair = int | Sequence[int]

_NAMES = ("SAME", "VALID", "REFLECT", "CIRCULAR")


def check_layer(
    *,
    kernel_size: Any,
    strides: Any,
    padding: Any,
    input_dilation: Any,
    kernel_dilation: Any,
    dtype: Any,
    param_dtype: Any,
    precision: Any,
    implementation: Any,
) -> None:
    """Check the arguments of a layer that it needs later.

    Args:
        kernel_size: An int >= 1, or two, like the other sizes; those may be None too, which is 1.
        strides: See `kernel_size`.
        padding: A name of Flax's, or numbers, which the operator checks.
        input_dilation: See `kernel_size`.
        kernel_dilation: See `kernel_size`.
        dtype: None, or a floating-point dtype of 16, 32 or 64 bits.
        param_dtype: Such a dtype.
        precision: None, or a precision of `jax.lax.Precision`.
        implementation: None, or names of implementations of `pallas_kernels.conv2d`.

    Raises:
        ValueError: naming the first argument that is none of these.
    """
    checked_pair(kernel_size, "kernel_size", least=1)
    sizes = {"strides": strides, "input_dilation": input_dilation}
    for name, value in (sizes | {"kernel_dilation": kernel_dilation}).items():
        checked_pair(1 if value is None else value, name, least=1)
    if isinstance(padding, str) and padding not in _NAMES:
        raise ValueError(f"padding={padding!r}: the names are {', '.join(_NAMES)}")
    check_computation(OPERATOR, dtype, param_dtype, precision, implementation)


def kernel_shape(
    in_features: int, features: int, kernel_size: Pair, groups: int
) -> tuple[int, int, int, int]:
    """Shape `[*kernel_size, in_features / groups, features]` of a layer's kernel.

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
    x: ArrayLike,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    mask: ArrayLike | None,
    strides: Pair | None,
    padding: Padding,
    input_dilation: Pair | None,
    kernel_dilation: Pair | None,
    feature_group_count: int,
    dtype: DTypeLike | None,
    precision: PrecisionLike,
    activation: str | None,
    implementation: ImplementationLike,
) -> jax.Array:
    """Cast input and kernel as a Flax layer does, then call the operator.

    Args:
        x: Input `[*batch, H, W, C]`.
        kernel: `[HF, WF, C / feature_group_count, features]`.
        bias: `[features]`, or None; it is added in its own dtype.
        mask: Of kernel's shape, or None; multiplied with it.
        strides: Of the output.
        padding: As of `flax.linen.Conv`.
        input_dilation: Distance that neighbouring samples are brought to, zeros between them.
        kernel_dilation: Distance of samples that neighbouring taps read.
        feature_group_count: Groups of channels.
        dtype: Dtype of computation and result; None promotes `x` with the parameters.
        precision: See `jax.lax.Precision`.
        activation: See `pallas_kernels.conv2d.conv2d`.
        implementation: See there.

    Returns:
        Output `[*batch, H_out, W_out, features]`.

    Raises:
        ValueError: If `x` is not floating point, a shape does not fit, or the operator refuses.
    """
    x = checked_array(x, "x")
    if mask is not None:
        if jnp.shape(mask) != kernel.shape:
            raise ValueError(
                f"mask: expected the kernel's shape, {kernel.shape}, got {jnp.shape(mask)}"
            )
        kernel = kernel * mask
    arrays = (x, kernel) if bias is None else (x, kernel, bias)
    dtype = jnp.result_type(*arrays) if dtype is None else jnp.dtype(dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    spread = checked_pair(input_dilation or 1, "input_dilation", least=1)
    if spread != (1, 1) and x.ndim > 2:
        between = [(0, 0, step - 1) for step in spread]
        x = lax.pad(x, jnp.zeros((), dtype), [(0, 0, 0)] * (x.ndim - 3) + [*between, (0, 0, 0)])
    dilation = checked_pair(kernel_dilation or 1, "kernel_dilation", least=1)
    if padding == "REFLECT":
        padding = "reflect"
    elif padding == "CIRCULAR" and x.ndim > 2:
        reach = [d * (k - 1) for d, k in zip(dilation, kernel.shape, strict=False)]
        sides = [(r // 2, r - r // 2) for r in reach]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [*sides, (0, 0)], mode="wrap")
        padding = "VALID"
    return conv2d(
        x,
        kernel,
        stride=strides or 1,
        padding=padding,
        dilation=dilation,
        groups=feature_group_count,
        bias=bias,
        activation=activation,
        precision=precision,
        implementation=implementation,
    )
