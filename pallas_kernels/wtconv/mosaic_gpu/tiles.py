"""What launches share that stream the rows of tiles of an image through shared memory.

A block streams the rows of one or more images, `CHANNELS` channels and `strips x columns` columns
of coefficients wide. The copy engine fills what lies outside an image with zeros, so nothing is
masked. A thread holds one channel of one strip, and its sums and taps in registers; a step is a row
of coefficients, of two rows of pixels. Four warpgroups with roles work at once, of which one orders
the copies. `CUTLASS <https://github.com/NVIDIA/cutlass>`_ describes such pipelines.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.mosaic_gpu import MULTIPROCESSORS, UNSYNCHRONISED, following

__all__ = [
    "CHANNELS",
    "MAX_COLUMNS",
    "MIN_ROWS",
    "REGISTERS",
    "STRIPS",
    "Block",
    "Launched",
    "Ring",
    "Step",
    "Tiled",
    "Tiling",
    "drain",
    "handed_dtype",
    "launch",
    "tiling_of",
    "tilings",
    "zeros",
]

CHANNELS = 32
STRIPS = 4
"""A warpgroup: a thread for each channel of each strip."""

Step = tuple[Any, Any]
"""A block's tile and the step in it."""
Ring = tuple[Any, Step]
"""The slot that is filled next, and the step that it is for."""

MAX_COLUMNS = 7
"""Columns of coefficients a strip: the sums of five rows of them fit in a thread's registers."""
MIN_ROWS = 8
"""Rows of coefficients of a tile that is not a whole image high."""
_MAX_ROUNDS = 8
"""Of blocks that a multiprocessor takes one after the other, to choose from."""
_START, _OVERHEAD = 4, 3
"""What it costs to start a block, in steps, and a step, in columns; estimates."""
REGISTERS = {"bands": 152, "pixels": 104}
"""Registers of a thread, together what a multiprocessor has for 512 threads."""


def handed_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of what one launch hands on to the next: low bands double with each level."""
    return jnp.dtype("float32") if x.dtype == "float16" else x.dtype


@dataclass(frozen=True)
class Tiling:
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
    def width(self) -> int:
        """Columns of coefficients of a tile."""
        return self.strips * self.columns

    @property
    def tiles(self) -> int:
        """Of a chunk and stretch."""
        return self.groups * self.heights

    @property
    def lead(self) -> int:
        """Rows that a tile reads above its own."""
        return self.reach if self.heights > 1 else 0

    @property
    def lag(self) -> int:
        """`reach`, which counts pixels too, in rows of coefficients of two pixels each."""
        return pl.cdiv(self.reach, 2)

    @property
    def steps(self) -> int:
        """Steps a tile: after its last row come those below that it is filtered with."""
        return self.lead + self.rows + self.reach

    @property
    def read(self) -> int:
        """Steps whose rows are not known to be zero."""
        return self.steps if self.heights > 1 else self.rows

    @property
    def step_cost(self) -> int:
        """Of one step, in columns."""
        return self.columns + _OVERHEAD

    @property
    def cost(self) -> int:
        """Of the busiest multiprocessor's steps, roughly."""
        rounds = pl.cdiv(self.stretches * self.chunks * self.splits, MULTIPROCESSORS)
        steps = pl.cdiv(self.tiles, self.splits) * self.steps + _START
        return rounds * steps * self.step_cost


AnyTiling = TypeVar("AnyTiling", bound=Tiling)


