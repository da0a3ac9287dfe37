"""A whole MLP in one launch on Hopper GPUs: the hidden rows stay in registers.

Two products that follow each other, as in FlashAttention-3, with GELU in the place of softmax:

- **Tiles:** a consumer warpgroup takes 64 rows at a time. For each chunk of hidden channels it
  multiplies its rows, in shared memory, by the chunk's columns of the first kernel, adds the bias,
  takes GELU in float32, rounds, and multiplies these registers by the chunk's rows of the second
  kernel. The sums over chunks stay in registers. Blocks are persistent, one for each
  multiprocessor, and take one tile after the other.
- **Overlap:** a chunk's second product and the next one's first are queued together, and while one
  consumer takes GELU the tensor cores have those of the others.
- **Kernels:** a producer warpgroup loads their chunks by TMA. Where all of them fit beside the rows
  they are loaded once and stay; else they go round through a pipeline of stages, out of the L2
  cache, in which all blocks find the same chunks.
- **Rows:** each consumer loads its own: the next tile's x once the last first product of this one
  is done, and the residual into the buffer that y is stored from, once the store before is.
- **mbarriers:** a stage has one of each kernel for "full", on which its TMA load arrives, and one
  for "empty", on which all consumers do. Each consumer has one for x, and one for the residual.
- **Norm:** where x is to be normalised, a consumer does so with its rows in shared memory.
- **Epilogue:** bias and residual are added in float32, and y leaves by TMA stores, which leave out
  what lies outside the result. What TMA reads outside of an array is zero.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import gelu, mosaic_gpu_call
from pallas_kernels.common._compat import gpu_load, in_32_bits, vary_like
from pallas_kernels.common.mosaic_gpu import (
    MANUAL_BARRIERS,
    MULTIPROCESSORS,
    SHARED,
    Scratch,
    choose,
    next_stage,
    seen_twice,
    swizzled,
    when,
)
from pallas_kernels.common.types import Index, Ref, Slice
from pallas_kernels.mlp.problem import Problem

__all__ = ["TILES", "tiling", "whole"]

_ROWS = 64
"""The rows of a consumer's tile, which are those of a `wgmma` instruction."""
_WIDEST = 256
"""The most columns of a `wgmma` instruction, and elements of a TMA copy along an axis."""
_UNIT = 16
"""Channels (K) of a `wgmma` instruction, to whose multiples rows are filled up."""
_SWIZZLED = (64, 32, 16)
"""Channels of a row of a swizzled tile of memory, of 128, 64 or 32 bytes."""
_STAGES = 8
"""The most stages of the pipeline."""
_RESIDENT = 32
"""The most chunks that stay: Mosaic has no more mbarriers of one name."""
_REGISTERS = {2: (40, 232), 3: (32, 160)}
"""Registers of a thread of the producer, and of a consumer, by the number of consumers."""
_OTHERS = 48
"""Registers of a thread beside sums and what GELU has been taken of."""
_PARAMS = replace(MANUAL_BARRIERS, approx_math=True)
"""Compiler parameters: powers of two and roots are one instruction, with two or three wrong bits of
24, of which 16 bits show nothing."""


class Tile(NamedTuple):
    """The size of a block: its consumer warpgroups, and hidden channels of a chunk."""

    consumers: int
    chunk: int


TILES = (Tile(3, 64), Tile(2, 64), Tile(2, 128), Tile(3, 96), Tile(2, 32))
"""The sizes that are worth timing, in the order in which they are taken unasked."""


