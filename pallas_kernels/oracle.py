"""Every operator in NumPy float64: plain loops over taps, obviously right, and slow.

This file is THE definition that every kernel of both frameworks is tested against. It imports
NumPy alone. Arrays are channels-last: `(*batch, *spatial, C)`. Subbands stand on an axis of
their own in front of the channels, `(*batch, *spatial, 2**ndim, C)`; subband `s` is
`b_0 + 2 * b_1 + 4 * b_2` where `b_a` is 1 for the high band along spatial axis `a`.

Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
ECCV 2024.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

HAAR: Array = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2.0)
"""The Haar bank `[2, 2]`: low and high filter; it is its own inverse bank."""


def analysis(x: ArrayLike, ndim: int, dec: ArrayLike = HAAR) -> Array:
    """One level of wavelet analysis, odd sizes zero-padded at the end of the axis.

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
        padded = [_pad_axis(band, axis, before, 2 * half - size + length) for band in bands]
        bands = [
            sum(dec[b, m] * _slice_axis(band, axis, m, half, 2) for m in range(length))
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
    """Analysis cascade: the coefficients of every level, finest first.

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
    """Synthesis cascade: inverse of `wavedec` for Haar, with what each low band holds added.

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
        deeper = synthesis(level, ndim, rec)[(..., *window, slice(None))]
    return np.asarray(deeper)


def depthwise(x: ArrayLike, kernel: ArrayLike, ndim: int) -> Array:
    """Depthwise cross-correlation, stride 1, zero padding to the same size.

    Args:
        x: Signal `[*batch, *spatial, ..., C]` where the axes after the spatial ones (subbands,
            channels) match those of `kernel`.
        kernel: Taps `[*k, ..., C]`; even k pads `(k - 1) // 2` before and the rest after.
        ndim: Number of spatial axes.

    Returns:
        Array of x's shape.
    """
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    inner = kernel.ndim - ndim
    first = x.ndim - inner - ndim
    size = x.shape[first : first + ndim]
    pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:ndim]]
    padded = np.pad(x, [(0, 0)] * first + pads + [(0, 0)] * inner)
    out = np.zeros_like(x)
    for tap in product(*(range(k) for k in kernel.shape[:ndim])):
        window = tuple(slice(t, t + n) for t, n in zip(tap, size, strict=True))
        out += padded[(slice(None),) * first + window] * kernel[tap]
    return out


def wtconv(
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    ndim: int,
    *,
    stride: int = 1,
    dec: ArrayLike = HAAR,
    rec: ArrayLike = HAAR,
) -> Array:
    """Wavelet convolution of 1-D, 2-D or 3-D signals.

    Args:
        x: Signal `[*batch, *spatial, C]`.
        params: `base_kernel [*k, 1, C]`, `base_scale [C]`, optionally `base_bias [C]`, and for
            each level i from 0 `wavelet_kernel_{i} [*k, 2**ndim, C]` and
            `wavelet_scale_{i} [2**ndim, C]`.
        ndim: Number of spatial axes.
        stride: 2-D and 3-D keep every stride-th sample of each axis, 1-D averages each group of
            stride samples and drops an incomplete last group, as the published layers do.
        dec: Analysis filters `[2, F]`.
        rec: Synthesis filters `[2, F]`.

    Returns:
        `[*batch, *spatial, C]` for stride 1, in float64.
    """
    x = np.asarray(x, np.float64)
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    levels = sum(name.startswith("wavelet_kernel_") for name in params)
    filtered = [
        params[f"wavelet_scale_{i}"] * depthwise(c, params[f"wavelet_kernel_{i}"], ndim)
        for i, c in enumerate(wavedec(x, ndim, levels, dec))
    ]
    base = depthwise(x[..., None, :], params["base_kernel"], ndim)[..., 0, :]
    y = params["base_scale"] * (base + params.get("base_bias", 0.0))
    if filtered:
        y = y + waverec(filtered, ndim, x.shape[-1 - ndim : -1], rec)
    return subsample(y, ndim, stride)


