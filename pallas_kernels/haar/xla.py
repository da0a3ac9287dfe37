"""Analysis and synthesis in plain JAX: runs on every platform, differentiable in both modes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.common._compat import unfused
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.haar.filters import IS_HAAR, filter_bank

DIFFERENTIABLE = True

Filters = tuple[tuple[float, ...], ...]


def unavailable(platform: str) -> str | None:
    """Plain JAX runs everywhere."""
    return None


def check(direction: str, problem: Any) -> None:
    """Plain JAX takes every problem."""


def wavedec(
    x: jax.Array, *, ndim: int, levels: int, wavelet: str
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], ...]]:
    """All levels of `x [N, *spatial, C]`: the low band, and the details from coarse to fine."""
    low, details = x.astype(accumulation_dtype(x.dtype)), []
    for _ in range(levels):
        bands = analysis(low, ndim, wavelet)
        low, *high = (bands[..., s, :] for s in range(2**ndim))
        details.append(tuple(high))
    return jax.tree.map(lambda band: band.astype(x.dtype), (low, tuple(reversed(details))))


def waverec(
    low: jax.Array,
    details: tuple[tuple[jax.Array, ...], ...],
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

    Odd sizes are zero-padded at the end. With `transpose` the filters are those whose transpose
    is `synthesis`: the other half of a biorthogonal bank.
    """
    sizes = x.shape[1:-1]
    x = jnp.pad(x, [(0, 0), *((0, n % 2) for n in sizes), (0, 0)])
    if wavelet in IS_HAAR:
        return _haar_analysis(x, ndim)
    filters = filter_bank(wavelet)[transpose]
    bands = [x]
    # The last axis splits first, so that axis 0 ends as the lowest bit of the subband.
    for axis in range(ndim, 0, -1):
        split = partial(_filter_down, axis=axis, filters=_hashable(filters))
        bands = [half for band in bands for half in split(band)]
    return jnp.stack(bands, axis=-2)


def synthesis(
    coefficients: jax.Array,
    ndim: int,
    shape: Sequence[int],
    wavelet: str = "haar",
    transpose: bool = False,
) -> jax.Array:
    """One level of synthesis `[N, *half, 2**ndim, C] -> [N, *shape, C]`, cropped to `shape`."""
    if wavelet in IS_HAAR:
        x = _haar_synthesis(coefficients, ndim)
    else:
        filters = filter_bank(wavelet)[not transpose]
        bands = [coefficients[..., s, :] for s in range(2**ndim)]
        for axis in range(1, ndim + 1):
            merge = partial(_filter_up, axis=axis, filters=_hashable(filters))
            bands = [merge(low, high) for low, high in zip(bands[::2], bands[1::2], strict=True)]
        x = bands[0]
    return x[(slice(None), *(slice(n) for n in shape))]


def _haar_analysis(x: jax.Array, ndim: int) -> jax.Array:
    """Sums and differences of the 2**ndim parities; every band is one expression of x."""
    n, *sizes, c = x.shape
    pairs = x.reshape(n, *(k for size in sizes for k in (size // 2, 2)), c)
    bands = [pairs]
    for axis in range(ndim, 0, -1):
        halves = [[lax.index_in_dim(b, p, 2 * axis, keepdims=False) for p in (0, 1)] for b in bands]
        bands = [band for even, odd in halves for band in (even + odd, even - odd)]
    return jnp.stack(bands, axis=-2) * np.asarray(2 ** (-ndim / 2), x.dtype)


def _haar_synthesis(coefficients: jax.Array, ndim: int) -> jax.Array:
    """Reads each coefficient with the sign of the pixel's parity.

    A broadcast and a select, where interleaving would be a concatenation: XLA fuses the former
    into the addition that follows.
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
    """Stride-2 correlation along one axis with the low and the high filter."""
    reach = len(filters[0]) // 2 - 1
    half = x.shape[axis] // 2
    # Even and odd samples apart: then every tap reads a contiguous slice.
    pairs = _pad_axis(x, axis, reach)
    pairs = pairs.reshape(*x.shape[:axis], half + reach, 2, *x.shape[axis + 1 :])
    parity = [lax.index_in_dim(pairs, b, axis + 1, keepdims=False) for b in (0, 1)]
    return tuple(
        sum(
            np.asarray(tap, x.dtype)
            * lax.slice_in_dim(parity[m % 2], m // 2, m // 2 + half, axis=axis)
            for m, tap in enumerate(taps)
        )
        for taps in filters
    )


@partial(unfused, static_argnames=("axis", "filters"))
def _filter_up(low: jax.Array, high: jax.Array, *, axis: int, filters: Filters) -> jax.Array:
    """Transpose of `_filter_down`: two bands into a signal of twice the size along one axis."""
    reach = len(filters[0]) // 2 - 1
    half = low.shape[axis]
    bands = [_pad_axis(band, axis, reach) for band in (low, high)]
    # Sample 2u + b of the full (uncropped) signal takes tap 2j + b of coefficient u - j.
    parity = [
        sum(
            np.asarray(taps[2 * j + b], low.dtype)
            * lax.slice_in_dim(band, reach - j, 2 * reach - j + half, axis=axis)
            for band, taps in zip(bands, filters, strict=True)
            for j in range(reach + 1)
        )
        for b in (0, 1)
    ]
    full = jnp.stack(parity, axis + 1)
    full = full.reshape(*low.shape[:axis], 2 * (half + reach), *low.shape[axis + 1 :])
    return lax.slice_in_dim(full, reach, reach + 2 * half, axis=axis)


def _pad_axis(x: jax.Array, axis: int, width: int) -> jax.Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (width, width)
    return jnp.pad(x, pads)


def _hashable(filters: np.ndarray) -> Filters:
    return tuple(tuple(map(float, taps)) for taps in filters)
