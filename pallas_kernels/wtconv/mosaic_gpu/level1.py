"""The kernel of level 1 and the base convolution, which is the last launch of the operator.

The same kernel, without the base convolution, does one level from the third on where these do not
fit into one launch of `fused_levels`.

- **Tiles and halo:** those of `tiles`. A step brings two rows of pixels, that is one row of
  coefficients, `2 * radius` columns of halo at each side included, and the row of what is added to
  its low band.
- **Pipeline:** as many stages as shared memory holds, at most 8. The prologue fills all but one,
  since a stage is refilled in the step after the one that read it.
- **Warpgroups:** four, of which none only loads. 0 and 1 are consumers that filter one pair of
  bands each, (LL, LH) and (HL, HH), and synthesise them in height. 2 and 3 are consumers that
  convolve with the base kernel, one the upper and one the lower row of pixels, add the handoff of
  the first two, and store the result; 3 is the producer of all TMA loads as well.
- **Handoff:** rows in shared memory from the bands' warpgroups to the pixels', a second pipeline of
  `_HANDOFF_STAGES` stages with full and empty mbarriers of its own.
- **mbarriers:** `full` of a stage has one arrival for each TMA load, `empty` one for each
  warpgroup; `handoff_full` and `handoff_empty` have one for each of two warpgroups.
- **TMA stores:** warpgroups 2 and 3 store a row of pixels each, from two buffers in turn. The
  epilogue waits for the last stores, and drains `empty` and `handoff_empty`.
- **Registers:** 152 a thread where bands are filtered, 104 where pixels are (`setmaxnreg`).
"""

import itertools
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mosaic_gpu_call
from pallas_kernels.common.mosaic_gpu import SHARED, Scratch, next_stage, size_in_bytes
from pallas_kernels.common.types import Index, Ref
from pallas_kernels.wtconv.mosaic_gpu.tiles import (
    CHANNELS,
    REGISTERS,
    Block,
    PipelineState,
    Step,
    drain,
    launch,
    tiling_of,
    zeros,
)

__all__ = ["level1"]

_HANDOFF_STAGES = 4
"""Stages of the handoff, a row of filtered bands each; a power of two."""
_MAX_STAGES = 8
"""The most stages of the pipeline."""