def wtconv_vjp(
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    dy: ArrayLike,
    ndim: int,
    *,
    stride: int = 1,
    dec: ArrayLike = HAAR,
    rec: ArrayLike = HAAR,
) -> tuple[Array, dict[str, Array]]:
    """Gradients of `sum(dy * wtconv(x, params))`, every step of `wtconv` transposed in turn.

    Args:
        x: Signal `[*batch, *spatial, C]`.
        params: As `wtconv` takes them.
        dy: Gradient of the output, of the output's shape.
        ndim: Number of spatial axes.
        stride: As `wtconv`.
        dec: Analysis filters `[2, F]`.
        rec: Synthesis filters `[2, F]`.

    Returns:
        `(dx, dparams)`: float64 arrays of the shapes of x and of the parameters.
    """
    x = np.asarray(x, np.float64)
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    levels = sum(name.startswith("wavelet_kernel_") for name in params)
    spatial = x.shape[-1 - ndim : -1]
    dy = _spread(np.asarray(dy, np.float64), spatial, stride)
    everywhere = tuple(range(x.ndim - 1))

    base = depthwise(x[..., None, :], params["base_kernel"], ndim)[..., 0, :]
    biased = base + params.get("base_bias", 0.0)
    dbase = params["base_scale"] * dy
    grads = {"base_scale": (dy * biased).sum(axis=everywhere)}
    if "base_bias" in params:
        grads["base_bias"] = dbase.sum(axis=everywhere)
    dbase = dbase[..., None, :]
    dx, grads["base_kernel"] = _depthwise_vjp(x[..., None, :], params["base_kernel"], dbase, ndim)
    dx = dx[..., 0, :]

    dcoefficients = []
    of_x, of_dy = wavedec(x, ndim, levels, dec), wavedec(dy, ndim, levels, rec)
    for i, (c, dfiltered) in enumerate(zip(of_x, of_dy, strict=True)):
        kernel, scale = params[f"wavelet_kernel_{i}"], params[f"wavelet_scale_{i}"]
        grads[f"wavelet_scale_{i}"] = (dfiltered * depthwise(c, kernel, ndim)).sum(axis=everywhere)
        dc, grads[f"wavelet_kernel_{i}"] = _depthwise_vjp(c, kernel, scale * dfiltered, ndim)
        dcoefficients.append(dc)
    if dcoefficients:
        dx = dx + waverec(dcoefficients, ndim, spatial, dec)
    return dx, grads


def conv2d(
    x: ArrayLike,
    w: ArrayLike,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | str | Sequence[int | Sequence[int]] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    layout: str = "nhwc_hwcf",
) -> Array:
    """Dense 2-D convolution (cross-correlation), then the bias, then the activation.

    Args:
        x: Images `[*batch, H, W, C]`; `[*batch, C, H, W]` in the layout "nchw_fchw".
        w: Filters `[HF, WF, C / groups, NF]`; `[NF, C / groups, HF, WF]` in "nchw_fchw".
        stride: Along H and W: output `o` reads from `stride * o - padding before` on.
        padding: Zeros around the image: a number, one for H and one for W, `((top, bottom),
            (left, right))`, "VALID" (none), or "SAME": as many that the output has
            `ceil(size / stride)` samples, the odd one behind. "reflect": as many as leave a
            convolution of stride 1 its size, the odd one behind, mirrored about the edge samples.
        dilation: Along H and W: distance of the samples that neighbouring taps read.
        groups: Filter `f` reads the channels of group `f // (NF / groups)` alone.
        bias: `[NF]`.
        activation: None, "relu", or "gelu": `x` times the normal distribution function of `x`.
        layout: "nhwc_hwcf" or "nchw_fchw".

    Returns:
        `[*batch, H_out, W_out, NF]`, in "nchw_fchw" `[*batch, NF, H_out, W_out]`, in float64, with
        `H_out = (H + top + bottom - dilation * (HF - 1) - 1) // stride + 1`.

    Example:
        >>> conv2d(np.arange(4.0).reshape(1, 4, 1), np.ones((1, 2, 1, 1)))[0, :, 0]
        array([1., 3., 5.])
    """
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    if layout == "nchw_fchw":
        x, w = np.moveaxis(x, -3, -1), w.transpose(2, 3, 1, 0)
    strides, dilations = (
        (value, value) if isinstance(value, int) else value for value in (stride, dilation)
    )
    pads = _conv2d_pads(padding, x.shape[-3:-1], w.shape[:2], strides, dilations)
    mode = "reflect" if padding == "reflect" else "constant"
    x = np.pad(x, [(0, 0)] * (x.ndim - 3) + pads + [(0, 0)], mode=mode)
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, w.shape, strict=False)]
    size = [(n - span) // s + 1 for n, span, s in zip(x.shape[-3:-1], reach, strides, strict=True)]
    y = np.zeros((*x.shape[:-3], *size, w.shape[3]))
    channels, filters = w.shape[2], w.shape[3] // groups
    for i, j, g in product(range(w.shape[0]), range(w.shape[1]), range(groups)):
        own = slice(g * filters, (g + 1) * filters)
        read = _slice_axis(x, -3, i * dilations[0], size[0], strides[0])
        read = _slice_axis(read, -2, j * dilations[1], size[1], strides[1])
        y[..., own] += read[..., g * channels : (g + 1) * channels] @ w[i, j, :, own]
    if bias is not None:
        y += np.asarray(bias, np.float64)
    if activation == "relu":
        y = np.maximum(y, 0.0)
    elif activation == "gelu":
        y = y * (0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(y / math.sqrt(2.0))))
    return np.moveaxis(y, -1, -3) if layout == "nchw_fchw" else y


