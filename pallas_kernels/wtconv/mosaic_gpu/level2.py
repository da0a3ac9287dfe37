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

from pallas_kernels.common.mosaic_gpu import SHARED, following, size_in_bytes
from pallas_kernels.wtconv.mosaic_gpu.bands import WARPGROUPS, BandsBlock, analysed, synthesised
from pallas_kernels.wtconv.mosaic_gpu.tiles import CHANNELS, STRIPS, Tiled, Tiling, launch, tilings

__all__ = ["second"]

_MIN_SLOTS, _MAX_SLOTS = 2, 8
"""Of the ring, of four rows of pixels each, which make a row of coefficients."""
_MAX_ROUNDS = 4
"""Of blocks that a multiprocessor takes one after the other, to choose from."""

Position = tuple[Any, Any, Any, Any]
"""A block's tile, a step in it, and the tile's group of images and first row."""


@dataclass(frozen=True)
class _Tiling(Tiling):
    """Of a coefficient to 4 x 4 pixels; of one, two or four images a tile."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a warpgroup's values."""
        return self.images, self.strips, CHANNELS

    @property
    def analysed(self) -> int:
        """Columns of a strip where the halos are shared out among them too."""
        return pl.cdiv(self.width + 2 * self.reach, self.strips)

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
        return 2, WARPGROUPS, self.images, self.strips * self.analysed, CHANNELS

    @property
    def filtered(self) -> tuple[int, ...]:
        """Of the rows of filtered bands: one that is filtered and one that is written."""
        return 2, WARPGROUPS, self.images, self.width, CHANNELS

    def slots(self, dtype: jnp.dtype) -> int:
        """How many the ring has room for."""
        taken = math.prod(self.bands) + math.prod(self.filtered)
        left = SHARED - size_in_bytes((taken,), jnp.dtype("float32"))
        return min(_MAX_SLOTS, left // size_in_bytes(self.slot, dtype))

    @property
    def step_cost(self) -> int:
        """Of one step, in columns."""
        return super().step_cost + self.analysed


@cache
def _tiling(shape: tuple[int, ...], dtype: jnp.dtype, kernel_size: int) -> _Tiling:
    """The tiling of x `[N, H, W, C]` that takes the busiest multiprocessor the least work."""
    found = tilings(_Tiling, shape, 4, kernel_size, (1, 2, STRIPS), _MAX_ROUNDS)
    return min(
        (tiling for tiling in found if tiling.slots(dtype) >= _MIN_SLOTS),
        key=lambda tiling: tiling.cost,
    )


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

    names = "x", "taps", "y", "low", "rows", "bands", "filtered", "full", "met"

    def body(*refs: Any) -> None:
        _Block(tiling=tiling, slots=slots, **dict(zip(names, refs, strict=True))).run()

    y, low = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape in (y, low)],
        scratch_types=[
            plgpu.SMEM((slots, *tiling.slot), x.dtype),
            plgpu.SMEM(tiling.bands, jnp.float32),
            plgpu.SMEM(tiling.filtered, jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        **launch(tiling),
    )(x, taps.reshape(*taps.shape[:2], *tiling.shape))
    width, channels = strips * tiling.columns, tiling.chunks * CHANNELS
    images = tiling.groups * tiling.images
    low = low.reshape(images, rows, width, channels)
    return (
        y.reshape(images, 2 * rows, 2 * width, channels),
        low[:n, : pl.cdiv(h, 4), : pl.cdiv(w, 4)],
    )


@dataclass(frozen=True, kw_only=True)
class _Block(BandsBlock, Tiled):
    """One block of `second`: its references, and what its warpgroups do, all of them the same."""

    slots: int
    y: Any
    low: Any
    bands: Any
    filtered: Any

    def run(self) -> None:
        """Takes one row after the other, over all tiles."""
        # Bands are four times as large as they are, not twice.
        taps = [[0.5 * tap for tap in row] for row in self.kernel(self.place[0], 2)]
        turns = self.turns

        def two(t: Any, carry: tuple[Any, Position, Position, list[Any]]) -> Any:
            # By twos, so that rows lie where it is known.
            for new in range(2):
                slot, fetched, position, sums = carry
                there = 2 * t + new < turns
                pl.when(there)(lambda slot=slot, new=new: self.analyse(slot, new))
                sums = self.filter(1 - new, new, taps, sums)
                self.write(position, 1 - new)
                self.meet()
                fetched = self.fetch(slot, fetched)
                carry = following(slot, self.slots), fetched, self.after(position), sums
            return carry

        group, row = self.origin(0)
        zero = jnp.int32(0)
        fetched = lax.fori_loop(0, self.slots, self.fetch, (zero, zero, group, row))
        # What the first step filters, in the place of a row of its tile.
        self.clear(1)
        self.meet()
        carry = zero, fetched, (zero, jnp.int32(-1), group, row)
        lax.fori_loop(0, lax.div(turns + 2, 2), two, (*carry, self.zeros(self.open)))

    @property
    def open(self) -> int:
        """Sums of rows that are not complete."""
        return 2 * self.tiling.reach * self.tiling.columns

    def after(self, position: Position) -> Position:
        """The step that follows."""

        def next_tile(i: Any, *_: Any) -> Position:
            return i + 1, jnp.int32(0), *self.origin(i + 1)

        def next_step(i: Any, s: Any, *origin: Any) -> Position:
            return i, s + 1, *origin

        return lax.cond(position[1] == self.tiling.steps - 1, next_tile, next_step, *position)

    def clear(self, slot: int) -> None:
        """Fills a row of this warpgroup's band with zeros."""
        (zero,) = self.zeros(1)
        row = self.bands.at[slot, self.warpgroup]
        for j in range(self.tiling.analysed):
            self.view(row, self.tiling.analysed, 1, j)[...] = zero

    def fetch(self, slot: Any, position: Position) -> Position:
        """Orders the copy of a step's rows, if there is one; the step that follows."""
        tiling = self.tiling
        i, s, group, row = position
        images, height, columns, _ = tiling.slot

        @pl.when((self.warpgroup == WARPGROUPS - 1) & (i < self.count))
        def _() -> None:
            chunk, stretch = self.place
            plgpu.copy_gmem_to_smem(
                self.x.at[
                    pl.ds(group * images, images),
                    pl.ds(4 * (row + s - tiling.lead), height),
                    pl.ds(4 * (stretch * tiling.width - tiling.reach), columns),
                    pl.ds(chunk * CHANNELS, CHANNELS),
                ],
                self.rows.at[slot],
                self.full.at[slot],
            )

        return self.after(position)

    def neighbour(self, row: Any, j: int) -> Any:
        """Column j of each strip, halo included: of a row of a band that came in."""
        tiling = self.tiling
        first = min(j, row.shape[1] - tiling.width)
        # In two steps: what is known of an address should not be added at each load.
        return self.view(row.at[:, pl.ds(first, tiling.width)], tiling.columns, 1, j - first)

    def share(self, columns: int, one: Callable[[Any], None]) -> None:
        """Takes this warpgroup's columns of each strip."""
        for first in range(0, columns, WARPGROUPS):
            j = first + self.warpgroup
            if first + WARPGROUPS <= columns:
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
            values = analysed(((low(j, 0, 0), low(j, 0, 1)), (low(j, 1, 0), low(j, 1, 1))))
            for band, value in enumerate(values):
                self.view(self.bands.at[to, band], tiling.analysed, 1, j)[...] = value

        self.share(tiling.analysed, one)

    def pixel(self, slot: Any, row: int, j: Any, part: int) -> Any:
        """One of the pixels in column j of each strip of a row of a slot, in float32."""
        line = self.rows.at[slot, :, row]
        return self.view(line, self.tiling.analysed, 4, j, part)[...].astype(jnp.float32)

    def filter(self, slot: int, to: int, taps: list[list[Any]], sums: list[Any]) -> list[Any]:
        """Adds a row of a band to the rows of results that it is a neighbour of.

        Returns:
            The sums of those that are not complete with it; the one that is goes to `filtered`.
        """
        columns, reach = self.tiling.columns, self.tiling.reach
        row = self.bands.at[slot, self.warpgroup]
        new: list[Any] = [None] * columns
        found = {j: self.neighbour(row, j + reach)[...] for j in range(-reach, columns + reach)}
        first, *others = [sums[i : i + columns] for i in range(0, len(sums), columns)] + [new]
        last, *above = reversed(taps)
        done = self.add_products(first, found, last)
        # Before sums of the next row begin, which take the registers of these.
        row = self.filtered.at[to, self.warpgroup]
        for j, total in enumerate(done):
            self.view(row, columns, 1, j)[...] = total
        return [
            total
            for open_row, tap in zip(others, above, strict=True)
            for total in self.add_products(open_row, found, tap)
        ]

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
            found = (
                self.view(self.filtered.at[slot, band], tiling.columns, 1, j)[...]
                for band in range(WARPGROUPS)
            )
            for v, values in enumerate(synthesised(tuple(found))):
                for e, value in enumerate(values):
                    to = self.y.at[group, :, row + result_row, v, own, j, e, chunk]
                    to[...] = value.astype(self.y.dtype)

        @pl.when((low_row >= 0) & (low_row < tiling.rows) & (i < self.count))
        def _() -> None:
            self.share(tiling.columns, write_low)

        @pl.when((result_row >= 0) & (i < self.count))
        def _() -> None:
            self.share(tiling.columns, write_square)
