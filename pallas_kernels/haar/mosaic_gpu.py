"""The Haar cascade on Hopper GPUs: Pallas kernels of Mosaic GPU, up to `_FUSED` levels a launch.

A warpgroup takes squares of `2**levels` x `2**levels` pixels: the copy engine brings them into a
ring of slots of shared memory, a thread computes all levels of one channel of some of them in
registers, and the copy engine takes the results away. It fills what lies outside an image with
zeros, and leaves out what lies outside a result. Warpgroups know nothing of each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
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
    UNSYNCHRONISED,
    aligned,
    size_in_bytes,
    unavailable,
)

__all__ = ["DIFFERENTIABLE", "check", "unavailable", "wavedec", "waverec"]

DIFFERENTIABLE = False

Bands = tuple[jax.Array, ...]

_MAX_LEVELS = 5
_FUSED = 2
"""Levels of a launch; a low band between two launches is then 1/16 of the image."""
_THREADS = 128
"""Of a warpgroup."""
_PIXELS = 32
"""Pixels of a thread, where a single square is not more."""
_LARGEST_COPY = 256
"""Of the copy engine, along each axis."""
_MAX_DEPTH = 4
"""Slots of a warpgroup's ring."""


def check(direction: str, problem: Any) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd", the only one.
        problem: `pallas_kernels.haar.problem.Problem`.
    """
    reasons = problem.unsupported(("float32", "bfloat16", "float16"), _MAX_LEVELS)
    if not reasons:
        images, height, width, channels = problem.shape
        # What the copy engine takes at a time is counted in 32 bits, however large the array is.
        if images * pl.cdiv(height, 2) * pl.cdiv(width, 2) * pl.cdiv(channels, 8) >= 1 << 31:
            reasons.append(f"a signal {problem.shape}, which is too large")
    if reasons:
        raise NotImplementedError(f"does not take {'; '.join(reasons)}")


@partial(jax.jit, static_argnames=("ndim", "levels", "wavelet"))
@in_32_bits
def wavedec(
    x: jax.Array, *, ndim: int, levels: int, wavelet: str
) -> tuple[jax.Array, tuple[Bands, ...]]:
    """All levels of `x [N, H, W, C]`: the low band, and three details a level from coarse on."""
    axes, channels = varying_axes(x), x.shape[-1]
    low, details = aligned(x, x.dtype), []
    while len(details) < levels:
        count = min(_FUSED, levels - len(details))
        last = len(details) + count == levels
        low, *found = _analysis(low, count, x.dtype, x.dtype if last else jnp.dtype("float32"))
        for first in range(0, 3 * count, 3):
            details.insert(0, tuple(found[first : first + 3]))
    return vary_over(axes, jax.tree.map(lambda band: band[..., :channels], (low, tuple(details))))


@partial(jax.jit, static_argnames=("shape", "wavelet"))
@in_32_bits
def waverec(
    low: jax.Array, details: tuple[Bands, ...], *, shape: tuple[int, int], wavelet: str
) -> jax.Array:
    """The inverse of `wavedec`: an image `[N, *shape, C]`."""
    axes, channels, dtype = varying_axes((low, details)), low.shape[-1], low.dtype
    low, left = jax.tree.map(lambda band: aligned(band, dtype), (low, list(details)))
    while left:
        # Whole launches for the finest levels, which are the largest.
        count = (len(left) - 1) % _FUSED + 1
        levels, left = left[:count][::-1], left[count:]
        size = left[0][0].shape[1:3] if left else shape
        low = _synthesis(low, levels, size, jnp.dtype("float32") if left else dtype)
    return vary_over(axes, low[..., :channels])


@dataclass(frozen=True)
class _Tiling:
    """How the warpgroups of a launch share an image's squares.

    A task is a row of `columns` squares for each strip of threads, of one image or of `images`.
    """

    levels: int
    images: int
    strips: int
    columns: int
    channels: int
    groups: int
    rows: int
    stretches: int
    chunks: int

    @property
    def side(self) -> int:
        """Of a square, in pixels."""
        return 1 << self.levels

    @property
    def tasks(self) -> int:
        """Of all warpgroups."""
        return self.groups * self.rows * self.stretches * self.chunks

    def shape(self, level: int) -> tuple[int, int, int, int]:
        """What a task has of a band of a level, of the image if that is 0."""
        each = self.side >> level
        return self.images, each, self.strips * self.columns * each, self.channels


def _tiling(shape: tuple[int, ...], levels: int) -> _Tiling:
    """The tiling of an image `[N, H, W, C]`, the finest that a launch has to do with."""
    n, h, w, c = shape
    side = 1 << levels
    rows, across = pl.cdiv(h, side), pl.cdiv(w, side)
    # Mosaic (JAX 0.10 to 0.11) writes windows that are contiguous in memory without a look at
    # bounds. Those of fewer or of more channels than there are have gaps, but for one coincidence.
    sizes = [size for size in (32, 16, 8) if size < c] or [16, 32]
    channels = next(size for size in sizes if size != rows * across * c)
    images, strips = 1, _THREADS // channels
    if across <= strips // 2:
        images, strips = strips, 1
    most = min(max(1, _PIXELS // side**2), _LARGEST_COPY // (strips * side))
    columns = min(most, pl.cdiv(across, strips))
    return _Tiling(
        *(levels, images, strips, columns, channels),
        *(pl.cdiv(n, images), rows, pl.cdiv(across, strips * columns)),
        pl.cdiv(c, channels),
    )


def _analysis(x: jax.Array, levels: int, dtype: jnp.dtype, low_dtype: jnp.dtype) -> list[jax.Array]:
    """The coarsest low band of `x [N, H, W, C]`, and three details a level from fine to coarse."""
    n, h, w, c = x.shape
    tiling = _tiling(x.shape, levels)
    sizes = [(n, pl.cdiv(h, 1 << level), pl.cdiv(w, 1 << level), c) for level in _to(levels)]
    outputs = [jax.ShapeDtypeStruct(sizes[-1], low_dtype)]
    outputs += [jax.ShapeDtypeStruct(size, dtype) for size in sizes for _ in range(3)]
    return _launch(_Analysis, tiling, [x], outputs)


def _synthesis(
    low: jax.Array, details: list[Bands], size: tuple[int, int], dtype: jnp.dtype
) -> jax.Array:
    """The image `[N, *size, C]` of its coarsest low band and the details from fine to coarse."""
    shape = low.shape[0], *size, low.shape[-1]
    bands = [band for level in details for band in level]
    tiling = _tiling(shape, len(details))
    (image,) = _launch(_Synthesis, tiling, [low, *bands], [jax.ShapeDtypeStruct(shape, dtype)])
    return image


def _to(levels: int) -> range:
    """The levels of a launch from fine to coarse."""
    return range(1, levels + 1)


def _launch(
    kind: "type[_Block]",
    tiling: _Tiling,
    inputs: list[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Runs a kernel in as many blocks as are resident at once."""
    coefficients = [tiling.levels, *(level for level in _to(tiling.levels) for _ in range(3))]
    read, written = ([0], coefficients) if kind is _Analysis else (coefficients, [0])
    slot, out = (
        sum(
            size_in_bytes(tiling.shape(level), array.dtype)
            for level, array in zip(levels, arrays, strict=True)
        )
        for levels, arrays in ((read, inputs), (written, outputs))
    )
    warpgroups = 4 if 4 * (2 * slot + out) <= SHARED else 2
    depth = min(_MAX_DEPTH, (SHARED // warpgroups - out) // slot)
    blocks = min(MULTIPROCESSORS, pl.cdiv(tiling.tasks, warpgroups))

    def ring(array: Any, level: int, slots: tuple[int, ...]) -> Any:
        return plgpu.SMEM((warpgroups, *slots, *tiling.shape(level)), array.dtype)

    def body(*refs: Any) -> None:
        parts = iter(refs)
        sources, results, slots, outs = (
            [next(parts) for _ in arrays] for arrays in (inputs, outputs, inputs, outputs)
        )
        kind(
            tiling,
            depth,
            blocks * warpgroups,
            lax.axis_index("block") * warpgroups + lax.axis_index("warpgroup"),
            lax.axis_index("warpgroup"),
            list(zip(sources, slots, read, strict=True)),
            list(zip(results, outs, written, strict=True)),
            next(parts),
        ).run()

    scratch = [ring(array, level, (depth,)) for array, level in zip(inputs, read, strict=True)]
    scratch += [ring(array, level, ()) for array, level in zip(outputs, written, strict=True)]
    # A warpgroup waits for its own copies alone.
    full = plgpu.Barrier(num_arrivals=len(inputs), num_barriers=warpgroups * depth)
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=[*scratch, full],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=UNSYNCHRONISED,
    )(*inputs)


Copied = list[tuple[Any, Any, int]]
"""Arrays in memory, the buffers that hold parts of them, and their levels."""

Values = dict[tuple[int, int, int], Any]
"""Of a thread's squares, in float32: by square, row and column."""


@dataclass(frozen=True)
class _Block:
    """What a warpgroup does: `total` of them, of which this is number `first`, in turn."""

    tiling: _Tiling
    depth: int
    total: int
    first: Any
    warpgroup: Any
    read: Copied
    written: Copied
    full: Any

    def run(self) -> None:
        """Brings in, computes and takes away one task after the other."""
        count = lax.div(self.tiling.tasks - self.first + self.total - 1, self.total)

        def begin(i: Any, _: Any) -> tuple[()]:
            pl.when(i < count)(partial(self.fetch, i))
            return ()

        def task(i: Any, _: Any) -> tuple[()]:
            plgpu.barrier_wait(self.full.at[self.barrier(i)])
            # Of the task before nothing is left to take away.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.compute(lax.rem(i, self.depth))
            # All threads have read and written; the copy engine sees it.
            plgpu.commit_smem()
            for array, out, level in self.written:
                plgpu.copy_smem_to_gmem(
                    out.at[self.warpgroup], array.at[self.window(i, level)], commit_group=False
                )
            plgpu.commit_smem_to_gmem_group()
            pl.when(i + self.depth < count)(partial(self.fetch, i + self.depth))
            return ()

        lax.fori_loop(0, self.depth, begin, ())
        lax.fori_loop(0, count, task, ())
        plgpu.wait_smem_to_gmem(0)

    def compute(self, slot: Any) -> None:
        """From the buffers of a slot to those of the results."""
        raise NotImplementedError

    def barrier(self, i: Any) -> Any:
        """Which barrier tells that the copies of the i-th task have come."""
        return self.warpgroup * self.depth + lax.rem(i, self.depth)

    def fetch(self, i: Any) -> None:
        """Orders the copies of the i-th task."""
        slot = lax.rem(i, self.depth)
        for array, slots, level in self.read:
            plgpu.copy_gmem_to_smem(
                array.at[self.window(i, level)],
                slots.at[self.warpgroup, slot],
                self.full.at[self.barrier(i)],
            )

    def window(self, i: Any, level: int) -> tuple[Any, ...]:
        """What the i-th task has of an array of a level; it starts inside the array."""
        tiling = self.tiling
        task = self.first + i * self.total
        task, chunk = lax.div(task, tiling.chunks), lax.rem(task, tiling.chunks)
        task, stretch = lax.div(task, tiling.stretches), lax.rem(task, tiling.stretches)
        group, row = lax.div(task, tiling.rows), lax.rem(task, tiling.rows)
        at = group, row, stretch, chunk
        return tuple(
            pl.ds(part * size, size) for part, size in zip(at, tiling.shape(level), strict=True)
        )

    def squares(self, level: int) -> Iterator[tuple[int, int, int]]:
        """Square, row and column of each of a thread's values of a level."""
        each = range(self.tiling.side >> level)
        return product(range(self.tiling.columns), each, each)

    def view(self, buffer: Any, level: int, at: tuple[int, int, int]) -> Any:
        """One value of each thread, `[strips, channels]`, of a buffer of a level."""
        tiling, (j, v, u) = self.tiling, at
        each = tiling.side >> level
        if tiling.strips == 1:
            return buffer.at[:, v, j * each + u]
        row = buffer.at[0, v].reshape(tiling.columns, tiling.strips, each, tiling.channels)
        return row.at[j, :, u]

    def load(self, buffer: Any, level: int, at: tuple[int, int, int]) -> Any:
        """What `view` shows, in float32."""
        return self.view(buffer, level, at)[...].astype(jnp.float32)

    def store(self, buffer: Any, level: int, at: tuple[int, int, int], value: Any) -> None:
        """Writes what `load` would read."""
        self.view(buffer, level, at)[...] = value.astype(buffer.dtype)


class _Analysis(_Block):
    """From an image to the coarsest low band and the details of all levels."""

    def compute(self, slot: Any) -> None:
        """From the buffers of a slot to those of the results."""
        tiling = self.tiling
        (_, low_out, _), *details = ((a, out.at[self.warpgroup], e) for a, out, e in self.written)
        ((_, slots, _),) = self.read
        image = slots.at[self.warpgroup, slot]
        lows: Values = {}
        for level in _to(tiling.levels):
            finer, lows = lows, {}
            for j, v, u in self.squares(level):
                corners = [(j, 2 * v + b, 2 * u + e) for b in range(2) for e in range(2)]
                if level == 1:
                    a, b, c, d = (self.load(image, 0, at) for at in corners)
                else:
                    a, b, c, d = (finer[at] for at in corners)
                top, bottom, right, cross = a + b, c + d, a - b, c - d
                lows[j, v, u] = 0.5 * (top + bottom)
                bands = top - bottom, right + cross, right - cross
                for (_, out, _), band in zip(details[3 * (level - 1) :], bands, strict=False):
                    self.store(out, level, (j, v, u), 0.5 * band)
        for at, value in lows.items():
            self.store(low_out, tiling.levels, at, value)


class _Synthesis(_Block):
    """From the coarsest low band and the details of all levels to an image."""

    def compute(self, slot: Any) -> None:
        """From the buffers of a slot to those of the results."""
        tiling = self.tiling
        low, *details = (slots.at[self.warpgroup, slot] for _, slots, _ in self.read)
        ((_, out, _),) = self.written
        image = out.at[self.warpgroup]
        lows = {at: self.load(low, tiling.levels, at) for at in self.squares(tiling.levels)}
        for level in reversed(_to(tiling.levels)):
            bands = details[3 * (level - 1) : 3 * level]
            coarser, lows = lows, {}
            for j, v, u in self.squares(level):
                vertical, horizontal, diagonal = (
                    self.load(band, level, (j, v, u)) for band in bands
                )
                top, bottom = coarser[j, v, u] + vertical, coarser[j, v, u] - vertical
                right, cross = horizontal + diagonal, horizontal - diagonal
                pixels = top + right, top - right, bottom + cross, bottom - cross
                corners = [(j, 2 * v + b, 2 * u + e) for b in range(2) for e in range(2)]
                for at, pixel in zip(corners, pixels, strict=True):
                    if level == 1:
                        self.store(image, 0, at, 0.5 * pixel)
                    else:
                        lows[at] = 0.5 * pixel
