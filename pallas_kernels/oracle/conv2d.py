"""Dense 2-D convolution."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.oracle.arrays import Array, slice_axis


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
        read = slice_axis(x, -3, i * dilations[0], size[0], strides[0])
        read = slice_axis(read, -2, j * dilations[1], size[1], strides[1])
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
