"""Dense convolution by `lax.conv_general_dilated`: runs on every platform."""

import operator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common.arguments import surely
from pallas_kernels.common.device import on_cpu, platform
from pallas_kernels.common.dtypes import accumulation_dtype, common_dtype
from pallas_kernels.common.linear import transposed
from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.conv2d.activations import activate
from pallas_kernels.conv2d.moments import WithMoments, of_rows
from pallas_kernels.conv2d.problem import Pair, Problem, Window

DIFFERENTIABLE = True

_DIMENSIONS = {
    "nhwc_hwcf": ("NHWC", "HWIO", "NHWC"),
    "nchw_fchw": ("NCHW", "OIHW", "NCHW"),
}


def unavailable(platform: str) -> str | None:
    """None: plain JAX runs on every platform."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""


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
    moments: bool = False,
) -> jax.Array | WithMoments:
    """The operator; see `vjp` for the arguments. XLA picks its own tiles and ignores `config`."""
    acc = accumulation_dtype(x.dtype)
    # XLA widens cuDNN's inputs if the output is wider, which is as slow as float32. So on a GPU
    # 16-bit outputs stay 16 bits wide until the epilogue.
    stays = platform() == "gpu" and out_dtype == x.dtype
    y = _conv(x, w, window, precision, None if stays else acc).astype(acc)
    y = epilogue(y, bias, window, activation)
    return (y.astype(out_dtype), of_rows(y, window)) if moments else y.astype(out_dtype)


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
    """The transpose of the convolution in x, applied to dy: an array `[N, *shape]`."""
    common = _computed(common_dtype(dy.dtype, w.dtype))
    run = partial(_conv, w=w.astype(common), window=window, precision=precision)
    over_batch = jax.P(jax.typeof(dy).sharding.spec[0])
    dx = transposed(run, (dy.shape[0], *shape), dy.astype(common), w, spec=over_batch)
    return dx.astype(dtype)


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
    """The transpose of the convolution in w, applied to dy: an array of the filters' shape."""
    common = _computed(common_dtype(dy.dtype, x.dtype))
    run = partial(_conv, x.astype(common), window=window, precision=precision)
    return transposed(run, shape, dy.astype(common), x).astype(dtype)


def mirrored(x: jax.Array, window: Window) -> jax.Array:
    """The images, padded by reflection as the window says."""
    pads = window.laid_out((0, 0), *window.pads, (0, 0))
    return jnp.pad(x, pads, mode="reflect")


def along_features(bias: jax.Array, window: Window) -> jax.Array:
    """A bias `[NF]` as one image of one pixel in the window's layout."""
    return bias.reshape(window.laid_out(1, 1, 1, bias.size))


def epilogue(
    y: jax.Array, bias: jax.Array | None, window: Window, activation: str | None
) -> jax.Array:
    """The sums of a convolution with its bias added, through its activation."""
    if bias is not None:
        y = y + along_features(bias.astype(y.dtype), window)
    return activate(y, activation)


def _conv(
    x: jax.Array,
    w: jax.Array,
    window: Window,
    precision: lax.Precision | None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """The convolution without bias and activation."""
    pads = window.pads
    if window.reflect:
        x, pads = mirrored(x, window), ((0, 0), (0, 0))
    if platform() == "gpu" and min(map(min, pads)) < 0:
        x, pads = _cropped(x, window)
    computed = _computed(x.dtype)
    if precision is None and x.dtype == jnp.float32:
        # None would mean less than float32 on GPUs and TPUs.
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


def _cropped(x: jax.Array, window: Window) -> tuple[jax.Array, tuple[Pair, Pair]]:
    """The images without the samples that pads of less than zero leave out, and the other pads.

    cuDNN has no gradients with such pads. XLA takes convolutions by filters as large as the images
    for them, which are many times as slow.
    """
    cut, kept = [], []
    for n, (before, after) in zip(window.images(x.shape)[1:3], window.pads, strict=True):
        # More than all samples: the other pad is shorter by the rest.
        if surely(operator.lt, n + before, 0):
            before, after = -n, n + before + after
        elif surely(operator.lt, n + after, 0):
            before, after = n + before + after, -n
        cut.append((min(before, 0), min(after, 0), 0))
        kept.append((max(before, 0), max(after, 0)))
    (rows, columns), (above, left) = cut, kept
    x = lax.pad(x, jnp.zeros((), x.dtype), window.laid_out((0, 0, 0), rows, columns, (0, 0, 0)))
    return x, (above, left)


def _computed(dtype: DTypeLike) -> DTypeLike:
    """The dtype to convolve in: on a CPU float32 for 16 bits, which it would also accumulate in."""
    return accumulation_dtype(dtype) if on_cpu() else dtype
