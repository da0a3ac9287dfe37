"""Dense convolution by `lax.conv_general_dilated`: runs on every platform."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common._compat import gelu, vary_over, varying_axes
from pallas_kernels.common.device import on_cpu, platform
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.conv2d.problem import TileConfig, Window

DIFFERENTIABLE = True

_DIMENSIONS = {
    "nhwc_hwcf": ("NHWC", "HWIO", "NHWC"),
    "nchw_fchw": ("NCHW", "OIHW", "NCHW"),
}


def unavailable(platform: str) -> str | None:
    """Plain JAX runs everywhere."""
    return None


def check(direction: str, problem: Any) -> None:
    """Plain JAX takes every problem."""


def forward(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    *,
    window: Window,
    activation: str | None,
    out_dtype: DTypeLike,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> jax.Array:
    """The operator; see `vjp` for the arguments. XLA picks tiles itself, whatever `config`."""
    acc = accumulation_dtype(x.dtype)
    # XLA widens what cuDNN is to read if it is to write more: as slow as float32, so on a GPU 16
    # bits stay 16 until the epilogue.
    stays = platform() == "gpu" and out_dtype == x.dtype
    y = _conv(x, w, window, precision, None if stays else acc).astype(acc)
    if bias is not None:
        y = y + _along_features(bias.astype(acc), window)
    return activate(y, activation).astype(out_dtype)


def input_grad(
    dy: jax.Array,
    w: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    window: Window,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> jax.Array:
    """The transpose in x, of the shape `[N, *shape]`."""
    common = _computed(jnp.promote_types(dy.dtype, w.dtype))
    run = partial(_conv, w=w.astype(common), window=window, precision=precision)
    return transposed(run, (dy.shape[0], *shape), dy.astype(common), w).astype(dtype)


def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    window: Window,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> jax.Array:
    """The transpose in w."""
    common = _computed(jnp.promote_types(dy.dtype, x.dtype))
    run = partial(_conv, x.astype(common), window=window, precision=precision)
    return transposed(run, shape, dy.astype(common), x).astype(dtype)


def activate(y: jax.Array, activation: str | None) -> jax.Array:
    """The epilogue: nothing, "relu" or "gelu"."""
    if activation == "relu":
        return jnp.maximum(y, 0)
    if activation == "gelu":
        return gelu(y)
    return y


def transposed(
    linear: Callable[[jax.Array], jax.Array],
    shape: tuple[int, ...],
    dy: jax.Array,
    *used: jax.Array,
) -> jax.Array:
    """The transpose of a linear function of an array of a shape and dy's dtype, applied to dy.

    `used` is what the function knows. Not `jax.linear_transpose`, which refuses arrays that vary
    over the axes of a mesh; the function's own value is not computed either.
    """
    zeros = vary_over(varying_axes((dy, used)), jnp.zeros(shape, dy.dtype))
    _, pullback = jax.vjp(linear, zeros)
    return pullback(dy)[0]


def mirrored(x: jax.Array, window: Window) -> jax.Array:
    """The images with the padding of a window that reflects."""
    pads = window.laid_out((0, 0), *window.pads, (0, 0))
    return jnp.pad(x, pads, mode="reflect")


def _conv(
    x: jax.Array,
    w: jax.Array,
    window: Window,
    precision: lax.Precision | None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    pads = window.pads
    if window.reflect:
        x, pads = mirrored(x, window), ((0, 0), (0, 0))
    computed = _computed(x.dtype)
    if precision is None and x.dtype == jnp.float32:
        # What None means to GPUs and TPUs is less than float32.
        precision = lax.Precision.HIGHEST
    return lax.conv_general_dilated(
        x.astype(computed),
        w.astype(computed),
        window.stride,
        pads,
        rhs_dilation=window.dilation,
        dimension_numbers=_DIMENSIONS[window.layout],
        feature_group_count=window.groups,
        precision=precision,
        preferred_element_type=out_dtype,
    )


def _computed(dtype: DTypeLike) -> DTypeLike:
    """CPUs have no matrix unit that would sum products of 16 bits in 32."""
    return accumulation_dtype(dtype) if on_cpu() else dtype


def _along_features(bias: jax.Array, window: Window) -> jax.Array:
    return bias if window.layout == "nhwc_hwcf" else bias[:, None, None]