def _conv2d_pads(
    padding: int | str | Sequence[int | Sequence[int]],
    size: tuple[int, ...],
    taps: tuple[int, ...],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> list[tuple[int, int]]:
    """Samples before and after, for H and for W."""
    if isinstance(padding, int):
        padding = (padding, padding)
    if not isinstance(padding, str):
        sides = [(side, side) if isinstance(side, int) else side for side in padding]
        return [(before, after) for before, after in sides]
    pads = []
    for n, k, s, d in zip(size, taps, stride, dilation, strict=True):
        reach = d * (k - 1)
        total = {
            "VALID": 0,
            "SAME": max(((n + s - 1) // s - 1) * s + reach + 1 - n, 0),
            "reflect": reach,
        }[padding]
        pads.append((total // 2, total - total // 2))
    return pads


def subsample(y: Array, ndim: int, stride: int) -> Array:
    """The stride of the published layers: the mean in 1-D, every stride-th sample otherwise."""
    if ndim == 1:
        length = y.shape[-2] // stride
        groups = y[..., : length * stride, :].reshape(*y.shape[:-2], length, stride, y.shape[-1])
        return groups.mean(axis=-2)
    return y[(..., *(slice(None, None, stride),) * ndim, slice(None))]


def _spread(dy: Array, spatial: tuple[int, ...], stride: int) -> Array:
    """Transpose of `subsample`."""
    ndim = len(spatial)
    full = np.zeros((*dy.shape[: -1 - ndim], *spatial, dy.shape[-1]))
    if ndim == 1:
        repeated = np.repeat(dy, stride, axis=-2) / stride
        full[..., : repeated.shape[-2], :] = repeated
    else:
        full[(..., *(slice(None, None, stride),) * ndim, slice(None))] = dy
    return full


def _depthwise_vjp(x: Array, kernel: Array, dy: Array, ndim: int) -> tuple[Array, Array]:
    """Gradients of `sum(dy * depthwise(x, kernel))`; the axes as there."""
    first = x.ndim - kernel.ndim
    size = x.shape[first : first + ndim]
    pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:ndim]]
    padded = np.pad(x, [(0, 0)] * first + pads + [(0, 0)] * (x.ndim - first - ndim))
    dpadded, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    for tap in product(*(range(k) for k in kernel.shape[:ndim])):
        window = (slice(None),) * first
        window += tuple(slice(t, t + n) for t, n in zip(tap, size, strict=True))
        dpadded[window] += dy * kernel[tap]
        dkernel[tap] = (padded[window] * dy).sum(axis=tuple(range(first + ndim)))
    inside = tuple(slice(b, b + n) for (b, _), n in zip(pads, size, strict=True))
    return dpadded[(slice(None),) * first + inside], dkernel


def _pad_axis(x: Array, axis: int, before: int, after: int) -> Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    return np.pad(x, pads)


def _slice_axis(x: Array, axis: int, start: int, count: int, step: int) -> Array:
    window = [slice(None)] * x.ndim
    window[axis] = slice(start, start + step * (count - 1) + 1, step)
    return x[tuple(window)]


def _upsample(band: Array, taps: Array, axis: int, before: int) -> Array:
    """Transposed stride-2 correlation along one axis, cropped to twice the size."""
    size = band.shape[axis]
    shape = list(band.shape)
    shape[axis] = 2 * size + taps.size
    out = np.zeros(shape)
    for m, tap in enumerate(taps):
        window = [slice(None)] * band.ndim
        window[axis] = slice(m, m + 2 * size, 2)
        out[tuple(window)] += tap * band
    return _slice_axis(out, axis, before, 2 * size, 1)
