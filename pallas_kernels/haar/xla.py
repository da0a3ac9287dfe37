"""Analysis and synthesis in plain JAX: runs on every platform, differentiable in both modes."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.common._compat import unfused
from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.types import Bands
from pallas_kernels.haar.filters import IS_HAAR, filter_bank
from pallas_kernels.haar.problem import Problem

DIFFERENTIABLE = True

Filters = tuple[tuple[float, ...], ...]
"""The low and the high filter."""


def unavailable(platform: str) -> str | None:
    """None: plain JAX runs on every platform."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""


def wavedec(
    x: jax.Array, *, ndim: int, levels: int, wavelet: str
) -> tuple[jax.Array, tuple[Bands, ...]]:
    """The low band of `x [N, *spatial, C]`, and the details of each level from coarse to fine."""
    low, details = x.astype(accumulation_dtype(x.dtype)), []
    for _ in range(levels):
        bands = analysis(low, ndim, wavelet)
        low, *high = (bands[..., s, :] for s in range(2**ndim))
        details.append(tuple(high))
    return jax.tree.map(lambda band: band.astype(x.dtype), (low, tuple(reversed(details))))


def waverec(
    low: jax.Array,
    details: tuple[Bands, ...],
    *,
    shape: tuple[int, ...],
    wavelet: str,
) -> jax.Array:
    """The inverse of `wavedec`: a signal `[N, *shape, C]`."""
    x = low.astype(accumulation_dtype(low.dtype))
    sizes = [*(bands[0].shape[1:-1] for bands in details[1:]), shape]
    for bands, size in zip(details, sizes, strict=True):
        stacked = jnp.stack([x, *(band.astype(x.dtype) for band in bands)], axis=-2)
        x = synthesis(stacked, len(shape), size, wavelet)
    return x.astype(low.dtype)