def level1(
    x: jax.Array,
    below: tuple[jax.Array, ...],
    taps: jax.Array,
    level: int,
    kernel_size: int,
    biased: bool,
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns one level of the operator, from analysis to synthesis.

    Args:
        x: `[N, H, W, C]`.
        below: Arrays that are added to the low band, or larger ones: half the synthesis of all
            levels below, `[N, H / 2, W / 2, C]`; or that of the next level alone, and that of the
            levels below the next one, `[N, H / 4, W / 2, C]`.
        taps: The taps of all levels, as `_packed` lays them out.
        level: The level: 1, which has the base convolution too, or one from 3 on.
        kernel_size: The height and width of the kernel.
        biased: Whether the taps end with a bias to add.
        dtype: The dtype of the result.

    Returns:
        `[N, H, W, C]`; where `level` is 3, with each column twice, as level 1 reads it.
    """
    n, h, w, c = x.shape
    tiling = tiling_of(x.shape, kernel_size)
    arrays = {"x": x, "taps": taps} | {f"below_{i}": one for i, one in enumerate(below)}
    halo = 2 * tiling.radius
    image = (tiling.images, 2, 2 * tiling.width + 2 * halo, CHANNELS)
    coefficients = (tiling.images, tiling.width, CHANNELS)
    handoff = (_HANDOFF_STAGES, 2, 2, *coefficients)
    row = (2, 2, tiling.images, 1, 2 * tiling.width, CHANNELS)
    stage_size = size_in_bytes(image, x.dtype)
    stage_size += sum(size_in_bytes(coefficients, one.dtype) for one in below)
    left = SHARED - size_in_bytes(handoff, jnp.dtype("float32")) - size_in_bytes(row, dtype)
    stages = min(_MAX_STAGES, left // stage_size)
    scratch: dict[str, Scratch] = {
        "rows": plgpu.SMEM((stages, *image), x.dtype),
        "handoff": plgpu.SMEM(handoff, jnp.float32),
        "out": plgpu.SMEM(row, dtype),
        "full": plgpu.Barrier(num_arrivals=1 + len(below), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        "handoff_full": plgpu.Barrier(num_arrivals=2, num_barriers=_HANDOFF_STAGES),
        "handoff_empty": plgpu.Barrier(num_arrivals=2, num_barriers=_HANDOFF_STAGES),
    }
    for i, one in enumerate(below):
        shape = stages, tiling.images, 1, *coefficients[1:]
        scratch[f"below_rows_{i}"] = plgpu.SMEM(shape, one.dtype)
    names = [*arrays, "y", *scratch]
    # The x of level 3 has whole blocks of channels.
    copies = 2 if level == 3 else 1

    def body(*refs: Ref) -> None:
        block = dict(zip(names, refs, strict=True))
        pairs = [
            tuple(block.pop(f"{name}_{i}") for name in ("below", "below_rows"))
            for i in range(len(below))
        ]
        _Level1Block(
            tiling=tiling, stages=stages, level=level, biased=biased, below=pairs, **block
        ).run()

    y = mosaic_gpu_call.kernel(
        body,
        # Copies of a column lie side by side, as if they were more channels.
        out_type=jax.ShapeDtypeStruct((n, h, w, copies * c), dtype),
        scratch_types=list(scratch.values()),
        **launch(tiling),
    )(*arrays.values())
    return y.reshape(n, h, w * copies, c)


Rows = list[list[jax.Array]]
"""Values of several rows, in registers: of pixels, or sums of results that are not complete."""
State = PipelineState | tuple[()]
"""The producer's state, which the other warpgroups do not have."""


@dataclass(frozen=True, kw_only=True)
class _Level1Block(Block):
    """One block of `level1`: its references, and what each of its warpgroups does.

    Warpgroups 0 and 1 (`bands`) and 2 and 3 (`pixels`) are consumers of the pipeline's stages. 3 is
    the producer of the TMA loads too, and 2 and 3 issue the TMA stores.

    Attributes:
        taps: The taps of all levels in global memory.
        y: The result in global memory.
        handoff: The stages of the handoff, `[stages, pair, row of pixels, images, columns, C]`.
        out: Two buffers for TMA stores of each of two warpgroups.
        handoff_full: An mbarrier a stage of the handoff, on which its writers arrive.
        handoff_empty: An mbarrier a stage of the handoff, on which its readers arrive.
        level: The level.
        biased: Whether the taps end with a bias.
        below: The arrays that are added to the low band, in global memory, with their stages in
            shared memory, each of half as many rows as the one before.
    """

    taps: Ref
    y: Ref
    handoff: Ref
    out: Ref
    handoff_full: Ref
    handoff_empty: Ref
    level: int
    biased: bool
    below: list[tuple[Ref, ...]]

    def run(self) -> None:
        """Runs the role of this warpgroup."""
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup < 2)(partial(self.bands, warpgroup))
        pl.when(warpgroup == 2)(partial(self.pixels, 0))
        pl.when(warpgroup == 3)(partial(self.pixels, 1))

    @property
    def delay(self) -> int:
        """The number of steps by which the base convolution's results lag behind what it reads."""
        return self.tiling.delay if self.level == 1 else 0

    @property
    def prefilled(self) -> int:
        """The number of stages that the prologue fills: the producer refills one a step late."""
        return self.stages - 1

    def load_stage(self, stage: Index, step: Step) -> None:
        """Issues all TMA loads of a step: of rows of x, and of what is added to the low band."""
        self.load_rows(stage, step, self.tiling.halo_rows)
        images, row, column_block, channels = self.window(step)
        columns = pl.ds(column_block * self.tiling.width, self.tiling.width)
        row = row - self.tiling.halo_rows - self.tiling.radius
        for i, (array, buffer) in enumerate(self.below):
            plgpu.copy_gmem_to_smem(
                array.at[images, pl.ds(row >> i, 1), columns, channels],
                buffer.at[stage],
                self.full.at[stage],
            )

    def bands(self, pair: Index) -> None:
        """Filters (LL, LH), or (HL, HH) if `pair` is 1, and hands off their synthesis in height."""
        plgpu.set_max_registers(REGISTERS["bands"], action="increase")
        tiling, size, columns = self.tiling, self.size, self.tiling.columns
        channel_block, _ = self.place
        first = size**2 * (4 * self.level - 3 + 2 * pair)
        taps = [
            [
                [self.taps[channel_block, first + 2 * (d * size + e) + band] for band in range(2)]
                for e in range(size)
            ]
            for d in range(size)
        ]
        filtered = 2 * columns

        def added(
            found: list[tuple[jax.Array, jax.Array]], sums: list[jax.Array] | None, row: int
        ) -> list[jax.Array]:
            """Returns the sums of one of the `size` open rows of results, with this row added."""
            totals = []
            for j, band in itertools.product(range(columns), range(2)):
                total = None if sums is None else sums[2 * j + band]
                for e in range(size):
                    product = found[j + e][band] * taps[size - 1 - row][e][band]
                    total = product if total is None else total + product
                assert total is not None
                totals.append(total)
            return totals

        def add_below(stage: Index, lows: list[jax.Array]) -> list[jax.Array]:
            for _, buffer in self.below:
                row = buffer.at[stage, :, 0]
                lows = [low + self.column(row, j, 1) for j, low in enumerate(lows)]
            return lows

        def hand_off(step: Index, stage: Index, done: list[jax.Array]) -> None:
            """Hands off a row of results; `step` is its number, counted over all tiles."""
            lows, highs = done[::2], done[1::2]
            if self.below:
                lows = lax.cond(pair == 0, partial(add_below, stage), lambda lows: lows, lows)
            to = step & _HANDOFF_STAGES - 1
            plgpu.barrier_wait(self.handoff_empty.at[to])
            for j in range(columns):
                self.view(self.handoff.at[to, pair, 0], j, 1)[...] = lows[j] + highs[j]
                self.view(self.handoff.at[to, pair, 1], j, 1)[...] = lows[j] - highs[j]
            plgpu.barrier_arrive(self.handoff_full.at[to])

        def tile(i: Index, stage: Index) -> Index:
            skipped = tiling.halo_rows + tiling.radius

            def one(s: Index, carry: tuple[Index, Rows]) -> tuple[Index, Rows]:
                stage, sums = carry
                plgpu.barrier_wait(self.full.at[stage])
                found = self.pairs(self.rows.at[stage], pair, columns + size - 1)
                first, *others = [*sums, None]

                # This is done before sums of the next row begin, which take the registers of these.
                @pl.when(s >= skipped)
                def _() -> None:
                    hand_off(i * tiling.rows + s - skipped, stage, added(found, first, 0))

                plgpu.barrier_arrive(self.empty.at[stage])
                sums = [added(found, other, row) for row, other in enumerate(others, 1)]
                return next_stage(stage, self.stages), sums

            sums: Rows = [zeros(filtered)] * (size - 1)
            stage, sums = lax.fori_loop(0, tiling.read, one, (stage, sums))
            for s in range(tiling.read, tiling.steps):
                plgpu.barrier_wait(self.full.at[stage])
                first, *sums = [*sums, zeros(filtered)]
                if s >= skipped:
                    hand_off(i * tiling.rows + s - skipped, stage, first)
                plgpu.barrier_arrive(self.empty.at[stage])
                stage = next_stage(stage, self.stages)
            return stage

        self.release_unfilled()
        lax.fori_loop(0, self.count, tile, jnp.int32(0))
        drain(self.handoff_empty, self.count * tiling.rows, _HANDOFF_STAGES, prefilled=0)

    def pixels(self, lower: int) -> None:
        """Convolves the upper or the lower row of each pair of rows of pixels, and stores it.

        The warpgroup of the lower row is the producer of the pipeline as well.
        """
        plgpu.set_max_registers(REGISTERS["pixels"], action="decrease")
        tiling, size, columns = self.tiling, self.size, 2 * self.tiling.columns
        channel_block, _ = self.place
        if self.level == 1:
            taps = [
                [self.taps[channel_block, d * size + e] for e in range(size)] for d in range(size)
            ]
        (start,) = zeros(1)
        if self.biased:
            # It is a sum because inside `shard_map` JAX 0.11 takes what is read to vary, sums not.
            start = start + self.taps[channel_block, self.taps.shape[1] - 1]
        open_rows = 2 * self.delay

        def added(rows: Rows, sums: list[jax.Array], o: int) -> list[jax.Array]:
            """Returns the sums of the o-th open row of results, with two rows of x added."""
            totals = list(sums)
            for j, row in itertools.product(range(columns if rows else 0), range(2)):
                d = row + 2 * (self.delay - o) - lower + tiling.radius
                for e in range(size if 0 <= d < size else 0):
                    totals[j] = totals[j] + rows[row][j + e] * taps[d][e]
            return totals

        def finish(i: Index, row: Index, done: list[jax.Array]) -> None:
            """Adds the handoff to a row of results, and stores it."""
            step = i * tiling.rows + row
            stage, to = step & _HANDOFF_STAGES - 1, step & 1
            plgpu.barrier_wait(self.handoff_full.at[stage])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            out = self.out.at[lower, to, :, 0]
            for j in range(tiling.columns):
                even, odd = (self.column(self.handoff.at[stage, p, lower], j, 1) for p in range(2))
                for column, value in ((2 * j, even + odd), (2 * j + 1, even - odd)):
                    if done:
                        value = value + done[column]
                    self.view(out, column, 2)[...] = value.astype(out.dtype)
            plgpu.barrier_arrive(self.handoff_empty.at[stage])
            plgpu.commit_smem()
            self.store_row(i, row, lower, to)

        def tile(i: Index, carry: tuple[Index, State]) -> tuple[Index, State]:
            skipped = tiling.halo_rows + self.delay
            new = [start] * columns if self.level == 1 else []

            def one(s: Index, carry: tuple[Index, State, Rows]) -> tuple[Index, State, Rows]:
                stage, state, sums = carry
                plgpu.barrier_wait(self.full.at[stage])
                rows = [
                    [
                        self.column(self.rows.at[stage, :, row], tiling.radius + j)
                        for j in range(columns + size - 1)
                    ]
                    for row in range(2 if self.level == 1 else 0)
                ]
                plgpu.barrier_arrive(self.empty.at[stage])
                first, *others = [*sums, new]

                # This is done before sums of the next row begin, which take the registers of these.
                @pl.when((s >= skipped) & (s < skipped + tiling.rows))
                def _() -> None:
                    finish(i, s - skipped, added(rows, first, 0))

                sums = [added(rows, other, o) for o, other in enumerate(others, 1)]
                if state:
                    state = self.load_next(state)
                return next_stage(stage, self.stages), state, sums

            stage, state = carry
            sums: Rows = [new] * open_rows
            stage, state, sums = lax.fori_loop(0, tiling.read, one, (stage, state, sums))
            for s in range(tiling.read, tiling.steps):
                plgpu.barrier_wait(self.full.at[stage])
                plgpu.barrier_arrive(self.empty.at[stage])
                first, *sums = [*sums, new]
                if skipped <= s < skipped + tiling.rows:
                    finish(i, s - skipped, first)
                if state:
                    state = self.load_next(state)
                stage = next_stage(stage, self.stages)
            return stage, state

        self.release_unfilled()
        for stage in range(_HANDOFF_STAGES):
            plgpu.barrier_arrive(self.handoff_empty.at[stage])
        state: State = self.prologue() if lower else ()
        lax.fori_loop(0, self.count, tile, (jnp.int32(0), state))
        plgpu.wait_smem_to_gmem(0)
        if lower:
            drain(self.empty, self.total_steps, self.stages, self.prefilled)

    def store_row(self, i: Index, row: Index, lower: int, buffer: Index) -> None:
        """Issues the TMA store of a row of the i-th tile's pixels from one of two buffers.

        TMA leaves out what lies outside the image. Mosaic, though, copies windows that are
        contiguous in memory without TMA's bounds, and takes axes of one element to be inside:
        those windows are cut here.
        """
        tiling = self.tiling
        group, first = self.origin(i)
        channel_block, column_block = self.place
        height, width, channels = self.y.shape[1:]
        first_channels = range(0, channels, self.x.shape[-1])
        if lower and height == 1:
            return

        def store(columns: int) -> None:
            for channel in first_channels:
                plgpu.copy_smem_to_gmem(
                    self.out.at[lower, buffer, :, :, pl.ds(0, columns)],
                    self.y.at[
                        pl.ds(group * tiling.images, tiling.images),
                        pl.ds(2 * (first + row) + lower, 1),
                        pl.ds(2 * column_block * tiling.width, columns),
                        pl.ds(channel + channel_block * CHANNELS, CHANNELS),
                    ],
                    # `finish` waits for all of them as for one.
                    commit_group=channel == first_channels[-1],
                )

        if channels != CHANNELS or tiling.images > 1:
            store(2 * tiling.width)
            return
        within = 2 * (first + row) + lower < height
        last = width - 2 * tiling.width * (tiling.column_blocks - 1)
        pl.when(within & (column_block < tiling.column_blocks - 1))(
            partial(store, 2 * tiling.width)
        )
        pl.when(within & (column_block == tiling.column_blocks - 1))(partial(store, last))

        @pl.when(jnp.logical_not(within))
        def _() -> None:
            # `finish` counts stores to know which buffer it may write, and here is one less.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