@dataclass(frozen=True)
class _Tiling:
    """The division of an MLP among blocks.

    Attributes:
        rows: Rows of x.
        channels: Channels of x.
        hidden: Channels between the layers.
        features: Channels of y.
        consumers: Consumer warpgroups of a block, each of which takes 64 rows at a time.
        chunk: Hidden channels of a chunk.
        stages: Chunks that there is shared memory for.
    """

    rows: int
    channels: int
    hidden: int
    features: int
    consumers: int
    chunk: int
    stages: int = 0

    @property
    def read(self) -> tuple[int, int]:
        """The parts of a row of x, and the channels of each, which one TMA load takes."""
        return self._parts(self.channels)

    @property
    def written(self) -> tuple[int, int]:
        """The parts of a row of y, and the features of each, which one TMA store takes."""
        return self._parts(self.features)

    def _parts(self, channels: int) -> tuple[int, int]:
        """The number of swizzled parts of a row, and the channels of each."""
        whole = pl.cdiv(channels, _UNIT) * _UNIT
        size = next(size for size in _SWIZZLED if whole % size == self.chunk % size == 0)
        return whole // size, size

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return pl.cdiv(self.hidden, self.chunk)

    @property
    def resident(self) -> bool:
        """Whether all chunks stay in shared memory."""
        return self.stages == self.chunks

    @property
    def tiles(self) -> int:
        """The number of tiles, of a block's consumers together."""
        return pl.cdiv(self.rows, _ROWS * self.consumers)

    def with_stages(self) -> "_Tiling":
        """The tiling with as many stages as fit, at most those of all chunks."""
        wide = sum(count * size for count, size in (self.read, self.written))
        left = SHARED - 2 * self.consumers * _ROWS * wide
        stages = left // (2 * self.chunk * wide)
        stay = self.chunks <= min(stages, _RESIDENT)
        return replace(self, stages=self.chunks if stay else min(stages, _STAGES))

    def possible(self) -> bool:
        """Whether `wgmma` instructions, registers and shared memory can be of these sizes."""
        parts, wide = self.written
        sums = (parts * wide + self.chunk + self.chunk // 2) // 2
        return (
            max(self.chunk, self.channels, self.features) <= _WIDEST
            and sums + _OTHERS <= _REGISTERS[self.consumers][1]
            and self.stages >= min(2, self.chunks)
        )


def tiling(problem: Problem, **tile: int) -> _Tiling | None:
    """Returns the tiling of a size, or the first of `TILES` that is possible; None where none is.

    Args:
        problem: The call.
        **tile: The fields of a `Tile`, or nothing.
    """
    (rows, channels), _, hidden, features = problem
    sizes = rows, channels, hidden, features
    found = (_Tiling(*sizes, *size).with_stages() for size in ([Tile(**tile)] if tile else TILES))
    return next((one for one in found if one.possible()), None)


@partial(jax.jit, static_argnames=("epsilon", "cut"))
@in_32_bits
def whole(
    x: jax.Array,
    kernels: tuple[jax.Array, jax.Array],
    biases: tuple[jax.Array, jax.Array],
    residual: jax.Array | None,
    *,
    epsilon: float | None,
    cut: _Tiling,
) -> jax.Array:
    """Returns the MLP of rows; see `vjp` for the arguments.

    Args:
        x: `[rows, C]`, bfloat16 or float16.
        kernels: `[C, hidden]` and `[hidden, features]`.
        biases: `[hidden]` and `[features]`.
        residual: `[rows, features]`, or None.
        epsilon: What the norm of x adds to the variance, or None.
        cut: What `tiling` returns.
    """
    inputs = x, kernels, biases, residual
    (depth, deep), (parts, wide) = cut.read, cut.written
    # Where an array has only one row, Mosaic takes every row to be inside.
    rows, hidden = max(cut.rows, 2), pl.cdiv(cut.hidden, deep) * deep
    arrays = {
        "x": _filled(x, rows, depth * deep),
        "first": _filled(kernels[0], depth * deep, hidden),
        "second": _filled(kernels[1], hidden, parts * wide),
        "inner": _filled(biases[0].astype(jnp.float32), cut.chunks * cut.chunk),
        "outer": _filled(biases[1].astype(jnp.float32), parts * wide),
    }
    if residual is not None:
        arrays["residual"] = _filled(residual, rows, parts * wide)
    y = jax.ShapeDtypeStruct((rows, parts * wide), x.dtype)
    scratch = _scratch(cut, x.dtype)
    names = [*arrays, "y", *scratch]

    def body(*refs: Ref) -> None:
        _Block(cut=cut, epsilon=epsilon, **dict(zip(names, refs, strict=True))).run()

    kernel = mosaic_gpu_call.kernel(
        body,
        out_type=y,
        scratch_types=list(scratch.values()),
        grid=(min(cut.tiles, MULTIPROCESSORS),),
        grid_names=("block",),
        num_threads=cut.consumers + 1,
        thread_name="warpgroup",
        compiler_params=_PARAMS,
    )
    return vary_like(inputs, kernel(*arrays.values())[: cut.rows, : cut.features])


def _scratch(cut: _Tiling, dtype: jnp.dtype) -> dict[str, Scratch]:
    """Returns the shared memory and the mbarriers of a block, as `_Block` describes them."""
    (depth, deep), (parts, wide) = cut.read, cut.written
    sizes = {"one": (depth * deep, cut.chunk, deep), "two": (cut.chunk, parts * wide, wide)}
    scratch: dict[str, Scratch] = {
        "images": seen_twice((cut.consumers, depth), (_ROWS,), deep, dtype),
        "out": seen_twice((cut.consumers, parts), (_ROWS,), wide, dtype),
        "arrived": plgpu.Barrier(num_arrivals=depth, num_barriers=cut.consumers),
        "added": plgpu.Barrier(num_arrivals=parts, num_barriers=cut.consumers),
    }
    for name, (rows, columns, swizzle) in sizes.items():
        scratch[name] = plgpu.SMEM(
            (cut.stages, rows, columns), dtype, transforms=swizzled(swizzle, dtype)
        )
        scratch[f"{name}_full"] = plgpu.Barrier(num_barriers=cut.stages)
        scratch[f"{name}_empty"] = plgpu.Barrier(
            num_arrivals=cut.consumers, num_barriers=cut.stages
        )
    return scratch


def _filled(array: jax.Array, *shape: int) -> jax.Array:
    """Returns an array with zeros up to a shape."""
    fill = [(0, size - own) for size, own in zip(shape, array.shape, strict=True)]
    return jnp.pad(array, fill) if shape != array.shape else array


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One persistent block: its references, and what each of its warpgroups does.

    The last warpgroup is the producer (`produce`), the others are consumers (`consume`).

    Attributes:
        cut: How blocks share the result.
        epsilon: What the norm of x adds to the variance, or None.
        x: The rows in global memory.
        first: The first kernel in global memory.
        second: The second one.
        inner: The first bias in global memory, float32.
        outer: The second one.
        y: The result in global memory.
        images: A tile of x for each consumer in shared memory, in parts, seen twice.
        out: A tile of the residual, then of y, likewise.
        arrived: An mbarrier of each consumer for its tile of x.
        added: An mbarrier of each consumer for its tile of the residual.
        one: The stages for chunks of the first kernel in shared memory.
        one_full: Their mbarriers, on which the loads arrive.
        one_empty: Their mbarriers, on which the consumers do.
        two: The stages for chunks of the second kernel, which are empty later.
        two_full: As `one_full`.
        two_empty: As `one_empty`.
        residual: The residual in global memory, or None.
    """

    cut: _Tiling
    epsilon: float | None
    x: Ref
    first: Ref
    second: Ref
    inner: Ref
    outer: Ref
    y: Ref
    images: Ref
    out: Ref
    arrived: Ref
    added: Ref
    one: Ref
    one_full: Ref
    one_empty: Ref
    two: Ref
    two_full: Ref
    two_empty: Ref
    residual: Ref = None

    def run(self) -> None:
        """Runs the role of this warpgroup."""
        warpgroup = lax.axis_index("warpgroup")
        # It is one branch, so that registers can go from one role to the other.
        consumes = warpgroup < self.cut.consumers
        choose(consumes, partial(self.consume, warpgroup), self.produce)

    @property
    def count(self) -> jax.Array:
        """The number of tiles of this block."""
        blocks = lax.axis_size("block")
        return lax.div(self.cut.tiles - lax.axis_index("block") + blocks - 1, blocks)

    def row(self, i: Index, warpgroup: Index) -> Index:
        """Returns the first row of a consumer's part of the block's i-th tile."""
        tile = lax.axis_index("block") + i * lax.axis_size("block")
        return (tile * self.cut.consumers + warpgroup) * _ROWS

    def produce(self) -> None:
        """Issues the TMA loads of all chunks, of each tile anew unless they stay."""
        plgpu.set_max_registers(_REGISTERS[self.cut.consumers][0], action="decrease")
        chunks, stages = self.cut.chunks, self.cut.stages
        steps = chunks if self.cut.resident else self.count * chunks

        def load(step: Index, carry: tuple[Index, Index]) -> tuple[Index, Index]:
            chunk, stage = carry

            def each(source: Ref, stages_of: Ref, full: Ref, empty: Ref) -> None:
                if not self.cut.resident:

                    @when(step >= stages)
                    def _() -> None:
                        plgpu.barrier_wait(empty.at[stage])

                plgpu.copy_gmem_to_smem(source, stages_of.at[stage], full.at[stage])

            hidden = pl.ds(chunk * self.cut.chunk, self.cut.chunk)
            (depth, deep), (parts, wide) = self.cut.read, self.cut.written
            first = self.first.at[pl.ds(0, depth * deep), hidden]
            each(first, self.one, self.one_full, self.one_empty)
            second = self.second.at[hidden, pl.ds(0, parts * wide)]
            each(second, self.two, self.two_full, self.two_empty)
            return next_stage(chunk, chunks), next_stage(stage, stages)

        def drain(step: Index, stage: Index) -> Index:
            plgpu.barrier_wait(self.one_empty.at[stage])
            plgpu.barrier_wait(self.two_empty.at[stage])
            return next_stage(stage, stages)

        none = jnp.int32(0)
        _, stage = lax.fori_loop(0, steps, load, (none, none))
        if not self.cut.resident:
            # There are fewer stages than chunks, so all are in use.
            lax.fori_loop(0, stages, drain, stage)

    def consume(self, warpgroup: Index) -> None:
        """Computes a consumer's part of each tile of the block."""
        plgpu.set_max_registers(_REGISTERS[self.cut.consumers][1], action="increase")
        count, chunks, stages = self.count, self.cut.chunks, self.cut.stages
        self.load(0, warpgroup)

        def tile(i: Index, stage: Index) -> Index:
            plgpu.barrier_wait(self.arrived.at[warpgroup])
            if self.epsilon is not None:
                self.normalize(warpgroup, self.epsilon)

            def summed(sums: Ref) -> Index:
                def chunk(j: Index, stage: Index) -> Index:
                    # Chunks that stay are waited for once.
                    when((i == 0) | (not self.cut.resident))(
                        lambda: plgpu.barrier_wait(self.one_full.at[stage])
                    )
                    hidden = self.widened(j, stage, warpgroup)
                    # All products that were under way are done.
                    if not self.cut.resident:
                        plgpu.barrier_arrive(self.one_empty.at[stage])

                        @when(j > 0)
                        def _() -> None:
                            before = jnp.where(stage == 0, stages, stage) - 1
                            plgpu.barrier_arrive(self.two_empty.at[before])

                    when(j == 0)(lambda: self.make_room(i, warpgroup))
                    when((j == chunks - 1) & (i + 1 < count))(lambda: self.load(i + 1, warpgroup))
                    after = gelu.in_kernel(hidden).astype(self.y.dtype)
                    when((i == 0) | (not self.cut.resident))(
                        lambda: plgpu.barrier_wait(self.two_full.at[stage])
                    )
                    # It goes on while the next chunk's first product is issued.
                    plgpu.wgmma(sums, after, self.two.at[stage])
                    return next_stage(stage, stages)

                following = lax.fori_loop(0, chunks, chunk, stage)
                done = sums[...]
                if not self.cut.resident:
                    last = jnp.where(following == 0, stages, following) - 1
                    plgpu.barrier_arrive(self.two_empty.at[last])
                self.epilogue(i, warpgroup, done)
                return following

            parts, wide = self.cut.written
            return pl.run_scoped(summed, plgpu.ACC((_ROWS, parts * wide), jnp.float32))

        lax.fori_loop(0, count, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def widened(self, j: Index, stage: Index, warpgroup: Index) -> jax.Array:
        """Returns the first layer of a consumer's rows, for the channels of a chunk."""
        (depth, deep), chunk = self.cut.read, self.cut.chunk
        rows = self.images[1]
        # It arrives while the tensor cores multiply.
        bias = _along_rows(self.inner.at[pl.ds(j * chunk, chunk)], chunk)

        def multiplied(sums: Ref) -> jax.Array:
            for k in range(depth):
                kernel = self.one.at[stage, pl.ds(k * deep, deep)]
                plgpu.wgmma(sums, rows.at[warpgroup, k], kernel)
            return sums[...]

        return pl.run_scoped(multiplied, plgpu.ACC((_ROWS, chunk), jnp.float32)) + bias

    def normalize(self, warpgroup: Index, epsilon: float) -> None:
        """Brings each of a consumer's rows, where they are, to mean 0 and variance 1."""
        (depth, deep), channels = self.cut.read, self.cut.channels
        rows, shape = self.images[1], (_ROWS, deep)

        def mean(parts: Sequence[jax.Array]) -> jax.Array:
            return reduce(operator.add, (part.sum(axis=1) for part in parts)) * (1 / channels)

        def inside(k: int, values: jax.Array) -> jax.Array:
            if (k + 1) * deep <= channels:
                return values
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            return jnp.where(column < channels - k * deep, values, 0.0)

        parts = [
            gpu_load(rows.at[warpgroup, k], plgpu.Layout.WGMMA).astype(jnp.float32)
            for k in range(depth)
        ]
        middle = lax.broadcast_in_dim(mean(parts), shape, (0,))
        parts = [inside(k, part - middle) for k, part in enumerate(parts)]
        factor = lax.rsqrt(mean([part * part for part in parts]) + epsilon)
        for k, part in enumerate(parts):
            done = part * lax.broadcast_in_dim(factor, shape, (0,))
            rows.at[warpgroup, k][...] = done.astype(self.y.dtype)
        plgpu.commit_smem()

    def load(self, i: Index, warpgroup: Index) -> None:
        """Issues the TMA loads of a consumer's rows of the i-th tile."""
        depth, deep = self.cut.read
        # All warps have read what was there.
        plgpu.commit_smem()
        for k in range(depth):
            source = self.x.at[pl.ds(self.row(i, warpgroup), _ROWS), pl.ds(k * deep, deep)]
            boxes = self.images[0].at[warpgroup, k]
            plgpu.copy_gmem_to_smem(source, boxes, self.arrived.at[warpgroup])

    def make_room(self, i: Index, warpgroup: Index) -> None:
        """Waits for the stores of the tile before, and issues the loads of the residual."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if self.residual is not None:
            for number, at in enumerate(self.places(i, warpgroup)):
                boxes = self.out[0].at[warpgroup, number]
                plgpu.copy_gmem_to_smem(self.residual.at[*at], boxes, self.added.at[warpgroup])

    def epilogue(self, i: Index, warpgroup: Index, sums: jax.Array) -> None:
        """Finishes a consumer's part of the i-th tile, and issues its TMA stores."""
        parts, wide = self.cut.written
        if self.residual is not None:
            plgpu.barrier_wait(self.added.at[warpgroup])
        for number in range(parts):
            own = self.out[1].at[warpgroup, number]
            first = number * wide
            done = sums[:, first : first + wide]
            done = done + _along_rows(self.outer.at[pl.ds(first, wide)], wide)
            if self.residual is not None:
                # Last, as it is the largest.
                done = done + gpu_load(own, plgpu.Layout.WGMMA).astype(jnp.float32)
            own[...] = done.astype(self.y.dtype)
        plgpu.commit_smem()
        for number, at in enumerate(self.places(i, warpgroup)):
            plgpu.copy_smem_to_gmem(self.out[0].at[warpgroup, number], self.y.at[*at])

    def places(self, i: Index, warpgroup: Index) -> Iterator[tuple[Slice, Slice]]:
        """Yields where in the result each part of a consumer's rows of the i-th tile is."""
        parts, wide = self.cut.written
        for number in range(parts):
            yield pl.ds(self.row(i, warpgroup), _ROWS), pl.ds(number * wide, wide)


def _along_rows(bias: Ref, size: int) -> jax.Array:
    """Returns a bias for each row of a consumer's."""
    values = gpu_load(bias, plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(values, (_ROWS, size), (1,))
