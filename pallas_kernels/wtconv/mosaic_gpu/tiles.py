"""The pipeline and tiling of the launches that stream the rows of tiles through shared memory.

The kernels of `level1` and `weights` are built on `Block`, that of `level2` on `Tiled`. The unit of
work is a tile: rows of coefficients of one or more images, `CHANNELS` channels and `strips x
columns` columns wide, with a halo of `radius` rows and columns around it. A block of four
warpgroups takes one tile after the other, as persistent kernels do, and its pipeline runs on from
tile to tile:

- **Pipeline:** a pipeline stage is a buffer in shared memory for the rows of one step, which is one
  row of coefficients, that is two rows of pixels (four in `level2`). The producer warpgroup fills
  the first stages before the main loop (the prologue), and in the loop one stage a step.
- **TMA loads:** they bring in a step's rows with the halo; TMA fills what lies outside an image
  with zeros, so the kernels mask nothing.
- **mbarriers:** each stage has a `full` one, on which the bytes of its TMA loads arrive, and in
  `Block` an `empty` one, on which every consumer warpgroup arrives when it has read the stage. The
  epilogue waits for the last phases of `empty`: see `drain`.
- **Registers:** a thread holds one channel of one strip, and keeps its sums and taps in registers.

The last warpgroup is the producer. It is a consumer as well, but for deeper levels of `weights`.
`CUTLASS <https://github.com/NVIDIA/cutlass>`_ describes such pipelines.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.mosaic_gpu import MANUAL_BARRIERS, MULTIPROCESSORS, next_stage
from pallas_kernels.common.types import Index, Keywords, Ref, Slice

__all__ = [
    "CHANNELS",
    "MAX_COLUMNS",
    "MIN_ROWS",
    "REGISTERS",
    "STRIPS",
    "Block",
    "Divided",
    "Launched",
    "PipelineState",
    "Step",
    "Tiled",
    "Tiling",
    "drain",
    "handoff_dtype",
    "launch",
    "tiling_of",
    "tilings",
    "zeros",
]

CHANNELS = 32
STRIPS = 4
"""A warpgroup has one thread for each channel of each strip."""

Step = tuple[Index, Index]
"""The index of one of a block's tiles, and the index of a pipeline step in that tile."""
PipelineState = tuple[Index, Step]
"""The stage that the producer fills next, and the step whose rows it loads into it."""

MAX_COLUMNS = 7
"""A strip has at most so many columns of coefficients: five rows of sums fit in registers."""
MIN_ROWS = 8
"""An image is at most one tile high for so many rows of coefficients, or a part of them."""
_MAX_WAVES = 8
"""A tiling is chosen among those whose blocks fill the GPU at most so many times."""
_START, _OVERHEAD = 4, 3
"""Starting a block costs as much as so many steps, and a step as so many columns; estimates."""
REGISTERS = {"bands": 152, "pixels": 104}
"""Registers of a thread by role: two warpgroups of each use all that a multiprocessor has."""


def handoff_dtype(x: jax.Array) -> jnp.dtype:
    """Returns the dtype of what one launch hands on to the next.

    float16 becomes float32, because low bands double with each level.
    """
    return jnp.dtype("float32") if x.dtype == "float16" else x.dtype


