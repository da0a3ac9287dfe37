"""The wavelet convolution on Hopper GPUs: Pallas kernels of Mosaic GPU, a launch a level.

Where an image is small, all levels from the second on are one launch, of `mosaic_gpu_deep`. Here a
block streams the rows of one or more images through shared memory, `CHANNELS` channels and
`strips x columns` columns of coefficients wide. The copy engine fills what lies outside an image
with zeros, so nothing is masked. A thread holds one channel of one strip, and its sums and taps in
registers; a step is a row of coefficients, of two rows of pixels. Four warpgroups work at once:

- two filter pairs of bands, (LL, LH) and (HL, HH), and synthesise the columns of each;
- two convolve with the base kernel, one the upper and one the lower row of pixels, add what the
  others hand them through shared memory, and write the result. One of them orders the copies.

`CUTLASS <https://github.com/NVIDIA/cutlass>`_ describes such pipelines of warps with roles.
"""

import itertools
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import in_32_bits, vary_over, varying_axes
from pallas_kernels.mosaic_gpu import (
    MULTIPROCESSORS,
    SHARED,
    UNSYNCHRONISED,
    aligned,
    following,
    size_in_bytes,
    unavailable,
)
from pallas_kernels.wtconv.mosaic_gpu_deep import CHANNELS, STRIPS, deep, fits
from pallas_kernels.wtconv.mosaic_gpu_second import second

__all__ = ["BIAS_GRADIENT", "DIFFERENTIABLE", "check", "forward", "unavailable", "weight_grad"]

DIFFERENTIABLE = False
BIAS_GRADIENT = True

Taps = tuple[jax.Array, ...]
Step = tuple[Any, Any]
"""A block's tile and the step in it."""
Ring = tuple[Any, Step]
"""The slot that is filled next, and the step that it is for."""

_MAX_COLUMNS = 7
"""Columns of coefficients a strip: the sums of five rows of them fit in a thread's registers."""
_MAX_KERNEL = 5
_MAX_LEVELS = 5
_MIN_ROWS = 8
"""Rows of coefficients of a tile that is not a whole image high."""
_MAX_ROUNDS = 8
"""Of blocks that a multiprocessor takes one after the other, to choose from."""
_START, _OVERHEAD = 4, 3
"""What it costs to start a block, in steps, and a step, in columns; estimates."""
_HANDED = 4
"""Rows of filtered bands between the warpgroups."""
_REGISTERS = {"bands": 152, "pixels": 104}
"""Registers of a thread, together what a multiprocessor has for 512 threads."""


