"""All levels from the second or third on in one launch: images that fit into shared memory.

A block streams the rows of `images` images, `CHANNELS` channels wide, through a ring of slots, and
keeps the four bands of all its levels in shared memory, in float32:

- as rows come in, all four warpgroups reduce them to bands of the first of these levels, and those
  to bands of the next; a row or two later each filters one band of the first level, in place;
- then the deeper levels are analysed, and all of them filtered, in place, a band a warpgroup;
- then each level's synthesis, from the deepest on, is added to the low band of the level above it.

The copy engine runs ahead: while deeper levels are filtered, it brings in the next images' rows.
What lies beside an image in shared memory is zero, and stays so: each row's columns are followed by
zeros, which are what the row below has at its left too. Where a thread has whole rows, it leaves
out what lies beside them instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.mosaic_gpu import (
    MULTIPROCESSORS,
    SHARED,
    UNSYNCHRONISED,
    following,
    size_in_bytes,
)
from pallas_kernels.wtconv.mosaic_gpu.bands import (
    WARPGROUPS,
    BandsBlock,
    Square,
    analysed,
    synthesised,
)
from pallas_kernels.wtconv.mosaic_gpu.tiles import CHANNELS, MAX_COLUMNS, STRIPS

__all__ = ["deep", "fits"]

_MIN_SLOTS, _MAX_SLOTS = 3, 8
"""Of the ring, of two rows each; a row of level 2 takes two of them, one of level 3 takes one."""
_OVERHEAD, _LATE = 3, 3
"""What a step costs, in columns, and what it waits for rows ordered late; estimates."""


@dataclass(frozen=True)
class _Level:
    """A level's bands in shared memory: rows of `pitch` columns, `columns` of them a strip."""

    reach: int
    strips: int
    height: int
    width: int
    columns: int
    pitch: int

    @property
    def halo(self) -> int:
        """Columns beside a strip that filtering reads: none beside the only one, of whole rows."""
        return self.reach if self.strips > 1 else 0

    @property
    def size(self) -> int:
        """Columns of all rows, and what is read before and beyond them."""
        pairs = (self.height + self.height % 2) * self.pitch
        # The window that filtering takes the last of a strip's columns and its neighbours from.
        window = self.columns - 1 + self.halo + self.strips * self.columns
        return self.halo + max(pairs, (self.height - 1) * self.pitch + window)

    @property
    def cost(self) -> int:
        """Of filtering it, roughly."""
        return (self.height + 2 * self.reach) * (self.columns + _OVERHEAD)


