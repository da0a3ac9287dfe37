"""Level 2 straight from the image, in one launch that reads it once, for images of any size.

It leaves half the synthesis of this level alone, and the low band that deeper levels begin with:
theirs is another launch, and level 1 adds the results of both. So no level waits for a deeper one,
and the low band of level 1, a quarter of the image, is never in memory.

A block streams rows of pixels through shared memory, `CHANNELS` channels and `strips x columns`
columns of coefficients wide, and halos. All four warpgroups do the same, three things between one
meeting and the next, each a row behind the one before it:

- they reduce four rows of pixels to a row of the four bands, each some of its columns;
- each filters one band, of which it holds the taps and the sums of open rows in registers;
- they synthesise a row from the four filtered bands, each some of its columns.

What lies outside an image the copy engine fills with zeros. Tiles follow each other without a
pause: the rows beyond an image's last, or those that a tile reads above its own, empty the sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    MULTIPROCESSORS,
    SHARED,
    UNSYNCHRONISED,
    following,
    size_in_bytes,
)
from pallas_kernels.wtconv.mosaic_gpu_tiles import CHANNELS, STRIPS

__all__ = ["second"]

_WARPGROUPS = 4
"""One for each band."""
_MAX_COLUMNS = 7
"""Columns of coefficients a strip: the sums of five rows of them fit in a thread's registers."""
_MIN_ROWS = 8
"""Rows of coefficients of a tile that is not a whole image high."""
_MIN_SLOTS, _MAX_SLOTS = 2, 8
"""Of the ring, of four rows of pixels each, which make a row of coefficients."""
_AHEAD = 2
"""So many steps before rows are copied into their slot, they are to be in the second cache."""
_MAX_ROUNDS = 4
"""Of blocks that a multiprocessor takes one after the other, to choose from."""
_START, _OVERHEAD = 4, 3
"""What it costs to start a block, in steps, and a step, in columns; estimates."""

Position = tuple[Any, Any, Any, Any]
"""A block's tile, a step in it, and the tile's group of images and first row."""