def check(direction: str, problem: Any) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd" or "bwd".
        problem: `pallas_kernels.wtconv.problem.Problem`.
    """
    dtypes = ("float32", "bfloat16", "float16")
    reasons = problem.beyond(dtypes, _MAX_KERNEL, _MAX_LEVELS, odd=True)
    if reasons:
        raise NotImplementedError(f"does not take {'; '.join(reasons)}")


@partial(jax.jit, static_argnames=("wavelet", "transpose", "precision"))
@in_32_bits
def forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
) -> jax.Array:
    """The operator on `x [N, H, W, C]`, or its transpose; see `vjp` for the arguments.

    `wavelet` is Haar, and `precision` is float32's whatever is asked: no matrix unit is used.
    """
    axes = varying_axes((x, taps, bias))
    if transpose:
        taps = tuple(jnp.flip(tap, (0, 1)) for tap in taps)
    channels, x = x.shape[-1], aligned(x, x.dtype)
    levels, kernel_size = len(taps) - 1, taps[0].shape[0]
    packed = _packed(taps, bias)
    below: Taps = ()
    if fits(x, levels, kernel_size):
        below = (deep(x, packed, levels, kernel_size, _between(x)),)
    elif levels > 1:
        half, low = second(x, packed, kernel_size, _between(x))
        below = half, *_from_third(low, packed, levels, kernel_size)
    y = _level(x, below, packed, 1, kernel_size, bias is not None, x.dtype)
    return vary_over(axes, y[..., :channels])


def _from_third(low: jax.Array, taps: jax.Array, levels: int, kernel_size: int) -> Taps:
    """Half the synthesis of levels 3 to `levels` from the low band of level 2, if there are any."""
    if fits(low, levels, kernel_size, 3):
        return (deep(low, taps, levels, kernel_size, low.dtype, 3),)
    lows = _lows(low, levels - 2)
    below: Taps = ()
    for level in range(levels, 2, -1):
        below = (_level(lows[level - 3], below, taps, level, kernel_size, False, low.dtype),)
    return below


def _lows(x: jax.Array, levels: int) -> list[jax.Array]:
    """The image and its low bands down to the one that the deepest level reads."""
    lows = [x]
    while len(lows) < levels:
        low = lows[-1]
        odd = [(0, size % 2) for size in low.shape[1:3]]
        low = jnp.pad(low, ((0, 0), *odd, (0, 0))).astype(jnp.float32)
        left, right = low[:, :, ::2], low[:, :, 1::2]
        both = left + right
        lows.append((0.5 * (both[:, ::2] + both[:, 1::2])).astype(_between(x)))
    return lows


def _between(x: jax.Array) -> jnp.dtype:
    """The dtype of what one launch hands on to the next: low bands double with each level."""
    return jnp.dtype("float32") if x.dtype == "float16" else x.dtype


@dataclass(frozen=True)
class _Tiling:
    """How the blocks of a launch share its images.

    A block has one chunk of channels and one stretch of columns, and takes every `splits`-th tile:
    `rows` rows of coefficients, four strips of `columns` columns of one image or of four images.
    Where an image is several tiles high, a tile reads `reach` rows of the one above too.
    """

    reach: int
    images: int
    strips: int
    columns: int
    rows: int
    stretches: int
    chunks: int
    heights: int
    tiles: int
    splits: int

    @property
    def width(self) -> int:
        """Columns of coefficients of a tile."""
        return self.strips * self.columns

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


@cache
def _tiling(shape: tuple[int, ...], kernel_size: int, most_rounds: int = _MAX_ROUNDS) -> _Tiling:
    """The tiling of `[N, H, W, C]` that takes the busiest multiprocessor the least work."""
    n, h, w, c = shape
    rows, columns = pl.cdiv(h, 2), pl.cdiv(w, 2)
    reach, chunks = kernel_size // 2, pl.cdiv(c, CHANNELS)

    def cost(tiling: _Tiling) -> int:
        rounds = pl.cdiv(tiling.stretches * chunks * tiling.splits, MULTIPROCESSORS)
        steps = pl.cdiv(tiling.tiles, tiling.splits) * tiling.steps + _START
        return rounds * steps * (tiling.columns + _OVERHEAD)

    tilings = []
    for images in (1, STRIPS):
        strips = STRIPS // images
        for each in range(1, _MAX_COLUMNS + 1):
            if images > 1 and c == CHANNELS and h * w == 2 * each:
                continue  # Such a window is contiguous: see `_LevelBlock.store`.
            stretches = pl.cdiv(columns, strips * each)
            for heights in range(1, min(pl.cdiv(rows, _MIN_ROWS), MULTIPROCESSORS) + 1):
                tiles = pl.cdiv(n, images) * heights
                units = stretches * chunks
                for rounds in range(1, 1 + pl.cdiv(units * tiles, MULTIPROCESSORS)):
                    splits = min(tiles, max(1, rounds * MULTIPROCESSORS // units))
                    tilings.append(
                        _Tiling(
                            *(reach, images, strips, each, pl.cdiv(rows, heights)),
                            *(stretches, chunks, heights, tiles, splits),
                        )
                    )
                    if splits == tiles or rounds >= most_rounds:
                        break
    return min(tilings, key=cost)


def _packed(taps: Taps, bias: jax.Array | None) -> jax.Array:
    """All taps and the bias, `[chunks, rows, strips, channels]`, the same for all strips.

    One array, because each more is one more launch. Taps of the base come first, then for each
    level (LL, LH) and (HL, HH), a row a tap and band; the bias is last. A level's hold the factors
    1/2 of analysis and of synthesis, and 1/2 for each level above: so its result is ready to be
    added to that one's low band.
    """
    size, channels = taps[0].shape[0] ** 2, taps[0].shape[-1]
    rows = [taps[0].reshape(size, channels)]
    for level, tap in enumerate(taps[1:]):
        bands = tap.astype(jnp.float32) * (0.25 * 0.5**level)
        rows.append(jnp.moveaxis(bands.reshape(size, 2, 2, channels), 1, 0).reshape(-1, channels))
    if bias is not None:
        rows.append(bias[None])
    flat = jnp.concatenate([row.astype(jnp.float32) for row in rows])
    chunks = pl.cdiv(channels, CHANNELS)
    flat = jnp.pad(flat, ((0, 0), (0, chunks * CHANNELS - channels)))
    flat = jnp.moveaxis(flat.reshape(-1, chunks, 1, CHANNELS), 1, 0)
    return jnp.broadcast_to(flat, (*flat.shape[:2], STRIPS, CHANNELS))


def _level(
    x: jax.Array,
    below: Taps,
    taps: jax.Array,
    level: int,
    kernel_size: int,
    biased: bool,
    dtype: jnp.dtype,
) -> jax.Array:
    """One level there and back.

    Args:
        x: `[N, H, W, C]`.
        below: Half the synthesis of the levels below, or of the next and of those below that one:
            `[N, H / 2, W / 2, C]` and `[N, H / 4, W / 2, C]`, or larger.
        taps: As `_packed` has them.
        level: 1, which has the base convolution too, or from 3 on.
        kernel_size: k.
        biased: Whether the taps end with a bias to add.
        dtype: Of the result.

    Returns:
        `[N, H, W, C]`; of level 3, which is added to level 2 in level 1, each column twice.
    """
    n, h, w, c = x.shape
    tiling = _tiling(x.shape, kernel_size)
    arrays = {"x": x, "taps": taps} | {f"below_{i}": one for i, one in enumerate(below)}
    halo = 2 * tiling.reach
    image = (tiling.images, 2, 2 * tiling.width + 2 * halo, CHANNELS)
    coefficients = (tiling.images, tiling.width, CHANNELS)
    handed = (_HANDED, 2, 2, *coefficients)
    row = (2, 2, tiling.images, 1, 2 * tiling.width, CHANNELS)
    slot = size_in_bytes(image, x.dtype)
    slot += sum(size_in_bytes(coefficients, one.dtype) for one in below)
    left = SHARED - size_in_bytes(handed, jnp.dtype("float32")) - size_in_bytes(row, dtype)
    depth = min(8, left // slot)
    scratch = {
        "rows": plgpu.SMEM((depth, *image), x.dtype),
        "handed": plgpu.SMEM(handed, jnp.float32),
        "out": plgpu.SMEM(row, dtype),
        "full": plgpu.Barrier(num_arrivals=1 + len(below), num_barriers=depth),
        "free": plgpu.Barrier(num_arrivals=4, num_barriers=depth),
        "handed_full": plgpu.Barrier(num_arrivals=2, num_barriers=_HANDED),
        "handed_free": plgpu.Barrier(num_arrivals=2, num_barriers=_HANDED),
    }
    for i, one in enumerate(below):
        slots = depth, tiling.images, 1, *coefficients[1:]
        scratch[f"slots_{i}"] = plgpu.SMEM(slots, one.dtype)
    names = [*arrays, "y", *scratch]
    # Of level 3, whose x has whole chunks of channels.
    copies = 2 if level == 3 else 1

    def body(*refs: Any) -> None:
        block = dict(zip(names, refs, strict=True))
        rows_below = [
            tuple(block.pop(f"{name}_{i}") for name in ("below", "slots"))
            for i in range(len(below))
        ]
        _LevelBlock(
            tiling=tiling, depth=depth, level=level, biased=biased, below=rows_below, **block
        ).run()

    y = plgpu.kernel(
        body,
        # The copies side by side, as if they were more channels.
        out_type=jax.ShapeDtypeStruct((n, h, w, copies * c), dtype),
        scratch_types=list(scratch.values()),
        **_launch(tiling),
    )(*arrays.values())
    return y.reshape(n, h, w * copies, c)


def _launch(tiling: _Tiling) -> dict[str, Any]:
    """How all kernels are launched."""
    return {
        "grid": (tiling.splits, tiling.stretches * tiling.chunks),
        "grid_names": ("split", "unit"),
        "num_threads": 4,
        "thread_name": "warpgroup",
        # Every thread arrives at the barriers itself, after its own loads and stores.
        "compiler_params": UNSYNCHRONISED,
    }


def _drain(barrier: Any, turns: Any, slots: int, early: int) -> None:
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


def _zeros(count: int) -> list[Any]:
    """Sums to begin with."""
    shape = (STRIPS, CHANNELS)
    zero = jnp.zeros(shape, jnp.float32)
    return [plgpu.layout_cast(zero, plgpu.Layout.WG_STRIDED(shape, vec_size=1))] * count


@dataclass(frozen=True, kw_only=True)
class _Block:
    """What the blocks of all launches have: rows of x in a ring of slots of shared memory."""

    tiling: _Tiling
    depth: int
    x: Any
    rows: Any
    full: Any
    free: Any

    @property
    def size(self) -> int:
        """The kernel size."""
        return 2 * self.tiling.reach + 1

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
        """First image and first row of coefficients of the block's i-th tile."""
        tiling = self.tiling
        tile = lax.axis_index("split") + i * tiling.splits
        group, height = lax.div(tile, tiling.heights), lax.rem(tile, tiling.heights)
        return group * tiling.images, height * tiling.rows

    @property
    def turns(self) -> Any:
        """Steps of this block, over all of its tiles."""
        return self.count * self.tiling.steps

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
        image, row = self.origin(i)
        chunk, stretch = self.place
        return pl.ds(image, tiling.images), row + s, stretch, pl.ds(chunk * CHANNELS, CHANNELS)

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

    def free_first(self, early: int) -> None:
        """Frees the last `early` slots, into which nothing was copied yet."""
        for slot in range(self.depth - early, self.depth):
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


