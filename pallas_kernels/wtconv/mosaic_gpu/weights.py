"""The kernel of the taps' gradients: bands of x correlated with those of dy, a launch a level.

Each launch stores the low bands of both for the next one, since it has them in registers.

- **Tiles and halo:** those of `tiles`, with one wave of blocks. A step brings two rows of dy, that
  is one row of coefficients, and the two rows of x that lie `radius` steps above, with
  `2 * radius` columns of halo at each side.
- **Pipeline:** as many stages as shared memory holds, at most 8. Pixels of dy are used `dy_delay`
  steps after they come in. So in level 1 the prologue leaves as many stages and one more unfilled;
  in deeper levels, where one warpgroup only loads, it fills all.
- **Warpgroups:** four. 0 and 1 are consumers that correlate one pair of bands each, (LL, LH) and
  (HL, HH). In level 1, for the base convolution, 2 and 3 are consumers that correlate x with the
  upper and the lower rows of pixels of dy, and 3 is the producer of all TMA loads as well. In
  deeper levels 3 is the producer alone, and 2 is idle.
- **mbarriers:** `full` of a stage has one arrival for each of two TMA loads, x and dy; `empty` has
  one for each consumer warpgroup. The epilogue of the producer drains `empty`.
- **Stores:** a thread has a sum for each tap in registers. The epilogue adds up the strips of a
  block in shared memory, and stores the sums to global memory, without TMA; XLA adds up the blocks.
- **Registers:** 152 a thread in warpgroups 0 and 1, 104 in 2 and 3 (`setmaxnreg`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mosaic_gpu_call
from pallas_kernels.common._compat import in_32_bits, vary_like
from pallas_kernels.common.mosaic_gpu import (
    MULTIPROCESSORS,
    SHARED,
    Scratch,
    aligned,
    next_stage,
    size_in_bytes,
)
from pallas_kernels.common.types import Index, Ref, Slice
from pallas_kernels.wtconv.mosaic_gpu.tiles import (
    CHANNELS,
    MIN_ROWS,
    REGISTERS,
    STRIPS,
    Block,
    PipelineState,
    Step,
    drain,
    handoff_dtype,
    launch,
    tiling_of,
    zeros,
)

__all__ = ["weight_grad"]

_MAX_STAGES = 8
"""The most stages of the pipeline."""

Signals = tuple[jax.Array, jax.Array]
"""x and dy, or their low bands."""


@partial(jax.jit, static_argnames=("kernel_shapes", "wavelet", "precision"))
@in_32_bits
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of the taps: each level's bands of x correlated with those of dy.

    If the last shape is that of a bias, the last result is its gradient, the sum of dy. Every sum
    runs in a fixed order, so the gradients are bitwise reproducible.
    """
    inputs = x, dy
    channels = x.shape[-1]
    biased = len(kernel_shapes[-1]) == 1
    kernel_size, levels = kernel_shapes[0][0], len(kernel_shapes) - 1 - biased
    pair = aligned(x, x.dtype), aligned(dy, dy.dtype)
    first, *others = _parts(x.shape) if levels > 1 else [range(x.shape[0])]
    sums = _sums(pair, kernel_size, levels, first)
    for images in others:
        # The parts run one after the other, so that the low bands of only one are in memory.
        pair, sums = lax.optimization_barrier((pair, sums))
        more = _sums(pair, kernel_size, levels, images)
        sums = [one + other for one, other in zip(sums, more, strict=True)]
    base, *fine = sums
    # The sum of dy follows the base's taps.
    sums = [base[:-1], *fine, *([base[-1]] if biased else [])]
    return vary_like(
        inputs,
        tuple(
            one[..., :channels].reshape(shape)
            for one, shape in zip(sums, kernel_shapes, strict=True)
        ),
    )


