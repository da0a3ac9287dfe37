"""Gradients of the taps on Hopper GPUs: bands of x correlated with those of dy, a launch a level.

Each launch leaves the low bands of both for the next one: it has them in registers. Tiles and their
streams are those of `mosaic_gpu_tiles`; two warpgroups multiply pairs of bands, and in the first
level two more the upper and the lower rows of pixels, for the base convolution.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common._compat import in_32_bits, vary_over, varying_axes
from pallas_kernels.common.mosaic_gpu import (
    MULTIPROCESSORS,
    SHARED,
    aligned,
    following,
    size_in_bytes,
)
from pallas_kernels.wtconv.mosaic_gpu.tiles import (
    CHANNELS,
    MIN_ROWS,
    REGISTERS,
    STRIPS,
    Block,
    Step,
    drain,
    handed_dtype,
    launch,
    tiling_of,
    zeros,
)

__all__ = ["weight_grad"]

Pair = tuple[jax.Array, jax.Array]
"""x and dy, or low bands of them."""


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
    """Gradients of the taps: each level's coefficients of x correlated with those of dy.

    And of the bias, whose shape is the last if it is wanted: dy is summed on the way. Every sum
    runs in a fixed order, so they are bitwise reproducible.
    """
    axes = varying_axes((x, dy))
    channels = x.shape[-1]
    biased = len(kernel_shapes[-1]) == 1
    kernel_size, levels = kernel_shapes[0][0], len(kernel_shapes) - 1 - biased
    pair = aligned(x, x.dtype), aligned(dy, dy.dtype)
    first, *others = _parts(x.shape) if levels > 1 else [range(x.shape[0])]
    sums = _sums(pair, kernel_size, levels, first)
    for images in others:
        # One part after the other, so that the low bands of one alone are in memory.
        pair, sums = lax.optimization_barrier((pair, sums))
        more = _sums(pair, kernel_size, levels, images)
        sums = [one + other for one, other in zip(sums, more, strict=True)]
    base, *fine = sums
    # The sum of dy follows the base's taps.
    sums = [base[:-1], *fine, *([base[-1]] if biased else [])]
    return vary_over(
        axes,
        tuple(
            one[..., :channels].reshape(shape)
            for one, shape in zip(sums, kernel_shapes, strict=True)
        ),
    )


def _parts(shape: tuple[int, ...]) -> list[range]:
    """Two halves of the images, where they are whole tiles and enough for all multiprocessors."""
    n, h, _, c = shape
    tiles = n // 2 * pl.cdiv(c, CHANNELS) * pl.cdiv(h, 2 * MIN_ROWS)
    if n % (2 * STRIPS) or tiles < MULTIPROCESSORS:
        return [range(n)]
    return [range(n // 2), range(n // 2, n)]


def _sums(pair: Pair, kernel_size: int, levels: int, images: range) -> list[jax.Array]:
    """Over some of the images: `[k * k + 1, C]`, and of each level `[k * k, 4, C]`."""
    base, fine, pair = _level_weights(pair, kernel_size, levels > 1, images, first=True)
    assert base is not None
    found = [base, fine]
    for level in range(2, levels + 1):
        whole = range(pair[0].shape[0])
        _, fine, pair = _level_weights(pair, kernel_size, level < levels, whole, first=False)
        found.append(fine)
    return found


def _level_weights(
    pair: Pair, kernel_size: int, deeper: bool, images: range, first: bool
) -> tuple[jax.Array | None, jax.Array, Pair]:
    """Correlates the bands of x with those of dy, and in the first level x itself with dy.

    Args:
        pair: x and dy, `[N, H, W, C]`.
        kernel_size: k.
        deeper: Whether low bands are wanted.
        images: Which are taken.
        first: Whether it is the first level.

    Returns:
        `[k * k + 1, C]`, of which the last sums dy, or None in a deeper level; `[k * k, 4, C]`; and
        low bands of x and dy, `[images, H / 2, W / 2, C]` with zeros beyond up to whole tiles, or
        none.
    """
    x, dy = pair
    n, channels = len(images), x.shape[-1]
    # One round of blocks: each leaves its own sums in memory.
    tiling = tiling_of((n, *x.shape[1:]), kernel_size, most_rounds=1)
    image = (tiling.images, 2, 2 * tiling.width + 4 * tiling.reach, CHANNELS)
    other = (tiling.images, 2, 2 * tiling.width, CHANNELS)
    units = tiling.stretches * tiling.chunks
    taps = kernel_size**2

    def shape(count: int) -> tuple[int, ...]:
        """Of the sums of both roles; stored four at a time."""
        return tiling.splits, units, 2, pl.cdiv(count, STRIPS) * STRIPS, CHANNELS

    # Strips and chunks are axes of their own, so that every store is a plain slice.
    groups, rows = pl.cdiv(n, tiling.images), tiling.heights * tiling.rows
    strips = tiling.stretches * tiling.strips
    low = groups, tiling.images, rows, strips, tiling.columns, tiling.chunks, CHANNELS
    outputs = {"bands": jax.ShapeDtypeStruct(shape(2 * taps), jnp.float32)}
    if first:
        outputs["base"] = jax.ShapeDtypeStruct(shape(taps + 1), jnp.float32)
    if deeper:
        outputs |= {f"low_{of}": jax.ShapeDtypeStruct(low, handed_dtype(x)) for of in ("x", "dy")}
    totals = (4, STRIPS, STRIPS, CHANNELS)
    left = SHARED - size_in_bytes(totals, jnp.dtype("float32"))
    depth = min(8, left // (size_in_bytes(image, x.dtype) + size_in_bytes(other, dy.dtype)))
    scratch = {
        "rows": plgpu.SMEM((depth, *image), x.dtype),
        "others": plgpu.SMEM((depth, *other), dy.dtype),
        "strips": plgpu.SMEM(totals, jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=depth),
        "free": plgpu.Barrier(num_arrivals=4 if first else 2, num_barriers=depth),
    }
    names = ["x", "dy", *outputs, *scratch]

    def body(*refs: Any) -> None:
        block = dict(zip(names, refs, strict=True))
        _WeightsBlock(tiling=tiling, depth=depth, start=images.start, **block).run()

    found = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        **launch(tiling),
    )(x, dy)
    by_name = dict(zip(outputs, found, strict=True))

    def total(sums: jax.Array, count: int) -> jax.Array:
        """`[splits, units, roles, sums, channels]` as `[roles, count, C]`."""
        sums = sums.sum(0).reshape(tiling.stretches, tiling.chunks, *sums.shape[2:]).sum(0)
        return jnp.moveaxis(sums, 0, -2).reshape(*sums.shape[1:-1], -1)[:, :count, :channels]

    bands = total(by_name["bands"], 2 * taps).reshape(2, taps, 2, channels)
    # The transforms leave out the factors 1/2.
    bands = 0.25 * jnp.moveaxis(bands, 0, 1).reshape(taps, 4, channels)
    base = total(by_name["base"], taps + 1).sum(0) if first else None
    whole = groups * tiling.images, rows, strips * tiling.columns, tiling.chunks * CHANNELS
    lows = [by_name[f"low_{of}"].reshape(whole) for of in ("x", "dy") if deeper]
    return base, bands, tuple(lows)


@dataclass(frozen=True, kw_only=True)
class _WeightsBlock(Block):
    """One block of `_level_weights`.

    A step brings in rows of dy, and of x those that lie `reach` rows above. A warpgroup keeps the
    rows of dy that a row of x is a neighbour of, and a sum a tap. `start` is the first image.
    """

    start: int
    dy: Any
    others: Any
    strips: Any
    bands: Any
    base: Any = None
    low_x: Any = None
    low_dy: Any = None

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
        """Slots of the row read and of those behind it; none where a warpgroup only fetches."""
        return 0 if self.base is None else self.behind + 1

    def window(self, step: Step) -> tuple[Any, Any, Any, Any]:
        """Images, first row, stretch and channels of a step."""
        images, *others = super().window(step)
        return pl.ds(self.start + images.start, images.size), *others

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
            step: Called with its number, what it carries, the window, whether there may be other
                than zeros in its rows of x, and whether its row of dy is the tile's; returns what
                it carries and the window.
            carry: What it carries at first; returned as it is at last.
            window: Rows of dy that a step keeps; None is for zeros.
            columns: Values of each.
            behind: Steps by which a row of dy is used later than it comes in.
        """
        tiling = self.tiling
        # Rows above an image.
        above = tiling.reach if tiling.heights == 1 else 0
        first, last = max(above, behind), tiling.rows + behind
        rows: list[list[Any] | None] = [None] * window
        for s in range(first):
            carry, rows = step(s, carry, rows, s >= above, behind <= s < last)
        rows = [zeros(columns) if row is None else row for row in rows]
        # Two steps a turn would move rows of the window half as often, and take a quarter longer:
        # the code of all roles must stay in the cache of instructions.
        carry, rows = lax.fori_loop(
            first, last, lambda s, state: step(s, *state, True, True), (carry, rows)
        )
        for s in range(max(first, last), tiling.steps):
            carry, rows = step(s, carry, rows, True, False)
        return carry

    def correlate_bands(self, pair: Any) -> None:
        """Sums of (LL, LH), or of (HL, HH) if `pair` is 1."""
        plgpu.set_max_registers(REGISTERS["bands"], action="increase")
        tiling, size, columns = self.tiling, self.size, self.tiling.columns
        reach, filtered = tiling.reach, 2 * columns

        def step(
            i: Any, s: Any, carry: Any, window: list[Any], some: bool, own: bool
        ) -> tuple[Any, list[Any]]:
            slot, totals = carry
            plgpu.barrier_wait(self.full.at[slot])
            row = None
            if own:
                row = [v for both in self.pairs(self.others.at[slot], pair, columns) for v in both]
                if self.low_dy is not None:
                    pl.when(pair == 0)(partial(self.keep, self.low_dy, i, s, row[::2]))
            window = [*window, row]
            found = self.pairs(self.rows.at[slot], pair, columns + size - 1) if some else []
            plgpu.barrier_arrive(self.free.at[slot])
            if some and self.low_x is not None:
                lows = [low for low, _ in found[reach:][:columns]]
                inside = (s >= reach) & (s < reach + tiling.rows) & (pair == 0)
                pl.when(inside)(partial(self.keep, self.low_x, i, s - reach, lows))
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

        def tile(i: Any, carry: Any) -> Any:
            return self.over_a_tile(partial(step, i), carry, size - 1, filtered, 0)

        self.free_first()
        carry = jnp.int32(0), zeros(2 * size**2)
        _, totals = lax.fori_loop(0, self.count, tile, carry)
        split, unit = lax.axis_index("split"), lax.axis_index("unit")
        self.leave(pair, totals, self.bands.at[split, unit, pair])

    def keep(self, low: Any, i: Any, row: Any, values: list[Any]) -> None:
        """Writes a row of the i-th tile's low band, which is twice as large here."""
        tiling = self.tiling
        group, first = self.origin(i)
        chunk, stretch = self.place
        if tiling.images == 1:
            strips = pl.ds(stretch * tiling.strips, tiling.strips)
            line = low.at[group, 0, first + row, strips, :, chunk]
        else:
            line = low.at[group, :, first + row, stretch, :, chunk]
        for j, value in enumerate(values):
            line.at[:, j][...] = (0.5 * value).astype(low.dtype)

    def correlate_pixels(self, lower: int) -> None:
        """Sums over the upper or the lower row of each pair of pixels' rows of dy."""
        plgpu.set_max_registers(REGISTERS["pixels"], action="decrease")
        tiling, size, columns = self.tiling, self.size, 2 * self.tiling.columns
        reach, lag, behind = tiling.reach, tiling.lag, self.behind

        def step(
            _: Any, carry: Any, window: list[Any], some: bool, own: bool
        ) -> tuple[Any, list[Any]]:
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
            state = following(slot, self.depth), following(before, self.depth), ring, sums
            return state, window[1:]

        def tile(_: Any, carry: Any) -> Any:
            return self.over_a_tile(step, carry, 2 * lag, columns, behind)

        # The others of the slots that are free at first are freed by the first steps.
        plgpu.barrier_arrive(self.free.at[self.depth - 1 - behind])
        ring: Any = self.fetch_first() if lower else ()
        before = jnp.int32(self.depth - behind if behind else 0)
        carry = jnp.int32(0), before, ring, zeros(size**2 + 1)
        _, before, _, totals = lax.fori_loop(0, self.count, tile, carry)
        for _ in range(behind):
            plgpu.barrier_arrive(self.free.at[before])
            before = following(before, self.depth)
        split, unit = lax.axis_index("split"), lax.axis_index("unit")
        self.leave(2 + lower, totals, self.base.at[split, unit, lower])
        if lower:
            drain(self.free, self.turns, self.depth, self.early)

    def leave(self, role: Any, totals: list[Any], to: Any) -> None:
        """Adds up the strips of each sum, in shared memory, and stores them."""
        fill = -len(totals) % STRIPS
        totals = [*totals, *zeros(fill)]
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
        plgpu.set_max_registers(REGISTERS["pixels"], action="decrease")

    def only_fetch(self) -> None:
        """Orders the copies for two warpgroups that need no others."""
        plgpu.set_max_registers(REGISTERS["pixels"], action="decrease")
        lax.fori_loop(0, self.turns, lambda _, ring: self.fetch_next(ring), self.fetch_first())
        drain(self.free, self.turns, self.depth, self.early)