@dataclass(frozen=True, kw_only=True)
class _LevelBlock(_Block):
    """One block of `_level`: its references, and what each of its warpgroups does."""

    taps: Any
    y: Any
    handed: Any
    out: Any
    handed_full: Any
    handed_free: Any
    level: int
    biased: bool
    below: list[tuple[Any, ...]]
    """What is added to the low band, in memory and in slots, each of half as many rows."""

    def run(self) -> None:
        """Gives each warpgroup its role."""
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup < 2)(partial(self.bands, warpgroup))
        pl.when(warpgroup == 2)(partial(self.pixels, 0))
        pl.when(warpgroup == 3)(partial(self.pixels, 1))

    @property
    def lag(self) -> int:
        """Rows of coefficients that the base convolution's results lie behind what it reads."""
        return self.tiling.lag if self.level == 1 else 0

    @property
    def early(self) -> int:
        """Rows are read in the step that they come for, and ordered in the next."""
        return 1

    def fetch(self, slot: Any, step: Step) -> None:
        """Orders the copies of a step."""
        self.fetch_rows(slot, step, self.tiling.lead)
        images, row, stretch, channels = self.window(step)
        columns = pl.ds(stretch * self.tiling.width, self.tiling.width)
        row = row - self.tiling.lead - self.tiling.reach
        for i, (array, slots) in enumerate(self.below):
            plgpu.copy_gmem_to_smem(
                array.at[images, pl.ds(row >> i, 1), columns, channels],
                slots.at[slot],
                self.full.at[slot],
            )

    def bands(self, pair: Any) -> None:
        """Filters (LL, LH), or (HL, HH) if `pair` is 1, and hands on their synthesis in height."""
        plgpu.set_max_registers(_REGISTERS["bands"], action="increase")
        tiling, size, columns = self.tiling, self.size, self.tiling.columns
        chunk, _ = self.place
        first = size**2 * (4 * self.level - 3 + 2 * pair)
        taps = [
            [
                [self.taps[chunk, first + 2 * (d * size + e) + band] for band in range(2)]
                for e in range(size)
            ]
            for d in range(size)
        ]
        filtered = 2 * columns

        def added(found: list[Any], sums: list[Any] | None, row: int) -> list[Any]:
            """The sums of a row of results, of `size` that a row is a neighbour of, with it."""
            totals = []
            for j, band in itertools.product(range(columns), range(2)):
                total = None if sums is None else sums[2 * j + band]
                for e in range(size):
                    product = found[j + e][band] * taps[size - 1 - row][e][band]
                    total = product if total is None else total + product
                totals.append(total)
            return totals

        def add_below(slot: Any, lows: list[Any]) -> list[Any]:
            for _, slots in self.below:
                row = slots.at[slot, :, 0]
                lows = [low + self.column(row, j, 1) for j, low in enumerate(lows)]
            return lows

        def hand_on(turn: Any, slot: Any, done: list[Any]) -> None:
            """Hands on the row of results number `turn`, counted over all tiles."""
            lows, highs = done[::2], done[1::2]
            if self.below:
                lows = lax.cond(pair == 0, partial(add_below, slot), lambda lows: lows, lows)
            to = turn & _HANDED - 1
            plgpu.barrier_wait(self.handed_free.at[to])
            for j in range(columns):
                self.view(self.handed.at[to, pair, 0], j, 1)[...] = lows[j] + highs[j]
                self.view(self.handed.at[to, pair, 1], j, 1)[...] = lows[j] - highs[j]
            plgpu.barrier_arrive(self.handed_full.at[to])

        def tile(i: Any, slot: Any) -> Any:
            skipped = tiling.lead + tiling.reach

            def one(s: Any, carry: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
                slot, sums = carry
                plgpu.barrier_wait(self.full.at[slot])
                found = self.pairs(self.rows.at[slot], pair, columns + size - 1)
                first, *others = [*sums, None]

                # Before sums of the next row begin, which take the registers of these.
                @pl.when(s >= skipped)
                def _() -> None:
                    hand_on(i * tiling.rows + s - skipped, slot, added(found, first, 0))

                plgpu.barrier_arrive(self.free.at[slot])
                sums = [added(found, other, row) for row, other in enumerate(others, 1)]
                return following(slot, self.depth), sums

            carry = slot, [_zeros(filtered)] * (size - 1)
            slot, sums = lax.fori_loop(0, tiling.read, one, carry)
            for s in range(tiling.read, tiling.steps):
                plgpu.barrier_wait(self.full.at[slot])
                first, *sums = [*sums, _zeros(filtered)]
                if s >= skipped:
                    hand_on(i * tiling.rows + s - skipped, slot, first)
                plgpu.barrier_arrive(self.free.at[slot])
                slot = following(slot, self.depth)
            return slot

        self.free_first(self.early)
        lax.fori_loop(0, self.count, tile, jnp.int32(0))
        _drain(self.handed_free, self.count * tiling.rows, _HANDED, _HANDED)

    def pixels(self, lower: int) -> None:
        """Convolves the upper or the lower row of each pair of pixels' rows, and writes it."""
        plgpu.set_max_registers(_REGISTERS["pixels"], action="decrease")
        tiling, size, columns = self.tiling, self.size, 2 * self.tiling.columns
        chunk, _ = self.place
        if self.level == 1:
            taps = [[self.taps[chunk, d * size + e] for e in range(size)] for d in range(size)]
        (start,) = _zeros(1)
        if self.biased:
            # A sum: inside `shard_map`, JAX (0.11) has it that what is read alone varies, sums not.
            start = start + self.taps[chunk, self.taps.shape[1] - 1]
        open_rows = 2 * self.lag

        def added(rows: list[Any], sums: list[Any], o: int) -> list[Any]:
            """The sums of the o-th row of results, of those not complete, with two rows of x."""
            totals = list(sums)
            for j, row in itertools.product(range(columns if rows else 0), range(2)):
                d = row + 2 * (self.lag - o) - lower + tiling.reach
                for e in range(size if 0 <= d < size else 0):
                    totals[j] = totals[j] + rows[row][j + e] * taps[d][e]
            return totals

        def write(i: Any, row: Any, done: list[Any]) -> None:
            turn = i * tiling.rows + row
            slot, to = turn & _HANDED - 1, turn & 1
            plgpu.barrier_wait(self.handed_full.at[slot])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            out = self.out.at[lower, to, :, 0]
            for j in range(tiling.columns):
                even, odd = (self.column(self.handed.at[slot, p, lower], j, 1) for p in range(2))
                for column, value in ((2 * j, even + odd), (2 * j + 1, even - odd)):
                    if done:
                        value = value + done[column]
                    self.view(out, column, 2)[...] = value.astype(out.dtype)
            plgpu.barrier_arrive(self.handed_free.at[slot])
            plgpu.commit_smem()
            self.store(i, row, lower, to)

        def tile(i: Any, carry: tuple[Any, Ring]) -> tuple[Any, Ring]:
            skipped = tiling.lead + self.lag
            new = [start] * columns if self.level == 1 else []

            def one(s: Any, carry: tuple[Any, Ring, list[Any]]) -> tuple[Any, Ring, list[Any]]:
                slot, ring, sums = carry
                plgpu.barrier_wait(self.full.at[slot])
                rows = [
                    [
                        self.column(self.rows.at[slot, :, row], tiling.reach + j)
                        for j in range(columns + size - 1)
                    ]
                    for row in range(2 if self.level == 1 else 0)
                ]
                plgpu.barrier_arrive(self.free.at[slot])
                first, *others = [*sums, new]

                # Before sums of the next row begin, which take the registers of these.
                @pl.when((s >= skipped) & (s < skipped + tiling.rows))
                def _() -> None:
                    write(i, s - skipped, added(rows, first, 0))

                sums = [added(rows, other, o) for o, other in enumerate(others, 1)]
                if lower:
                    ring = self.fetch_next(ring)
                return following(slot, self.depth), ring, sums

            slot, ring = carry
            sums = [new] * open_rows
            slot, ring, sums = lax.fori_loop(0, tiling.read, one, (slot, ring, sums))
            for s in range(tiling.read, tiling.steps):
                plgpu.barrier_wait(self.full.at[slot])
                plgpu.barrier_arrive(self.free.at[slot])
                first, *sums = [*sums, new]
                if skipped <= s < skipped + tiling.rows:
                    write(i, s - skipped, first)
                if lower:
                    ring = self.fetch_next(ring)
                slot = following(slot, self.depth)
            return slot, ring

        self.free_first(self.early)
        for handed in range(_HANDED):
            plgpu.barrier_arrive(self.handed_free.at[handed])
        ring: Any = self.fetch_first() if lower else ()
        lax.fori_loop(0, self.count, tile, (jnp.int32(0), ring))
        plgpu.wait_smem_to_gmem(0)
        if lower:
            _drain(self.free, self.turns, self.depth, self.early)

    def store(self, i: Any, row: Any, lower: int, slot: Any) -> None:
        """Orders the copy of a row of the i-th tile's pixels to the result.

        What lies outside the image is left out. Mosaic, though, copies windows that are contiguous
        without a look at bounds, and takes axes of one element to be inside: those are cut here.
        """
        tiling = self.tiling
        image, first = self.origin(i)
        chunk, stretch = self.place
        _, height, width, channels = self.y.shape
        first_channels = range(0, channels, self.x.shape[-1])
        if lower and height == 1:
            return

        def copy(columns: int) -> None:
            for channel in first_channels:
                plgpu.copy_smem_to_gmem(
                    self.out.at[lower, slot, :, :, pl.ds(0, columns)],
                    self.y.at[
                        pl.ds(image, tiling.images),
                        pl.ds(2 * (first + row) + lower, 1),
                        pl.ds(2 * stretch * tiling.width, columns),
                        pl.ds(channel + chunk * CHANNELS, CHANNELS),
                    ],
                    # `write` waits for all of them as for one.
                    commit_group=channel == first_channels[-1],
                )

        if channels != CHANNELS or tiling.images > 1:
            copy(2 * tiling.width)
            return
        within = 2 * (first + row) + lower < height
        last = width - 2 * tiling.width * (tiling.stretches - 1)
        pl.when(within & (stretch < tiling.stretches - 1))(partial(copy, 2 * tiling.width))
        pl.when(within & (stretch == tiling.stretches - 1))(partial(copy, last))

        @pl.when(jnp.logical_not(within))
        def _() -> None:
            # `write` counts copies to know which slots are free, and here is one less.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@partial(jax.jit, static_argnames=("kernel_shapes", "wavelet", "precision"))
@in_32_bits
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
) -> Taps:
    """Gradients of the taps: each level's coefficients of x correlated with those of dy.

    And of the bias, whose shape is the last if it is wanted: dy is summed on the way. Every sum
    runs in a fixed order, so they are bitwise reproducible.
    """
    axes = varying_axes((x, dy))
    channels = x.shape[-1]
    biased = len(kernel_shapes[-1]) == 1
    kernel_size, levels = kernel_shapes[0][0], len(kernel_shapes) - 1 - biased
    x, dy = aligned(x, x.dtype), aligned(dy, dy.dtype)
    fine, base = _level_weights(x, dy, kernel_size, base=True)
    assert base is not None
    deeper = _deeper_weights(x, dy, kernel_size, levels)
    # The sum of dy follows the base's taps.
    sums = [base[:-1], fine, *deeper, *([base[-1]] if biased else [])]
    return vary_over(
        axes,
        tuple(
            part[..., :channels].reshape(shape)
            for part, shape in zip(sums, kernel_shapes, strict=True)
        ),
    )


