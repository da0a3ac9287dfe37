"""The shards of a wavelet convolution: the samples that they read, and what they compute.

The raw low band is what goes down, so one exchange of a halo, `k // 2 * 2**levels` samples, serves
all levels. Where that is more than a quarter of a shard, low bands are exchanged once more instead:
the convolution is linear in its levels, so the deeper ones are a convolution of a low band, whose
output is added to the low band of the others', and so to every sample.
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp

from pallas_kernels.common import halos, sharding
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.types import Taps
from pallas_kernels.haar.filters import IS_HAAR
from pallas_kernels.wtconv.problem import Problem

Shapes = tuple[tuple[int, ...], ...]
Forward = Callable[[jax.Array, Taps, jax.Array | None], jax.Array]
"""The operator, or its transpose, of an image, taps and a bias."""
WeightGrad = Callable[[jax.Array, jax.Array, Shapes], Taps]
"""The gradients of taps of these shapes, of x and dy."""

_SPATIAL = "dhw"
"""The rule's names of spatial axes."""


@cache
def rule(ndim: int, taps: int = 0, bias: bool = False, wavelet: str = "haar") -> sharding.Rule:
    """The axes of x, taps and bias, and of the output: images and channels do not mix.

    Shards of an image exchange the samples around them. Filters longer than Haar's reach further
    than a cell, so that their images stay whole.

    Args:
        ndim: The number of spatial axes.
        taps: The number of arrays of taps.
        bias: Whether there is a bias.
        wavelet: PyWavelets' name of the wavelet.

    Example:
        >>> rule(2, 1, True).operands
        ('n h w c', '_ _ _ c', 'c')
    """
    spatial = _SPATIAL[-ndim:]
    image = f"n {' '.join(spatial)} c"
    kernel = f"{'_ ' * (ndim + 1)}c"
    operands = image, *[kernel] * taps, *["c"] * bias
    free = ("n", "c", *(spatial if wavelet in IS_HAAR else ""))
    return sharding.Rule(operands, (image,), frozenset(free))


def of_shard(problem: Problem, shard: sharding.Shard) -> Problem:
    """The convolution that a shard computes, with the samples around it and its own levels.

    Example:
        >>> strips = sharding.Shard({"h": ("rows",)}, {"h": 2})
        >>> found = of_shard(Problem((1, 64, 8, 4), "float32", 5, 4, "haar"), strips)
        >>> found.shape, found.levels
        ((1, 48, 8, 4), 2)
    """
    (image,) = rule(len(problem.shape) - 2).results
    return around(problem._replace(shape=shard.local(problem.shape, image)), shard)


def around(problem: Problem, shard: sharding.Shard) -> Problem:
    """The same, of a problem of the shard's own samples."""
    shape = list(problem.shape)
    levels = _own_levels(shard, problem.shape, problem.kernel_size, problem.levels)
    for window in _windows(shard, problem.shape, problem.kernel_size, levels):
        shape[window.axis] = window.size
    return problem._replace(shape=tuple(shape), levels=levels)


def forward(
    run: Forward,
    below: Forward,
    shard: sharding.Shard,
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
) -> jax.Array:
    """The output of a shard, of which x has its own samples.

    Args:
        run: The operator.
        below: The operator for low bands, in float32 or better.
        shard: The place of the shard.
        x: `[N, *spatial, C]`.
        taps: The taps of all levels.
        bias: `[C]` or None.
    """
    size, levels = taps[0].shape[0], len(taps) - 1
    own = _own_levels(shard, x.shape, size, levels)
    y = _around(run, _windows(shard, x.shape, size, own), shard, x, taps[: own + 1], bias)
    if own == levels:
        return y
    deeper = jnp.zeros_like(taps[0]), *taps[own + 1 :]
    z = forward(below, below, shard, _low(x, own), deeper, None)
    return (y.astype(z.dtype) + _spread(z, own, x.shape)).astype(x.dtype)


def weight_grad(
    run: WeightGrad,
    below: WeightGrad,
    shard: sharding.Shard,
    x: jax.Array,
    dy: jax.Array,
    shapes: Shapes,
) -> Taps:
    """Returns what a shard adds to the gradients of the taps, of x and dy its own samples.

    Args:
        run: The gradients.
        below: Those for low bands.
        shard: The place of the shard.
        x: `[N, *spatial, C]`.
        dy: The gradient of the output.
        shapes: The shapes of the taps, and where it is asked of the bias, of the whole.
    """
    local = tuple((*shape[:-1], x.shape[-1]) for shape in shapes)
    taps, bias = ([s for s in local if (len(s) > 1) == many] for many in (True, False))
    size, levels = taps[0][0], len(taps) - 1
    own = _own_levels(shard, x.shape, size, levels)
    windows = _windows(shard, x.shape, size, own)
    asked = *taps[: own + 1], *bias
    if _in_strips(windows):
        found = _of_edges(run, windows[0], shard, x, dy, asked)
    else:
        inner, outer = x, dy
        for window in windows:
            inner, outer = window.extended(inner, shard), window.padded(outer, shard)
        found = tuple(run(inner, outer, asked))
    if own == levels:
        return found
    deeper = taps[0], *taps[own + 1 :]
    _, *more = weight_grad(below, below, shard, _low(x, own), _low(dy, own), deeper)
    return *found[: own + 1], *more, *found[own + 1 :]


