"""The stages of a wavelet convolution in plain JAX: padding, analysis, convolution, synthesis.

`unfused` keeps them apart: where XLA's CPU compiler fuses across levels, it computes each
convolution once for every pixel of the synthesis that reads it. Taps that meet nothing but the
zeros around an image, as most of a large kernel's do at a deep level, are left out. So are levels
below a single pixel, of which a small image has several, for taps of the level above.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
from itertools import islice
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common._compat import unfused
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.linear import transposed
from pallas_kernels.common.types import Pair, Taps
from pallas_kernels.haar.filters import IS_HAAR
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

    taps: tuple[Pair, ...]
    pads: Pads

    def of(self, kernel: jax.Array) -> jax.Array:
        """These taps of a kernel."""
        return kernel[tuple(slice(*pair) for pair in self.taps)]

    def flipped(self, kernel_size: int) -> "Reach":
        """The reach of the flipped kernel, which the transpose convolves with."""
        taps = tuple((kernel_size - stop, kernel_size - start) for start, stop in self.taps)
        return Reach(taps, tuple((after, before) for before, after in self.pads))

    def whole(self, taps: jax.Array, kernel_size: int) -> jax.Array:
        """The transpose of `of`: a whole kernel, with zeros for the taps that meet no image."""
        around = [(start, kernel_size - stop) for start, stop in self.taps]
        return jnp.pad(taps, [*around, *[(0, 0)] * (taps.ndim - len(around))])


def reaches_of(size: tuple[int, ...], kernel_size: int, levels: int) -> list[Reach]:
    """The reach of each level's kernel, the base's first; padding is PyTorch's `same`."""
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    reaches = []
    for _ in range(levels + 1):
        # A symbolic size may be any.
        far = [max(n - 1, 0) if isinstance(n, int) else kernel_size for n in size]
        pads = tuple((min(before, most), min(after, most)) for most in far)
        taps = tuple((before - b, kernel_size - after + a) for b, a in pads)
        reaches.append(Reach(taps, pads))
        size = tuple((n + 1) // 2 for n in size)
    return reaches


def levels_of_pixels(size: Sequence[int], levels: int, wavelet: str) -> int:
    """The levels that are computed: those below a single pixel only change taps above them.

    Haar's bands of a single pixel are the pixel itself, halved along each axis of two, and so is
    the way back. So what such a level adds to the pixel is the sum of its taps times the pixel,
    and the tap of the level above takes that sum, see `merged`.

    Args:
        size: The spatial sizes of the image.
        levels: The levels of the operator.
        wavelet: Name of the wavelet.

    Example:
        >>> levels_of_pixels((16, 9), 5, "haar"), levels_of_pixels((2, 2), 5, "db2")
        (4, 5)
    """
    if wavelet not in IS_HAAR:
        return levels
    for level in range(levels):
        if one_pixel(size):
            return level
        size = [(n + 1) // 2 for n in size]
    return levels


def merged(taps: Taps, reaches: Sequence[Reach], levels: int) -> tuple[Taps, list[Reach]]:
    """The kernels of the first levels, the last with the taps of deeper ones in it, and reaches.

    Args:
        taps: All kernels, the base's first.
        reaches: The reach of each.
        levels: The levels that are left, see `levels_of_pixels`.
    """
    *above, last = taps
    *others, reach = reaches
    if len(above) <= levels:
        return taps, [*reaches]
    share = jnp.sum(reach.of(last), axis=-2) / last.shape[-2]
    middle = _added_to_low(others[-1].of(above[-1]), share)
    only = Reach(((0, 1),) * len(reach.pads), reach.pads)
    return merged((*above[:-1], middle), [*others[:-1], only], levels)


def unmerged(
    found: Sequence[jax.Array], shapes: Sequence[tuple[int, ...]], reaches: Sequence[Reach]
) -> Taps:
    """The gradients of all kernels, of those of the kernels that `merged` returns.

    Args:
        found: The gradients.
        shapes: The shapes of all kernels.
        reaches: The reach of each.
    """
    gradients = [*found]
    for shape, reach in islice(zip(shapes, reaches, strict=True), len(found), None):
        above = reach.of(gradients[-1])
        low = above if above.ndim < len(shape) else above[..., 0, :]
        share = jnp.broadcast_to(low[..., None, :] / shape[-2], (*low.shape[:-1], *shape[-2:]))
        gradients.append(reach.whole(share, shape[0]))
    return tuple(gradients)


def cascade(
    x: jax.Array, pads: Sequence[Pads], padded: bool, wavelet: str, transpose: bool
) -> list[jax.Array]:
    """The image and each level's bands `[N, *size, bands, C]`, zero-padded by `pads` if so."""
    none = ((0, 0),) * (x.ndim - 2)
    around, *levels = pads if padded else [none] * len(pads)
    coefficients = [x if around == none else surrounded(x, pads=around)]
    source, inner = x, None
    for outer in levels:
        source = analyse(source, inner=inner, pads=outer, wavelet=wavelet, transpose=transpose)
        coefficients.append(source)
        inner = outer
    return coefficients


def _of_one_pixel(bands: jax.Array, *_: object, **__: object) -> bool:
    """Whether the bands `[N, *size, bands, C]` are those of a single pixel."""
    return one_pixel(bands.shape[1:-2])


@partial(unfused, static_argnames=("inner", "pads", "wavelet", "transpose"))
def analyse(
    source: jax.Array,
    *,
    inner: Pads | None,
    pads: Pads,
    wavelet: str,
    transpose: bool,
) -> jax.Array:
    """The bands, padded by `pads`, of an image or of the low band of bands padded by `inner`."""
    low = source
    if inner is not None:
        inside = (slice(b, n - a) for (b, a), n in zip(inner, source.shape[1:-2], strict=True))
        low = source[(slice(None), *inside, 0)]
    low = low.astype(accumulation_dtype(low.dtype))
    bands = analysis(low, low.ndim - 2, wavelet, transpose)
    return jnp.pad(bands, [(0, 0), *pads, (0, 0), (0, 0)]) if any(map(any, pads)) else bands


@partial(unfused, static_argnames=("pads",))
def surrounded(x: jax.Array, *, pads: Pads) -> jax.Array:
    """An image `[N, *spatial, C]` with zeros around it."""
    return jnp.pad(x, [(0, 0), *pads, (0, 0)])


@partial(
    unfused,
    static_argnames=("reach", "wavelet", "transpose", "precision", "shifted", "dtype"),
)
def convolve(
    stored: jax.Array,
    taps: jax.Array,
    deeper: jax.Array | None,
    bias: jax.Array | None,
    *,
    reach: Reach,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    shifted: bool,
    dtype: DTypeLike,
) -> jax.Array:
    """The depthwise convolution of one level plus, in its low band, the synthesis of the next.

    An image `[N, *size, C]`, unlike bands `[N, *size, bands, C]`, has no axis of bands, nor do its
    taps: XLA would copy what gets such an axis of one.
    """
    out = _depthwise(stored, taps, reach, precision, shifted)
    ndim = len(reach.pads)
    size = out.shape[1 : ndim + 1]
    if bias is not None:
        out = out + jnp.expand_dims(bias.astype(taps.dtype), range(out.ndim - 1))
    if deeper is None:
        return out.astype(dtype)
    # A pad that XLA fuses with the synthesis defeats the vectoriser, so wavelet levels keep the
    # synthesis unfused and pad its result.
    merge = synthesis if out.ndim == deeper.ndim - 1 else synthesise
    low = merge(deeper, ndim=ndim, shape=size, wavelet=wavelet, transpose=transpose)
    return _added_to_low(out, low).astype(dtype)


@unfused
def convolve_and_add(stored: jax.Array, taps: jax.Array, low: jax.Array | None) -> jax.Array:
    """The convolution of padded bands on a CPU plus, in the low band, `low [N, *size, C]`."""
    out = shifted_products(stored, taps, taps.ndim - 2)
    return out if low is None else _added_to_low(out, low)


def _added_to_low(out: jax.Array, low: jax.Array) -> jax.Array:
    """An image, or bands, plus an image in the low band."""
    if out.ndim == low.ndim:
        return out + low
    above = [(0, 0)] * (low.ndim - 1) + [(0, out.shape[-2] - 1), (0, 0)]
    return out + jnp.pad(low[..., None, :], above)


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
    reach: Reach,
    precision: lax.Precision | None,
    shifted: bool,
) -> jax.Array:
    """The convolution of an image or of bands, which are padded if `shifted`."""
    taps, ndim = reach.of(taps), len(reach.pads)
    if shifted:
        return shifted_products(stored, taps, ndim)
    kernel, channels = taps.shape[:ndim], math.prod(taps.shape[ndim:])
    out = lax.conv_general_dilated(
        stored.reshape(*stored.shape[: ndim + 1], channels).astype(taps.dtype),
        taps.reshape(*kernel, 1, channels),
        window_strides=(1,) * ndim,
        padding=reach.pads,
        dimension_numbers=_LAYOUTS[ndim],
        feature_group_count=channels,
        # By default tensor cores and matrix units would round float32 to fewer bits.
        precision=lax.Precision.HIGHEST if precision is None else precision,
    )
    return out.reshape(*out.shape[:-1], *taps.shape[ndim:])


def shifted_products(
    stored: jax.Array, taps: jax.Array, ndim: int, steps: Sequence[int] | int = 1
) -> jax.Array:
    """The sum of taps `[*kernel, ..., C]` times padded coefficients that are shifted by them.

    The kernel has `ndim` axes. Along each neighbouring taps are as many samples apart as `steps`
    says.

    LLVM vectorises a loop of up to some eighty products, and makes of more one that is ten times
    slower for each. A large kernel's products are therefore added a few at a time, which is faster
    than many at a time, too: the windows of a few stay in the first cache.
    """
    shifts = np.array(list(np.ndindex(taps.shape[:ndim]))) * np.array(steps)
    taps = taps.reshape(len(shifts), *taps.shape[ndim:])
    n, *sizes = stored.shape[: ndim + 1]
    size = (n - most for n, most in zip(sizes, shifts[-1], strict=True))
    shape = (n, *size, *stored.shape[ndim + 1 :])
    over = range(ndim + 1, stored.ndim)
    others = (0,) * len(over)

    def window(shift: np.ndarray | jax.Array) -> jax.Array:
        if isinstance(shift, jax.Array):
            at = 0, *shift, *others
            return lax.dynamic_slice(stored, at, shape, allow_negative_indices=False)
        # One operation to compile, where a dynamic slice has one more for each index.
        start = 0, *map(int, shift), *others
        return lax.slice(stored, start, [at + n for at, n in zip(start, shape, strict=True)])

    def products(shifts: np.ndarray | jax.Array, taps: jax.Array) -> jax.Array:
        # By `lax`: operators take Python four times as long to trace.
        every = (
            lax.mul(window(shift).astype(taps.dtype), lax.broadcast_in_dim(tap, shape, over))
            for shift, tap in zip(shifts, taps, strict=True)
        )
        return reduce(lax.add, every)

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
    around: Pads,
    shape: tuple[int, ...],
    reach: Reach,
    precision: lax.Precision | None,
    shifted: bool,
) -> jax.Array:
    """The transpose of `_depthwise` in its taps: `dW[tap] = sum_p x[p + tap - r] * dy[p]`.

    Like x, dy is padded if `shifted`, by `around`. The gradient is of a shape.
    """
    acc = accumulation_dtype(dy.dtype)
    if shifted:
        lengths = (stop - start for start, stop in reach.taps)
        taps = jax.ShapeDtypeStruct((*lengths, *shape[len(around) :]), acc)
        return reach.whole(shifted_sums(stored, dy, taps, around), shape[0])

    def convolved(taps: jax.Array) -> jax.Array:
        return _depthwise(stored, taps, reach, precision, shifted=False)[None]

    # In a map that checks nothing JAX (0.10) types arguments as varying over a mesh, but nothing
    # that is made of them: so dy is made of an argument, as the convolution is.
    return transposed(convolved, shape, dy.astype(acc)[None], stored)