def analysis(x: jax.Array, ndim: int, wavelet: str = "haar", transpose: bool = False) -> jax.Array:
    """One level of analysis `[N, *spatial, C] -> [N, *ceil(spatial / 2), 2**ndim, C]`.

    Odd sizes are zero-padded at the end. With `transpose` it is the transpose of `synthesis`, which
    reads the other half of a biorthogonal filter bank.
    """
    sizes = x.shape[1:-1]
    if wavelet in IS_HAAR and one_pixel(sizes):
        return _of_one_pixel(x, ndim)
    # Of symbolic sizes JAX knows that no such pad is negative, and that it fills whole pairs.
    x = jnp.pad(x, [(0, 0), *((0, -(-n // 2) * 2 - n) for n in sizes), (0, 0)])
    if wavelet in IS_HAAR:
        return (_signed_analysis if on_cpu() else _haar_analysis)(x, ndim)
    filters = filter_bank(wavelet)[transpose]
    bands = [x]
    # The last axis splits first, so that axis 0 ends as the lowest bit of the subband.
    for axis in range(ndim, 0, -1):
        down = partial(_filter_down, axis=axis, filters=_hashable(filters))
        bands = [half for band in bands for half in down(band)]
    return jnp.stack(bands, axis=-2)


def synthesis(
    coefficients: jax.Array,
    ndim: int,
    shape: Sequence[int],
    wavelet: str = "haar",
    transpose: bool = False,
) -> jax.Array:
    """One level of synthesis `[N, *half, 2**ndim, C] -> [N, *shape, C]`, cropped to `shape`."""
    if wavelet in IS_HAAR and one_pixel(shape):
        return _one_pixel_of(coefficients, ndim)
    if wavelet in IS_HAAR:
        x = _haar_synthesis(coefficients, ndim)
    else:
        filters = filter_bank(wavelet)[not transpose]
        bands = [coefficients[..., s, :] for s in range(2**ndim)]
        for axis in range(1, ndim + 1):
            up = partial(_filter_up, axis=axis, filters=_hashable(filters))
            bands = [up(low, high) for low, high in zip(bands[::2], bands[1::2], strict=True)]
        x = bands[0]
    return x[(slice(None), *(slice(n) for n in shape))]


def one_pixel(sizes: Sequence[int]) -> bool:
    """Whether a map of these sizes is a single pixel, which no symbolic size is known to be."""
    return all(isinstance(size, int) and size == 1 for size in sizes)


def _of_one_pixel(x: jax.Array, ndim: int) -> jax.Array:
    """The Haar analysis of a single pixel: its neighbours are zeros, so all bands are the same."""
    n, *sizes, c = x.shape
    bands = jnp.broadcast_to(x[..., None, :], (n, *sizes, 2**ndim, c))
    return bands * np.asarray(2 ** (-ndim / 2), x.dtype)


def _one_pixel_of(coefficients: jax.Array, ndim: int) -> jax.Array:
    """The Haar synthesis of a single pixel, added up as `_haar_synthesis` does."""
    bands = [coefficients[..., s, :] for s in range(2**ndim)]
    for _ in range(ndim):
        bands = [low + high for low, high in zip(bands[::2], bands[1::2], strict=True)]
    return bands[0] * np.asarray(2 ** (-ndim / 2), coefficients.dtype)


def _haar_analysis(x: jax.Array, ndim: int) -> jax.Array:
    """The Haar analysis along any number of axes, unlike `butterfly.split` one axis at a time.

    Slicing all axes into parities first compiles to a loop that takes a CPU more than twice as
    long.
    """
    n, *sizes, c = x.shape
    bands = [x.reshape(n, *(k for size in sizes for k in (size // 2, 2)), c)]
    for axis in range(ndim, 0, -1):
        halves = [[lax.index_in_dim(b, p, 2 * axis, keepdims=False) for p in (0, 1)] for b in bands]
        bands = [band for even, odd in halves for band in (even + odd, even - odd)]
    return jnp.stack(bands, axis=-2) * np.asarray(2 ** (-ndim / 2), x.dtype)


def _signed_analysis(x: jax.Array, ndim: int) -> jax.Array:
    """The same numbers as those of `_haar_analysis`, by one sum for all bands.

    It takes a CPU's compiler half the time; the loop is as fast.
    """
    n, *sizes, c = x.shape
    bands = x.reshape(n, *(k for size in sizes for k in (size // 2, 2)), 1, c)
    for axis in range(ndim, 0, -1):
        even, odd = (lax.index_in_dim(bands, parity, 2 * axis, keepdims=False) for parity in (0, 1))
        high = np.arange(2**ndim) >> (axis - 1) & 1
        signs = np.where(high, -1, 1).astype(x.dtype)
        bands = even + odd * signs.reshape(*(1,) * (odd.ndim - 2), -1, 1)
    return bands * np.asarray(2 ** (-ndim / 2), x.dtype)


def _haar_synthesis(coefficients: jax.Array, ndim: int) -> jax.Array:
    """The Haar synthesis along any number of axes, by a broadcast and a select for each.

    XLA fuses these into the addition that follows, but would not fuse the concatenation that
    interleaves the pixels of `butterfly.merge`.
    """
    n, *half, _, c = coefficients.shape
    spread = (n, *(k for size in half for k in (size, 1)), c)
    bands = [coefficients[..., s, :].reshape(spread) for s in range(2**ndim)]
    for axis in range(1, ndim + 1):
        parity = np.arange(2).reshape([2 if i == 2 * axis else 1 for i in range(len(spread))])
        bands = [
            jnp.where(parity == 0, low + high, low - high)
            for low, high in zip(bands[::2], bands[1::2], strict=True)
        ]
    x = bands[0] * np.asarray(2 ** (-ndim / 2), coefficients.dtype)
    return x.reshape(n, *(2 * size for size in half), c)


@partial(unfused, static_argnames=("axis", "filters"))
def _filter_down(x: jax.Array, *, axis: int, filters: Filters) -> tuple[jax.Array, ...]:
    """The stride-2 correlation along one axis with the low and the high filter."""
    pad = len(filters[0]) // 2 - 1
    half = x.shape[axis] // 2
    # Even and odd samples are separated, so that every tap reads a contiguous slice.
    pairs = _pad_axis(x, axis, pad)
    pairs = pairs.reshape(*x.shape[:axis], half + pad, 2, *x.shape[axis + 1 :])
    parity = [lax.index_in_dim(pairs, b, axis + 1, keepdims=False) for b in (0, 1)]

    def correlated(taps: tuple[float, ...]) -> jax.Array:
        products = (
            np.asarray(tap, x.dtype)
            * lax.slice_in_dim(parity[m % 2], m // 2, m // 2 + half, axis=axis)
            for m, tap in enumerate(taps)
        )
        # NumPy leaves products with JAX's arrays to JAX, which its types do not say.
        return cast(jax.Array, sum(products))

    return tuple(map(correlated, filters))


@partial(unfused, static_argnames=("axis", "filters"))
def _filter_up(low: jax.Array, high: jax.Array, *, axis: int, filters: Filters) -> jax.Array:
    """The transpose of `_filter_down`: two bands into a signal of twice the size along one axis."""
    pad = len(filters[0]) // 2 - 1
    half = low.shape[axis]
    bands = [_pad_axis(band, axis, pad) for band in (low, high)]
    # Sample 2u + b of the full (uncropped) signal takes tap 2j + b of coefficient u - j.
    parity = [
        sum(
            np.asarray(taps[2 * j + b], low.dtype)
            * lax.slice_in_dim(band, pad - j, 2 * pad - j + half, axis=axis)
            for band, taps in zip(bands, filters, strict=True)
            for j in range(pad + 1)
        )
        for b in (0, 1)
    ]
    full = jnp.stack(parity, axis + 1)
    full = full.reshape(*low.shape[:axis], 2 * (half + pad), *low.shape[axis + 1 :])
    return lax.slice_in_dim(full, pad, pad + 2 * half, axis=axis)


def _pad_axis(x: jax.Array, axis: int, width: int) -> jax.Array:
    """The array with `width` zeros before and after it along one axis."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (width, width)
    return jnp.pad(x, pads)


def _hashable(filters: np.ndarray) -> Filters:
    """A filter bank as tuples, which `jax.jit` takes as a static argument."""
    return tuple(tuple(map(float, taps)) for taps in filters)
