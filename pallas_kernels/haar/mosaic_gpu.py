"""The Haar cascade on Hopper GPUs: Pallas kernels of Mosaic GPU, up to `_FUSED` levels a launch.

- **Tasks:** a task is a row of squares of `2**levels` x `2**levels` pixels, some of them for each
  thread, which computes all levels of one channel of them in registers. Squares need no halo.
  Blocks are persistent, at most one for each multiprocessor, and their warpgroups take one task
  after the other.
- **Warpgroups:** two or four a block, each of which is the producer and the only consumer of a
  pipeline of its own: they know nothing of each other.
- **Pipeline:** 1 to 4 stages a warpgroup, as many as shared memory holds, each for a task's inputs.
  The prologue fills all of them; a stage is filled again when its task is done.
- **mbarriers:** `full` of a stage, on which the TMA loads into it arrive, one for each input. There
  is no `empty`, since the consumer issues the loads itself.
- **TMA loads and stores:** loads fill what lies outside an image with zeros, and stores leave out
  what lies outside a result. A warpgroup has one buffer for results, and waits until the stores of
  the task before have read it. The epilogue waits for the last stores.
- **Registers:** no `setmaxnreg`, since all roles are alike: 128 a thread for four warpgroups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mosaic_gpu_call
from pallas_kernels.common._compat import in_32_bits, vary_like
from pallas_kernels.common.mosaic_gpu import (
    MANUAL_BARRIERS,
    MULTIPROCESSORS,
    SHARED,
    Scratch,
    aligned,
    size_in_bytes,
    unavailable,
)
from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.types import Bands, Index, Ref, Slice
from pallas_kernels.haar.butterfly import merge, split
from pallas_kernels.haar.problem import Problem

__all__ = ["DIFFERENTIABLE", "check", "unavailable", "wavedec", "waverec"]

DIFFERENTIABLE = False

_MAX_LEVELS = 5
_FUSED = 2
"""The most levels of a launch; a low band between two launches is then 1/16 of the image."""
_THREADS = 128
"""Threads of a warpgroup."""
_PIXELS = 32
"""The most pixels of a thread, unless a single square is more."""
_LARGEST_COPY = 256
"""The most elements of a TMA copy along each axis."""
_MAX_STAGES = 4
"""The most stages of a warpgroup's pipeline."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd", the only one.
        problem: The call.
    """
    reasons = problem.unsupported(("float32", "bfloat16", "float16"), _MAX_LEVELS)
    if not reasons:
        images, height, width, channels = problem.shape
        # Positions of TMA copies are counted in 32 bits, however large the array is.
        if images * pl.cdiv(height, 2) * pl.cdiv(width, 2) * pl.cdiv(channels, 8) >= 1 << 31:
            reasons.append(f"a signal {problem.shape}, which is too large")
    refuse(reasons)


@partial(jax.jit, static_argnames=("ndim", "levels", "wavelet"))
@in_32_bits
def wavedec(
    x: jax.Array, *, ndim: int, levels: int, wavelet: str
) -> tuple[jax.Array, tuple[Bands, ...]]:
    """Returns the low band of `x [N, H, W, C]`, and three details a level, the coarsest first."""
    inputs, channels = x, x.shape[-1]
    low = aligned(x, x.dtype)
    details: list[Bands] = []
    while len(details) < levels:
        count = min(_FUSED, levels - len(details))
        last = len(details) + count == levels
        low, *found = _analysis(low, count, x.dtype, x.dtype if last else jnp.dtype("float32"))
        for first in range(0, 3 * count, 3):
            details.insert(0, tuple(found[first : first + 3]))
    return vary_like(inputs, jax.tree.map(lambda band: band[..., :channels], (low, tuple(details))))


@partial(jax.jit, static_argnames=("shape", "wavelet"))
@in_32_bits
def waverec(
    low: jax.Array, details: tuple[Bands, ...], *, shape: tuple[int, int], wavelet: str
) -> jax.Array:
    """Returns the image `[N, *shape, C]` that `wavedec` makes these bands of."""
    inputs, channels, dtype = (low, details), low.shape[-1], low.dtype
    low, left = jax.tree.map(lambda band: aligned(band, dtype), (low, list(details)))
    while left:
        # The finest levels, which are the largest, have launches with all `_FUSED` levels.
        count = (len(left) - 1) % _FUSED + 1
        levels, left = left[:count][::-1], left[count:]
        size = left[0][0].shape[1:3] if left else shape
        low = _synthesis(low, levels, size, jnp.dtype("float32") if left else dtype)
    return vary_like(inputs, low[..., :channels])


@dataclass(frozen=True)
class _Tiling:
    """The division of all images' squares among the warpgroups of a launch.

    A task is a row of `columns` squares for each strip of threads, of each of `images` images.

    Attributes:
        levels: Levels of the launch.
        images: Images of a task.
        strips: Strips of threads side by side, each of a thread for each channel.
        columns: Squares of a thread.
        channels: Channels of a task.
        groups: Groups of `images` images.
        rows: Rows of squares of an image.
        column_blocks: Tasks that an image is wide.
        channel_blocks: Blocks of `channels` channels.
    """

    levels: int
    images: int
    strips: int
    columns: int
    channels: int
    groups: int
    rows: int
    column_blocks: int
    channel_blocks: int

    @property
    def side(self) -> int:
        """The height and width of a square, in pixels."""
        return 1 << self.levels

    @property
    def tasks(self) -> int:
        """The number of tasks of all warpgroups."""
        return self.groups * self.rows * self.column_blocks * self.channel_blocks

    def shape(self, level: int) -> tuple[int, int, int, int]:
        """Returns the shape of a task's part of a band of a level, or of the image for level 0."""
        each = self.side >> level
        return self.images, each, self.strips * self.columns * each, self.channels