def _own_levels(
    shard: sharding.Shard, shape: tuple[int, ...], kernel_size: int, levels: int
) -> int:
    """The levels that one exchange serves: those whose halo is a quarter of a shard at most.

    All, where that would be none, or where a shard of the low band begins inside a cell.
    """
    own = [window.own for window in _windows(shard, shape, kernel_size, levels)]
    reach = kernel_size // 2
    able = [
        level
        for level in range(1, levels)
        if all(4 * reach * 2**level <= n and n % 2**level == 0 for n in own)
    ]
    short = any(4 * reach * 2**levels > n for n in own)
    return max(able) if short and able else levels


def _low(x: jax.Array, level: int) -> jax.Array:
    """The low band of so many levels, of zeros beyond the image, in float32 or better."""
    ndim, cell = x.ndim - 2, 2**level
    dtype = accumulation_dtype(x.dtype)
    x = jnp.pad(x, [(0, 0), *((0, -n % cell) for n in x.shape[1:-1]), (0, 0)])
    cells = [side for n in x.shape[1:-1] for side in (n // cell, cell)]
    parts = x.reshape(x.shape[0], *cells, x.shape[-1])
    return parts.sum(range(2, 2 * ndim + 1, 2), dtype=dtype) * 2.0 ** (-ndim * level / 2)


def _spread(z: jax.Array, level: int, shape: tuple[int, ...]) -> jax.Array:
    """The synthesis of a low band of so many levels, cut to the shape: the transpose of `_low`."""
    ndim, cell = z.ndim - 2, 2**level
    cells = [side for n in z.shape[1:-1] for side in (n, 1)]
    wide = [side for n in z.shape[1:-1] for side in (n, cell)]
    parts = z.reshape(z.shape[0], *cells, z.shape[-1]) * 2.0 ** (-ndim * level / 2)
    parts = jnp.broadcast_to(parts, (z.shape[0], *wide, z.shape[-1]))
    whole = parts.reshape(z.shape[0], *(n * cell for n in z.shape[1:-1]), z.shape[-1])
    return whole[(slice(None), *map(slice, shape[1:-1]))]


def _windows(
    shard: sharding.Shard, shape: tuple[int, ...], kernel_size: int, levels: int
) -> list[halos.Window]:
    """The windows of a shard of this shape, along the spatial axes that are split.

    `kernel_size // 2` taps on either side serve even kernels, whose transpose swaps its sides.
    """
    ndim, align = len(shape) - 2, 2**levels
    return [
        halos.Window(axis, name, shape[axis], align, kernel_size // 2 * align)
        for axis, name in enumerate(_SPATIAL[-ndim:], 1)
        if shard.splits(name)
    ]


def _in_strips(windows: list[halos.Window]) -> bool:
    """Whether a shard is computed as it is, and its first and last rows again.

    So nothing waits for the neighbours' rows, and no copy of the image with them is made.
    """
    if len(windows) != 1:
        return False
    (window,) = windows
    aligned = window.own % window.align == 0 and window.own >= 2 * window.halo > 0
    return window.axis == 1 and aligned


def _around(
    run: Forward,
    windows: list[halos.Window],
    shard: sharding.Shard,
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
) -> jax.Array:
    """The output of a shard by the samples in its windows."""
    if _in_strips(windows):
        return _edges_again(lambda x: run(x, taps, bias), windows[0], shard, x)
    for window in windows:
        x = window.extended(x, shard)
    y = run(x, taps, bias)
    for window in windows:
        y = window.cropped(y, shard)
    return y


def _edges_again(
    run: Callable[[jax.Array], jax.Array],
    window: halos.Window,
    shard: sharding.Shard,
    x: jax.Array,
) -> jax.Array:
    """The output of a shard in strips: the rows that the neighbours reach are computed again.

    Both ends at once, as twice the images: launches of a few rows cost more than what they compute.
    """
    h = window.halo
    above, below = window.neighbours(x, shard)
    y = run(x)
    edges = _edges(window, shard, (above, x[:, : 2 * h]), (x[:, -2 * h :], below))
    again = run(edges)[:, h : 2 * h]
    if window.is_of_two(shard):
        start = jnp.where(window.is_second(shard), 0, window.own - h)
        return jax.lax.dynamic_update_slice_in_dim(y, again, start, 1)
    first, last = jnp.split(again, 2)
    return y.at[:, :h].set(first).at[:, -h:].set(last)


def _of_edges(
    run: WeightGrad,
    window: halos.Window,
    shard: sharding.Shard,
    x: jax.Array,
    dy: jax.Array,
    shapes: Shapes,
) -> Taps:
    """The weight gradients of a shard in strips: what the neighbours' rows add is bilinear too.

    The gradient of a bias, a sum of dy alone, has all of it already.
    """
    h = window.halo
    above, below = window.neighbours(x, shard)
    nothing = jnp.zeros_like(above)
    found = tuple(run(x, dy, shapes))
    read = _edges(window, shard, (above, nothing), (nothing, below))
    written = _edges(window, shard, (nothing, dy[:, :h]), (dy[:, -h:], nothing))
    more = run(read, written, shapes)
    return tuple(g if g.ndim == 1 else g + a for g, a in zip(found, more, strict=True))


def _edges(
    window: halos.Window,
    shard: sharding.Shard,
    first: tuple[jax.Array, ...],
    last: tuple[jax.Array, ...],
) -> jax.Array:
    """Images of the rows at the beginning of a shard, and behind them those at its end.

    Two shards meet at the end of one and at the beginning of the other alone.
    """
    ends = jnp.concatenate(first, 1), jnp.concatenate(last, 1)
    if window.is_of_two(shard):
        return jnp.where(window.is_second(shard), *ends)
    return jnp.concatenate(ends)
