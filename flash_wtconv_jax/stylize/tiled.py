"""TransformerNet over pictures that are too large for a device's memory, without seams.

The picture stays on the host. What lies between the ends of the network, a sixteenth of the pixels,
is whole on the device, and every stretch from one to the next, an end or a residual block, is
computed by tiles. A stretch of k layers takes k passes over its tiles, each of which leaves the
statistics of one layer more, over the whole picture; so every tile is normalised as the whole would
be.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flash_wtconv_jax.models.transformer_net import LEAST, TransformerNet
from flash_wtconv_jax.stylize.network import Moments, Stage, head, in_range, tail, trunk

_Whole = jax.Array | np.ndarray
"""The array that tiles are put into: on the device, or on the host."""

_SCALE = 4
_HALO = 2
"""Pixels of the trunk around a tile that its own edges spoil, in either end."""
MIN_TILE = 64
"""Side of the smallest tiles, in pixels of the picture; sides are multiples of 4."""


class _Span(NamedTuple):
    """One axis of a tile, in pixels of the trunk.

    Attributes:
        window: Where what is computed begins.
        begin: Where what is kept begins; it is `size` long, and may overlap the tile before.
        fresh: Where what no tile before has kept begins.
    """

    window: int
    begin: int
    fresh: int


def tiled(model: TransformerNet, picture: np.ndarray, tile: int) -> np.ndarray:
    """The network's output for one picture, equal to the untiled one but for rounding.

    Args:
        model: The network.
        picture: Pixels `[H, W, 3]` of uint8 or uint16; they stay on the host.
        tile: Side of the tiles in pixels, at least `MIN_TILE` and a multiple of 4. Memory on the
            device goes with its square, about 1.5 GB for 1024, beside 32 bytes a pixel of the
            picture in 16 bits: a residual block's input and its output.

    Returns:
        The picture, float32 `[H, W, 3]`, not clipped.

    Raises:
        ValueError: If the tile's side is not such a number, or the picture is too small.
    """
    if tile < MIN_TILE or tile % _SCALE:
        raise ValueError(f"tile is {tile}, expected a multiple of 4 from {MIN_TILE} on")
    height, width = picture.shape[:2]
    if min(height, width) < LEAST:
        raise ValueError(f"{width} x {height} pixels, expected at least {LEAST} each way")
    size = tile // _SCALE

    shape = -(-height // _SCALE), -(-width // _SCALE)

    def of_picture(row: int, column: int, window: tuple[int, int]) -> jax.Array:
        # A window that reaches the end ends where the picture does.
        rows, columns = (
            slice(at * _SCALE, (at + length) * _SCALE)
            for at, length in zip((row, column), window, strict=True)
        )
        return in_range(jnp.asarray(picture[None, rows, columns]))

    small, moments = _stretch(head(model), of_picture, shape, size, _SCALE)
    small = _normalised(*nnx.split(head(model)[-1]), small, moments)
    for stages in trunk(model):
        raw, moments = _stretch(stages, partial(_window, small), shape, size, 1)
        small = _normalised(*nnx.split(stages[-1]), raw, moments, small)
    whole, _ = _stretch(tail(model), partial(_window, small), shape, size, 1)
    return np.asarray(whole)[0, :height, :width]


def _stretch(
    stages: Sequence[Stage],
    part: Callable[[int, int, tuple[int, int]], jax.Array],
    shape: tuple[int, int],
    size: int,
    scale: int,
) -> tuple[_Whole, Moments | None]:
    """The last stage's output for the whole picture, not normalised, and its statistics.

    Args:
        stages: Stages with a ReLU behind each but the last.
        part: Gives the input of a window by its row, column and size in pixels of the trunk.
        shape: Height and width of the trunk.
        size: Side of a tile in pixels of the trunk.
        scale: Pixels of the input over those of the trunk.

    Returns:
        The output on the device where it is to be normalised; on the host, without statistics,
        where it is the picture.
    """
    # How many output pixels each stage has for one of the trunk's.
    factors = accumulate(stages, _factor, initial=scale)
    next(factors)
    sides = min(size, shape[0]), min(size, shape[1])
    window = min(sides[0] + 2 * _HALO, shape[0]), min(sides[1] + 2 * _HALO, shape[1])
    spans = [list(_spans(*axis)) for axis in zip(shape, sides, window, strict=True)]
    graphdef, state = nnx.split(list(stages))
    known: list[Moments] = []
    whole: _Whole = np.empty(0)
    for depth, (stage, factor) in enumerate(zip(stages, factors, strict=True), 1):
        sums = []
        for row, column in product(*spans):
            x = part(row.window, column.window, window)
            offsets = [(span.begin - span.window) * factor for span in (row, column)]
            fresh = [(span.fresh - span.begin) * factor for span in (row, column)]
            kept = sides[0] * factor, sides[1] * factor
            last = depth == len(stages)
            own, of_tile = _tile(graphdef, state, x, known, offsets, fresh, kept, factor, last)
            sums.append(of_tile)
            if last:
                if not whole.size:
                    full = (1, shape[0] * factor, shape[1] * factor, own.shape[-1])
                    on_host = stage.norm is None
                    whole = np.empty(full, np.float32) if on_host else jnp.zeros(full, own.dtype)
                whole = _placed(whole, own, row.begin * factor, column.begin * factor)
        if stage.norm is None:
            return whole, None
        known.append(_together(sums))
    return whole, known[-1]


def _factor(before: int, stage: Stage) -> int:
    return before * 2 if stage.doubled else before // stage.stride


@partial(jax.jit, static_argnames="size")
def _window(x: jax.Array, row: int, column: int, size: tuple[int, int]) -> jax.Array:
    return lax.dynamic_slice(x, (0, row, column, 0), (1, *size, x.shape[-1]))


def _spans(extent: int, size: int, window: int) -> Iterator[_Span]:
    """The tiles of one axis."""
    for fresh in range(0, extent, size):
        begin = min(fresh, extent - size)
        yield _Span(min(max(begin - _HALO, 0), extent - window), begin, fresh)


@partial(jax.jit, static_argnames=("graphdef", "kept", "factor", "wanted"))
def _tile(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: jax.Array,
    known: Sequence[Moments],
    offsets: Sequence[jax.Array],
    fresh: Sequence[jax.Array],
    kept: tuple[int, int],
    factor: int,
    wanted: bool,
) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array, jax.Array]]:
    """The output of the first stage whose statistics are not known, for one window.

    Returns:
        What is kept of it, from `offsets` on, if it is `wanted`; and count, mean and squared
        deviations of those of its pixels that are `fresh` and within the picture.
    """
    stages = nnx.merge(graphdef, state)[: len(known) + 1]
    for stage, moments in zip(stages[:-1], known, strict=True):
        x = stage.normalised(stage.raw(x), moments)
    y = stages[-1].raw(x)
    # A window that ends with the picture may lack pixels that a multiple of 4 would have.
    beyond = [-length % factor for length in y.shape[1:3]]
    counted = [
        (at + jnp.arange(side) < length) & (jnp.arange(side) >= new)
        for at, side, length, new in zip(offsets, kept, y.shape[1:3], fresh, strict=True)
    ]
    y = jnp.pad(y, [(0, 0), (0, beyond[0]), (0, beyond[1]), (0, 0)])
    own = lax.dynamic_slice(y, (0, *offsets, 0), (1, *kept, y.shape[-1]))
    mask = (counted[0][:, None] & counted[1])[None, :, :, None]
    count = mask.sum(dtype=jnp.float32)
    values = jnp.where(mask, own.astype(jnp.float32), 0)
    mean = values.sum((1, 2), keepdims=True) / count
    squares = jnp.where(mask, jnp.square(values - mean), 0).sum((1, 2), keepdims=True)
    return own if wanted else None, (count, mean, squares)


def _placed(whole: _Whole, own: jax.Array, row: int, column: int) -> _Whole:
    """The whole with a tile in its place; one on the host is written where it stands."""
    if isinstance(whole, jax.Array):
        return _updated(whole, own, row, column)
    whole[:, row : row + own.shape[1], column : column + own.shape[2]] = own
    return whole


@partial(jax.jit, donate_argnums=0)
def _updated(whole: jax.Array, own: jax.Array, row: int, column: int) -> jax.Array:
    return lax.dynamic_update_slice(whole, own, (0, row, column, 0))


def _together(sums: Sequence[Sequence[jax.Array]]) -> Moments:
    """The statistics of the whole from those of its tiles, in float64 and in their order."""
    counts, means, squares = (
        np.stack([np.asarray(one, np.float64) for one in column])
        for column in zip(*sums, strict=True)
    )
    counts = counts.reshape(-1, 1, 1, 1, 1)
    mean = (counts * means).sum(0) / counts.sum()
    var = (squares + counts * np.square(means - mean)).sum(0) / counts.sum()
    return Moments(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32))


@partial(jax.jit, static_argnames="graphdef", donate_argnames="y")
def _normalised(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    y: jax.Array,
    moments: Moments,
    residual: jax.Array | None = None,
) -> jax.Array:
    """A stage's output by its statistics, perhaps added to what a block was given."""
    return nnx.merge(graphdef, state).normalised(y, moments, residual)
