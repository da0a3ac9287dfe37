"""The kernel of all levels from the second or third on, for images that fit into shared memory.

- **Tasks:** a task is `images` whole images of one block of channels; there are no tiles and no
  halo to load. A persistent block takes one task after the other, at most one block for each
  multiprocessor. It keeps the four bands of all of its levels in shared memory, in float32.
- **Halo:** what lies beside an image in shared memory is zero, and stays so: each row's columns are
  followed by zeros, which are the halo at the left of the row below too. Where a thread has whole
  rows, it leaves out what lies beside them instead.
- **Pipeline:** 3 to 8 stages of two rows of x; a row of the first level takes two stages where x is
  the image, and one where x is the low band of level 2. The prologue fills all stages. Loads run
  ahead of tasks: while deeper levels are filtered, the next task's rows come in.
- **Warpgroups:** four consumers that do the same, of which the last is the producer as well. Of a
  task they

  1. reduce rows, as they come in, to bands of the first of these levels, and those to bands of the
     next one; a row or two later each warpgroup filters one band of the first level, in place;
  2. analyse the deeper levels, and filter all of them, in place, each warpgroup one band;
  3. add each level's synthesis, from the deepest on, to the low band of the level above it;
  4. store the synthesis of the first level.

- **mbarriers:** `full` of a stage, on which its one TMA load arrives. There is no `empty`: each row
  that is read, and each of the phases above, ends with a barrier of all warpgroups.
- **Stores:** straight from registers to global memory, without TMA.
- **Registers:** no `setmaxnreg`, since all roles are alike: 128 for each of 512 threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mosaic_gpu_call
from pallas_kernels.common.mosaic_gpu import (
    MANUAL_BARRIERS,
    MULTIPROCESSORS,
    SHARED,
    Scratch,
    next_stage,
    size_in_bytes,
)
from pallas_kernels.common.types import Index, Ref
from pallas_kernels.haar import butterfly
from pallas_kernels.wtconv.mosaic_gpu.bands import WARPGROUPS, BandsBlock
from pallas_kernels.wtconv.mosaic_gpu.tiles import CHANNELS, MAX_COLUMNS, STRIPS

__all__ = ["fits", "fused_levels"]

_MIN_STAGES, _MAX_STAGES = 3, 8
"""The fewest and the most stages of the pipeline, of two rows of x each."""
_OVERHEAD, _LATE = 3, 3
"""The costs, in columns, of a step and of its wait for rows that were loaded late; estimates."""


@dataclass(frozen=True)
class _Level:
    """The layout of a level's bands in shared memory.

    Attributes:
        radius: Rows, and columns, that filtering reaches to each side.
        strips: Strips of a row.
        height: Rows of the level.
        width: Columns of the level.
        columns: Columns of a strip.
        pitch: Columns from the beginning of a row to that of the next one.
    """

    radius: int
    strips: int
    height: int
    width: int
    columns: int
    pitch: int

    @property
    def halo(self) -> int:
        """The number of columns beside a strip that filtering reads; none beside whole rows."""
        return self.radius if self.strips > 1 else 0

    @property
    def size(self) -> int:
        """The number of columns of all rows, and of what is read before and after them."""
        pairs = (self.height + self.height % 2) * self.pitch
        # Filtering reads the last column of a strip, and its halo, from this window.
        window = self.columns - 1 + self.halo + self.strips * self.columns
        return self.halo + max(pairs, (self.height - 1) * self.pitch + window)

    @property
    def cost(self) -> int:
        """The estimated cost of filtering the level."""
        return (self.height + 2 * self.radius) * (self.columns + _OVERHEAD)


@dataclass(frozen=True)
class _Tiling:
    """The division of the images among persistent blocks: each takes every `blocks`-th task.

    Attributes:
        first: The level that `levels` begins with.
        images: Images of a task.
        levels: The layouts of the levels.
        stages: Stages of the pipeline.
        groups: Groups of `images` images.
        channel_blocks: Blocks of `CHANNELS` channels.
    """

    first: int
    images: int
    levels: tuple[_Level, ...]
    stages: int
    groups: int
    channel_blocks: int

    @property
    def radius(self) -> int:
        """The number of rows, and columns, that filtering reaches to each side."""
        return self.levels[0].radius

    @property
    def strips(self) -> int:
        """The number of strips of an image."""
        return STRIPS // self.images

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one value a thread of a warpgroup."""
        return self.images, self.strips, CHANNELS

    @property
    def delay(self) -> int:
        """The number of rows by which filtering the first level lags behind its analysis.

        The next level has then read what filtering overwrites.
        """
        return max(1, 2 - self.radius)

    @property
    def side(self) -> int:
        """The number of rows, and columns, of x that make up a coefficient of the first level."""
        return 4 if self.first == 2 else 2

    @property
    def across(self) -> int:
        """The number of columns of the result for each coefficient of the first level."""
        return 1 << (self.first - 1)

    @property
    def stage_shape(self) -> tuple[int, ...]:
        """The shape of a pipeline stage."""
        return self.images, 2, self.side * self.strips * self.levels[0].columns, CHANNELS

    @property
    def tasks(self) -> int:
        """The number of tasks of all blocks."""
        return self.groups * self.channel_blocks

    @property
    def blocks(self) -> int:
        """The number of blocks, as many as are resident at once."""
        return min(self.tasks, MULTIPROCESSORS)

    @property
    def loads(self) -> int:
        """The number of TMA loads of a task, each of which fills a stage."""
        return self.levels[0].height * (self.side // 2)

    @property
    def cost(self) -> int:
        """The estimated cost of all tasks of the busiest multiprocessor."""
        # With fewer stages than two steps take, rows are loaded only when the step before is done.
        late = _LATE * self.levels[0].height if self.stages < self.side else 0
        task = sum(level.cost for level in self.levels) + late
        return pl.cdiv(self.tasks, self.blocks) * task


@cache
def _tiling(
    shape: tuple[int, ...], dtype: jnp.dtype, levels: int, kernel_size: int, first: int = 2
) -> _Tiling | None:
    """Returns the cheapest tiling of x `[N, H, W, C]`, None if no image fits into shared memory."""
    tilings = []
    for images in (1, 2, 4):
        tiling = _of_images(images, shape, dtype, levels, kernel_size // 2, first)
        if tiling is not None:
            tilings.append(tiling)
    return min(tilings, key=lambda tiling: tiling.cost, default=None)


def _of_images(
    images: int, shape: tuple[int, ...], dtype: jnp.dtype, levels: int, radius: int, first: int
) -> _Tiling | None:
    """Returns the tiling with so many images a task, None if they do not fit."""
    n, h, w, c = shape
    strips = STRIPS // images
    found: list[_Level] = []
    for level in range(levels, first - 1, -1):
        # x is the image, or the low band of level 2.
        halvings = level if first == 2 else level - 2
        height, width = pl.cdiv(h, 1 << halvings), pl.cdiv(w, 1 << halvings)
        columns = pl.cdiv(width, strips)
        # Analysis reads pairs of columns, also where the next level's strips have none.
        below = 2 * strips * found[0].columns if found else 0
        pitch = max(width, strips * columns, below)
        if strips > 1:
            # Filtering may not read the halo at the left of a row while it writes the row above,
            # which it does with a radius of one.
            apart = 1 if radius == 1 else 0
            pitch = max(pitch, width + radius, strips * columns + apart)
        found.insert(0, _Level(radius, strips, height, width, columns, pitch))
    if found[0].columns > MAX_COLUMNS:
        return None
    groups, channel_blocks = pl.cdiv(n, images), pl.cdiv(c, CHANNELS)
    tiling = _Tiling(first, images, tuple(found), 0, groups, channel_blocks)
    bands = sum(WARPGROUPS * level.size for level in found) * images * CHANNELS
    left = SHARED - size_in_bytes((bands,), jnp.dtype("float32"))
    stages = min(_MAX_STAGES, left // size_in_bytes(tiling.stage_shape, dtype))
    return replace(tiling, stages=stages) if stages >= _MIN_STAGES else None


def fits(x: jax.Array, levels: int, kernel_size: int, first: int = 2) -> bool:
    """Returns whether `fused_levels` takes x, since its bands fit into shared memory.

    Args:
        x: The image `[N, H, W, C]`, or for `first` 3 the low band of level 2.
        levels: The number of levels of the convolution.
        kernel_size: The height and width of the kernel.
        first: The level to begin with, 2 or 3.
    """
    return levels >= first and _tiling(x.shape, x.dtype, levels, kernel_size, first) is not None


def fused_levels(
    x: jax.Array,
    taps: jax.Array,
    levels: int,
    kernel_size: int,
    dtype: jnp.dtype,
    first: int = 2,
) -> jax.Array:
    """Returns half the synthesis of the levels from `first` to `levels`.

    Args:
        x: The image `[N, H, W, C]`, or for `first` 3 the low band of level 2; it `fits`.
        taps: The taps of all levels with their factors, `[channel_blocks, rows, STRIPS, CHANNELS]`.
        levels: The number of levels of the convolution, at least `first`.
        kernel_size: The height and width of the kernel.
        dtype: The dtype of the result.
        first: The level to begin with, 2 or 3.

    Returns:
        For `first` 2 `[N, H / 2, W / 2, C]`; for `first` 3 `[N, H, 2 W, C]` with each column twice,
        so that it is as wide as for the image. It is larger where whole strips and blocks of
        channels are: what lies beyond is undefined.
    """
    tiling = _tiling(x.shape, x.dtype, levels, kernel_size, first)
    assert tiling is not None
    top = tiling.levels[0]
    # Strips and channel blocks are axes of their own, so that every store is a plain slice.
    out = (
        *(tiling.groups, tiling.images, top.height, 2),
        *(tiling.strips, top.columns, tiling.across, tiling.channel_blocks, CHANNELS),
    )
    scratch: list[Scratch] = [
        plgpu.SMEM((tiling.stages, *tiling.stage_shape), x.dtype),
        plgpu.Barrier(num_arrivals=1, num_barriers=tiling.stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        *(
            plgpu.SMEM((WARPGROUPS, tiling.images, level.size, CHANNELS), jnp.float32)
            for level in tiling.levels
        ),
    ]

    names = "x", "taps", "y", "rows", "full", "arrived"

    def body(*refs: Ref) -> None:
        block = dict(zip(names, refs, strict=False))
        _Block(tiling=tiling, bands=refs[len(names) :], **block).run()

    found = mosaic_gpu_call.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out, dtype),
        scratch_types=scratch,
        grid=(tiling.blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=MANUAL_BARRIERS,
    )(x, taps.reshape(*taps.shape[:2], *tiling.shape))
    return found.reshape(
        tiling.groups * tiling.images,
        2 * top.height,
        tiling.across * tiling.strips * top.columns,
        tiling.channel_blocks * CHANNELS,
    )


PipelineState = tuple[Index, Index, Index]
"""The stage that is read and refilled next, and the task and index of the load that refills it."""


@dataclass(frozen=True, kw_only=True)
class _Block(BandsBlock):
    """One block of `fused_levels`: its references, and what each of its warpgroups does.

    All four warpgroups are consumers of the pipeline's stages, and wait for each other at one
    mbarrier; the last is the producer of the TMA loads too.

    Attributes:
        y: The result in global memory.
        bands: The four bands of each level in shared memory.
    """

    tiling: _Tiling
    y: Ref
    bands: tuple[Ref, ...]

    def run(self) -> None:
        """Takes one task after the other."""
        levels = len(self.tiling.levels)

        def task(i: Index, state: PipelineState) -> PipelineState:
            state, sums = self.stream(i, state)
            # They are read all at once and early, to hide the latency of global memory.
            taps = [self.taps_of(level, i) for level in range(1, levels)]
            # After this, all warpgroups have read the last rows.
            self.warpgroup_barrier()
            self.filter_last(0, sums)
            for level in range(2, levels):
                self.rows_of(level, partial(self.analyse_low, level, split=False))
                self.warpgroup_barrier()
            for level in range(1, levels):
                self.filter(level, taps[level - 1])
            self.warpgroup_barrier()
            for level in range(levels - 1, 0, -1):
                self.rows_of(level, partial(self.synthesise, level))
                self.warpgroup_barrier()
            self.rows_of(0, partial(self.store, i))
            # After this, the next task's rows may overwrite the bands.
            self.warpgroup_barrier()
            return state

        state: PipelineState = (jnp.int32(0), lax.axis_index("block"), jnp.int32(0))
        state = lax.fori_loop(
            0, self.tiling.stages, lambda _, state: self.load_next(state, True), state
        )
        self.clear()
        self.warpgroup_barrier()
        lax.fori_loop(0, self.count, task, state)

    @property
    def count(self) -> jax.Array:
        """The number of tasks of this block."""
        blocks = self.tiling.blocks
        return lax.div(self.tiling.tasks - lax.axis_index("block") + blocks - 1, blocks)

    def task(self, i: Index) -> jax.Array:
        """Returns the number of the block's i-th task."""
        return lax.axis_index("block") + i * self.tiling.blocks

    def place(self, task: Index) -> tuple[jax.Array, jax.Array]:
        """Returns the group of images and the channel block of a task."""
        return lax.div(task, self.tiling.channel_blocks), lax.rem(task, self.tiling.channel_blocks)

    def clear(self) -> None:
        """Fills all bands with zeros, of which those beside the images stay.

        Beside a single strip nothing is read but the low band, of which analysis reads pairs.
        """
        strips = self.tiling.strips

        @pl.when((self.warpgroup == 0) | (strips > 1))
        def _() -> None:
            zero = self.zeros(1)[0]
            for level, bands in zip(self.tiling.levels, self.bands, strict=True):
                band = bands.at[self.warpgroup]
                last = level.size - strips

                def one(
                    t: Index, carry: tuple[()], band: Ref = band, last: int = last
                ) -> tuple[()]:
                    band[:, pl.ds(jnp.minimum(t * strips, last), strips)] = zero
                    return ()

                lax.fori_loop(0, pl.cdiv(level.size, strips), one, ())

    def load_next(self, state: PipelineState, needed: bool | jax.Array) -> PipelineState:
        """Issues the TMA load of a state, if it is needed, and returns the next state.

        The last warpgroup is the producer; the others only count.
        """
        tiling = self.tiling
        stage, task, load = state
        images, rows, columns = tiling.stage_shape[:3]

        @pl.when(needed & (self.warpgroup == WARPGROUPS - 1) & (task < tiling.tasks))
        def _() -> None:
            group, channel_block = self.place(task)
            plgpu.copy_gmem_to_smem(
                self.x.at[
                    pl.ds(group * images, images),
                    pl.ds(rows * load, rows),
                    # Pallas refuses windows beyond an array's end where it knows their start.
                    pl.ds(0 * load, columns),
                    pl.ds(channel_block * CHANNELS, CHANNELS),
                ],
                self.rows.at[stage],
                self.full.at[stage],
            )

        last = load == tiling.loads - 1
        after = jnp.where(last, task + tiling.blocks, task), jnp.where(last, 0, load + 1)
        return next_stage(stage, tiling.stages), *after

    def coefficient(
        self, level: int, band: Index, row: Index, j: Index, shift: int = 0, pair: int | None = None
    ) -> Ref:
        """Returns a view of column j of each strip of a row of a band.

        Args:
            level: The level, counted from 0, which is the first of this launch.
            band: The number of the band.
            row: The row of the level.
            j: The column of the level in a strip, or of the next level if `pair` is given.
            shift: Columns to add to j, which may lead into the halo.
            pair: Which of the two columns that the next level's column j is computed from.
        """
        tiled = self.tiling.levels[level if pair is None else level + 1]
        parts = 1 if pair is None else 2
        columns, first = tiled.strips * tiled.columns * parts, tiled.halo + shift
        # The index is in two parts, so that its static part is not added at each load.
        line = self.bands[level].at[
            band, :, pl.ds(row * self.tiling.levels[level].pitch, first + columns)
        ]
        return self.view(line.at[:, pl.ds(first, columns)], tiled.columns, parts, j, pair or 0)

    def within(self, value: jax.Array, limit: int, each: int, j: int) -> jax.Array:
        """Returns `value`, or zero where column j of a strip, `each` wide, reaches `limit`."""
        images, strips, _ = shape = self.tiling.shape
        if (strips - 1) * each + j < limit:
            return value
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)
        strip = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        return jnp.where(strip * each + j < limit, value, 0.0)

    def rows_of(self, level: int, one: Callable[[Index], None]) -> None:
        """Calls `one` for this warpgroup's part of the rows of a level."""

        def row(t: Index, carry: tuple[()]) -> tuple[()]:
            one(self.warpgroup + t * WARPGROUPS)
            return ()

        rows = self.tiling.levels[level].height - self.warpgroup + WARPGROUPS - 1
        lax.fori_loop(0, lax.div(rows, WARPGROUPS), row, ())

    def stream(self, i: Index, state: PipelineState) -> tuple[PipelineState, list[jax.Array]]:
        """Runs the pipeline over all rows of a task: analyses two levels, and filters the first.

        Args:
            i: The number of the task.
            state: The state of the pipeline, whose stage holds the first rows of the task.

        Returns:
            The state for the next task, and the sums of the last rows, for `filter_last`.
        """
        tiling = self.tiling
        level, delay = tiling.levels[0], tiling.delay
        taps = self.taps_of(0, i)

        def advance(s: Index, state: PipelineState) -> PipelineState:
            stages = [state[0]]
            while 2 * len(stages) < tiling.side:
                stages.append(next_stage(stages[-1], tiling.stages))
            inside = s < level.height
            pl.when(inside)(partial(self.analyse_rows, stages, s))
            self.warpgroup_barrier()
            after = state
            for _ in stages:
                after = self.load_next(after, inside)
            if len(tiling.levels) > 1:
                pair = lax.div(s, 2)

                @pl.when((lax.rem(s, 2) == 1) & (pair < tiling.levels[1].height))
                def _() -> None:
                    self.analyse_low(1, pair, split=True)

            stage, task, load = (jnp.where(inside, *two) for two in zip(after, state, strict=True))
            return stage, task, load

        def step(
            s: Index, carry: tuple[PipelineState, list[jax.Array]]
        ) -> tuple[PipelineState, list[jax.Array]]:
            state, sums = carry
            return advance(s, state), self.filter_row(0, s - delay, sums, taps)

        state = lax.fori_loop(0, delay, advance, state)
        carry = state, self.zeros(2 * level.radius * level.columns)
        return lax.fori_loop(delay, level.height + delay, step, carry)

    def analyse_rows(self, stages: list[Index], row: Index) -> None:
        """Reduces the rows of x in these stages to a row of all bands of the first level."""
        for stage in stages:
            plgpu.barrier_wait(self.full.at[stage])

        def low(j: Index, v: int, e: int) -> jax.Array:
            if self.tiling.first > 2:
                return self.pixel(stages[0], v, j, e)
            upper, lower = (
                self.pixel(stages[v], half, j, 2 * e) + self.pixel(stages[v], half, j, 2 * e + 1)
                for half in range(2)
            )
            return (upper + lower) * 0.5

        self.analyse(0, row, low, split=True)

    def pixel(self, stage: Index, row: int, j: Index, part: int) -> jax.Array:
        """Returns one of the values of x in column j of each strip of a stage's row, as float32."""
        line, columns = self.rows.at[stage, :, row], self.tiling.levels[0].columns
        return self.view(line, columns, self.tiling.side, j, part)[...].astype(jnp.float32)

    def analyse_low(self, level: int, row: Index, split: bool) -> None:
        """Reduces two rows of the low band of the level above to a row of all bands of a level."""

        def low(j: Index, v: int, e: int) -> jax.Array:
            return self.coefficient(level - 1, 0, 2 * row + v, j, pair=e)[...] * 0.5

        self.analyse(level, row, low, split)

    def analyse(
        self, level: int, row: Index, low: Callable[[Index, int, int], jax.Array], split: bool
    ) -> None:
        """Writes a row of all bands, twice as large as they are, from the low band as it is.

        Args:
            level: The level, counted from 0, which is the first of this launch.
            row: The row of the level.
            low: Returns, for (j, v, e), row v and column e of the 2 x 2 squares of column j.
            split: Whether the warpgroups share the columns of the row.
        """
        columns = self.tiling.levels[level].columns

        def one(j: Index) -> None:
            values = butterfly.split(*(low(j, v, e) for v, e in product(range(2), range(2))))
            for band, value in enumerate(values):
                self.coefficient(level, band, row, j)[...] = value

        if not split:
            for j in range(columns):
                one(j)
            return
        for first in range(0, columns, WARPGROUPS):
            column = first + self.warpgroup
            pl.when(column < columns)(partial(one, column))

    def taps_of(self, level: int, i: Index) -> list[list[jax.Array]]:
        """Returns the taps of this warpgroup's band, of a level counted from 0."""
        _, channel_block = self.place(self.task(i))
        return self.kernel(channel_block, self.tiling.first + level)

    def filter(self, level: int, taps: list[list[jax.Array]]) -> None:
        """Filters this warpgroup's band, in place."""
        tiled = self.tiling.levels[level]
        if tiled.height <= self.size:
            self.filter_low(level, taps)
            return

        def one(row: Index, sums: list[jax.Array]) -> list[jax.Array]:
            sums = self.filter_row(level, row, sums, taps)
            self.fence_smem()
            return sums

        sums = self.zeros(2 * tiled.radius * tiled.columns)
        self.filter_last(level, lax.fori_loop(0, tiled.height, one, sums))

    def filter_low(self, level: int, taps: list[list[jax.Array]]) -> None:
        """Filters a band of few rows in place, without products with zeros above and below it."""
        tiled = self.tiling.levels[level]
        rows = [self.neighbours(level, row) for row in range(tiled.height)]
        self.fence_smem()
        for row in range(tiled.height):
            totals: Sequence[jax.Array | None] = [None] * tiled.columns
            for d, found in enumerate(rows, tiled.radius - row):
                if 0 <= d < self.size:
                    totals = self.add_products(totals, found, taps[d])
            self.keep(level, row, cast(list[jax.Array], totals))

    def fence_smem(self) -> None:
        """Waits until all threads of the warpgroup have read what results overwrite.

        Threads read each other's columns only where a row has several strips.
        """
        if self.tiling.strips > 1:
            plgpu.commit_smem()

    def neighbours(self, level: int, row: Index) -> dict[int, jax.Array]:
        """Returns a row of this warpgroup's band by column, those beside each strip included."""
        tiled = self.tiling.levels[level]
        return {
            j: self.coefficient(level, self.warpgroup, row, 0, j)[...]
            for j in range(-tiled.halo, tiled.columns + tiled.halo)
        }

    def filter_row(
        self, level: int, row: Index, sums: list[jax.Array], taps: list[list[jax.Array]]
    ) -> list[jax.Array]:
        """Adds a row to the `size` open rows of results, and keeps the one that it completes.

        Returns:
            The sums of the rows that are still open.
        """
        columns, radius = self.tiling.levels[level].columns, self.tiling.levels[level].radius
        found = self.neighbours(level, row)
        totals = []
        rows: list[jax.Array | None] = [*sums, *[None] * columns]
        for open_row, tap in enumerate(reversed(taps)):
            totals += self.add_products(rows[open_row * columns :][:columns], found, tap)

        @pl.when(row >= radius)
        def _() -> None:
            self.keep(level, row - radius, totals[:columns])

        return totals[columns:]

    def filter_last(self, level: int, sums: list[jax.Array]) -> None:
        """Keeps the last rows of results, which only zeros below the image were missing for."""
        tiled = self.tiling.levels[level]
        for late in range(tiled.radius):
            row = tiled.height - tiled.radius + late
            if row >= 0:
                self.keep(level, row, sums[late * tiled.columns :][: tiled.columns])

    def keep(self, level: int, row: Index, values: list[jax.Array]) -> None:
        """Writes a row of results into this warpgroup's band."""
        tiled = self.tiling.levels[level]
        for j, value in enumerate(values):
            value = self.within(value, tiled.width, tiled.columns, j)
            self.coefficient(level, self.warpgroup, row, j)[...] = value

    def pixels(self, level: int, row: Index, j: int) -> list[tuple[jax.Array, jax.Array]]:
        """Returns the synthesis of a level in a row of coefficients and column j of the strips."""
        found = (self.coefficient(level, band, row, j)[...] for band in range(WARPGROUPS))
        a, b, c, d = butterfly.merge(*found)
        return [(a, b), (c, d)]

    def synthesise(self, level: int, row: Index) -> None:
        """Adds a row of a level's synthesis to the low band of the level above it."""
        above, each = self.tiling.levels[level - 1], 2 * self.tiling.levels[level].columns
        for j in range(each // 2):
            found = self.pixels(level, row, j)

            def add(v: int, j: int = j, found: list[tuple[jax.Array, jax.Array]] = found) -> None:
                for e, value in enumerate(found[v]):
                    value = self.within(value, above.width, each, 2 * j + e)
                    low = self.coefficient(level - 1, 0, 2 * row + v, j, pair=e)
                    low[...] = low[...] + value

            add(0)
            # The row below the last of an odd number stays zero.
            pl.when(2 * row + 1 < above.height)(partial(add, 1))

    def store(self, i: Index, row: Index) -> None:
        """Stores a row of the synthesis of the first level to global memory."""
        group, channel_block = self.place(self.task(i))
        times = self.tiling.across // 2
        for j in range(self.tiling.levels[0].columns):
            for v, values in enumerate(self.pixels(0, row, j)):
                for e, value in enumerate(values):
                    rounded = value.astype(self.y.dtype)
                    for column in range(e * times, (e + 1) * times):
                        to = self.y.at[group, :, row, v, :, j, column, channel_block]
                        to[...] = rounded
