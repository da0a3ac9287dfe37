"""Dense 2-D convolution, and its gradients."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.oracle.arrays import Array, slice_axis

Sides = int | Sequence[int | Sequence[int]]
"""Samples around images: one number, one for H and one for W, or two for each."""
Padding = str | Sides | tuple[str, Sides]
"""A name, numbers of zeros, or "reflect" and the numbers of samples that are mirrored."""
Pads = list[tuple[int, int]]


def conv2d(
    x: ArrayLike,
    w: ArrayLike,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    layout: str = "nhwc_hwcf",
    upsample: int = 1,
) -> Array:
    """Dense 2-D convolution (cross-correlation), then the bias, then the activation.

    Args:
        x: Images `[*batch, H, W, C]`; `[*batch, C, H, W]` in the layout "nchw_fchw".
        w: Filters `[HF, WF, C / groups, NF]`; `[NF, C / groups, HF, WF]` in "nchw_fchw".
        stride: Distance along H and W between the samples that neighbouring outputs read: output
            `o` reads from `stride * o - padding before` on.
        padding: Number of zeros around the image: one number, one for H and one for W, or
            `((top, bottom), (left, right))`. "VALID" pads nothing. "SAME" pads so that the output
            has `ceil(size / stride)` samples. "reflect" pads so that a convolution of stride 1
            keeps the size, with the image mirrored about its edge samples. Both pad an odd sample
            behind. `("reflect", numbers)` mirrors so many samples, given as numbers of zeros are.
        dilation: Distance along H and W between the samples that neighbouring taps read.
        groups: Number of groups of channels; filter `f` reads those of `f // (NF / groups)` alone.
        bias: `[NF]`, or None.
        activation: None, "relu", or "gelu": `x` times the normal distribution function of `x`.
        layout: "nhwc_hwcf" or "nchw_fchw".
        upsample: How many times each sample is repeated along H and along W, before the padding.

    Returns:
        `[*batch, H_out, W_out, NF]`, in "nchw_fchw" `[*batch, NF, H_out, W_out]`, in float64, with
        `H_out = (upsample * H + top + bottom - dilation * (HF - 1) - 1) // stride + 1`.

    Example:
        >>> conv2d(np.arange(4.0).reshape(1, 4, 1), np.ones((1, 2, 1, 1)))[0, :, 0]
        array([1., 3., 5.])
    """
    x, w = _channels_last(x, w, layout)
    x = _repeated(x, upsample)
    window = _window(x, w, stride, padding, dilation, groups)
    y = _linear(x, w, bias, window)
    if activation == "relu":
        y = np.maximum(y, 0.0)
    elif activation == "gelu":
        y = y * _normal_distribution(y)
    return np.moveaxis(y, -1, -3) if layout == "nchw_fchw" else y


def conv2d_vjp(
    x: ArrayLike,
    w: ArrayLike,
    dy: ArrayLike,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    layout: str = "nhwc_hwcf",
    upsample: int = 1,
) -> tuple[Array, Array, Array]:
    """Gradients of `sum(dy * conv2d(x, w))`, every step of `conv2d` transposed in turn.

    Args:
        x: As `conv2d` takes it.
        w: As `conv2d` takes it.
        dy: Gradient of the output, of the output's shape.
        stride: As `conv2d` takes it.
        padding: As `conv2d` takes it.
        dilation: As `conv2d` takes it.
        groups: As `conv2d` takes it.
        bias: As `conv2d` takes it.
        activation: As `conv2d` takes it; the slope of "relu" is 0 where it meets 0.
        layout: As `conv2d` takes it.
        upsample: As `conv2d` takes it.

    Returns:
        `(dx, dw, dbias)`: float64 arrays of the shapes of x, of w, and `[NF]`.

    Example:
        >>> x, w = np.arange(4.0).reshape(1, 4, 1), np.ones((1, 2, 1, 1))
        >>> dx, dw, dbias = conv2d_vjp(x, w, np.ones((1, 3, 1)))
        >>> dx[0, :, 0], dw[0, :, 0, 0], dbias
        (array([1., 2., 2., 1.]), array([3., 6.]), array([3.]))
    """
    x, w = _channels_last(x, w, layout)
    x = _repeated(x, upsample)
    dz = np.asarray(dy, np.float64)
    if layout == "nchw_fchw":
        dz = np.moveaxis(dz, -3, -1)
    window = _window(x, w, stride, padding, dilation, groups)
    if activation is not None:
        z = _linear(x, w, bias, window)
        if activation == "relu":
            dz = dz * (z > 0)
        else:
            dz = dz * (_normal_distribution(z) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi))
    everywhere = tuple(range(dz.ndim - 1))
    padded = _padded(x, window)
    dpadded, dw = np.zeros_like(padded), np.zeros_like(w)
    # What a tap reads is a view, so adding to it adds to the gradient of the padded image.
    reads = zip(_reads(padded, w, window), _reads(dpadded, w, window), strict=True)
    for (read, tap), (dread, _) in reads:
        own = dz[..., tap[-1]]
        dread += own @ w[tap].T
        dw[tap] = np.tensordot(read, own, (everywhere, everywhere))
    dx, dbias = _padded_transposed(dpadded, x.shape, window), dz.sum(axis=everywhere)
    dx = _repeated_transposed(dx, upsample)
    if layout == "nchw_fchw":
        dx, dw = np.moveaxis(dx, -1, -3), dw.transpose(3, 2, 0, 1)
    return dx, dw, dbias


class _Window(NamedTuple):
    """Which samples the taps read, along H and W, and the size of the output."""

    pads: Pads
    reflect: bool
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    size: tuple[int, int]


def _channels_last(x: ArrayLike, w: ArrayLike, layout: str) -> tuple[Array, Array]:
    """Images `[*batch, H, W, C]` and filters `[HF, WF, C / groups, NF]` in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    if layout == "nchw_fchw":
        x, w = np.moveaxis(x, -3, -1), w.transpose(2, 3, 1, 0)
    return x, w