def _parts(shape: tuple[int, ...]) -> list[range]:
    """Returns two halves of the images, if they are whole tiles and fill the GPU, else all."""
    n, h, _, c = shape
    tiles = n // 2 * pl.cdiv(c, CHANNELS) * pl.cdiv(h, 2 * MIN_ROWS)
    if n % (2 * STRIPS) or tiles < MULTIPROCESSORS:
        return [range(n)]
    return [range(n // 2), range(n // 2, n)]


def _sums(pair: Signals, kernel_size: int, levels: int, images: range) -> list[jax.Array]:
    """Returns sums over some of the images: `[k * k + 1, C]`, and `[k * k, 4, C]` of each level."""
    base, fine, pair = _level_weights(pair, kernel_size, levels > 1, images, first=True)
    assert base is not None
    found = [base, fine]
    for level in range(2, levels + 1):
        whole = range(pair[0].shape[0])
        _, fine, pair = _level_weights(pair, kernel_size, level < levels, whole, first=False)
        found.append(fine)
    return found


def _level_weights(
    pair: Signals, kernel_size: int, deeper: bool, images: range, first: bool
) -> tuple[jax.Array | None, jax.Array, Signals]:
    """Correlates the bands of x with those of dy, and in the first level x itself with dy.

    Args:
        pair: x and dy, `[N, H, W, C]`.
        kernel_size: The height and width k of the kernel.
        deeper: Whether to return low bands.
        images: The images to sum over.
        first: Whether it is the first level.

    Returns:
        The sums of the base convolution, `[k * k + 1, C]`, of which the last sums dy, or None in a
        deeper level; the sums of the bands, `[k * k, 4, C]`; and the low bands of x and dy,
        `[images, H / 2, W / 2, C]` with zeros up to whole tiles, or none.
    """
    x, dy = pair
    n, channels = len(images), x.shape[-1]
    # There is one wave of blocks, since each stores sums of its own.
    tiling = tiling_of((n, *x.shape[1:]), kernel_size, max_waves=1)
    image = (tiling.images, 2, 2 * tiling.width + 4 * tiling.radius, CHANNELS)
    other = (tiling.images, 2, 2 * tiling.width, CHANNELS)
    units = tiling.column_blocks * tiling.channel_blocks
    taps = kernel_size**2

    def shape(count: int) -> tuple[int, ...]:
        """Returns the shape of `count` sums of each of two warpgroups, stored four at a time."""
        return tiling.splits, units, 2, pl.cdiv(count, STRIPS) * STRIPS, CHANNELS

    # Strips and channel blocks are axes of their own, so that every store is a plain slice.
    groups, rows = pl.cdiv(n, tiling.images), tiling.row_blocks * tiling.rows
    strips = tiling.column_blocks * tiling.strips
    low = groups, tiling.images, rows, strips, tiling.columns, tiling.channel_blocks, CHANNELS
    outputs = {"bands": jax.ShapeDtypeStruct(shape(2 * taps), jnp.float32)}
    if first:
        outputs["base"] = jax.ShapeDtypeStruct(shape(taps + 1), jnp.float32)
    if deeper:
        outputs |= {f"low_{of}": jax.ShapeDtypeStruct(low, handoff_dtype(x)) for of in ("x", "dy")}
    totals = (4, STRIPS, STRIPS, CHANNELS)
    left = SHARED - size_in_bytes(totals, jnp.dtype("float32"))
    stage_size = size_in_bytes(image, x.dtype) + size_in_bytes(other, dy.dtype)
    stages = min(_MAX_STAGES, left // stage_size)
    scratch: dict[str, Scratch] = {
        "rows": plgpu.SMEM((stages, *image), x.dtype),
        "dy_rows": plgpu.SMEM((stages, *other), dy.dtype),
        "strips": plgpu.SMEM(totals, jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=4 if first else 2, num_barriers=stages),
    }
    names = ["x", "dy", *outputs, *scratch]

    def body(*refs: Ref) -> None:
        block = dict(zip(names, refs, strict=True))
        _WeightsBlock(tiling=tiling, stages=stages, start=images.start, **block).run()

    found = mosaic_gpu_call.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        **launch(tiling),
    )(x, dy)
    by_name = dict(zip(outputs, found, strict=True))

    def total(sums: jax.Array, count: int) -> jax.Array:
        """Returns `[splits, units, 2, sums, channels]`, summed over blocks, as `[2, count, C]`."""
        blocks = tiling.column_blocks, tiling.channel_blocks
        sums = sums.sum(0).reshape(*blocks, *sums.shape[2:]).sum(0)
        return jnp.moveaxis(sums, 0, -2).reshape(*sums.shape[1:-1], -1)[:, :count, :channels]

    bands = total(by_name["bands"], 2 * taps).reshape(2, taps, 2, channels)
    # The transforms of x and of dy leave out their factors 1/2.
    bands = 0.25 * jnp.moveaxis(bands, 0, 1).reshape(taps, 4, channels)
    base = total(by_name["base"], taps + 1).sum(0) if first else None
    whole = groups * tiling.images, rows, strips * tiling.columns, tiling.channel_blocks * CHANNELS
    lows = [by_name[f"low_{of}"].reshape(whole) for of in ("x", "dy") if deeper]
    return base, bands, tuple(lows)


Carry = TypeVar("Carry")
Window = list[list[jax.Array] | None]
"""The values of rows of dy, None for a row of zeros."""
BandsCarry = tuple[Index, list[jax.Array]]
"""The stage of a step, and the sums."""
PixelsCarry = tuple[Index, Index, PipelineState | tuple[()], list[jax.Array]]
"""The stages of rows of x and of dy, the producer's state, which only it has, and the sums."""


@dataclass(frozen=True, kw_only=True)
class _WeightsBlock(Block):
    """One block of `_level_weights`: its references, and what each of its warpgroups does.

    Warpgroups 0 and 1 (`correlate_bands`), and in level 1 also 2 and 3 (`correlate_pixels`), are
    consumers of the pipeline's stages. 3 is the producer of the TMA loads, and in deeper levels
    nothing else (`produce`).

    A consumer keeps a window of the rows of dy that a row of x is a neighbour of, and a sum for
    each tap, in registers.

    Attributes:
        start: The first image.
        dy: The gradient of the result in global memory.
        dy_rows: The stages for dy in shared memory.
        strips: Shared memory to add up strips in, for each warpgroup.
        bands: The sums of the bands in global memory.
        base: The sums of the base convolution in global memory, None in a deeper level.
        low_x: The low band of x in global memory, None if it is not stored.
        low_dy: The low band of dy in global memory, None if it is not stored.
    """

    start: int
    dy: Ref
    dy_rows: Ref
    strips: Ref
    bands: Ref
    base: Ref = None
    low_x: Ref = None
    low_dy: Ref = None

    def run(self) -> None:
        """Runs the role of this warpgroup."""
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup < 2)(partial(self.correlate_bands, warpgroup))
        if self.base is not None:
            pl.when(warpgroup == 2)(partial(self.correlate_pixels, 0))
            pl.when(warpgroup == 3)(partial(self.correlate_pixels, 1))
        else:
            # All four warpgroups must run, so that two can give up registers to the others.
            pl.when(warpgroup == 2)(self.idle)
            pl.when(warpgroup == 3)(self.produce)

    @property
    def dy_delay(self) -> int:
        """The number of steps after which rows of pixels of dy are used, once they have come in."""
        return self.tiling.radius - self.tiling.delay

    @property
    def prefilled(self) -> int:
        """The number of stages that the prologue fills, which is all where a warpgroup only loads.

        Else it leaves those unfilled that rows of dy wait in, and one more.
        """
        return self.stages if self.base is None else self.stages - self.dy_delay - 1

    def window(self, step: Step) -> tuple[Slice, jax.Array, jax.Array, Slice]:
        """Returns the images, first row, column block and channels of a step."""
        images, row, column_block, channels = super().window(step)
        images = pl.ds(self.start + images.start, self.tiling.images)
        return images, row, column_block, channels

    def load_stage(self, stage: Index, step: Step) -> None:
        """Issues the two TMA loads of a step, of rows of x and of dy."""
        self.load_rows(stage, step, self.tiling.radius)
        images, row, column_block, channels = self.window(step)
        columns = pl.ds(2 * column_block * self.tiling.width, 2 * self.tiling.width)
        plgpu.copy_gmem_to_smem(
            self.dy.at[images, pl.ds(2 * row, 2), columns, channels],
            self.dy_rows.at[stage],
            self.full.at[stage],
        )

    def over_a_tile(
        self,
        step: Callable[[Index, Carry, Window, bool, bool], tuple[Carry, Window]],
        carry: Carry,
        window: int,
        columns: int,
        delay: int,
    ) -> Carry:
        """Runs the steps of a tile; those whose rows are known to be zero are unrolled.

        Args:
            step: Called with its number, what it carries, the window, whether its rows of x may be
                other than zero, and whether its row of dy is one of the tile's; returns what it
                carries and the window.
            carry: The value that the first step gets; that of the last one is returned.
            window: The number of rows of dy that a step keeps, each a list of values or None if
                it is zero.
            columns: The number of values of such a row.
            delay: The number of steps after which a row of dy is used, once it has come in.
        """
        tiling = self.tiling
        # So many rows lie above an image.
        above = tiling.radius if tiling.row_blocks == 1 else 0
        first, last = max(above, delay), tiling.rows + delay
        rows: Window = [None] * window
        for s in range(first):
            carry, rows = step(s, carry, rows, s >= above, delay <= s < last)
        rows = [zeros(columns) if row is None else row for row in rows]
        # Unrolled by two, the loop would move rows of the window half as often, but take a quarter
        # longer: the code of all warpgroups must stay in the instruction cache.
        carry, rows = lax.fori_loop(
            first, last, lambda s, state: step(s, state[0], state[1], True, True), (carry, rows)
        )
        for s in range(max(first, last), tiling.steps):
            carry, rows = step(s, carry, rows, True, False)
        return carry

    def correlate_bands(self, pair: Index) -> None:
        """Correlates (LL, LH), or (HL, HH) if `pair` is 1, and stores the sums."""
        plgpu.set_max_registers(REGISTERS["bands"], action="increase")
        tiling, size, columns = self.tiling, self.size, self.tiling.columns
        radius, filtered = tiling.radius, 2 * columns

        def step(
            i: Index, s: Index, carry: BandsCarry, window: Window, has_x: bool, has_dy: bool
        ) -> tuple[BandsCarry, Window]:
            stage, totals = carry
            plgpu.barrier_wait(self.full.at[stage])
            row: list[jax.Array] | None = None
            if has_dy:
                bands = self.pairs(self.dy_rows.at[stage], pair, columns)
                row = [value for both in bands for value in both]
                if self.low_dy is not None:
                    pl.when(pair == 0)(partial(self.store_low, self.low_dy, i, s, row[::2]))
            window = [*window, row]
            found = self.pairs(self.rows.at[stage], pair, columns + size - 1) if has_x else []
            plgpu.barrier_arrive(self.empty.at[stage])
            if has_x and self.low_x is not None:
                lows = [low for low, _ in found[radius:][:columns]]
                inside = (s >= radius) & (s < radius + tiling.rows) & (pair == 0)
                pl.when(inside)(partial(self.store_low, self.low_x, i, s - radius, lows))
            sums = list(totals)
            # The oldest row of dy is the furthest above that of x.
            for d, row in enumerate(reversed(window)):
                if row is None or not has_x:
                    continue
                for e in range(size):
                    for band in range(2):
                        at = (d * size + e) * 2 + band
                        for j in range(columns):
                            sums[at] = sums[at] + found[j + e][band] * row[2 * j + band]
            return (next_stage(stage, self.stages), sums), window[1:]

        def tile(i: Index, carry: BandsCarry) -> BandsCarry:
            return self.over_a_tile(partial(step, i), carry, size - 1, filtered, 0)

        self.release_unfilled()
        carry = jnp.int32(0), zeros(2 * size**2)
        _, totals = lax.fori_loop(0, self.count, tile, carry)
        split, unit = lax.axis_index("split"), lax.axis_index("unit")
        self.store_sums(pair, totals, self.bands.at[split, unit, pair])

    def store_low(self, low: Ref, i: Index, row: Index, values: list[jax.Array]) -> None:
        """Stores a row of the i-th tile's low band, whose values are twice as large here."""
        tiling = self.tiling
        group, first = self.origin(i)
        channel_block, column_block = self.place
        if tiling.images == 1:
            strips = pl.ds(column_block * tiling.strips, tiling.strips)
            line = low.at[group, 0, first + row, strips, :, channel_block]
        else:
            line = low.at[group, :, first + row, column_block, :, channel_block]
        for j, value in enumerate(values):
            line.at[:, j][...] = (0.5 * value).astype(low.dtype)

    def correlate_pixels(self, lower: int) -> None:
        """Correlates x with the upper or the lower row of pixels of dy, and stores the sums.

        The warpgroup of the lower row is the producer of the pipeline as well.
        """
        plgpu.set_max_registers(REGISTERS["pixels"], action="decrease")
        tiling, size, columns = self.tiling, self.size, 2 * self.tiling.columns
        radius, delay = tiling.radius, tiling.delay

        def step(
            _: Index, carry: PixelsCarry, window: Window, has_x: bool, has_dy: bool
        ) -> tuple[PixelsCarry, Window]:
            # `dy_stage` is the stage of `dy_delay` steps ago.
            stage, dy_stage, state, totals = carry
            plgpu.barrier_wait(self.full.at[stage])
            sums = list(totals)
            if has_dy:
                dy = self.dy_rows.at[dy_stage, :, lower]
                row = [self.column(dy, j) for j in range(columns)]
                for value in row:
                    sums[-1] = sums[-1] + value
                window = [*window, row]
            else:
                window = [*window, None]
            for v in range(2 if has_x else 0):
                x = self.rows.at[stage, :, v]
                values = [self.column(x, radius + j) for j in range(columns + size - 1)]
                for o, dy_row in enumerate(window):
                    d = 2 * (delay - o) + v - lower + radius
                    if dy_row is None or not 0 <= d < size:
                        continue
                    for e in range(size):
                        for j in range(columns):
                            product = values[j + e] * dy_row[j]
                            sums[d * size + e] = sums[d * size + e] + product
            plgpu.barrier_arrive(self.empty.at[dy_stage])
            if state:
                state = self.load_next(state)
            stages = next_stage(stage, self.stages), next_stage(dy_stage, self.stages)
            return (*stages, state, sums), window[1:]

        def tile(_: Index, carry: PixelsCarry) -> PixelsCarry:
            return self.over_a_tile(step, carry, 2 * delay, columns, self.dy_delay)

        # The first steps release the other stages that the prologue does not fill.
        plgpu.barrier_arrive(self.empty.at[self.prefilled])
        state: PipelineState | tuple[()] = self.prologue() if lower else ()
        dy_stage = jnp.int32(self.stages - self.dy_delay if self.dy_delay else 0)
        carry = jnp.int32(0), dy_stage, state, zeros(size**2 + 1)
        _, dy_stage, _, totals = lax.fori_loop(0, self.count, tile, carry)
        for _ in range(self.dy_delay):
            plgpu.barrier_arrive(self.empty.at[dy_stage])
            dy_stage = next_stage(dy_stage, self.stages)
        split, unit = lax.axis_index("split"), lax.axis_index("unit")
        self.store_sums(2 + lower, totals, self.base.at[split, unit, lower])
        if lower:
            drain(self.empty, self.total_steps, self.stages, self.prefilled)

    def store_sums(self, warpgroup: Index, totals: list[jax.Array], to: Ref) -> None:
        """Adds up the strips of each sum in shared memory, and stores the sums to global memory."""
        fill = -len(totals) % STRIPS
        totals = [*totals, *zeros(fill)]
        for first in range(0, len(totals), STRIPS):
            for t in range(STRIPS):
                self.strips[warpgroup, t] = totals[first + t]
            plgpu.commit_smem()
            # Now four sums lie side by side, as four strips of one sum did.
            one, two, three, four = (self.strips[warpgroup, :, strip] for strip in range(STRIPS))
            to[pl.ds(first, STRIPS)] = one + two + (three + four)
            plgpu.commit_smem()

    def idle(self) -> None:
        """Gives up registers to other warpgroups."""
        plgpu.set_max_registers(REGISTERS["pixels"], action="decrease")

    def produce(self) -> None:
        """Issues all TMA loads, as a producer warpgroup that does nothing else."""
        plgpu.set_max_registers(REGISTERS["pixels"], action="decrease")
        lax.fori_loop(0, self.total_steps, lambda _, state: self.load_next(state), self.prologue())
        drain(self.empty, self.total_steps, self.stages, self.prefilled)