@dataclass(frozen=True)
class Tiling:
    """The division of the images among the blocks of a launch.

    A block works on one channel block and one column block, and takes every `splits`-th tile of
    them: `rows` rows of coefficients, of `images` images at once, in strips of `columns` columns.

    Attributes:
        radius: Rows, and columns, that the convolution reaches to each side; the halo.
        images: Images of a tile.
        columns: Columns of coefficients of a strip.
        rows: Rows of coefficients of a tile.
        column_blocks: Tiles that an image is wide.
        channel_blocks: Blocks of `CHANNELS` channels.
        groups: Groups of `images` images.
        row_blocks: Tiles that an image is high.
        splits: Blocks that share the tiles of one channel block and column block.
    """

    radius: int
    images: int
    columns: int
    rows: int
    column_blocks: int
    channel_blocks: int
    groups: int
    row_blocks: int
    splits: int

    @property
    def strips(self) -> int:
        """The number of strips of an image in a tile."""
        return STRIPS // self.images

    @property
    def width(self) -> int:
        """The number of columns of coefficients of a tile."""
        return self.strips * self.columns

    @property
    def tiles(self) -> int:
        """The number of tiles of one channel block and column block."""
        return self.groups * self.row_blocks

    @property
    def halo_rows(self) -> int:
        """The number of rows that a tile reads above its own, where other tiles lie above it."""
        return self.radius if self.row_blocks > 1 else 0

    @property
    def delay(self) -> int:
        """The number of steps that a row of pixels waits for the pixels below it.

        A step brings two rows of pixels, so it is half of `radius`.
        """
        return pl.cdiv(self.radius, 2)

    @property
    def steps(self) -> int:
        """The number of steps of a tile: its rows, and those of the halo above and below it."""
        return self.halo_rows + self.rows + self.radius

    @property
    def read(self) -> int:
        """The number of steps whose rows may be other than zero: later ones lie below an image."""
        return self.steps if self.row_blocks > 1 else self.rows

    @property
    def step_cost(self) -> int:
        """The estimated cost of one step, in columns."""
        return self.columns + _OVERHEAD

    @property
    def cost(self) -> int:
        """The estimated cost of all steps of the busiest multiprocessor."""
        waves = pl.cdiv(self.column_blocks * self.channel_blocks * self.splits, MULTIPROCESSORS)
        steps = pl.cdiv(self.tiles, self.splits) * self.steps + _START
        return waves * steps * self.step_cost


AnyTiling = TypeVar("AnyTiling", bound=Tiling)