def _tiling(shape: tuple[int, ...], levels: int) -> _Tiling:
    """Returns the tiling of `[N, H, W, C]`, which is the finest array that a launch works on."""
    n, h, w, c = shape
    side = 1 << levels
    rows, across = pl.cdiv(h, side), pl.cdiv(w, side)
    # Mosaic (JAX 0.10 to 0.11) stores windows that are contiguous in memory without TMA's bounds.
    # Those of fewer or of more channels than there are have gaps, but for one coincidence.
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
    """Returns the coarsest low band of `[N, H, W, C]`, and three details a level, finest first."""
    n, h, w, c = x.shape
    tiling = _tiling(x.shape, levels)
    sizes = [(n, pl.cdiv(h, 1 << level), pl.cdiv(w, 1 << level), c) for level in _to(levels)]
    outputs = [jax.ShapeDtypeStruct(sizes[-1], low_dtype)]
    outputs += [jax.ShapeDtypeStruct(size, dtype) for size in sizes for _ in range(3)]
    return _launch(_Analysis, tiling, [x], outputs)


def _synthesis(
    low: jax.Array, details: list[Bands], size: tuple[int, int], dtype: jnp.dtype
) -> jax.Array:
    """Returns the image `[N, *size, C]` of its coarsest low band and the details, finest first."""
    shape = low.shape[0], *size, low.shape[-1]
    bands = [band for level in details for band in level]
    tiling = _tiling(shape, len(details))
    (image,) = _launch(_Synthesis, tiling, [low, *bands], [jax.ShapeDtypeStruct(shape, dtype)])
    return image


def _to(levels: int) -> range:
    """Returns the levels of a launch, from fine to coarse."""
    return range(1, levels + 1)


