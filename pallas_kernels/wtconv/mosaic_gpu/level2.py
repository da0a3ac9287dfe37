"""The kernel of level 2, straight from the image, in one launch for images of any size.

It returns half the synthesis of this level alone, and the low band that deeper levels begin with:
these are another launch, and level 1 adds the results of both. So no level waits for a deeper one,
and the low band of level 1, a quarter of the image, is never in global memory.

- **Tiles and halo:** those of `tiles`, with 4 x 4 pixels a coefficient. A step brings four rows of
  pixels, with `4 * radius` columns of halo at each side. Tiles follow each other without a pause:
  the rows below an image, or of the halo above a tile, flush the sums.
- **Pipeline:** 2 to 8 stages, as many as shared memory holds; the prologue fills all of them.
- **Warpgroups:** four consumers that do the same, of which the last is the producer as well. Each
  step is a software pipeline of three parts, each a row behind the one before it:

  - analysis: each warpgroup reduces four rows of pixels in some columns to a row of all bands;
  - filtering: each filters one band, whose taps and open sums it holds in registers;
  - synthesis: each synthesises some columns of a row of the four filtered bands, and stores them.

- **mbarriers:** `full` of a stage, on which its one TMA load arrives. There is no `empty`: a step
  ends with a barrier of all warpgroups, after which its stage is free to be filled again, and the
  rows of bands and of filtered bands, of which there are two buffers each, change places.
- **Stores:** straight from registers to global memory, without TMA.
- **Registers:** no `setmaxnreg`, since all roles are alike: 128 for each of 512 threads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mosaic_gpu_call
from pallas_kernels.common.mosaic_gpu import SHARED, next_stage, size_in_bytes
from pallas_kernels.common.types import Index, Ref
from pallas_kernels.haar.butterfly import merge, split
from pallas_kernels.wtconv.mosaic_gpu.bands import WARPGROUPS, BandsBlock
from pallas_kernels.wtconv.mosaic_gpu.tiles import CHANNELS, STRIPS, Tiled, Tiling, launch, tilings

__all__ = ["level2"]

_MIN_STAGES, _MAX_STAGES = 2, 8
"""The fewest and the most stages of the pipeline, of four rows of pixels each."""
_MAX_WAVES = 4
"""A tiling is chosen among those whose blocks fill the GPU at most so many times."""

Position = tuple[Index, Index, Index, Index]
"""The index of a block's tile, a step in it, and the tile's group of images and first row."""


Carry = tuple[Index, Position, Position, list[jax.Array]]
"""The stage of a step, the positions of the step to load and of the step itself, and open sums."""


@dataclass(frozen=True)
class _Tiling(Tiling):
    """A tiling with 4 x 4 pixels a coefficient, and one, two or four images a tile."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one value a thread of a warpgroup."""
        return self.images, self.strips, CHANNELS

    @property
    def analysed(self) -> int:
        """The number of columns of a strip in analysis, where strips share the halo as well."""
        return pl.cdiv(self.width + 2 * self.radius, self.strips)

    @property
    def skipped(self) -> int:
        """The number of steps of a tile before the one that completes its first row of results."""
        return self.halo_rows + self.radius

    @property
    def steps(self) -> int:
        """The number of steps of a tile; its last row is stored in the last of them."""
        return self.skipped + self.rows + 1

    @property
    def stage_shape(self) -> tuple[int, ...]:
        """The shape of a pipeline stage."""
        return self.images, 4, 4 * self.strips * self.analysed, CHANNELS

    @property
    def bands(self) -> tuple[int, ...]:
        """The shape of two rows of all bands, with halo: one is written and one is filtered."""
        return 2, WARPGROUPS, self.images, self.strips * self.analysed, CHANNELS

    @property
    def filtered(self) -> tuple[int, ...]:
        """The shape of two rows of filtered bands: one is written and one is synthesised."""
        return 2, WARPGROUPS, self.images, self.width, CHANNELS

    def stages(self, dtype: jnp.dtype) -> int:
        """Returns how many pipeline stages shared memory has room for."""
        taken = math.prod(self.bands) + math.prod(self.filtered)
        left = SHARED - size_in_bytes((taken,), jnp.dtype("float32"))
        return min(_MAX_STAGES, left // size_in_bytes(self.stage_shape, dtype))

    @property
    def step_cost(self) -> int:
        """The estimated cost of one step, in columns."""
        return super().step_cost + self.analysed


@cache
def _tiling(shape: tuple[int, ...], dtype: jnp.dtype, kernel_size: int) -> _Tiling:
    """Returns the tiling of x `[N, H, W, C]` whose busiest multiprocessor has the least work."""
    found = tilings(_Tiling, shape, 4, kernel_size, (1, 2, STRIPS), _MAX_WAVES)
    return min(
        (tiling for tiling in found if tiling.stages(dtype) >= _MIN_STAGES),
        key=lambda tiling: tiling.cost,
    )


def level2(
    x: jax.Array, taps: jax.Array, kernel_size: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns half the synthesis of level 2 alone, and the low band of level 2.

    Args:
        x: `[N, H, W, C]`.
        taps: The taps of all levels with their factors, `[channel_blocks, rows, STRIPS, CHANNELS]`.
        kernel_size: The height and width of the kernel.
        dtype: The dtype of both results.

    Returns:
        The synthesis, `[N, H / 2, W / 2, C]` or larger: what lies beyond that is undefined. And the
        low band, `[N, H / 4, W / 4, C]`, with zeros up to a whole block of channels.
    """
    n, h, w, _ = x.shape
    tiling = _tiling(x.shape, x.dtype, kernel_size)
    stages = tiling.stages(x.dtype)
    # Strips and channel blocks are axes of their own, so that every store is a plain slice.
    rows, strips = tiling.row_blocks * tiling.rows, tiling.column_blocks * tiling.strips
    low = (
        *(tiling.groups, tiling.images, rows, strips),
        *(tiling.columns, tiling.channel_blocks, CHANNELS),
    )
    y = *low[:3], 2, *low[3:5], 2, *low[5:]

    names = "x", "taps", "y", "low", "rows", "bands", "filtered", "full", "arrived"

    def body(*refs: Ref) -> None:
        _Block(tiling=tiling, stages=stages, **dict(zip(names, refs, strict=True))).run()

    y, low = mosaic_gpu_call.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape in (y, low)],
        scratch_types=[
            plgpu.SMEM((stages, *tiling.stage_shape), x.dtype),
            plgpu.SMEM(tiling.bands, jnp.float32),
            plgpu.SMEM(tiling.filtered, jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        **launch(tiling),
    )(x, taps.reshape(*taps.shape[:2], *tiling.shape))
    width, channels = strips * tiling.columns, tiling.channel_blocks * CHANNELS
    images = tiling.groups * tiling.images
    low = low.reshape(images, rows, width, channels)
    return (
        y.reshape(images, 2 * rows, 2 * width, channels),
        low[:n, : pl.cdiv(h, 4), : pl.cdiv(w, 4)],
    )


@dataclass(frozen=True, kw_only=True)
class _Block(BandsBlock, Tiled):
    """One block of `level2`: its references, and what each of its warpgroups does.

    All four warpgroups are consumers of the pipeline's stages, and wait for each other at one
    mbarrier a step; the last is the producer of the TMA loads too.

    Attributes:
        stages: How many stages the pipeline has.
        y: The synthesis in global memory.
        low: The low band in global memory.
        bands: Two rows of all bands in shared memory.
        filtered: Two rows of all filtered bands in shared memory.
    """

    tiling: _Tiling
    stages: int
    y: Ref
    low: Ref
    bands: Ref
    filtered: Ref

    def run(self) -> None:
        """Runs the pipeline over all steps of all tiles."""
        # The bands are four times as large as they should be, not twice.
        taps = [[0.5 * tap for tap in row] for row in self.kernel(self.place[0], 2)]
        total_steps = self.total_steps

        def two_steps(t: Index, carry: Carry) -> Carry:
            # The loop is unrolled by two, so that the buffers of rows have static indices.
            for new in range(2):
                stage, to_load, position, sums = carry
                inside = 2 * t + new < total_steps
                pl.when(inside)(partial(self.analyse, stage, new))
                sums = self.filter(1 - new, new, taps, sums)
                self.store(position, 1 - new)
                self.warpgroup_barrier()
                to_load = self.load_stage(stage, to_load)
                carry = next_stage(stage, self.stages), to_load, self.after(position), sums
            return carry

        group, row = self.origin(0)
        zero = jnp.int32(0)
        to_load = lax.fori_loop(0, self.stages, self.load_stage, (zero, zero, group, row))
        # The first step filters this row of zeros, since no row of the tile has come in yet.
        self.clear(1)
        self.warpgroup_barrier()
        carry = zero, to_load, (zero, jnp.int32(-1), group, row)
        lax.fori_loop(0, lax.div(total_steps + 2, 2), two_steps, (*carry, self.zeros(self.open)))

    @property
    def open(self) -> int:
        """The number of sums of rows that are not complete."""
        return 2 * self.tiling.radius * self.tiling.columns

    def after(self, position: Position) -> Position:
        """Returns the position of the next step."""

        def next_tile(i: Index, *_: Index) -> Position:
            return i + 1, jnp.int32(0), *self.origin(i + 1)

        def next_step(i: Index, s: Index, group: Index, row: Index) -> Position:
            return i, s + 1, group, row

        return lax.cond(position[1] == self.tiling.steps - 1, next_tile, next_step, *position)

    def clear(self, buffer: int) -> None:
        """Fills one of the two rows of this warpgroup's band with zeros."""
        (zero,) = self.zeros(1)
        row = self.bands.at[buffer, self.warpgroup]
        for j in range(self.tiling.analysed):
            self.view(row, self.tiling.analysed, 1, j)[...] = zero

    def load_stage(self, stage: Index, position: Position) -> Position:
        """Issues the TMA load of a step's rows, if there is one, and returns the next position.

        The last warpgroup is the producer; the others only count.
        """
        tiling = self.tiling
        i, s, group, row = position
        images, height, columns = tiling.stage_shape[:3]

        @pl.when((self.warpgroup == WARPGROUPS - 1) & (i < self.count))
        def _() -> None:
            channel_block, column_block = self.place
            plgpu.copy_gmem_to_smem(
                self.x.at[
                    pl.ds(group * images, images),
                    pl.ds(4 * (row + s - tiling.halo_rows), height),
                    pl.ds(4 * (column_block * tiling.width - tiling.radius), columns),
                    pl.ds(channel_block * CHANNELS, CHANNELS),
                ],
                self.rows.at[stage],
                self.full.at[stage],
            )

        return self.after(position)

    def neighbour(self, row: Ref, j: int) -> Ref:
        """Returns a view of column j of each strip, halo included, of a row of a band."""
        tiling = self.tiling
        first = min(j, row.shape[1] - tiling.width)
        # The index is in two parts, so that its static part is not added at each load.
        return self.view(row.at[:, pl.ds(first, tiling.width)], tiling.columns, 1, j - first)

    def share(self, columns: int, one: Callable[[Index], None]) -> None:
        """Calls `one` for this warpgroup's columns of each strip."""
        for first in range(0, columns, WARPGROUPS):
            j = first + self.warpgroup
            if first + WARPGROUPS <= columns:
                one(j)
            else:
                pl.when(j < columns)(partial(one, j))

    def analyse(self, stage: Index, to: int) -> None:
        """Reduces a stage's four rows of pixels to a row of all bands, four times as large."""
        tiling = self.tiling
        plgpu.barrier_wait(self.full.at[stage])

        def low(j: Index, v: int, e: int) -> jax.Array:
            upper, lower = (
                self.pixel(stage, row, j, 2 * e) + self.pixel(stage, row, j, 2 * e + 1)
                for row in (2 * v, 2 * v + 1)
            )
            return upper + lower

        def one(j: Index) -> None:
            values = split(*(low(j, v, e) for v, e in product(range(2), range(2))))
            for band, value in enumerate(values):
                self.view(self.bands.at[to, band], tiling.analysed, 1, j)[...] = value

        self.share(tiling.analysed, one)

    def pixel(self, stage: Index, row: int, j: Index, part: int) -> jax.Array:
        """Returns one of the four pixels in column j of each strip of a stage's row, as float32."""
        line = self.rows.at[stage, :, row]
        return self.view(line, self.tiling.analysed, 4, j, part)[...].astype(jnp.float32)

    def filter(
        self, buffer: int, to: int, taps: list[list[jax.Array]], sums: list[jax.Array]
    ) -> list[jax.Array]:
        """Adds a row of a band to the open rows of results, and keeps the one that it completes.

        Args:
            buffer: The row of `bands` to read.
            to: The row of `filtered` to write.
            taps: The taps of this warpgroup's band.
            sums: The sums of the open rows.

        Returns:
            The sums of the rows that are still open.
        """
        columns, radius = self.tiling.columns, self.tiling.radius
        row = self.bands.at[buffer, self.warpgroup]
        new: list[jax.Array | None] = [None] * columns
        found = {j: self.neighbour(row, j + radius)[...] for j in range(-radius, columns + radius)}
        open_rows: list[Sequence[jax.Array | None]] = [
            *(sums[i : i + columns] for i in range(0, len(sums), columns)),
            new,
        ]
        first, *others = open_rows
        last, *above = reversed(taps)
        done = self.add_products(first, found, last)
        # This is done before sums of the next row begin, which take the registers of these.
        row = self.filtered.at[to, self.warpgroup]
        for j, total in enumerate(done):
            self.view(row, columns, 1, j)[...] = total
        return [
            total
            for open_row, tap in zip(others, above, strict=True)
            for total in self.add_products(open_row, found, tap)
        ]

    def store(self, position: Position, buffer: int) -> None:
        """Stores what was complete before this step: a row of the low band, and of the synthesis.

        Args:
            position: The step before this one, which analysed the row of the low band.
            buffer: The row of `bands` and the row of `filtered` to read.
        """
        tiling = self.tiling
        i, s, group, row = position
        channel_block, column_block = self.place
        own = pl.ds(column_block * tiling.strips, tiling.strips)
        low_row, result_row = s - tiling.halo_rows, s - tiling.skipped - 1
        line = self.bands.at[buffer, 0, :, pl.ds(tiling.radius, tiling.width)]

        def store_low(j: Index) -> None:
            low = (0.25 * self.view(line, tiling.columns, 1, j)[...]).astype(self.low.dtype)
            self.low.at[group, :, row + low_row, own, j, channel_block][...] = low

        def store_square(j: Index) -> None:
            found = (
                self.view(self.filtered.at[buffer, band], tiling.columns, 1, j)[...]
                for band in range(WARPGROUPS)
            )
            corners = product(range(2), range(2))
            for (v, e), value in zip(corners, merge(*found), strict=True):
                to = self.y.at[group, :, row + result_row, v, own, j, e, channel_block]
                to[...] = value.astype(self.y.dtype)

        @pl.when((low_row >= 0) & (low_row < tiling.rows) & (i < self.count))
        def _() -> None:
            self.share(tiling.columns, store_low)

        @pl.when((result_row >= 0) & (i < self.count))
        def _() -> None:
            self.share(tiling.columns, store_square)
