"""Wavelet convolution and its gradients."""

from collections.abc import Mapping
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.oracle.arrays import Array
from pallas_kernels.oracle.haar import HAAR, wavedec, waverec


def depthwise(x: ArrayLike, kernel: ArrayLike, ndim: int) -> Array:
    """Depthwise cross-correlation with stride 1 and zero padding to the same size.

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
    arrays = {name: np.asarray(value, np.float64) for name, value in params.items()}
    levels = sum(name.startswith("wavelet_kernel_") for name in arrays)
    filtered = [
        arrays[f"wavelet_scale_{i}"] * depthwise(c, arrays[f"wavelet_kernel_{i}"], ndim)
        for i, c in enumerate(wavedec(x, ndim, levels, dec))
    ]
    base = depthwise(x[..., None, :], arrays["base_kernel"], ndim)[..., 0, :]
    y = arrays["base_scale"] * (base + arrays.get("base_bias", 0.0))
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
    """The gradients of `sum(dy * wtconv(x, params))`, by transposing each step of `wtconv`.

    Args:
        x: Signal `[*batch, *spatial, C]`.
        params: Parameters as `wtconv` takes them.
        dy: Gradient of the output, of the output's shape.
        ndim: Number of spatial axes.
        stride: Stride as `wtconv` takes it.
        dec: Analysis filters `[2, F]`.
        rec: Synthesis filters `[2, F]`.

    Returns:
        `(dx, dparams)`: float64 arrays of the shapes of x and of the parameters.
    """
    x = np.asarray(x, np.float64)
    arrays = {name: np.asarray(value, np.float64) for name, value in params.items()}
    levels = sum(name.startswith("wavelet_kernel_") for name in arrays)
    spatial = x.shape[-1 - ndim : -1]
    dy = _spread(np.asarray(dy, np.float64), spatial, stride)
    everywhere = tuple(range(x.ndim - 1))

    base = depthwise(x[..., None, :], arrays["base_kernel"], ndim)[..., 0, :]
    biased = base + arrays.get("base_bias", 0.0)
    dbase = arrays["base_scale"] * dy
    grads = {"base_scale": (dy * biased).sum(axis=everywhere)}
    if "base_bias" in arrays:
        grads["base_bias"] = dbase.sum(axis=everywhere)
    dbase = dbase[..., None, :]
    dx, grads["base_kernel"] = _depthwise_vjp(x[..., None, :], arrays["base_kernel"], dbase, ndim)
    dx = dx[..., 0, :]

    dcoefficients = []
    of_x, of_dy = wavedec(x, ndim, levels, dec), wavedec(dy, ndim, levels, rec)
    for i, (c, dfiltered) in enumerate(zip(of_x, of_dy, strict=True)):
        kernel, scale = arrays[f"wavelet_kernel_{i}"], arrays[f"wavelet_scale_{i}"]
        grads[f"wavelet_scale_{i}"] = (dfiltered * depthwise(c, kernel, ndim)).sum(axis=everywhere)
        dc, grads[f"wavelet_kernel_{i}"] = _depthwise_vjp(c, kernel, scale * dfiltered, ndim)
        dcoefficients.append(dc)
    if dcoefficients:
        dx = dx + waverec(dcoefficients, ndim, spatial, dec)
    return dx, grads


def subsample(y: Array, ndim: int, stride: int) -> Array:
    """`y` with the stride of the published layers: means in 1-D, else every stride-th sample."""
    if ndim == 1:
        length = y.shape[-2] // stride
        groups = y[..., : length * stride, :].reshape(*y.shape[:-2], length, stride, y.shape[-1])
        return groups.mean(axis=-2)
    return y[_every(stride, y.ndim, ndim)]


def _every(stride: int, axes: int, ndim: int) -> tuple[slice, ...]:
    """The index of every stride-th sample along the spatial axes, which the channels follow."""
    return (slice(None),) * (axes - 1 - ndim) + (slice(None, None, stride),) * ndim


def _spread(dy: Array, spatial: tuple[int, ...], stride: int) -> Array:
    """The transpose of `subsample`."""
    ndim = len(spatial)
    full = np.zeros((*dy.shape[: -1 - ndim], *spatial, dy.shape[-1]))
    if ndim == 1:
        repeated = np.repeat(dy, stride, axis=-2) / stride
        full[..., : repeated.shape[-2], :] = repeated
    else:
        full[_every(stride, full.ndim, ndim)] = dy
    return full


def _depthwise_vjp(x: Array, kernel: Array, dy: Array, ndim: int) -> tuple[Array, Array]:
    """The gradients of `sum(dy * depthwise(x, kernel))` in x and in the kernel."""
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
