"""The wavelet convolution on Hopper GPUs: Pallas kernels of Mosaic GPU.

Level 1 and the base convolution are the last launch, the one below. What it adds to its low band
comes from one launch for all deeper levels, of `mosaic_gpu_deep`, where an image is small; else
from one for level 2, of `mosaic_gpu_second`, and one or more for the levels below that. Gradients
of the taps are those of `mosaic_gpu_weights`.

A block streams rows of its tiles through shared memory, as `mosaic_gpu_tiles` has it; of its four
warpgroups

- two filter pairs of bands, (LL, LH) and (HL, HH), and synthesise the columns of each;
- two convolve with the base kernel, one the upper and one the lower row of pixels, add what the
  others hand them through shared memory, and write the result. One of them orders the copies.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common._compat import in_32_bits, vary_over, varying_axes
from pallas_kernels.common.mosaic_gpu import SHARED, aligned, following, size_in_bytes, unavailable
from pallas_kernels.wtconv.mosaic_gpu.fused_levels import deep, fits
from pallas_kernels.wtconv.mosaic_gpu.level2 import second
from pallas_kernels.wtconv.mosaic_gpu.tiles import (
    CHANNELS,
    REGISTERS,
    STRIPS,
    Block,
    Ring,
    Step,
    drain,
    handed_dtype,
    launch,
    tiling_of,
    zeros,
)
from pallas_kernels.wtconv.mosaic_gpu.weights import weight_grad

__all__ = ["BIAS_GRADIENT", "DIFFERENTIABLE", "check", "forward", "unavailable", "weight_grad"]

DIFFERENTIABLE = False
BIAS_GRADIENT = True

Taps = tuple[jax.Array, ...]

_MAX_KERNEL = 5
_MAX_LEVELS = 5
_HANDED = 4
"""Rows of filtered bands between the warpgroups."""


def check(direction: str, problem: Any) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd" or "bwd".
        problem: `pallas_kernels.wtconv.problem.Problem`.
    """
    dtypes = ("float32", "bfloat16", "float16")
    reasons = problem.unsupported(dtypes, _MAX_KERNEL, _MAX_LEVELS, odd=True)
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
        below = (deep(x, packed, levels, kernel_size, handed_dtype(x)),)
    elif levels > 1:
        half, low = second(x, packed, kernel_size, handed_dtype(x))
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
        lows.append((0.5 * (both[:, ::2] + both[:, 1::2])).astype(handed_dtype(x)))
    return lows


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
    tiling = tiling_of(x.shape, kernel_size)
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
        **launch(tiling),
    )(*arrays.values())
    return y.reshape(n, h, w * copies, c)


@dataclass(frozen=True, kw_only=True)
class _LevelBlock(Block):
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
        plgpu.set_max_registers(REGISTERS["bands"], action="increase")
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

            carry = slot, [zeros(filtered)] * (size - 1)
            slot, sums = lax.fori_loop(0, tiling.read, one, carry)
            for s in range(tiling.read, tiling.steps):
                plgpu.barrier_wait(self.full.at[slot])
                first, *sums = [*sums, zeros(filtered)]
                if s >= skipped:
                    hand_on(i * tiling.rows + s - skipped, slot, first)
                plgpu.barrier_arrive(self.free.at[slot])
                slot = following(slot, self.depth)
            return slot

        self.free_first()
        lax.fori_loop(0, self.count, tile, jnp.int32(0))
        drain(self.handed_free, self.count * tiling.rows, _HANDED, _HANDED)

    def pixels(self, lower: int) -> None:
        """Convolves the upper or the lower row of each pair of pixels' rows, and writes it."""
        plgpu.set_max_registers(REGISTERS["pixels"], action="decrease")
        tiling, size, columns = self.tiling, self.size, 2 * self.tiling.columns
        chunk, _ = self.place
        if self.level == 1:
            taps = [[self.taps[chunk, d * size + e] for e in range(size)] for d in range(size)]
        (start,) = zeros(1)
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

        self.free_first()
        for handed in range(_HANDED):
            plgpu.barrier_arrive(self.handed_free.at[handed])
        ring: Any = self.fetch_first() if lower else ()
        lax.fori_loop(0, self.count, tile, (jnp.int32(0), ring))
        plgpu.wait_smem_to_gmem(0)
        if lower:
            drain(self.free, self.turns, self.depth, self.early)

    def store(self, i: Any, row: Any, lower: int, slot: Any) -> None:
        """Orders the copy of a row of the i-th tile's pixels to the result.

        What lies outside the image is left out. Mosaic, though, copies windows that are contiguous
        without a look at bounds, and takes axes of one element to be inside: those are cut here.
        """
        tiling = self.tiling
        group, first = self.origin(i)
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
                        pl.ds(group * tiling.images, tiling.images),
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