@dataclass(frozen=True)
class _Tiling:
    """How the blocks of a launch share the images: each takes every `blocks`-th task.

    A task is one chunk of channels of `images` images; `first` is the level of `levels[0]`.
    """

    first: int
    images: int
    levels: tuple[_Level, ...]
    slots: int
    groups: int
    chunks: int

    @property
    def reach(self) -> int:
        """Rows, and columns, that filtering reaches to each side."""
        return self.levels[0].reach

    @property
    def strips(self) -> int:
        """Strips of an image."""
        return STRIPS // self.images

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a warpgroup's values."""
        return self.images, self.strips, CHANNELS

    @property
    def lag(self) -> int:
        """Rows that filtering the first level lies behind: the next one has read what it writes."""
        return max(1, 2 - self.reach)

    @property
    def side(self) -> int:
        """Rows, and columns, of x that a coefficient of the first level is made of."""
        return 4 if self.first == 2 else 2

    @property
    def across(self) -> int:
        """Columns of the result to one of the first level's coefficients."""
        return 1 << (self.first - 1)

    @property
    def slot(self) -> tuple[int, ...]:
        """Of a slot of the ring."""
        return self.images, 2, self.side * self.strips * self.levels[0].columns, CHANNELS

    @property
    def tasks(self) -> int:
        """Of all blocks."""
        return self.groups * self.chunks

    @property
    def blocks(self) -> int:
        """As many as are resident at once."""
        return min(self.tasks, MULTIPROCESSORS)

    @property
    def turns(self) -> int:
        """Slots that a task fills."""
        return self.levels[0].height * (self.side // 2)

    @property
    def cost(self) -> int:
        """Of the busiest multiprocessor's tasks, roughly."""
        # Into a ring of less than two steps a step's rows come when the one before is done.
        late = _LATE * self.levels[0].height if self.slots < self.side else 0
        task = sum(level.cost for level in self.levels) + late
        return pl.cdiv(self.tasks, self.blocks) * task


@cache
def _tiling(
    shape: tuple[int, ...], dtype: jnp.dtype, levels: int, kernel_size: int, first: int = 2
) -> _Tiling | None:
    """The cheapest tiling of x `[N, H, W, C]`, None if no image fits into shared memory."""
    tilings = []
    for images in (1, 2, 4):
        tiling = _of_images(images, shape, dtype, levels, kernel_size // 2, first)
        if tiling is not None:
            tilings.append(tiling)
    return min(tilings, key=lambda tiling: tiling.cost, default=None)


def _of_images(
    images: int, shape: tuple[int, ...], dtype: jnp.dtype, levels: int, reach: int, first: int
) -> _Tiling | None:
    """The tiling of so many images a task, None if they do not fit."""
    n, h, w, c = shape
    strips = STRIPS // images
    found: list[_Level] = []
    for level in range(levels, first - 1, -1):
        # The array is the image, or level 2's low band.
        halvings = level if first == 2 else level - 2
        height, width = pl.cdiv(h, 1 << halvings), pl.cdiv(w, 1 << halvings)
        columns = pl.cdiv(width, strips)
        # Analysis reads pairs of columns, also where the next level's strips have none.
        below = 2 * strips * found[0].columns if found else 0
        pitch = max(width, strips * columns, below)
        if strips > 1:
            # What is left of a row must not be written with the row above; a reach of one would.
            apart = 1 if reach == 1 else 0
            pitch = max(pitch, width + reach, strips * columns + apart)
        found.insert(0, _Level(reach, strips, height, width, columns, pitch))
    if found[0].columns > MAX_COLUMNS:
        return None
    groups, chunks = pl.cdiv(n, images), pl.cdiv(c, CHANNELS)
    tiling = _Tiling(first, images, tuple(found), 0, groups, chunks)
    bands = sum(WARPGROUPS * level.size for level in found) * images * CHANNELS
    left = SHARED - size_in_bytes((bands,), jnp.dtype("float32"))
    slots = min(_MAX_SLOTS, left // size_in_bytes(tiling.slot, dtype))
    return replace(tiling, slots=slots) if slots >= _MIN_SLOTS else None


def fits(x: jax.Array, levels: int, kernel_size: int, first: int = 2) -> bool:
    """Whether `deep` takes an image: whether the bands of its levels fit into shared memory.

    Args:
        x: `[N, H, W, C]`: the image, or for `first` 3 the low band of level 2.
        levels: All of the convolution's.
        kernel_size: k.
        first: The level to begin with, 2 or 3.
    """
    return levels >= first and _tiling(x.shape, x.dtype, levels, kernel_size, first) is not None


def deep(
    x: jax.Array,
    taps: jax.Array,
    levels: int,
    kernel_size: int,
    dtype: jnp.dtype,
    first: int = 2,
) -> jax.Array:
    """Half the synthesis of levels 2 or 3 to `levels`, or somewhat larger.

    Of an image `[N, H, W, C]`, for `first` 2, it is `[N, H / 2, W / 2, C]`. Of level 2's low band
    `[N, H, W, C]`, for `first` 3, it is `[N, H, 2 W, C]`, each column twice: so wide is also what
    is computed of the image. What lies beyond is not meant for anyone: whole strips and chunks of
    channels are written.

    Args:
        x: `[N, H, W, C]`, which `fits`.
        taps: Of all levels, `[chunks, rows, STRIPS, CHANNELS]`, with their factors.
        levels: At least `first`.
        kernel_size: k.
        dtype: Of the result.
        first: The level to begin with, 2 or 3.
    """
    tiling = _tiling(x.shape, x.dtype, levels, kernel_size, first)
    assert tiling is not None
    top = tiling.levels[0]
    # Strips and chunks are axes of their own, so that every store is a plain slice.
    out = (
        *(tiling.groups, tiling.images, top.height, 2),
        *(tiling.strips, top.columns, tiling.across, tiling.chunks, CHANNELS),
    )
    scratch = [
        plgpu.SMEM((tiling.slots, *tiling.slot), x.dtype),
        plgpu.Barrier(num_arrivals=1, num_barriers=tiling.slots),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        *(
            plgpu.SMEM((WARPGROUPS, tiling.images, level.size, CHANNELS), jnp.float32)
            for level in tiling.levels
        ),
    ]

    names = "x", "taps", "y", "rows", "full", "met"

    def body(*refs: Any) -> None:
        block = dict(zip(names, refs, strict=False))
        _Block(tiling=tiling, bands=refs[len(names) :], **block).run()

    found = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out, dtype),
        scratch_types=scratch,
        grid=(tiling.blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=UNSYNCHRONISED,
    )(x, taps.reshape(*taps.shape[:2], *tiling.shape))
    return found.reshape(
        tiling.groups * tiling.images,
        2 * top.height,
        tiling.across * tiling.strips * top.columns,
        tiling.chunks * CHANNELS,
    )


Ring = tuple[Any, Any, Any]
"""Its first slot, the task whose rows come into it next, and which two of its rows."""


@dataclass(frozen=True, kw_only=True)
class _Block(BandsBlock):
    """One block of `deep`: its references, and what its warpgroups do, all of them the same."""

    y: Any
    bands: tuple[Any, ...]

    def run(self) -> None:
        """Takes one task after the other."""
        levels = len(self.tiling.levels)

        def task(i: Any, ring: Ring) -> Ring:
            ring, sums = self.stream(i, ring)
            # All at once and early, because they take their time.
            taps = [self.taps_of(level, i) for level in range(1, levels)]
            # All have read the last rows.
            self.meet()
            self.filter_last(0, sums)
            for level in range(2, levels):
                self.rows_of(level, partial(self.analyse_low, level, split=False))
                self.meet()
            for level in range(1, levels):
                self.filter(level, taps[level - 1])
            self.meet()
            for level in range(levels - 1, 0, -1):
                self.rows_of(level, partial(self.synthesise, level))
                self.meet()
            self.rows_of(0, partial(self.write, i))
            # The next task's rows take the place of what is read here.
            self.meet()
            return ring

        ring: Ring = (jnp.int32(0), lax.axis_index("block"), jnp.int32(0))
        ring = lax.fori_loop(0, self.tiling.slots, lambda _, ring: self.refill(ring, True), ring)
        self.clear()
        self.meet()
        lax.fori_loop(0, self.count, task, ring)

    @property
    def count(self) -> Any:
        """Tasks of this block."""
        blocks = self.tiling.blocks
        return lax.div(self.tiling.tasks - lax.axis_index("block") + blocks - 1, blocks)

    def task(self, i: Any) -> Any:
        """Number of the block's i-th task."""
        return lax.axis_index("block") + i * self.tiling.blocks

    def place(self, task: Any) -> tuple[Any, Any]:
        """Group of images and chunk of channels of a task."""
        return lax.div(task, self.tiling.chunks), lax.rem(task, self.tiling.chunks)

    def clear(self) -> None:
        """Fills all bands with zeros, of which those beside the images stay.

        Of a single strip nothing is read there but pairs, which the next level has of the low band.
        """
        strips = self.tiling.strips

        @pl.when((self.warpgroup == 0) | (strips > 1))
        def _() -> None:
            zero = self.zeros(1)[0]
            for level, bands in zip(self.tiling.levels, self.bands, strict=True):
                band = bands.at[self.warpgroup]
                last = level.size - strips

                def one(t: Any, _: Any, band: Any = band, last: int = last) -> tuple[()]:
                    band[:, pl.ds(jnp.minimum(t * strips, last), strips)] = zero
                    return ()

                lax.fori_loop(0, pl.cdiv(level.size, strips), one, ())

    def refill(self, ring: Ring, needed: Any) -> Ring:
        """Orders the copy into the ring's first slot if it is needed; the ring that follows."""
        tiling = self.tiling
        slot, task, turn = ring
        images, rows, columns, _ = tiling.slot

        @pl.when(needed & (self.warpgroup == WARPGROUPS - 1) & (task < tiling.tasks))
        def _() -> None:
            group, chunk = self.place(task)
            plgpu.copy_gmem_to_smem(
                self.x.at[
                    pl.ds(group * images, images),
                    pl.ds(rows * turn, rows),
                    # Pallas refuses windows beyond an array's end where it knows their start.
                    pl.ds(0 * turn, columns),
                    pl.ds(chunk * CHANNELS, CHANNELS),
                ],
                self.rows.at[slot],
                self.full.at[slot],
            )

        last = turn == tiling.turns - 1
        after = jnp.where(last, task + tiling.blocks, task), jnp.where(last, 0, turn + 1)
        return following(slot, tiling.slots), *after

    def coefficient(
        self, level: int, band: Any, row: Any, j: Any, shift: int = 0, pair: int | None = None
    ) -> Any:
        """A view of column j of each strip of a row of a band.

        Args:
            level: Counted from 0, which is the first of this launch.
            band: Number of the band.
            row: Of the level.
            j: Column of the level, or of the next one's if `pair` is given.
            shift: Columns to go further.
            pair: Which of the two columns that the next level's column j is computed from.
        """
        tiled = self.tiling.levels[level if pair is None else level + 1]
        parts = 1 if pair is None else 2
        columns, first = tiled.strips * tiled.columns * parts, tiled.halo + shift
        # In two steps: what is known of an address should not be added at each load.
        line = self.bands[level].at[
            band, :, pl.ds(row * self.tiling.levels[level].pitch, first + columns)
        ]
        return self.view(line.at[:, pl.ds(first, columns)], tiled.columns, parts, j, pair or 0)

    def within(self, value: Any, limit: int, each: int, j: int) -> Any:
        """The value, zero where column j of a strip, `each` wide, is not below `limit`."""
        images, strips, _ = shape = self.tiling.shape
        if (strips - 1) * each + j < limit:
            return value
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)
        strip = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        return jnp.where(strip * each + j < limit, value, 0.0)

    def rows_of(self, level: int, one: Callable[[Any], None]) -> None:
        """Takes this warpgroup's part of the rows of a level."""

        def row(t: Any, _: Any) -> tuple[()]:
            one(self.warpgroup + t * WARPGROUPS)
            return ()

        rows = self.tiling.levels[level].height - self.warpgroup + WARPGROUPS - 1
        lax.fori_loop(0, lax.div(rows, WARPGROUPS), row, ())

    def stream(self, i: Any, ring: Ring) -> tuple[Ring, list[Any]]:
        """Brings in all rows of x, reduces them to the first two levels, filters the first.

        Args:
            i: Number of the task.
            ring: Its first slot has the first rows.

        Returns:
            The ring of the next task, and the sums of the last rows, which `filter_last` keeps.
        """
        tiling = self.tiling
        level, lag = tiling.levels[0], tiling.lag
        taps = self.taps_of(0, i)

        def advance(s: Any, ring: Ring) -> Ring:
            slots = [ring[0]]
            while 2 * len(slots) < tiling.side:
                slots.append(following(slots[-1], tiling.slots))
            inside = s < level.height
            pl.when(inside)(partial(self.analyse_rows, slots, s))
            self.meet()
            after = ring
            for _ in slots:
                after = self.refill(after, inside)
            if len(tiling.levels) > 1:
                pair = lax.div(s, 2)

                @pl.when((lax.rem(s, 2) == 1) & (pair < tiling.levels[1].height))
                def _() -> None:
                    self.analyse_low(1, pair, split=True)

            slot, task, turn = (jnp.where(inside, *two) for two in zip(after, ring, strict=True))
            return slot, task, turn

        def step(s: Any, carry: tuple[Ring, list[Any]]) -> tuple[Ring, list[Any]]:
            ring, sums = carry
            return advance(s, ring), self.filter_row(0, s - lag, sums, taps)

        ring = lax.fori_loop(0, lag, advance, ring)
        carry = ring, self.zeros(2 * level.reach * level.columns)
        return lax.fori_loop(lag, level.height + lag, step, carry)

    def analyse_rows(self, slots: list[Any], row: Any) -> None:
        """From the rows of x in these slots to one of the bands of the first level."""
        for slot in slots:
            plgpu.barrier_wait(self.full.at[slot])

        def low(j: Any, v: int, e: int) -> Any:
            if self.tiling.first > 2:
                return self.pixel(slots[0], v, j, e)
            upper, lower = (
                self.pixel(slots[v], half, j, 2 * e) + self.pixel(slots[v], half, j, 2 * e + 1)
                for half in range(2)
            )
            return (upper + lower) * 0.5

        self.analyse(0, row, low, split=True)

    def pixel(self, slot: Any, row: int, j: Any, part: int) -> Any:
        """A value of column j's squares, of a row of each strip in a slot, in float32."""
        line, columns = self.rows.at[slot, :, row], self.tiling.levels[0].columns
        return self.view(line, columns, self.tiling.side, j, part)[...].astype(jnp.float32)

    def analyse_low(self, level: int, row: Any, split: bool) -> None:
        """From two rows of the level above's low band to one of the bands of a level."""

        def low(j: Any, v: int, e: int) -> Any:
            return self.coefficient(level - 1, 0, 2 * row + v, j, pair=e)[...] * 0.5

        self.analyse(level, row, low, split)

    def analyse(
        self, level: int, row: Any, low: Callable[[Any, int, int], Any], split: bool
    ) -> None:
        """Writes a row of all bands, twice as large as they are, from the low band as it is.

        Args:
            level: Counted from 0, which is the first of this launch.
            row: Of the level.
            low: What is in column j of the strips, at row v and column e of each 2 x 2 square.
            split: Whether other warpgroups take other columns of the same row.
        """
        columns = self.tiling.levels[level].columns

        def one(j: Any) -> None:
            square = (low(j, 0, 0), low(j, 0, 1)), (low(j, 1, 0), low(j, 1, 1))
            for band, value in enumerate(analysed(square)):
                self.coefficient(level, band, row, j)[...] = value

        if not split:
            for j in range(columns):
                one(j)
            return
        for first in range(0, columns, WARPGROUPS):
            j = first + self.warpgroup
            pl.when(j < columns)(partial(one, j))

    def taps_of(self, level: int, i: Any) -> list[list[Any]]:
        """The taps of this warpgroup's band, of a level counted from 0."""
        _, chunk = self.place(self.task(i))
        return self.kernel(chunk, self.tiling.first + level)

    def filter(self, level: int, taps: list[list[Any]]) -> None:
        """Filters this warpgroup's band, in place."""
        tiled = self.tiling.levels[level]
        if tiled.height <= self.size:
            self.filter_low(level, taps)
            return

        def one(row: Any, sums: list[Any]) -> list[Any]:
            sums = self.filter_row(level, row, sums, taps)
            self.settle()
            return sums

        sums = self.zeros(2 * tiled.reach * tiled.columns)
        self.filter_last(level, lax.fori_loop(0, tiled.height, one, sums))

    def filter_low(self, level: int, taps: list[list[Any]]) -> None:
        """Filters a band of few rows: none of the products with what is above and below it."""
        tiled = self.tiling.levels[level]
        rows = [self.neighbours(level, row) for row in range(tiled.height)]
        self.settle()
        for row in range(tiled.height):
            totals: list[Any] = [None] * tiled.columns
            for d, found in enumerate(rows, tiled.reach - row):
                if 0 <= d < self.size:
                    totals = self.add_products(totals, found, taps[d])
            self.keep(level, row, totals)

    def settle(self) -> None:
        """Waits until other strips have read what results take the place of, if there are any."""
        if self.tiling.strips > 1:
            plgpu.commit_smem()

    def neighbours(self, level: int, row: Any) -> dict[int, Any]:
        """A row's columns, and those beside each strip, from this warpgroup's band."""
        tiled = self.tiling.levels[level]
        return {
            j: self.coefficient(level, self.warpgroup, row, 0, j)[...]
            for j in range(-tiled.halo, tiled.columns + tiled.halo)
        }

    def filter_row(self, level: int, row: Any, sums: list[Any], taps: list[list[Any]]) -> list[Any]:
        """Adds a row to the `size` rows of results that it is a neighbour of."""
        columns, reach = self.tiling.levels[level].columns, self.tiling.levels[level].reach
        found = self.neighbours(level, row)
        totals = []
        new: list[Any] = [None] * columns
        for open_row, tap in enumerate(reversed(taps)):
            totals += self.add_products((sums + new)[open_row * columns :][:columns], found, tap)

        @pl.when(row >= reach)
        def _() -> None:
            self.keep(level, row - reach, totals[:columns])

        return totals[columns:]

    def filter_last(self, level: int, sums: list[Any]) -> None:
        """Keeps the last rows, below which there is nothing."""
        tiled = self.tiling.levels[level]
        for late in range(tiled.reach):
            row = tiled.height - tiled.reach + late
            if row >= 0:
                self.keep(level, row, sums[late * tiled.columns :][: tiled.columns])

    def keep(self, level: int, row: Any, values: list[Any]) -> None:
        """Writes a row of results into this warpgroup's band."""
        tiled = self.tiling.levels[level]
        for j, value in enumerate(values):
            value = self.within(value, tiled.width, tiled.columns, j)
            self.coefficient(level, self.warpgroup, row, j)[...] = value

    def pixels(self, level: int, row: Any, j: int) -> Square:
        """The synthesis of a level in a row of coefficients and column j of the strips."""
        found = (self.coefficient(level, band, row, j)[...] for band in range(WARPGROUPS))
        return synthesised(tuple(found))

    def synthesise(self, level: int, row: Any) -> None:
        """Adds a row of a level's synthesis to the low band of the level above it."""
        above, each = self.tiling.levels[level - 1], 2 * self.tiling.levels[level].columns
        for j in range(each // 2):
            found = self.pixels(level, row, j)

            def add(v: int, j: int = j, found: list[list[Any]] = found) -> None:
                for e, value in enumerate(found[v]):
                    value = self.within(value, above.width, each, 2 * j + e)
                    low = self.coefficient(level - 1, 0, 2 * row + v, j, pair=e)
                    low[...] = low[...] + value

            add(0)
            # The row below the last of an odd number stays zero.
            pl.when(2 * row + 1 < above.height)(partial(add, 1))

    def write(self, i: Any, row: Any) -> None:
        """Writes a row of the synthesis of the first level to the result."""
        group, chunk = self.place(self.task(i))
        times = self.tiling.across // 2
        for j in range(self.tiling.levels[0].columns):
            for v, values in enumerate(self.pixels(0, row, j)):
                for e, value in enumerate(values):
                    rounded = value.astype(self.y.dtype)
                    for column in range(e * times, (e + 1) * times):
                        to = self.y.at[group, :, row, v, :, j, column, chunk]
                        to[...] = rounded
