"""Wavelet analysis and synthesis, one level and cascades."""

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.oracle.arrays import Array, pad_axis, slice_axis

HAAR: Array = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2.0)
"""The Haar filter bank `[2, 2]`, low filter first; analysis and synthesis use the same."""


def analysis(x: ArrayLike, ndim: int, dec: ArrayLike = HAAR) -> Array:
    """One level of wavelet analysis, which zero-pads odd sizes at the end of the axis.

    Args:
        x: Signal `[*batch, *spatial, C]`.
        ndim: Number of spatial axes, 1 to 3.
        dec: Low and high analysis filter `[2, F]` in cross-correlation order, F even.

    Returns:
        Coefficients `[*batch, *ceil(spatial / 2), 2**ndim, C]`: along each axis
        `c_b[i] = sum_m dec[b, m] * x[2 * i + m - (F // 2 - 1)]`, zero outside the signal.

    Example:
        >>> analysis(np.array([[1.0], [2.0], [3.0], [4.0]]), 1)[:, :, 0].round(3)
        array([[ 2.121, -0.707],
               [ 4.95 , -0.707]])
    """
    dec = np.asarray(dec, np.float64)
    length = dec.shape[1]
    before = length // 2 - 1
    bands = [np.asarray(x, np.float64)]
    # The last axis splits first, so that axis 0 ends as the lowest bit of the subband.
    for axis in range(-2, -2 - ndim, -1):
        size = bands[0].shape[axis]
        half = (size + 1) // 2
        padded = [pad_axis(band, axis, before, 2 * half - size + length) for band in bands]
        bands = [
            sum(dec[b, m] * slice_axis(band, axis, m, half, 2) for m in range(length))
            for band in padded
            for b in (0, 1)
        ]
    return np.stack(bands, axis=-2)


def synthesis(coefficients: ArrayLike, ndim: int, rec: ArrayLike = HAAR) -> Array:
    """One level of wavelet synthesis: the transpose of `analysis` with the bank `rec`.

    Args:
        coefficients: Subbands `[*batch, *half, 2**ndim, C]`.
        ndim: Number of spatial axes, 1 to 3.
        rec: Low and high synthesis filter `[2, F]`, F even.

    Returns:
        Signal `[*batch, *(2 * half), C]`: along each axis coefficient `c_b[i]` adds
        `rec[b, m] * c_b[i]` at position `2 * i + m - (F // 2 - 1)`.

    Example:
        >>> x = np.arange(4.0).reshape(4, 1)
        >>> bool(np.allclose(synthesis(analysis(x, 1), 1), x))
        True
    """
    rec = np.asarray(rec, np.float64)
    length = rec.shape[1]
    before = length // 2 - 1
    coefficients = np.asarray(coefficients, np.float64)
    bands = [coefficients[..., s, :] for s in range(2**ndim)]
    for axis in range(-1 - ndim, -1):
        bands = [
            _upsample(low, rec[0], axis, before) + _upsample(high, rec[1], axis, before)
            for low, high in zip(bands[::2], bands[1::2], strict=True)
        ]
    return bands[0]


def wavedec(x: ArrayLike, ndim: int, levels: int, dec: ArrayLike = HAAR) -> list[Array]:
    """The analysis cascade: the coefficients of every level, finest first.

    Args:
        x: Signal `[*batch, *spatial, C]`.
        ndim: Number of spatial axes.
        levels: Number of levels, at least 0.
        dec: Analysis filters `[2, F]`.

    Returns:
        One array `[*batch, *spatial_level, 2**ndim, C]` a level; each level analyses subband 0
        (the low band) of the level before.
    """
    coefficients = []
    low = np.asarray(x, np.float64)
    for _ in range(levels):
        coefficients.append(analysis(low, ndim, dec))
        low = coefficients[-1][..., 0, :]
    return coefficients


def waverec(
    coefficients: list[Array], ndim: int, shape: tuple[int, ...], rec: ArrayLike = HAAR
) -> Array:
    """The synthesis cascade, which is the transpose of `wavedec` for an orthogonal filter bank.

    Args:
        coefficients: Arrays as `wavedec` returns them, finest first. The low band of a level is
            *added* to the synthesis of the deeper levels; give zeros there to invert `wavedec`.
        ndim: Number of spatial axes.
        shape: Spatial size of the result, which undoes the padding of odd sizes.
        rec: Synthesis filters `[2, F]`.

    Returns:
        Signal `[*batch, *shape, C]`.
    """
    shapes = [tuple(shape)] + [c.shape[-2 - ndim : -2] for c in coefficients[:-1]]
    deeper: Array | float = 0.0
    for level, size in zip(coefficients[::-1], shapes[::-1], strict=True):
        level = np.array(level, np.float64)
        level[..., 0, :] += deeper
        window = tuple(slice(n) for n in size)
        whole = synthesis(level, ndim, rec)
        deeper = whole[(slice(None),) * (whole.ndim - 1 - ndim) + window]
    return np.asarray(deeper)


def _upsample(band: Array, taps: Array, axis: int, before: int) -> Array:
    """The transposed stride-2 correlation along one axis, cropped to twice the size."""
    size = band.shape[axis]
    shape = list(band.shape)
    shape[axis] = 2 * size + taps.size
    out = np.zeros(shape)
    for m, tap in enumerate(taps):
        window = [slice(None)] * band.ndim
        window[axis] = slice(m, m + 2 * size, 2)
        out[tuple(window)] += tap * band
    return slice_axis(out, axis, before, 2 * size, 1)