def shifted_sums(
    stored: jax.Array,
    dy: jax.Array,
    taps: jax.ShapeDtypeStruct,
    around: Pads,
    steps: Sequence[int] | int = 1,
) -> jax.Array:
    """The transpose of `shifted_products` in its taps, one tap at a time; dy is padded too.

    Blocks of rows are added up product by product, in a loop that LLVM vectorises, before XLA
    reduces what is left: that is four times as fast as its reduction of all rows.
    """
    ndim = len(around)
    kernel, others = taps.shape[:ndim], taps.shape[ndim:]
    if one_pixel(dy.shape[1 : ndim + 1]) and one_pixel(kernel):
        every = stored.astype(taps.dtype) * dy.astype(taps.dtype)
        return jnp.sum(every, axis=0).reshape(taps.shape)
    (above, below), *sides = around
    inside = tuple(slice(b, n - a) for (b, a), n in zip(sides, dy.shape[2 : ndim + 1], strict=True))
    height = dy.shape[1] - above - below
    rows, count = height, 1
    # A symbolic height stays one block.
    if isinstance(height, int):
        rows = -(-height // _BLOCKS)
        count = height // rows

    def products(tap: jax.Array, first: int, end: int) -> jax.Array:
        some = dy[(slice(None), slice(above + first, above + end), *inside)].astype(taps.dtype)
        at = (0, tap[0] + first, *tap[1:], *(0 for _ in others))
        window = lax.dynamic_slice(stored, at, some.shape, allow_negative_indices=False)
        return window.astype(taps.dtype) * some

    @unfused
    def blocks(tap: jax.Array) -> jax.Array:
        every = (products(tap, i * rows, (i + 1) * rows) for i in range(count))
        return cast(jax.Array, sum(every))

    def one(tap: jax.Array) -> jax.Array:
        pixels, rest = range(ndim + 1), products(tap, count * rows, height)
        return jnp.sum(blocks(tap), axis=pixels) + jnp.sum(rest, axis=pixels)

    every_tap = np.array(list(np.ndindex(kernel))) * np.array(steps)
    return lax.map(one, every_tap).reshape(taps.shape)
