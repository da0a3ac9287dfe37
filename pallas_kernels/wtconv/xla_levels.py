"""The stages of a wavelet convolution in plain JAX: padding, analysis, convolution, synthesis.

`unfused` keeps them apart: where XLA's CPU compiler fuses across levels, it computes each
convolution once for every pixel of the synthesis that reads it. A single pixel, of which a small
image has several levels, has few readers, and is not kept apart: borders take XLA long to compile.
Taps that meet nothing but the zeros around an image, as most of a large kernel's do at a deep
level, are left out.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common._compat import unfused
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.linear import transposed
from pallas_kernels.common.types import Pair
from pallas_kernels.haar.xla import analysis, one_pixel, synthesis

_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}

_MOST_PRODUCTS = 30
"""The most products of a CPU's convolution that are one loop, with what is done to their sum."""
_PRODUCTS = 8
"""The products of a larger kernel that are one loop."""

_BLOCKS = 8
"""The blocks of rows that a CPU's weight gradient adds before it reduces them."""

Pads = tuple[Pair, ...]
"""The zeros before and after each axis."""


class Reach(NamedTuple):
    """The taps of a kernel that meet an image, by axis, and the zeros that they meet around it."""

    taps: tuple[slice, ...]
    pads: Pads


def reaches_of(
    size: tuple[int, ...], kernel_size: int, levels: int, transpose: bool
) -> list[Reach]:
    """The reach of each level's kernel, the base's first.

    Padding is PyTorch's `same`, which the transpose of an even kernel swaps.
    """
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    if transpose:
        before, after = after, before
    reaches = []
    for _ in range(levels + 1):
        # A symbolic size may be any.
        far = [max(n - 1, 0) if isinstance(n, int) else kernel_size for n in size]
        pads = tuple((min(before, most), min(after, most)) for most in far)
        taps = tuple(slice(before - b, kernel_size - after + a) for b, a in pads)
        reaches.append(Reach(taps, pads))
        size = tuple((n + 1) // 2 for n in size)
    return reaches


def cascade(
    x: jax.Array, pads: Sequence[Pads], padded: bool, wavelet: str, transpose: bool
) -> list[jax.Array]:
    """Each level's coefficients `[N, *size, bands, C]`, x first, zero-padded by `pads` if so."""
    none = ((0, 0),) * (x.ndim - 2)
    source = x[..., None, :]
    around, *levels = pads if padded else [none] * len(pads)
    coefficients = [source if around == none else surrounded(source, pads=around)]
    inner = none
    for outer in levels:
        source = analyse(source, inner=inner, pads=outer, wavelet=wavelet, transpose=transpose)
        coefficients.append(source)
        inner = outer
    return coefficients


def _of_one_pixel(bands: jax.Array, *_: object, **__: object) -> bool:
    """Whether the first argument of a stage, `[N, *size, bands, C]`, is a single pixel."""
    return one_pixel(bands.shape[1:-2])


@partial(unfused, static_argnames=("inner", "pads", "wavelet", "transpose"), unless=_of_one_pixel)
def analyse(
    source: jax.Array,
    *,
    inner: Pads,
    pads: Pads,
    wavelet: str,
    transpose: bool,
) -> jax.Array:
    """The bands, padded by `pads`, of the low band of `source`, which is padded by `inner`."""
    inside = (slice(b, n - a) for (b, a), n in zip(inner, source.shape[1:-2], strict=True))
    low = source[(slice(None), *inside, 0)]
    low = low.astype(accumulation_dtype(low.dtype))
    return _surrounded(analysis(low, low.ndim - 2, wavelet, transpose), pads)


def _surrounded(bands: jax.Array, pads: Pads) -> jax.Array:
    if not any(map(any, pads)):
        return bands
    return jnp.pad(bands, [(0, 0), *pads, (0, 0), (0, 0)])


surrounded = unfused(_surrounded, static_argnames=("pads",))
"""Bands `[N, *size, bands, C]` with zeros around them."""


@partial(
    unfused,
    static_argnames=("pads", "wavelet", "transpose", "precision", "shifted", "dtype"),
    unless=_of_one_pixel,
)
def convolve(
    stored: jax.Array,
    taps: jax.Array,
    deeper: jax.Array | None,
    bias: jax.Array | None,
    *,
    pads: Pads,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    shifted: bool,
    dtype: DTypeLike,
) -> jax.Array:
    """The depthwise convolution of one level plus, in its low band, the synthesis of the next."""
    out = _depthwise(stored, taps, pads, precision, shifted)
    ndim, size = out.ndim - 3, out.shape[1:-2]
    if bias is not None:
        out = out + jnp.expand_dims(bias.astype(taps.dtype), range(out.ndim - 1))
    if deeper is None:
        return out.astype(dtype)
    bands = out.shape[-2]
    # A pad that XLA fuses with the synthesis defeats the vectoriser, so wavelet levels keep the
    # synthesis unfused and pad its result.
    merge = synthesis if bands == 1 else synthesise
    low = merge(deeper, ndim=ndim, shape=size, wavelet=wavelet, transpose=transpose)
    return _added_to_low(out, low).astype(dtype)


@unfused
def convolve_and_add(stored: jax.Array, taps: jax.Array, low: jax.Array | None) -> jax.Array:
    """The convolution of padded bands on a CPU plus, in the low band, `low [N, *size, C]`."""
    out = shifted_products(stored, taps)
    return out if low is None else _added_to_low(out, low)


def _added_to_low(bands: jax.Array, low: jax.Array) -> jax.Array:
    above = [(0, 0)] * (low.ndim - 1) + [(0, bands.shape[-2] - 1), (0, 0)]
    return bands + jnp.pad(low[..., None, :], above)


@unfused
def low_band(x: jax.Array) -> jax.Array:
    """The low band `[N, *size, C]` of `x [N, *spatial, C]` by Haar's wavelet."""
    return analysis(x.astype(accumulation_dtype(x.dtype)), x.ndim - 2)[..., 0, :]


synthesise = unfused(
    synthesis, static_argnames=("ndim", "shape", "wavelet", "transpose"), unless=_of_one_pixel
)
"""The synthesis of bands, see `haar.xla.synthesis`."""


def _depthwise(
    stored: jax.Array,
    taps: jax.Array,
    pads: Pads,
    precision: lax.Precision | None,
    shifted: bool,
) -> jax.Array:
    """The convolution of coefficients `[N, *size, bands, C]`, which are padded if `shifted`."""
    if shifted:
        return shifted_products(stored, taps)
    ndim = stored.ndim - 3
    *kernel, bands, channels = taps.shape
    out = lax.conv_general_dilated(
        stored.reshape(*stored.shape[:-2], bands * channels).astype(taps.dtype),
        taps.reshape(*kernel, 1, bands * channels),
        window_strides=(1,) * ndim,
        padding=pads,
        dimension_numbers=_LAYOUTS[ndim],
        feature_group_count=bands * channels,
        # By default tensor cores and matrix units would round float32 to fewer bits.
        precision=lax.Precision.HIGHEST if precision is None else precision,
    )
    return out.reshape(*out.shape[:-1], bands, channels)


def shifted_products(
    stored: jax.Array, taps: jax.Array, steps: Sequence[int] | int = 1
) -> jax.Array:
    """The sum of taps `[*kernel, bands, C]` times padded coefficients that are shifted by them.

    Along each axis neighbouring taps are as many samples apart as `steps` says.

    LLVM vectorises a loop of up to some eighty products, and makes of more one that is ten times
    slower for each. A large kernel's products are therefore added a few at a time, which is faster
    than many at a time, too: the windows of a few stay in the first cache.
    """
    shifts = np.array(list(np.ndindex(taps.shape[:-2]))) * np.array(steps)
    taps = taps.reshape(len(shifts), *(1,) * (stored.ndim - 2), *taps.shape[-2:])
    size = (n - most for n, most in zip(stored.shape[1:-2], shifts[-1], strict=True))
    shape = (stored.shape[0], *size, *stored.shape[-2:])

    def window(shift: np.ndarray | jax.Array) -> jax.Array:
        if isinstance(shift, jax.Array):
            at = 0, *shift, 0, 0
            return lax.dynamic_slice(stored, at, shape, allow_negative_indices=False)
        # One operation to compile, where a dynamic slice has one more for each index.
        start = 0, *map(int, shift), 0, 0
        return lax.slice(stored, start, [at + n for at, n in zip(start, shape, strict=True)])

    def products(shifts: np.ndarray | jax.Array, taps: jax.Array) -> jax.Array:
        windows = map(window, shifts)
        every = (window.astype(taps.dtype) * tap for window, tap in zip(windows, taps, strict=True))
        return cast(jax.Array, sum(every))

    if len(shifts) <= _MOST_PRODUCTS:
        return products(shifts, taps)

    @unfused
    def add(total: jax.Array, shifts: jax.Array, taps: jax.Array) -> jax.Array:
        return total + products(shifts, taps)

    first = len(shifts) % _PRODUCTS or _PRODUCTS
    rest = jax.tree.map(
        lambda each: each[first:].reshape(-1, _PRODUCTS, *each.shape[1:]), (shifts, taps)
    )
    total = products(shifts[:first], taps[:first])
    return lax.scan(lambda total, some: (add(total, *some), None), total, rest)[0]


def correlate(
    stored: jax.Array,
    dy: jax.Array,
    shape: tuple[int, ...],
    reach: Reach,
    precision: lax.Precision | None,
    shifted: bool,
) -> jax.Array:
    """The transpose of `_depthwise` in its taps: `dW[tap] = sum_p x[p + tap - r] * dy[p]`."""
    acc = accumulation_dtype(dy.dtype)
    taps = jax.ShapeDtypeStruct(
        (*(taps.stop - taps.start for taps in reach.taps), *shape[-2:]), acc
    )
    if shifted:
        gradient = shifted_sums(stored, dy, taps)
    else:
        convolved = partial(_depthwise, stored, pads=reach.pads, precision=precision, shifted=False)
        gradient = transposed(convolved, taps.shape, dy.astype(acc), stored)
    # Taps that meet no image have no gradient.
    around = [(taps.start, n - taps.stop) for taps, n in zip(reach.taps, shape, strict=False)]
    return jnp.pad(gradient, [*around, (0, 0), (0, 0)])


def shifted_sums(
    stored: jax.Array,
    dy: jax.Array,
    taps: jax.ShapeDtypeStruct,
    steps: Sequence[int] | int = 1,
) -> jax.Array:
    """The transpose of `shifted_products` in its taps, one tap at a time.

    Blocks of rows are added up product by product, in a loop that LLVM vectorises, before XLA
    reduces what is left: that is four times as fast as its reduction of all rows.
    """
    if one_pixel(dy.shape[1:-2]) and one_pixel(taps.shape[:-2]):
        every = stored.astype(taps.dtype) * dy.astype(taps.dtype)
        return jnp.sum(every, axis=0).reshape(taps.shape)
    height = dy.shape[1]
    rows, count = height, 1
    # A symbolic height stays one block.
    if isinstance(height, int):
        rows = -(-height // _BLOCKS)
        count = height // rows

    def products(tap: jax.Array, first: int, end: int) -> jax.Array:
        some = lax.slice_in_dim(dy, first, end, axis=1).astype(taps.dtype)
        at = (0, tap[0] + first, *tap[1:], 0, 0)
        window = lax.dynamic_slice(stored, at, some.shape, allow_negative_indices=False)
        return window.astype(taps.dtype) * some

    @unfused
    def blocks(tap: jax.Array) -> jax.Array:
        every = (products(tap, i * rows, (i + 1) * rows) for i in range(count))
        return cast(jax.Array, sum(every))

    def one(tap: jax.Array) -> jax.Array:
        pixels, rest = range(dy.ndim - 2), products(tap, count * rows, height)
        return jnp.sum(blocks(tap), axis=pixels) + jnp.sum(rest, axis=pixels)

    every_tap = np.array(list(np.ndindex(taps.shape[:-2]))) * np.array(steps)
    return lax.map(one, every_tap).reshape(taps.shape)