@dataclass(frozen=True)
class _Tiling:
    """How the blocks of a launch share its images.

    A block has one chunk of channels and one stretch of columns, and takes every `splits`-th tile:
    `rows` rows of coefficients, of `images` images at once, in strips of `columns` columns. Where
    an image is several tiles high, a tile reads `reach` rows of the one above too.
    """

    reach: int
    images: int
    columns: int
    rows: int
    stretches: int
    chunks: int
    groups: int
    heights: int
    splits: int

    @property
    def strips(self) -> int:
        """Strips of an image."""
        return STRIPS // self.images

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a warpgroup's values."""
        return self.images, self.strips, CHANNELS

    @property
    def width(self) -> int:
        """Columns of coefficients of a tile."""
        return self.strips * self.columns

    @property
    def analysed(self) -> int:
        """Columns of a strip where the halos are shared out among them too."""
        return pl.cdiv(self.width + 2 * self.reach, self.strips)

    @property
    def tiles(self) -> int:
        """Of a chunk and stretch."""
        return self.groups * self.heights

    @property
    def lead(self) -> int:
        """Rows that a tile reads above its own."""
        return self.reach if self.heights > 1 else 0

    @property
    def skipped(self) -> int:
        """Steps of a tile before that which its first row of results is complete with."""
        return self.lead + self.reach

    @property
    def steps(self) -> int:
        """Steps a tile; the last is for the last row to be written."""
        return self.skipped + self.rows + 1

    @property
    def slot(self) -> tuple[int, ...]:
        """Of a slot of the ring."""
        return self.images, 4, 4 * self.strips * self.analysed, CHANNELS

    @property
    def bands(self) -> tuple[int, ...]:
        """Of the rows of bands, halos included: one that comes in and one that is filtered."""
        return 2, _WARPGROUPS, self.images, self.strips * self.analysed, CHANNELS

    @property
    def filtered(self) -> tuple[int, ...]:
        """Of the rows of filtered bands: one that is filtered and one that is written."""
        return 2, _WARPGROUPS, self.images, self.width, CHANNELS

    def slots(self, dtype: jnp.dtype) -> int:
        """How many the ring has room for."""
        taken = math.prod(self.bands) + math.prod(self.filtered)
        left = SHARED - size_in_bytes((taken,), jnp.dtype("float32"))
        return min(_MAX_SLOTS, left // size_in_bytes(self.slot, dtype))

    @property
    def cost(self) -> int:
        """Of the busiest multiprocessor's steps, roughly."""
        rounds = pl.cdiv(self.stretches * self.chunks * self.splits, MULTIPROCESSORS)
        steps = pl.cdiv(self.tiles, self.splits) * self.steps + _START
        return rounds * steps * (self.columns + self.analysed + _OVERHEAD)


@cache
def _tiling(shape: tuple[int, ...], dtype: jnp.dtype, kernel_size: int) -> _Tiling:
    """The tiling of x `[N, H, W, C]` that takes the busiest multiprocessor the least work."""
    n, h, w, c = shape
    rows, columns = pl.cdiv(h, 4), pl.cdiv(w, 4)
    reach, chunks = kernel_size // 2, pl.cdiv(c, CHANNELS)
    tilings = []
    for images in (1, 2, 4):
        strips, groups = STRIPS // images, pl.cdiv(n, images)
        for each in range(1, _MAX_COLUMNS + 1):
            stretches = pl.cdiv(columns, strips * each)
            for heights in range(1, min(pl.cdiv(rows, _MIN_ROWS), MULTIPROCESSORS) + 1):
                tiles, units = groups * heights, stretches * chunks
                for rounds in range(1, _MAX_ROUNDS + 1):
                    splits = min(tiles, max(1, rounds * MULTIPROCESSORS // units))
                    tilings.append(
                        _Tiling(
                            *(reach, images, each, pl.cdiv(rows, heights), stretches, chunks),
                            *(groups, heights, splits),
                        )
                    )
    enough = (tiling for tiling in tilings if tiling.slots(dtype) >= _MIN_SLOTS)
    return min(enough, key=lambda tiling: tiling.cost)


def second(
    x: jax.Array, taps: jax.Array, kernel_size: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Half the synthesis of level 2 alone, and the low band of level 2.

    Args:
        x: `[N, H, W, C]`.
        taps: Of all levels, `[chunks, rows, STRIPS, CHANNELS]`, with their factors.
        kernel_size: k.
        dtype: Of the results.

    Returns:
        `[N, H / 2, W / 2, C]`, or larger: what lies beyond is not meant for anyone. And
        `[N, H / 4, W / 4, C]` with channels of zeros up to a whole chunk.
    """
    n, h, w, _ = x.shape
    tiling = _tiling(x.shape, x.dtype, kernel_size)
    slots = tiling.slots(x.dtype)
    # Strips and chunks are axes of their own, so that every store is a plain slice.
    rows, strips = tiling.heights * tiling.rows, tiling.stretches * tiling.strips
    low = tiling.groups, tiling.images, rows, strips, tiling.columns, tiling.chunks, CHANNELS
    y = *low[:3], 2, *low[3:5], 2, *low[5:]

    def body(*refs: Any) -> None:
        _Block(tiling, slots, *refs).run()

    y, low = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape in (y, low)],
        scratch_types=[
            plgpu.SMEM((slots, *tiling.slot), x.dtype),
            plgpu.SMEM(tiling.bands, jnp.float32),
            plgpu.SMEM(tiling.filtered, jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=slots),
            plgpu.Barrier(num_arrivals=_WARPGROUPS),
        ],
        grid=(tiling.splits, tiling.stretches * tiling.chunks),
        grid_names=("split", "unit"),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=UNSYNCHRONISED,
    )(x, taps.reshape(*taps.shape[:2], *tiling.shape))
    width, channels = strips * tiling.columns, tiling.chunks * CHANNELS
    images = tiling.groups * tiling.images
    low = low.reshape(images, rows, width, channels)
    return (
        y.reshape(images, 2 * rows, 2 * width, channels),
        low[:n, : pl.cdiv(h, 4), : pl.cdiv(w, 4)],
    )


@dataclass(frozen=True)
class _Block:
    """One block of `second`: its references, and what its warpgroups do, all of them the same."""

    tiling: _Tiling
    slots: int
    x: Any
    taps: Any
    y: Any
    low: Any
    rows: Any
    bands: Any
    filtered: Any
    full: Any
    met: Any

    def run(self) -> None:
        """Takes one row after the other, over all tiles."""
        turns, taps = self.count * self.tiling.steps, self.kernel()

        def two(t: Any, carry: tuple[Any, Position, Position, list[Any]]) -> Any:
            # By twos, so that rows lie where it is known.
            for new in range(2):
                slot, fetched, position, sums = carry
                there = 2 * t + new < turns
                pl.when(there)(lambda slot=slot, new=new: self.analyse(slot, new))
                sums = self.filter(1 - new, new, taps, sums)
                self.write(position, 1 - new)
                self.meet()
                fetched = lax.cond(
                    there & (self.warpgroup == _WARPGROUPS - 1),
                    lambda fetched, slot=slot: self.fetch(slot, fetched),
                    lambda fetched: fetched,
                    fetched,
                )
                carry = following(slot, self.slots), fetched, self.after(position), sums
            return carry

        def first(slot: Any, fetched: Position) -> Position:
            return lax.cond(
                self.warpgroup == _WARPGROUPS - 1,
                lambda fetched: self.fetch(slot, fetched),
                lambda fetched: fetched,
                fetched,
            )

        start = jnp.int32(0), *self.origin(0)
        fetched = lax.fori_loop(0, self.slots, first, (start[0], *start))
        # What the first step filters, in the place of a row of its tile.
        self.clear(1)
        self.meet()
        carry = jnp.int32(0), fetched, (start[0], jnp.int32(-1), *start[1:])
        lax.fori_loop(0, lax.div(turns + 2, 2), two, (*carry, self.zeros(self.open)))

    @property
    def warpgroup(self) -> Any:
        """Number of this warpgroup, and of its band: LL, LH, HL or HH."""
        return lax.axis_index("warpgroup")

    @property
    def size(self) -> int:
        """The kernel size."""
        return 2 * self.tiling.reach + 1

    @property
    def open(self) -> int:
        """Sums of rows that are not complete."""
        return 2 * self.tiling.reach * self.tiling.columns

    @property
    def place(self) -> tuple[Any, Any]:
        """Chunk of channels and stretch of columns."""
        unit = lax.axis_index("unit")
        return lax.rem(unit, self.tiling.chunks), lax.div(unit, self.tiling.chunks)

    @property
    def count(self) -> Any:
        """Tiles of this block."""
        splits = self.tiling.splits
        return lax.div(self.tiling.tiles - lax.axis_index("split") + splits - 1, splits)

    def origin(self, i: Any) -> tuple[Any, Any]:
        """Group of images and first row of coefficients of the block's i-th tile."""
        tile = lax.axis_index("split") + i * self.tiling.splits
        heights = self.tiling.heights
        return lax.div(tile, heights), lax.rem(tile, heights) * self.tiling.rows

    def after(self, position: Position) -> Position:
        """The step that follows."""

        def next_tile(i: Any, *_: Any) -> Position:
            return i + 1, jnp.int32(0), *self.origin(i + 1)

        def next_step(i: Any, s: Any, *origin: Any) -> Position:
            return i, s + 1, *origin

        return lax.cond(position[1] == self.tiling.steps - 1, next_tile, next_step, *position)

    def meet(self) -> None:
        """Waits until all warpgroups have come here."""
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)

    def zeros(self, count: int) -> list[Any]:
        """Sums to begin with."""
        shape = self.tiling.shape
        zero = jnp.zeros(shape, jnp.float32)
        return [plgpu.layout_cast(zero, plgpu.Layout.WG_STRIDED(shape, vec_size=1))] * count

    def clear(self, slot: int) -> None:
        """Fills a row of this warpgroup's band with zeros."""
        (zero,) = self.zeros(1)
        row = self.bands.at[slot, self.warpgroup]
        for j in range(self.tiling.analysed):
            self.view(row, self.tiling.analysed, 1, j)[...] = zero

    def fetch(self, slot: Any, position: Position) -> Position:
        """Orders the copy of a step's rows, if there is one; the step that follows."""
        i, s, *_ = position

        @pl.when(i < self.count)
        def _() -> None:
            window = self.x.at[self.window(position, 0)]
            plgpu.copy_gmem_to_smem(window, self.rows.at[slot], self.full.at[slot])

            @pl.when(s + _AHEAD < self.tiling.steps)
            def _() -> None:
                plgpu.async_prefetch(self.x.at[self.window(position, _AHEAD)])

        return self.after(position)

    def window(self, position: Position, later: int) -> tuple[Any, ...]:
        """What a slot takes of x, so many steps later in the same tile."""
        tiling = self.tiling
        _, s, group, row = position
        chunk, stretch = self.place
        images, height, columns, _ = tiling.slot
        return (
            pl.ds(group * images, images),
            pl.ds(4 * (row + s + later - tiling.lead), height),
            pl.ds(4 * (stretch * tiling.width - tiling.reach), columns),
            pl.ds(chunk * CHANNELS, CHANNELS),
        )

    def view(self, row: Any, columns: int, parts: int, j: Any, part: int = 0) -> Any:
        """A part of column j of each strip: of a row `[images, strips * columns * parts, C]`."""
        images, strips, _ = self.tiling.shape
        if images == 1:
            # Mosaic (JAX 0.10 to 0.11) does not fold one image with a stride of its own.
            row = row.at[0]
        return row.reshape(images, strips, columns, parts, CHANNELS).at[:, :, j, part]

    def neighbour(self, row: Any, j: int) -> Any:
        """Column j of each strip, halo included: of a row of a band that came in."""
        tiling = self.tiling
        first = min(j, row.shape[1] - tiling.width)
        # In two steps: what is known of an address should not be added at each load.
        return self.view(row.at[:, pl.ds(first, tiling.width)], tiling.columns, 1, j - first)

    def share(self, columns: int, one: Callable[[Any], None]) -> None:
        """Takes this warpgroup's columns of each strip."""
        for first in range(0, columns, _WARPGROUPS):
            j = first + self.warpgroup
            if first + _WARPGROUPS <= columns:
                one(j)
            else:
                pl.when(j < columns)(partial(one, j))

    def analyse(self, slot: Any, to: int) -> None:
        """From four rows of pixels to one of the bands, four times as large."""
        tiling = self.tiling
        plgpu.barrier_wait(self.full.at[slot])

        def low(j: Any, v: int, e: int) -> Any:
            upper, lower = (
                self.pixel(slot, row, j, 2 * e) + self.pixel(slot, row, j, 2 * e + 1)
                for row in (2 * v, 2 * v + 1)
            )
            return upper + lower

        def one(j: Any) -> None:
            (first, second), (third, fourth) = ([low(j, v, e) for e in range(2)] for v in range(2))
            top, bottom, falls, rises = (
                *(first + second, third + fourth),
                *(first - second, third - fourth),
            )
            values = top + bottom, top - bottom, falls + rises, falls - rises
            for band, value in enumerate(values):
                self.view(self.bands.at[to, band], tiling.analysed, 1, j)[...] = value

        self.share(tiling.analysed, one)

    def pixel(self, slot: Any, row: int, j: Any, part: int) -> Any:
        """One of the pixels in column j of each strip of a row of a slot, in float32."""
        line = self.rows.at[slot, :, row]
        return self.view(line, self.tiling.analysed, 4, j, part)[...].astype(jnp.float32)

    def kernel(self) -> list[list[Any]]:
        """The taps of this warpgroup's band, for bands that are four times as large, not twice."""
        chunk, _ = self.place
        pair, band = lax.div(self.warpgroup, 2), lax.rem(self.warpgroup, 2)
        # The base's taps come first, then those of level 1.
        first = self.size**2 * (5 + 2 * pair) + band
        taps = self.taps.at[chunk, pl.ds(first, 2 * self.size**2 - 1)]
        return [
            [0.5 * taps[2 * (d * self.size + e)] for e in range(self.size)]
            for d in range(self.size)
        ]

    def filter(self, slot: int, to: int, taps: list[list[Any]], sums: list[Any]) -> list[Any]:
        """Adds a row of a band to the rows of results that it is a neighbour of.

        Returns:
            The sums of those that are not complete with it; the one that is goes to `filtered`.
        """
        columns, size = self.tiling.columns, self.size
        row = self.bands.at[slot, self.warpgroup]
        found = [self.neighbour(row, j)[...] for j in range(columns + size - 1)]
        totals: list[Any] = []
        for open_row in range(size):
            for j in range(columns):
                total = sums[open_row * columns + j] if open_row < size - 1 else None
                for e in range(size):
                    product = found[j + e] * taps[size - 1 - open_row][e]
                    total = product if total is None else total + product
                totals.append(total)
            if open_row == 0:
                # Before sums of the next row begin, which take the registers of these.
                row = self.filtered.at[to, self.warpgroup]
                for j, total in enumerate(totals):
                    self.view(row, columns, 1, j)[...] = total
                totals = []
        return totals

    def write(self, position: Position, slot: int) -> None:
        """Writes what is complete when a step begins: a row of the low band, and of the synthesis.

        Args:
            position: The step whose row of the bands came in.
            slot: That row's; and that of the row of results before the one that it completes.
        """
        tiling = self.tiling
        i, s, group, row = position
        chunk, stretch = self.place
        own = pl.ds(stretch * tiling.strips, tiling.strips)
        low_row, result_row = s - tiling.lead, s - tiling.skipped - 1
        line = self.bands.at[slot, 0, :, pl.ds(tiling.reach, tiling.width)]

        def write_low(j: Any) -> None:
            low = 0.25 * self.view(line, tiling.columns, 1, j)[...]
            self.low.at[group, :, row + low_row, own, j, chunk][...] = low.astype(self.low.dtype)

        def write_square(j: Any) -> None:
            low, vertical, horizontal, diagonal = (
                self.view(self.filtered.at[slot, band], tiling.columns, 1, j)[...]
                for band in range(_WARPGROUPS)
            )
            top, bottom = low + vertical, low - vertical
            right, cross = horizontal + diagonal, horizontal - diagonal
            square = (top + right, top - right), (bottom + cross, bottom - cross)
            for v, values in enumerate(square):
                for e, value in enumerate(values):
                    to = self.y.at[group, :, row + result_row, v, own, j, e, chunk]
                    to[...] = value.astype(self.y.dtype)

        @pl.when((low_row >= 0) & (low_row < tiling.rows) & (i < self.count))
        def _() -> None:
            self.share(tiling.columns, write_low)

        @pl.when((result_row >= 0) & (i < self.count))
        def _() -> None:
            self.share(tiling.columns, write_square)