def _launch(
    kind: "type[_Block]",
    tiling: _Tiling,
    inputs: list[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Runs a kernel in as many persistent blocks as are resident, and returns its results."""
    coefficients = [tiling.levels, *(level for level in _to(tiling.levels) for _ in range(3))]
    read, written = ([0], coefficients) if kind is _Analysis else (coefficients, [0])

    def size(levels: list[int], arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> int:
        """Returns the size in bytes of a task's parts of these arrays."""
        parts = zip(levels, arrays, strict=True)
        return sum(size_in_bytes(tiling.shape(level), array.dtype) for level, array in parts)

    stage_size, out_size = size(read, inputs), size(written, outputs)
    warpgroups = 4 if 4 * (2 * stage_size + out_size) <= SHARED else 2
    stages = min(_MAX_STAGES, (SHARED // warpgroups - out_size) // stage_size)
    blocks = min(MULTIPROCESSORS, pl.cdiv(tiling.tasks, warpgroups))

    def buffer(
        array: jax.Array | jax.ShapeDtypeStruct, level: int, stages: tuple[int, ...]
    ) -> Scratch:
        return plgpu.SMEM((warpgroups, *stages, *tiling.shape(level)), array.dtype)

    def body(*refs: Ref) -> None:
        parts = iter(refs)
        sources, results, buffers, outs = (
            [next(parts) for _ in arrays] for arrays in (inputs, outputs, inputs, outputs)
        )
        kind(
            tiling,
            stages,
            blocks * warpgroups,
            lax.axis_index("block") * warpgroups + lax.axis_index("warpgroup"),
            lax.axis_index("warpgroup"),
            list(zip(sources, buffers, read, strict=True)),
            list(zip(results, outs, written, strict=True)),
            next(parts),
        ).run()

    scratch = [buffer(array, level, (stages,)) for array, level in zip(inputs, read, strict=True)]
    scratch += [buffer(array, level, ()) for array, level in zip(outputs, written, strict=True)]
    # A warpgroup waits for its own loads alone.
    full = plgpu.Barrier(num_arrivals=len(inputs), num_barriers=warpgroups * stages)
    return mosaic_gpu_call.kernel(
        body,
        out_type=outputs,
        scratch_types=[*scratch, full],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=MANUAL_BARRIERS,
    )(*inputs)


Copied = list[tuple[Ref, Ref, int]]
"""Arrays in global memory, the buffers in shared memory for parts of them, and their levels."""

Values = dict[tuple[int, int, int], jax.Array]
"""A thread's values in float32, by square, row and column."""


@dataclass(frozen=True)
class _Block:
    """The work of one warpgroup: every `total`-th task from number `first` on.

    The warpgroup is the producer and the consumer of its own pipeline: it waits for a stage's
    `full` mbarrier, computes, issues the TMA stores, and issues the TMA loads of a later task.

    Attributes:
        tiling: How the launch's warpgroups share the squares.
        stages: Stages of this warpgroup's pipeline.
        total: Warpgroups of all blocks.
        first: The number of this warpgroup among all.
        warpgroup: The index of this warpgroup in its block.
        read: The inputs, with their stages.
        written: The results, with their buffers for TMA stores.
        full: An mbarrier for each stage of each warpgroup.
    """

    tiling: _Tiling
    stages: int
    total: int
    first: Index
    warpgroup: Index
    read: Copied
    written: Copied
    full: Ref

    def run(self) -> None:
        """Runs the pipeline: prologue, main loop over the tasks, and epilogue."""
        count = lax.div(self.tiling.tasks - self.first + self.total - 1, self.total)

        def prefill(i: Index, carry: tuple[()]) -> tuple[()]:
            pl.when(i < count)(partial(self.load_task, i))
            return ()

        def task(i: Index, carry: tuple[()]) -> tuple[()]:
            plgpu.barrier_wait(self.full.at[self.barrier(i)])
            # After this, the TMA stores of the task before have read the buffers of the results.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.compute(lax.rem(i, self.stages))
            # After this fence, all threads have read and written, and TMA sees what they wrote.
            plgpu.commit_smem()
            for array, out, level in self.written:
                plgpu.copy_smem_to_gmem(
                    out.at[self.warpgroup], array.at[self.window(i, level)], commit_group=False
                )
            plgpu.commit_smem_to_gmem_group()
            pl.when(i + self.stages < count)(partial(self.load_task, i + self.stages))
            return ()

        lax.fori_loop(0, self.stages, prefill, ())
        lax.fori_loop(0, count, task, ())
        plgpu.wait_smem_to_gmem(0)

    def compute(self, stage: Index) -> None:
        """Computes a task, from the buffers of its stage to those of the results."""
        raise NotImplementedError

    def barrier(self, i: Index) -> jax.Array:
        """Returns the index of the `full` mbarrier of the i-th task's stage."""
        return self.warpgroup * self.stages + lax.rem(i, self.stages)

    def load_task(self, i: Index) -> None:
        """Issues the TMA loads of the i-th task into its stage."""
        stage = lax.rem(i, self.stages)
        for array, buffers, level in self.read:
            plgpu.copy_gmem_to_smem(
                array.at[self.window(i, level)],
                buffers.at[self.warpgroup, stage],
                self.full.at[self.barrier(i)],
            )

    def window(self, i: Index, level: int) -> tuple[Slice, ...]:
        """Returns the i-th task's part of an array of a level, which starts inside the array."""
        tiling = self.tiling
        channel_blocks, column_blocks = tiling.channel_blocks, tiling.column_blocks
        task = self.first + i * self.total
        task, channel_block = lax.div(task, channel_blocks), lax.rem(task, channel_blocks)
        task, column_block = lax.div(task, column_blocks), lax.rem(task, column_blocks)
        group, row = lax.div(task, tiling.rows), lax.rem(task, tiling.rows)
        at = group, row, column_block, channel_block
        return tuple(
            pl.ds(part * size, size) for part, size in zip(at, tiling.shape(level), strict=True)
        )

    def squares(self, level: int) -> Iterator[tuple[int, int, int]]:
        """Yields the square, row and column of each of a thread's values of a level."""
        each = range(self.tiling.side >> level)
        return product(range(self.tiling.columns), each, each)

    def view(self, buffer: Ref, level: int, at: tuple[int, int, int]) -> Ref:
        """Returns a view of one value of each thread, of a buffer of a level."""
        tiling, (j, v, u) = self.tiling, at
        each = tiling.side >> level
        if tiling.strips == 1:
            return buffer.at[:, v, j * each + u]
        row = buffer.at[0, v].reshape(tiling.columns, tiling.strips, each, tiling.channels)
        return row.at[j, :, u]

    def load(self, buffer: Ref, level: int, at: tuple[int, int, int]) -> jax.Array:
        """Returns what `view` shows, as float32 in registers."""
        return self.view(buffer, level, at)[...].astype(jnp.float32)

    def store(self, buffer: Ref, level: int, at: tuple[int, int, int], value: jax.Array) -> None:
        """Writes what `view` shows, in the dtype of the buffer."""
        self.view(buffer, level, at)[...] = value.astype(buffer.dtype)


class _Analysis(_Block):
    """Warpgroups that turn an image into its coarsest low band and the details of all levels."""

    def compute(self, stage: Index) -> None:
        """Computes a task, from the buffers of its stage to those of the results."""
        tiling = self.tiling
        (_, low_out, _), *details = ((a, out.at[self.warpgroup], e) for a, out, e in self.written)
        ((_, buffers, _),) = self.read
        image = buffers.at[self.warpgroup, stage]
        lows: Values = {}
        for level in _to(tiling.levels):
            finer, lows = lows, {}
            for j, v, u in self.squares(level):
                corners = [(j, 2 * v + b, 2 * u + e) for b in range(2) for e in range(2)]
                if level == 1:
                    a, b, c, d = (self.load(image, 0, at) for at in corners)
                else:
                    a, b, c, d = (finer[at] for at in corners)
                low, *bands = split(a, b, c, d)
                lows[j, v, u] = 0.5 * low
                for (_, out, _), band in zip(details[3 * (level - 1) :], bands, strict=False):
                    self.store(out, level, (j, v, u), 0.5 * band)
        for at, value in lows.items():
            self.store(low_out, tiling.levels, at, value)


class _Synthesis(_Block):
    """Warpgroups that turn a coarsest low band and the details of all levels into an image."""

    def compute(self, stage: Index) -> None:
        """Computes a task, from the buffers of its stage to those of the results."""
        tiling = self.tiling
        low, *details = (buffers.at[self.warpgroup, stage] for _, buffers, _ in self.read)
        ((_, out, _),) = self.written
        image = out.at[self.warpgroup]
        lows = {at: self.load(low, tiling.levels, at) for at in self.squares(tiling.levels)}
        for level in reversed(_to(tiling.levels)):
            bands = details[3 * (level - 1) : 3 * level]
            coarser, lows = lows, {}
            for j, v, u in self.squares(level):
                high = (self.load(band, level, (j, v, u)) for band in bands)
                pixels = merge(coarser[j, v, u], *high)
                corners = [(j, 2 * v + b, 2 * u + e) for b in range(2) for e in range(2)]
                for at, pixel in zip(corners, pixels, strict=True):
                    if level == 1:
                        self.store(image, 0, at, 0.5 * pixel)
                    else:
                        lows[at] = 0.5 * pixel
