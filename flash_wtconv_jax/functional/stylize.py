"""Instance norm, alone and behind convolutions, for any layer library: checks and calls.

This module knows JAX and `pallas_kernels`, but no layer library.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import Padding, PerAxis
from pallas_kernels.common.arguments import (
    checked_array,
    checked_dtype,
    checked_eps,
    checked_integer,
    checked_pair,
    checked_precision,
)
from pallas_kernels.common.dtypes import common_dtype
from pallas_kernels.common.sharding import OutSharding
from pallas_kernels.common.types import Keywords
from pallas_kernels.conv2d.api import OPERATOR as CONV2D
from pallas_kernels.stylize import blocks
from pallas_kernels.stylize.api import OPERATOR, checked_activation
from pallas_kernels.stylize.api import instance_norm as norm
from pallas_kernels.stylize.convolution.api import conv2d_instance_norm

Branch = tuple[jax.Array, jax.Array, jax.Array]
"""The kernel `[HF, WF, C, F]` of a convolution, and the scale and bias `[F]` of the norm behind."""

_NAMES = ("SAME", "VALID", "REFLECT")


class Norm(Protocol):
    """The arguments that an `InstanceNorm` of any library keeps as attributes."""

    epsilon: float
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    activation: str | None
    implementation: ImplementationLike


class Block(Protocol):
    """The arguments that a `ConvNormAct` or a `ResidualBlock` of any library keeps."""

    kernel_size: PerAxis
    padding: Padding
    epsilon: float
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    precision: PrecisionLike
    conv_implementation: ImplementationLike
    norm_implementation: ImplementationLike


class ConvBlock(Block, Protocol):
    """The arguments that a `ConvNormAct` of any library keeps as attributes."""

    strides: PerAxis
    upsample: int
    activation: str | None


def check_norm(layer: Norm) -> None:
    """Check the arguments of an `InstanceNorm` that do not depend on its input.

    Raises:
        ValueError: naming the first argument that is out of range.

    Example:
        >>> from flash_wtconv_jax import InstanceNorm
        >>> check_norm(InstanceNorm(activation="relu"))
    """
    checked_eps(layer.epsilon, "epsilon")
    checked_activation(layer.activation)
    _check_dtypes(layer.dtype, layer.param_dtype)
    OPERATOR.check_names(layer.implementation)


def check_block(layer: Block) -> None:
    """Check the arguments that convolutions with a norm behind share.

    Args:
        layer: `padding`, where it is a name, must be one of Flax's but "CIRCULAR"; the operator
            checks padding in numbers.

    Raises:
        ValueError: naming the first argument that is out of range.
    """
    checked_pair(layer.kernel_size, "kernel_size", least=1)
    if isinstance(layer.padding, str) and layer.padding not in _NAMES:
        raise ValueError(f"padding={layer.padding!r}: the names are {', '.join(_NAMES)}")
    checked_eps(layer.epsilon, "epsilon")
    _check_dtypes(layer.dtype, layer.param_dtype)
    checked_precision(layer.precision)
    CONV2D.check_names(layer.conv_implementation, "conv_implementation")
    OPERATOR.check_names(layer.norm_implementation, "norm_implementation")


def check_conv_block(layer: ConvBlock) -> None:
    """Check the arguments of a `ConvNormAct` that do not depend on its input.

    Raises:
        ValueError: naming the first argument that is out of range.

    Example:
        >>> from flash_wtconv_jax import ConvNormAct
        >>> check_conv_block(ConvNormAct(features=8, kernel_size=3, upsample=2))
    """
    check_block(layer)
    checked_pair(layer.strides, "strides", least=1)
    checked_activation(layer.activation)
    if checked_integer(layer.upsample, "upsample", least=1) > 2:
        raise ValueError(f"upsample={layer.upsample}: expected 1 or 2")


def instance_norm(
    layer: Norm,
    x: ArrayLike,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: ArrayLike | None = None,
    out_sharding: OutSharding = None,
) -> jax.Array:
    """Cast as a Flax norm does, then call the operator.

    Args:
        layer: The layer, of which the arguments are read.
        x: Input `[*batch, H, W, C]`.
        scale: `[C]` or None.
        bias: `[C]` or None.
        residual: Is added before the activation, of x's shape, or None.
        out_sharding: As the operator takes it.

    Returns:
        Output of x's shape, rounded to the layer's dtype once.

    Raises:
        ValueError: If `x` is not floating point, a shape does not fit, or the operator refuses.
    """
    x = checked_array(x, "x")
    dtype = _computed(layer.dtype, x, *(p for p in (scale, bias) if p is not None))
    wide = common_dtype(x.dtype, dtype)
    y = norm(
        x.astype(wide),
        scale,
        bias,
        eps=layer.epsilon,
        activation=layer.activation,
        residual=None if residual is None else checked_array(residual, "residual").astype(wide),
        implementation=layer.implementation,
        out_sharding=out_sharding,
    )
    return y.astype(dtype)


def conv_norm(
    x: ArrayLike,
    branch: Branch,
    residual: ArrayLike | None = None,
    *,
    strides: PerAxis = 1,
    padding: Padding = "SAME",
    upsample: int = 1,
    epsilon: float = 1e-5,
    activation: str | None = None,
    dtype: DTypeLike | None = None,
    precision: PrecisionLike = None,
    conv_implementation: ImplementationLike = None,
    norm_implementation: ImplementationLike = None,
    out_sharding: OutSharding = None,
) -> jax.Array:
    """Cast as a Flax layer does, then call `pallas_kernels.stylize.conv2d_instance_norm`.

    Args:
        x: Input `[*batch, H, W, C]`.
        branch: Kernel, scale and bias.
        residual: Is added before the activation, of the output's shape, or None.
        strides: Of the convolution.
        padding: As `Conv2d` takes it, but "CIRCULAR".
        upsample: 1 or 2.
        epsilon: Is added to the variance.
        activation: None or "relu".
        dtype: Of the computation; None promotes the input and the parameters.
        precision: See `jax.lax.Precision`.
        conv_implementation: Filter on the implementations of the convolution.
        norm_implementation: Filter on those of the norm.
        out_sharding: As the operator takes it.

    Returns:
        `[*batch, H_out, W_out, F]`.

    Raises:
        ValueError: If `x` is not floating point, a shape does not fit, or an operator refuses.
    """
    x, (kernel, scale, bias) = checked_array(x, "x"), branch
    dtype = _computed(dtype, x, *branch)
    return conv2d_instance_norm(
        x.astype(dtype),
        kernel.astype(dtype),
        scale,
        bias,
        stride=strides,
        padding=_padding(padding),
        upsample=upsample,
        eps=epsilon,
        activation=activation,
        residual=None if residual is None else checked_array(residual, "residual").astype(dtype),
        precision=precision,
        conv_implementation=conv_implementation,
        norm_implementation=norm_implementation,
        out_sharding=out_sharding,
    )


def residual_block(
    x: ArrayLike,
    first: Branch,
    second: Branch,
    *,
    padding: Padding = "REFLECT",
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    precision: PrecisionLike = None,
    conv_implementation: ImplementationLike = None,
    norm_implementation: ImplementationLike = None,
    out_sharding: OutSharding = None,
) -> jax.Array:
    """Cast as a Flax layer does, then call `pallas_kernels.stylize.residual_block`.

    Args:
        x: Input `[*batch, H, W, C]`.
        first: Kernel, scale and bias of the first convolution and norm.
        second: Those of the second.
        padding: As `conv_norm` takes it, as are the others.
        epsilon: Is added to both variances.
        dtype: Of the computation.
        precision: See `jax.lax.Precision`.
        conv_implementation: Filter on the implementations of the convolutions.
        norm_implementation: Filter on those of the norms.
        out_sharding: As the operator takes it.

    Returns:
        An array of x's shape.

    Raises:
        ValueError: If `x` is not floating point, a shape does not fit, or an operator refuses.
    """
    x = checked_array(x, "x")
    dtype = _computed(dtype, x, *first, *second)
    of_first, of_second = ((kernel.astype(dtype), *rest) for kernel, *rest in (first, second))
    return blocks.residual_block(
        x.astype(dtype),
        of_first,
        of_second,
        padding=_padding(padding),
        eps=epsilon,
        precision=precision,
        conv_implementation=conv_implementation,
        norm_implementation=norm_implementation,
        out_sharding=out_sharding,
    )


def options(layer: Block) -> Keywords:
    """The keywords of `residual_block` that a layer keeps as attributes; `conv_norm` has them too.

    Example:
        >>> from flash_wtconv_jax import ResidualBlock
        >>> options(ResidualBlock())["padding"]
        'REFLECT'
    """
    names = "padding", "epsilon", "dtype", "precision", "conv_implementation", "norm_implementation"
    return {name: getattr(layer, name) for name in names}


def _padding(padding: Padding) -> Padding:
    """The padding as the operator names it."""
    return "reflect" if padding == "REFLECT" else padding


def _computed(dtype: DTypeLike | None, *arrays: jax.Array) -> jnp.dtype:
    """A layer's dtype, for None that which Flax promotes arrays to."""
    return jnp.dtype(jnp.result_type(*arrays) if dtype is None else dtype)


def _check_dtypes(dtype: DTypeLike | None, param_dtype: DTypeLike) -> None:
    if dtype is not None:
        checked_dtype(dtype, "dtype")
    checked_dtype(param_dtype, "param_dtype")