def tilings(
    kind: type[AnyTiling],
    shape: tuple[int, ...],
    side: int,
    kernel_size: int,
    images: Sequence[int],
    most_rounds: int,
) -> Iterator[AnyTiling]:
    """The tilings of `[N, H, W, C]` to choose from.

    Args:
        kind: Their class.
        shape: N, H, W and C.
        side: Pixels that a coefficient is made of, in height and in width.
        kernel_size: k.
        images: How many a tile may have.
        most_rounds: Of blocks that a multiprocessor takes one after the other.
    """
    n, h, w, c = shape
    rows, columns = pl.cdiv(h, side), pl.cdiv(w, side)
    for several in images:
        groups = pl.cdiv(n, several)
        for each in range(1, MAX_COLUMNS + 1):
            units = pl.cdiv(columns, STRIPS // several * each), pl.cdiv(c, CHANNELS)
            for heights in range(1, min(pl.cdiv(rows, MIN_ROWS), MULTIPROCESSORS) + 1):
                tiles, blocks = groups * heights, math.prod(units)
                for rounds in range(1, 1 + pl.cdiv(blocks * tiles, MULTIPROCESSORS)):
                    splits = min(tiles, max(1, rounds * MULTIPROCESSORS // blocks))
                    tile = several, each, pl.cdiv(rows, heights)
                    yield kind(kernel_size // 2, *tile, *units, groups, heights, splits)
                    if splits == tiles or rounds >= most_rounds:
                        break


@cache
def tiling_of(shape: tuple[int, ...], kernel_size: int, most_rounds: int = _MAX_ROUNDS) -> Tiling:
    """The tiling of `[N, H, W, C]` that takes the busiest multiprocessor the least work."""
    _, h, w, c = shape

    def contiguous(tiling: Tiling) -> bool:
        """Whether windows are: see `_LevelBlock.store`."""
        return tiling.images > 1 and c == CHANNELS and h * w == 2 * tiling.columns

    found = tilings(Tiling, shape, 2, kernel_size, (1, STRIPS), most_rounds)
    return min(
        (tiling for tiling in found if not contiguous(tiling)), key=lambda tiling: tiling.cost
    )


def launch(tiling: Tiling) -> dict[str, Any]:
    """How the blocks of a tiling are launched."""
    return {
        "grid": (tiling.splits, tiling.stretches * tiling.chunks),
        "grid_names": ("split", "unit"),
        "num_threads": 4,
        "thread_name": "warpgroup",
        # Every thread arrives at the barriers itself, after its own loads and stores.
        "compiler_params": UNSYNCHRONISED,
    }


def drain(barrier: Any, turns: Any, slots: int, early: int) -> None:
    """Waits for the last turns, which nobody had to wait for.

    Args:
        barrier: One for each slot.
        turns: How many there were.
        slots: Which they went around.
        early: Slots before that of the first turn that were freed before it.
    """

    def one(turn: Any, _: Any) -> tuple[()]:
        plgpu.barrier_wait(barrier.at[lax.rem(turn + slots, slots)])
        return ()

    lax.fori_loop(jnp.maximum(turns - slots, -early), turns, one, ())


def zeros(count: int, shape: tuple[int, ...] = (STRIPS, CHANNELS)) -> list[Any]:
    """Sums to begin with, each a warpgroup's values of a shape."""
    zero = jnp.zeros(shape, jnp.float32)
    return [plgpu.layout_cast(zero, plgpu.Layout.WG_STRIDED(shape, vec_size=1))] * count


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A block, and how those of its launch share the images."""

    tiling: Any

    @property
    def size(self) -> int:
        """The kernel size."""
        return 2 * self.tiling.reach + 1


@dataclass(frozen=True, kw_only=True)
class Tiled(Launched):
    """A block that has tiles."""

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
        tiling = self.tiling
        tile = lax.axis_index("split") + i * tiling.splits
        return lax.div(tile, tiling.heights), lax.rem(tile, tiling.heights) * tiling.rows

    @property
    def turns(self) -> Any:
        """Steps of this block, over all of its tiles."""
        return self.count * self.tiling.steps


@dataclass(frozen=True, kw_only=True)
class Block(Tiled):
    """A block whose warpgroups free the slots of its ring, of two rows of x each, one by one."""

    depth: int
    x: Any
    rows: Any
    full: Any
    free: Any

    @property
    def early(self) -> int:
        """How many slots, the last, are free at first and filled only in the first steps."""
        raise NotImplementedError

    def window(self, step: Step) -> tuple[Any, Any, Any, Any]:
        """Images, first row, stretch and channels of a step.

        The row is one of coefficients, in an image, and does not count what a tile reads above it.
        """
        i, s = step
        tiling = self.tiling
        group, row = self.origin(i)
        chunk, stretch = self.place
        images = pl.ds(group * tiling.images, tiling.images)
        return images, row + s, stretch, pl.ds(chunk * CHANNELS, CHANNELS)

    def fetch_rows(self, slot: Any, step: Step, above: int) -> None:
        """Orders the copy of the two rows of x that lie `above` rows over those of a step."""
        images, row, stretch, channels = self.window(step)
        first = 2 * (stretch * self.tiling.width - self.tiling.reach)
        columns = pl.ds(first, self.rows.shape[-2])
        plgpu.copy_gmem_to_smem(
            self.x.at[images, pl.ds(2 * (row - above), 2), columns, channels],
            self.rows.at[slot],
            self.full.at[slot],
        )

    def fetch(self, slot: Any, step: Step) -> None:
        """Orders the copies of a step."""
        raise NotImplementedError

    def fetch_first(self) -> Ring:
        """Orders the copies of the first steps, but for the last `early` slots."""
        ring: Ring = (jnp.int32(0), (jnp.int32(0), jnp.int32(0)))

        def one(_: Any, ring: Ring) -> Ring:
            return self.fetch_next(ring, wait=False)

        return lax.fori_loop(0, self.depth - self.early, one, ring)

    def fetch_next(self, ring: Ring, wait: bool = True) -> Ring:
        """Orders the copies of the ring's step, if there is one; the ring that follows.

        Args:
            ring: A slot, and the step that it is for.
            wait: Whether for all to have freed the slot.
        """
        slot, (i, s) = ring

        @pl.when(i < self.count)
        def _() -> None:
            if wait:
                plgpu.barrier_wait(self.free.at[slot])
            self.fetch(slot, (i, s))

        last = s == self.tiling.steps - 1
        return following(slot, self.depth), (jnp.where(last, i + 1, i), jnp.where(last, 0, s + 1))

    def free_first(self) -> None:
        """Frees the last slots, into which nothing was copied yet."""
        for slot in range(self.depth - self.early, self.depth):
            plgpu.barrier_arrive(self.free.at[slot])

    def pairs(self, row: Any, pair: Any, columns: int) -> list[tuple[Any, Any]]:
        """(LL, LH) of each column of coefficients, or (HL, HH) if `pair` is 1, twice as large.

        Args:
            row: `[images, 2, columns of pixels, channels]`, halo included.
            pair: Which two bands.
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

    def view(self, row: Any, j: int, each: int) -> Any:
        """Column j of each strip, `each * columns` wide, of a row `[images, columns, channels]`."""
        tiling = self.tiling
        if tiling.strips == 1:
            return row.at[:, j]
        each *= tiling.columns
        first = min(j, row.shape[1] - tiling.strips * each)
        row = row.at[0, pl.ds(first, tiling.strips * each)]
        return row.reshape(tiling.strips, each, CHANNELS).at[:, j - first]

    def column(self, row: Any, j: int, each: int = 2) -> Any:
        """What `view` shows, in float32."""
        return self.view(row, j, each)[...].astype(jnp.float32)