def _deeper_weights(
    x: jax.Array, dy: jax.Array, kernel_size: int, levels: int
) -> tuple[jax.Array, ...]:
    """Gradients of the taps from the second level on, `[k * k, 4, C]` each.

    One part of the batch after the other, so that fewer low bands are in memory at once.
    """
    n, *image, channels = x.shape

    def of(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        lows = list(zip(*(_lows(whole, levels) for whole in pair), strict=True))
        return tuple(_level_weights(*low, kernel_size, base=False)[0] for low in lows[1:])

    parts = _parts(n, channels)
    if parts == 1 or levels < 2:
        return of((x, dy))
    cut = tuple(whole.reshape(parts, n // parts, *image, channels) for whole in (x, dy))
    return tuple(found.sum(0) for found in lax.map(of, cut))


def _parts(images: int, channels: int) -> int:
    """Two, where half of the images are enough for all multiprocessors."""
    blocks = images // 2 * pl.cdiv(channels, CHANNELS)
    return 2 if images % 2 == 0 and blocks >= MULTIPROCESSORS else 1


def _level_weights(
    x: jax.Array, dy: jax.Array, kernel_size: int, base: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Correlates the bands of x with those of dy, and x itself with dy.

    Returns:
        `[k * k, 4, C]`, and if `base`, else None, `[k * k + 1, C]`, of which the last sums dy.
    """
    channels = x.shape[-1]
    # One round of blocks: each leaves its own sums in memory.
    tiling = _tiling(x.shape, kernel_size, most_rounds=1)
    image = (tiling.images, 2, 2 * tiling.width + 4 * tiling.reach, CHANNELS)
    other = (tiling.images, 2, 2 * tiling.width, CHANNELS)
    units = tiling.stretches * tiling.chunks
    taps = kernel_size**2

    def sums(count: int) -> tuple[int, ...]:
        """Of both roles; stored four at a time."""
        return tiling.splits, units, 2, pl.cdiv(count, STRIPS) * STRIPS, CHANNELS

    outputs = {"bands": sums(2 * taps)} | ({"base": sums(taps + 1)} if base else {})
    strips = (4, STRIPS, STRIPS, CHANNELS)
    left = SHARED - size_in_bytes(strips, jnp.dtype("float32"))
    depth = min(8, left // (size_in_bytes(image, x.dtype) + size_in_bytes(other, dy.dtype)))
    scratch = {
        "rows": plgpu.SMEM((depth, *image), x.dtype),
        "others": plgpu.SMEM((depth, *other), dy.dtype),
        "strips": plgpu.SMEM(strips, jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=depth),
        "free": plgpu.Barrier(num_arrivals=4 if base else 2, num_barriers=depth),
    }
    names = ["x", "dy", *outputs, *scratch]

    def body(*refs: Any) -> None:
        block = dict(zip(names, refs, strict=True))
        _WeightsBlock(tiling=tiling, depth=depth, **block).run()

    found = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs.values()],
        scratch_types=list(scratch.values()),
        **_launch(tiling),
    )(x, dy)

    def total(sums: jax.Array, count: int) -> jax.Array:
        """`[splits, units, roles, sums, channels]` as `[roles, count, C]`."""
        sums = sums.sum(0).reshape(tiling.stretches, tiling.chunks, *sums.shape[2:]).sum(0)
        return jnp.moveaxis(sums, 0, -2).reshape(*sums.shape[1:-1], -1)[:, :count, :channels]

    bands = total(found[0], 2 * taps).reshape(2, taps, 2, channels)
    # The transforms leave out the factors 1/2.
    bands = 0.25 * jnp.moveaxis(bands, 0, 1).reshape(taps, 4, channels)
    return bands, total(found[1], taps + 1).sum(0) if base else None


@dataclass(frozen=True, kw_only=True)
class _WeightsBlock(_Block):
    """One block of `_level_weights`.

    A step brings in rows of dy, and of x those that lie `reach` rows above. A warpgroup keeps the
    rows of dy that a row of x is a neighbour of, and a sum a tap.
    """

    dy: Any
    others: Any
    strips: Any
    bands: Any
    base: Any = None

    def run(self) -> None:
        """Gives each warpgroup its role."""
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup < 2)(partial(self.correlate_bands, warpgroup))
        if self.base is not None:
            pl.when(warpgroup == 2)(partial(self.correlate_pixels, 0))
            pl.when(warpgroup == 3)(partial(self.correlate_pixels, 1))
        else:
            # All four roles must be there for the registers to go from two to the others.
            pl.when(warpgroup == 2)(self.rest)
            pl.when(warpgroup == 3)(self.only_fetch)

    @property
    def behind(self) -> int:
        """Steps by which the rows of pixels of dy are used later than they come in."""
        return self.tiling.reach - self.tiling.lag

    @property
    def early(self) -> int:
        """Where there are others than the fetching warpgroup."""
        return 0 if self.base is None else self.behind + 1

    def fetch(self, slot: Any, step: Step) -> None:
        """Orders the copies of a step."""
        self.fetch_rows(slot, step, self.tiling.reach)
        images, row, stretch, channels = self.window(step)
        columns = pl.ds(2 * stretch * self.tiling.width, 2 * self.tiling.width)
        plgpu.copy_gmem_to_smem(
            self.dy.at[images, pl.ds(2 * row, 2), columns, channels],
            self.others.at[slot],
            self.full.at[slot],
        )

    def over_a_tile(self, step: Any, carry: Any, window: int, columns: int, behind: int) -> Any:
        """Takes the steps of a tile, those that have zeros for certain by a code of their own.

        Args:
            step: Called with what it carries, the window, whether there may be other than zeros in
                its rows of x, and whether its row of dy is the tile's; returns the first two.
            carry: What it carries at first; returned as it is at last.
            window: Rows of dy that a step keeps; None is for zeros.
            columns: Values of each.
            behind: Steps by which a row of dy is used later than it comes in.
        """
        tiling = self.tiling
        # Rows above an image.
        zeros = tiling.reach if tiling.heights == 1 else 0
        first, last = max(zeros, behind), tiling.rows + behind
        rows: list[list[Any] | None] = [None] * window
        for s in range(first):
            carry, rows = step(carry, rows, s >= zeros, behind <= s < last)
        rows = [_zeros(columns) if row is None else row for row in rows]
        # Two steps a turn would move rows of the window half as often, and take a quarter longer:
        # the code of all roles must stay in the cache of instructions.
        carry, rows = lax.fori_loop(
            first, last, lambda _, state: step(*state, True, True), (carry, rows)
        )
        for _ in range(max(first, last), tiling.steps):
            carry, rows = step(carry, rows, True, False)
        return carry

    def correlate_bands(self, pair: Any) -> None:
        """Sums of (LL, LH), or of (HL, HH) if `pair` is 1."""
        plgpu.set_max_registers(_REGISTERS["bands"], action="increase")
        size, columns = self.size, self.tiling.columns
        filtered = 2 * columns

        def step(carry: Any, window: list[Any], some: bool, own: bool) -> tuple[Any, list[Any]]:
            slot, totals = carry
            plgpu.barrier_wait(self.full.at[slot])
            row = None
            if own:
                row = [v for both in self.pairs(self.others.at[slot], pair, columns) for v in both]
            window = [*window, row]
            found = self.pairs(self.rows.at[slot], pair, columns + size - 1) if some else []
            plgpu.barrier_arrive(self.free.at[slot])
            sums = list(totals)
            # The oldest row of dy is the furthest above that of x.
            for d, row in enumerate(reversed(window)):
                if row is None or not some:
                    continue
                for e in range(size):
                    for band in range(2):
                        at = (d * size + e) * 2 + band
                        for j in range(columns):
                            sums[at] = sums[at] + found[j + e][band] * row[2 * j + band]
            return (following(slot, self.depth), sums), window[1:]

        def tile(_: Any, carry: Any) -> Any:
            return self.over_a_tile(step, carry, size - 1, filtered, 0)

        self.free_first(self.early)
        carry = jnp.int32(0), _zeros(2 * size**2)
        _, totals = lax.fori_loop(0, self.count, tile, carry)
        split, unit = lax.axis_index("split"), lax.axis_index("unit")
        self.leave(pair, totals, self.bands.at[split, unit, pair])

    def correlate_pixels(self, lower: int) -> None:
        """Sums over the upper or the lower row of each pair of pixels' rows of dy."""
        plgpu.set_max_registers(_REGISTERS["pixels"], action="decrease")
        tiling, size, columns = self.tiling, self.size, 2 * self.tiling.columns
        reach, lag, behind = tiling.reach, tiling.lag, self.behind

        def step(carry: Any, window: list[Any], some: bool, own: bool) -> tuple[Any, list[Any]]:
            # `before` is the slot of `behind` steps ago.
            slot, before, ring, totals = carry
            plgpu.barrier_wait(self.full.at[slot])
            sums = list(totals)
            if own:
                other = self.others.at[before, :, lower]
                row = [self.column(other, j) for j in range(columns)]
                for value in row:
                    sums[-1] = sums[-1] + value
                window = [*window, row]
            else:
                window = [*window, None]
            for v in range(2 if some else 0):
                x = self.rows.at[slot, :, v]
                values = [self.column(x, reach + j) for j in range(columns + size - 1)]
                for o, others in enumerate(window):
                    d = 2 * (lag - o) + v - lower + reach
                    if others is None or not 0 <= d < size:
                        continue
                    for e in range(size):
                        for j in range(columns):
                            product = values[j + e] * others[j]
                            sums[d * size + e] = sums[d * size + e] + product
            plgpu.barrier_arrive(self.free.at[before])
            if lower:
                ring = self.fetch_next(ring)
            return (following(slot, self.depth), following(before, self.depth), ring, sums), window[
                1:
            ]

        def tile(_: Any, carry: Any) -> Any:
            return self.over_a_tile(step, carry, 2 * lag, columns, behind)

        # The others of the slots that are free at first are freed by the first steps.
        plgpu.barrier_arrive(self.free.at[self.depth - 1 - behind])
        ring: Any = self.fetch_first() if lower else ()
        before = jnp.int32(self.depth - behind if behind else 0)
        carry = jnp.int32(0), before, ring, _zeros(size**2 + 1)
        _, before, _, totals = lax.fori_loop(0, self.count, tile, carry)
        for _ in range(behind):
            plgpu.barrier_arrive(self.free.at[before])
            before = following(before, self.depth)
        split, unit = lax.axis_index("split"), lax.axis_index("unit")
        self.leave(2 + lower, totals, self.base.at[split, unit, lower])
        if lower:
            _drain(self.free, self.turns, self.depth, self.early)

    def leave(self, role: Any, totals: list[Any], to: Any) -> None:
        """Adds up the strips of each sum, in shared memory, and stores them."""
        fill = -len(totals) % STRIPS
        totals = [*totals, *_zeros(fill)]
        for first in range(0, len(totals), STRIPS):
            for t in range(STRIPS):
                self.strips[role, t] = totals[first + t]
            plgpu.commit_smem()
            # Four sums side by side, as four strips of one were.
            one, two, three, four = (self.strips[role, :, strip] for strip in range(STRIPS))
            to[pl.ds(first, STRIPS)] = one + two + (three + four)
            plgpu.commit_smem()

    def rest(self) -> None:
        """Leaves its registers to others."""
        plgpu.set_max_registers(_REGISTERS["pixels"], action="decrease")

    def only_fetch(self) -> None:
        """Orders the copies for two warpgroups that need no others."""
        plgpu.set_max_registers(_REGISTERS["pixels"], action="decrease")
        lax.fori_loop(0, self.turns, lambda _, ring: self.fetch_next(ring), self.fetch_first())
        _drain(self.free, self.turns, self.depth, self.early)