def tilings(
    kind: type[AnyTiling],
    shape: tuple[int, ...],
    side: int,
    kernel_size: int,
    images: Sequence[int],
    max_waves: int,
) -> Iterator[AnyTiling]:
    """Yields the tilings of `[N, H, W, C]` to choose from.

    Args:
        kind: The class of the tilings.
        shape: N, H, W and C.
        side: The height and width in pixels that a coefficient is made of.
        kernel_size: The height and width of the kernel.
        images: The numbers of images that a tile may have.
        max_waves: The most waves of blocks, each of one block a multiprocessor.
    """
    n, h, w, c = shape
    rows, columns = pl.cdiv(h, side), pl.cdiv(w, side)
    for several in images:
        groups = pl.cdiv(n, several)
        for each in range(1, MAX_COLUMNS + 1):
            units = pl.cdiv(columns, STRIPS // several * each), pl.cdiv(c, CHANNELS)
            for row_blocks in range(1, min(pl.cdiv(rows, MIN_ROWS), MULTIPROCESSORS) + 1):
                tiles, blocks = groups * row_blocks, math.prod(units)
                for waves in range(1, 1 + pl.cdiv(blocks * tiles, MULTIPROCESSORS)):
                    splits = min(tiles, max(1, waves * MULTIPROCESSORS // blocks))
                    tile = several, each, pl.cdiv(rows, row_blocks)
                    yield kind(kernel_size // 2, *tile, *units, groups, row_blocks, splits)
                    if splits == tiles or waves >= max_waves:
                        break


@cache
def tiling_of(shape: tuple[int, ...], kernel_size: int, max_waves: int = _MAX_WAVES) -> Tiling:
    """Returns the tiling of `[N, H, W, C]` whose busiest multiprocessor has the least work."""
    _, h, w, c = shape

    def contiguous(tiling: Tiling) -> bool:
        """Returns whether windows of TMA stores are contiguous: see `store_row` of `level1`."""
        return tiling.images > 1 and c == CHANNELS and h * w == 2 * tiling.columns

    found = tilings(Tiling, shape, 2, kernel_size, (1, STRIPS), max_waves)
    return min(
        (tiling for tiling in found if not contiguous(tiling)), key=lambda tiling: tiling.cost
    )


def launch(tiling: Tiling) -> Keywords:
    """Returns the arguments of `plgpu.kernel` that launch the blocks of a tiling."""
    return {
        "grid": (tiling.splits, tiling.column_blocks * tiling.channel_blocks),
        "grid_names": ("split", "unit"),
        "num_threads": 4,
        "thread_name": "warpgroup",
        # Every warpgroup arrives at the mbarriers itself, after its own loads and stores.
        "compiler_params": MANUAL_BARRIERS,
    }


def drain(empty: Ref, steps: Index, stages: int, prefilled: int) -> None:
    """Waits for those phases of `empty` that the producer has not waited for in the main loop.

    This is what CUTLASS calls the producer's tail.

    Args:
        empty: The mbarriers, one for each stage.
        steps: How many steps the pipeline had.
        stages: How many stages it has.
        prefilled: How many stages the prologue filled without waiting; the others were released
            before the first step.
    """

    def one(step: Index, carry: tuple[()]) -> tuple[()]:
        plgpu.barrier_wait(empty.at[lax.rem(step + stages, stages)])
        return ()

    lax.fori_loop(jnp.maximum(steps - stages, prefilled - stages), steps, one, ())


def zeros(count: int, shape: tuple[int, ...] = (STRIPS, CHANNELS)) -> list[jax.Array]:
    """Returns `count` sums to begin with, in registers: zeros, one value a thread."""
    zero = jnp.zeros(shape, jnp.float32)
    return [plgpu.layout_cast(zero, plgpu.Layout.WG_STRIDED(shape, vec_size=1))] * count


class Divided(Protocol):
    """A division of the images among the blocks of a launch."""

    @property
    def radius(self) -> int:
        """The number of rows, and columns, that the convolution reaches to each side."""


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A block, and the tiling by which the blocks of its launch share the images."""

    tiling: Divided

    @property
    def size(self) -> int:
        """The height and width of the kernel."""
        return 2 * self.tiling.radius + 1


@dataclass(frozen=True, kw_only=True)
class Tiled(Launched):
    """A persistent block, which takes one tile after the other."""

    tiling: Tiling

    @property
    def place(self) -> tuple[jax.Array, jax.Array]:
        """The channel block and the column block of this block."""
        unit = lax.axis_index("unit")
        return lax.rem(unit, self.tiling.channel_blocks), lax.div(unit, self.tiling.channel_blocks)

    @property
    def count(self) -> jax.Array:
        """The number of tiles of this block."""
        splits = self.tiling.splits
        return lax.div(self.tiling.tiles - lax.axis_index("split") + splits - 1, splits)

    def origin(self, i: Index) -> tuple[jax.Array, jax.Array]:
        """Returns the group of images, and the first row of coefficients, of the i-th tile."""
        tiling = self.tiling
        tile = lax.axis_index("split") + i * tiling.splits
        return lax.div(tile, tiling.row_blocks), lax.rem(tile, tiling.row_blocks) * tiling.rows

    @property
    def total_steps(self) -> jax.Array:
        """The number of pipeline steps of this block, over all of its tiles."""
        return self.count * self.tiling.steps


@dataclass(frozen=True, kw_only=True)
class Block(Tiled):
    """A block with a pipeline whose stages hold two rows of x each.

    Attributes:
        stages: How many stages the pipeline has.
        x: The image in global memory.
        rows: The stages in shared memory, `[stages, images, 2, columns, channels]`.
        full: An mbarrier a stage, on which the TMA loads into it arrive.
        empty: An mbarrier a stage, on which the consumers of it arrive.
    """

    stages: int
    x: Ref
    rows: Ref
    full: Ref
    empty: Ref

    @property
    def prefilled(self) -> int:
        """The number of stages that the prologue fills, without waiting for `empty`.

        The stages after these are filled in the first steps; `release_unfilled` makes them empty.
        """
        raise NotImplementedError

    def window(self, step: Step) -> tuple[Slice, jax.Array, jax.Array, Slice]:
        """Returns the images, first row, column block and channels of a step.

        The row is one of coefficients, counted as if the tile had no halo above it.
        """
        i, s = step
        tiling = self.tiling
        group, row = self.origin(i)
        channel_block, column_block = self.place
        images = pl.ds(group * tiling.images, tiling.images)
        return images, row + s, column_block, pl.ds(channel_block * CHANNELS, CHANNELS)

    def load_rows(self, stage: Index, step: Step, above: int) -> None:
        """Issues the TMA load of the two rows of x that lie `above` rows over those of a step."""
        images, row, column_block, channels = self.window(step)
        first = 2 * (column_block * self.tiling.width - self.tiling.radius)
        columns = pl.ds(first, self.rows.shape[-2])
        plgpu.copy_gmem_to_smem(
            self.x.at[images, pl.ds(2 * (row - above), 2), columns, channels],
            self.rows.at[stage],
            self.full.at[stage],
        )

    def load_stage(self, stage: Index, step: Step) -> None:
        """Issues all TMA loads of a step."""
        raise NotImplementedError

    def prologue(self) -> PipelineState:
        """Issues the TMA loads of the first `prefilled` steps, and returns the state after them."""
        state: PipelineState = (jnp.int32(0), (jnp.int32(0), jnp.int32(0)))

        def one(_: Index, state: PipelineState) -> PipelineState:
            return self.load_next(state, wait=False)

        return lax.fori_loop(0, self.prefilled, one, state)

    def load_next(self, state: PipelineState, wait: bool = True) -> PipelineState:
        """Issues the TMA loads of the state's step, if there is one, and returns the next state.

        Args:
            state: A stage, and the step that it is filled for.
            wait: Whether to wait until all consumers have released the stage.
        """
        stage, (i, s) = state

        @pl.when(i < self.count)
        def _() -> None:
            if wait:
                plgpu.barrier_wait(self.empty.at[stage])
            self.load_stage(stage, (i, s))

        last = s == self.tiling.steps - 1
        after = next_stage(stage, self.stages)
        return after, (jnp.where(last, i + 1, i), jnp.where(last, 0, s + 1))

    def release_unfilled(self) -> None:
        """Arrives at `empty` of the stages that the prologue did not fill."""
        for stage in range(self.prefilled, self.stages):
            plgpu.barrier_arrive(self.empty.at[stage])

    def pairs(self, row: Ref, pair: Index, columns: int) -> list[tuple[jax.Array, jax.Array]]:
        """Returns (LL, LH) of each column, or (HL, HH) if `pair` is 1, twice as large as they are.

        Args:
            row: `[images, 2, columns of pixels, channels]`, halo included.
            pair: 0 for (LL, LH), 1 for (HL, HH).
            columns: Columns of coefficients of a strip, halo included.
        """
        sign = jnp.where(pair == 0, 1.0, -1.0).astype(jnp.float32)
        found = []
        for j in range(columns):
            upper, lower = (
                self.column(row.at[:, v], 2 * j) + sign * self.column(row.at[:, v], 2 * j + 1)
                for v in range(2)
            )
            found.append((upper + lower, upper - lower))
        return found

    def view(self, row: Ref, j: int, each: int) -> Ref:
        """Returns a view of column j of each strip, in a row `[images, columns, channels]`.

        Args:
            row: A row in shared memory.
            j: The column in a strip.
            each: A strip is `each * tiling.columns` columns of the row wide.
        """
        tiling = self.tiling
        if tiling.strips == 1:
            return row.at[:, j]
        each *= tiling.columns
        first = min(j, row.shape[1] - tiling.strips * each)
        row = row.at[0, pl.ds(first, tiling.strips * each)]
        return row.reshape(tiling.strips, each, CHANNELS).at[:, j - first]

    def column(self, row: Ref, j: int, each: int = 2) -> jax.Array:
        """Returns what `view` shows, as float32 in registers."""
        return self.view(row, j, each)[...].astype(jnp.float32)