def _window(
    x: Array,
    w: Array,
    stride: int | tuple[int, int],
    padding: Padding,
    dilation: int | tuple[int, int],
    groups: int,
) -> _Window:
    strides, dilations = (
        (value, value) if isinstance(value, int) else value for value in (stride, dilation)
    )
    pads = conv2d_pads(padding, x.shape[-3:-1], w.shape[:2], strides, dilations)
    height, width = (
        (n + before + after - d * (k - 1) - 1) // s + 1
        for n, k, s, d, (before, after) in zip(
            x.shape[-3:-1], w.shape[:2], strides, dilations, pads, strict=True
        )
    )
    return _Window(pads, reflects(padding), strides, dilations, groups, (height, width))


def _repeated(x: Array, times: int) -> Array:
    """Each sample of images `[*batch, H, W, C]` so many times along H and along W."""
    return np.repeat(np.repeat(x, times, axis=-3), times, axis=-2)


def _repeated_transposed(dx: Array, times: int) -> Array:
    """The sums over the copies of each sample."""
    *batch, height, width, channels = dx.shape
    blocks = dx.reshape(*batch, height // times, times, width // times, times, channels)
    return blocks.sum(axis=(-4, -2))


def _linear(x: Array, w: Array, bias: ArrayLike | None, window: _Window) -> Array:
    """The convolution and the bias."""
    y = np.zeros((*x.shape[:-3], *window.size, w.shape[3]))
    for read, tap in _reads(_padded(x, window), w, window):
        y[..., tap[-1]] += read @ w[tap]
    return y if bias is None else y + np.asarray(bias, np.float64)


def _reads(
    padded: Array, w: Array, window: _Window
) -> Iterator[tuple[Array, tuple[int, int, slice, slice]]]:
    """Views of what each tap of each group reads, and the index of its weights in the filters."""
    channels, filters = w.shape[2], w.shape[3] // window.groups
    (height, width), (down, across), (d, e) = window.size, window.stride, window.dilation
    for i, j, g in product(range(w.shape[0]), range(w.shape[1]), range(window.groups)):
        read = slice_axis(padded, -3, i * d, height, down)
        read = slice_axis(read, -2, j * e, width, across)
        own = slice(g * filters, (g + 1) * filters)
        yield read[..., g * channels : (g + 1) * channels], (i, j, slice(None), own)


def _padded(x: Array, window: _Window) -> Array:
    pads = [(0, 0)] * (x.ndim - 3) + window.pads + [(0, 0)]
    return np.pad(x, pads, mode="reflect" if window.reflect else "constant")


def _padded_transposed(dpadded: Array, shape: tuple[int, ...], window: _Window) -> Array:
    """Each sample of a padded image added to the one that it is a copy of, or dropped."""
    for axis, (before, after) in zip((-3, -2), window.pads, strict=True):
        size = shape[axis]
        dx = slice_axis(dpadded, axis, before, size, 1).copy()
        if window.reflect:
            sources = np.pad(np.arange(size), (before, after), mode="reflect")
            for place in (*range(before), *range(before + size, before + size + after)):
                mirrored = slice_axis(dpadded, axis, place, 1, 1)
                slice_axis(dx, axis, sources[place], 1, 1)[...] += mirrored
        dpadded = dx
    return dpadded


def _normal_distribution(z: Array) -> Array:
    """The distribution function of the normal distribution."""
    return 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(z / math.sqrt(2.0)))


def reflects(padding: Padding) -> bool:
    """Whether a convolution mirrors the image where it pads.

    Args:
        padding: As `conv2d` takes it.

    Example:
        >>> reflects("reflect"), reflects(("reflect", 1)), reflects((1, 2)), reflects("SAME")
        (True, True, False, False)
    """
    if isinstance(padding, str):
        return padding == "reflect"
    return isinstance(padding, Sequence) and len(padding) == 2 and padding[0] == "reflect"


def conv2d_pads(
    padding: Padding,
    size: tuple[int, ...],
    taps: tuple[int, ...],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> Pads:
    """Samples that a convolution pads along H and along W, before and after the image.

    Args:
        padding: As `conv2d` takes it.
        size: Height and width of the images, as upsampled.
        taps: Height and width of the filters.
        stride: Along H and W.
        dilation: Along H and W.

    Example:
        >>> conv2d_pads("SAME", (8, 9), (3, 4), (1, 1), (1, 1))
        [(1, 1), (1, 2)]
    """
    if reflects(padding) and not isinstance(padding, str):
        padding = cast(tuple[str, Sides], padding)[1]
    if isinstance(padding, int):
        padding = (padding, padding)
    if not isinstance(padding, str):
        both = cast(Sequence[int | Sequence[int]], padding)
        sides = [(side, side) if isinstance(side, int) else side for side in both]
        return [(before, after) for before, after in sides]
    pads = []
    for n, k, s, d in zip(size, taps, stride, dilation, strict=True):
        span = d * (k - 1) + 1
        total = {
            "VALID": 0,
            "SAME": max(((n + s - 1) // s - 1) * s + span - n, 0),
            "reflect": span - 1,
        }[padding]
        pads.append((total // 2, total - total // 2))
    return pads
