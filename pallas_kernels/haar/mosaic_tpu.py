"""The Haar cascade as Pallas TPU kernels: the image is read once, each coefficient written once.

The grid is `common.mosaic_tpu.launch_grid`: blocks of 128 channels, blocks of images, tiles. A grid
step holds one tile in VMEM, which Pallas double-buffers: whole images where they fit, else tiles
whose size is a multiple of 2**levels, which need no halo. Low bands stay in float32 VMEM scratch;
strided loads split columns, strided stores merge them. Small images of a batch are `[H, W, N, C]`,
as XLA lays them out: a register then holds the same column of eight images.

The kernels are bound by memory. For eight float32 images of 56 x 56 x 128 and three levels on a v5e
the compiler's final bundles take 18,000 cycles and the copies between HBM and VMEM 47,000. The
busiest unit is the single store slot, which writes every coefficient once to scratch and once to
its output block.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common._compat import in_32_bits, pallas_output, tpu_vmem_bytes
from pallas_kernels.common.mosaic_tpu import (
    LANES,
    SIZES,
    SUBLANES,
    VMEM_SHARE,
    Part,
    chosen,
    columns_per_register,
    compiler_params,
    from_hwnc,
    halved,
    hwnc_shape,
    launch_grid,
    load_hwnc_row,
    loop,
    offered,
    parts,
    round_up,
    store_row,
    to_hwnc,
    unavailable,
    whole_images,
)
from pallas_kernels.common.refusals import refusal, refuse
from pallas_kernels.common.types import Bands, Pair, Ref
from pallas_kernels.haar.butterfly import merge, split
from pallas_kernels.haar.problem import Problem

__all__ = ["DIFFERENTIABLE", "check", "search_space", "unavailable", "wavedec", "waverec"]

DIFFERENTIABLE = False

_MAX_LEVELS = 5
_MOST_TILINGS = 4


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd", the only one.
        problem: The call.
    """
    refuse(problem.unsupported(("float32", "bfloat16"), _MAX_LEVELS))
    _tilings(problem.shape, jnp.dtype(problem.dtype), problem.levels)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The tilings that are worth timing, the one that is taken unasked first; see `check`."""
    return offered(_tilings(problem.shape, jnp.dtype(problem.dtype), problem.levels))


@partial(jax.jit, static_argnames=("ndim", "levels", "wavelet", *SIZES))
@in_32_bits
def wavedec(
    x: jax.Array, *, ndim: int, levels: int, wavelet: str, **tile: int
) -> tuple[jax.Array, tuple[Bands, ...]]:
    """The low band of `x [N, H, W, C]`, and three details for each level from coarse to fine."""
    tiling = chosen(_tilings(x.shape, x.dtype, levels), tile)
    sizes = halved(tiling.size, levels)
    blocks = _blocks(x.shape, tiling, sizes)
    spec, lanes = blocks[0], min(x.shape[-1], LANES)
    shapes = [
        pallas_output(
            hwnc_shape((x.shape[0], *size, x.shape[-1]), tiling.images_per_register), x.dtype, x
        )
        for size in halved(x.shape[1:3], levels)
    ]
    order = [levels, *(level for level in range(levels, 0, -1) for _ in range(3))]
    low, *details = pl.pallas_call(
        partial(_analysis_kernel, tiling, sizes, (x.shape[1], x.shape[2])),
        out_shape=[shapes[level] for level in order],
        grid=launch_grid(x.shape, tiling.images, tiling.size),
        in_specs=[spec],
        out_specs=[blocks[level] for level in order],
        scratch_shapes=_scratch(tiling, sizes, lanes),
        compiler_params=compiler_params(),
        name="haar_wavedec",
    )(to_hwnc(x, tiling.images_per_register))
    low, *details = (from_hwnc(band, tiling.images_per_register) for band in (low, *details))
    return low, tuple(zip(*[iter(details)] * 3, strict=True))


@partial(jax.jit, static_argnames=("shape", "wavelet", *SIZES))
@in_32_bits
def waverec(
    low: jax.Array, details: tuple[Bands, ...], *, shape: Pair, wavelet: str, **tile: int
) -> jax.Array:
    """The inverse of `wavedec`: an image `[N, *shape, C]`."""
    whole, levels = (low.shape[0], *shape, low.shape[-1]), len(details)
    tiling = chosen(_tilings(whole, low.dtype, levels), tile)
    sizes = halved(tiling.size, levels)
    blocks, lanes = _blocks(whole, tiling, sizes), min(low.shape[-1], LANES)
    order = [levels, *(level for level in range(levels, 0, -1) for _ in range(3))]
    bands = low, *(band for bands in details for band in bands)
    image = pl.pallas_call(
        partial(_synthesis_kernel, tiling, sizes),
        out_shape=pallas_output(hwnc_shape(whole, tiling.images_per_register), low.dtype, *bands),
        grid=launch_grid(whole, tiling.images, tiling.size),
        in_specs=[blocks[level] for level in order],
        out_specs=blocks[0],
        scratch_shapes=_scratch(tiling, sizes, lanes),
        compiler_params=compiler_params(),
        name="haar_waverec",
    )(*(to_hwnc(band, tiling.images_per_register) for band in bands))
    return from_hwnc(image, tiling.images_per_register)


class _Tiling(NamedTuple):
    """The tile of a grid step, and the layout of its registers."""

    images: int
    """The number of images of a grid step."""
    size: Pair
    """The height and width of the tile."""
    images_per_register: int = 1
    """All images of the step, a multiple of eight, where images share registers; otherwise 1."""


def _tilings(shape: Sequence[int], dtype: jnp.dtype, levels: int) -> list[_Tiling]:
    """The tilings that fit in VMEM and are worth timing, the one that is taken unasked first."""
    _, h, w, _ = shape
    limit = int(tpu_vmem_bytes() * VMEM_SHARE)
    whole = whole_images(
        shape,
        dtype,
        lambda images, each: _vmem_use(_Tiling(images, (h, w), each), dtype, levels) <= limit,
    )
    if whole:
        return [_Tiling(images, (h, w), each) for images, each in whole]
    # Blocks of every level end on a whole register, including packed registers of bfloat16.
    rows, cols = 1 << levels, 16 << levels
    fitting = [
        (tile_rows * tile_cols, tiling)
        for i, j in product(range(12), repeat=2)
        for tile_rows, tile_cols in [(min(h, rows << i), w if cols << j >= w else cols << j)]
        if tile_rows < h or tile_cols < w
        if _vmem_use(tiling := _Tiling(1, (tile_rows, tile_cols)), dtype, levels) <= limit
    ]
    if not fitting:
        raise refusal(
            [
                f"{levels} levels of images of {h} x {w}: no tile of {rows} x {min(cols, w)} or "
                f"more fits in {limit / 2**20:.1f} MiB of VMEM"
            ]
        )
    return [tiling for _, tiling in sorted(fitting, reverse=True)[:_MOST_TILINGS]]


def _vmem_use(tiling: _Tiling, dtype: jnp.dtype, levels: int) -> int:
    """The bytes of VMEM of a kernel: float32 scratch once, every double-buffered block twice."""
    sizes = halved(tiling.size, levels)
    scratch = (
        sum(4 * rows * round_up(cols, SUBLANES) for rows, cols in sizes[1:])
        * tiling.images_per_register
    )
    areas = [rows * round_up(cols, 16) for rows, cols in sizes]
    blocks = max(tiling.images, 16 * (tiling.images_per_register > 1)) * (
        areas[0] + 3 * sum(areas[1:]) + areas[-1]
    )
    return LANES * (4 * scratch + 2 * dtype.itemsize * blocks)


def _blocks(shape: Sequence[int], tiling: _Tiling, sizes: list[Pair]) -> list[pl.BlockSpec]:
    """The block specification of each level's arrays; level 0 is the image."""
    lanes = min(shape[-1], LANES)
    if tiling.images_per_register > 1:
        return [
            pl.BlockSpec((*size, tiling.images, lanes), lambda c, n, i, j: (i, j, n, c))
            for size in sizes
        ]
    return [
        pl.BlockSpec((tiling.images, *size, lanes), lambda c, n, i, j: (n, i, j, c))
        for size in sizes
    ]


def _scratch(tiling: _Tiling, sizes: list[Pair], lanes: int) -> list[pl.MemoryRef]:
    """The VMEM scratch of the image and of every low band but the coarsest."""
    whole = columns_per_register(tiling.images_per_register)
    return [
        pltpu.VMEM(
            (2 * rows, 2 * round_up(cols, whole) * tiling.images_per_register, lanes), jnp.float32
        )
        for rows, cols in sizes[1:]
    ]


def _analysis_kernel(
    tiling: _Tiling, sizes: list[Pair], image: Pair, x: Ref, low: Ref, *refs: Ref
) -> None:
    """One grid step of `wavedec`: all levels of one tile."""
    levels = len(sizes) - 1
    details, lows = refs[: 3 * levels], refs[3 * levels :]
    first = [pl.program_id(axis) == 0 for axis in (1, 2, 3)]

    # Cells that no step writes stay zero: the padding of odd sizes.
    @pl.when(first[0] & first[1] & first[2])
    def _() -> None:
        for ref in lows:
            loop(ref.shape[0], partial(_zero_row, ref))

    def one(index: jax.Array) -> None:
        loop(tiling.size[0], partial(_load_row, x, index, lows[0], tiling, image))
        for level in range(1, levels + 1):
            bands = details[3 * (levels - level) : 3 * (levels - level + 1)]
            below = lows[level] if level < levels else None

            def row(
                i: jax.Array, level: int = level, bands: Ref = bands, below: Ref = below
            ) -> None:
                whole = columns_per_register(tiling.images_per_register)
                for part in parts(round_up(sizes[level][1], whole), tiling.images_per_register):
                    pixels = [
                        lows[level - 1][2 * i + v, part.pixels(0, u)]
                        for v, u in product((0, 1), repeat=2)
                    ]
                    smooth, *high = (0.5 * band for band in split(*pixels))
                    for out, value in zip(bands, high, strict=True):
                        _put(out, index, i, part, value)
                    if below is None:
                        _put(low, index, i, part, smooth)
                    else:
                        below[i, part.bands(0)] = smooth

            loop(sizes[level][0], row)

    loop(tiling.images // tiling.images_per_register, one)


def _zero_row(ref: Ref, i: jax.Array) -> None:
    """Zeros row i of a scratch."""
    ref[i] = jnp.zeros(ref.shape[1:], ref.dtype)


def _load_row(
    x: Ref, index: jax.Array, target: Ref, tiling: _Tiling, image: Pair, i: jax.Array
) -> None:
    """Copies row i of the tile to float32 scratch, zero where the tile overhangs the image."""
    if tiling.images_per_register > 1:
        value = load_hwnc_row(x, i)
        target[i, : value.shape[0]] = value
        return
    value = x[index, i].astype(jnp.float32)
    row = pl.program_id(2) * tiling.size[0] + i
    if image[1] % tiling.size[1]:
        at = lax.broadcasted_iota(jnp.int32, value.shape, 0) + pl.program_id(3) * tiling.size[1]
        value = jnp.where(at < image[1], value, 0.0)
    if image[0] % tiling.size[0]:
        value = jnp.where(row < image[0], value, 0.0)
    target[i, : value.shape[0]] = value


def _synthesis_kernel(tiling: _Tiling, sizes: list[Pair], low: Ref, *refs: Ref) -> None:
    """One grid step of `waverec`: all levels of one tile."""
    levels = len(sizes) - 1
    details, out, merged = refs[: 3 * levels], refs[3 * levels], refs[3 * levels + 1 :]

    def one(index: jax.Array) -> None:
        for level in range(levels, 0, -1):
            bands = details[3 * (levels - level) : 3 * (levels - level + 1)]
            smooth = merged[level] if level < levels else None

            def row(
                i: jax.Array, level: int = level, bands: Ref = bands, smooth: Ref = smooth
            ) -> None:
                for part in parts(sizes[level][1], tiling.images_per_register):
                    high = [_get(band, index, i, part) for band in bands]
                    if smooth is None:
                        coarse = _get(low, index, i, part)
                    else:
                        coarse = smooth[i, part.bands(0)]
                    pixels = merge(coarse, *high)
                    for (v, u), value in zip(product((0, 1), repeat=2), pixels, strict=True):
                        merged[level - 1][2 * i + v, part.pixels(0, u)] = 0.5 * value

            loop(sizes[level][0], row)
        loop(tiling.size[0], partial(store_row, merged[0], out, index, tiling.images_per_register))

    loop(tiling.images // tiling.images_per_register, one)


def _get(band: Ref, index: jax.Array, i: jax.Array, part: Part) -> jax.Array:
    """Row i of a block's coefficients in float32, the columns of one part."""
    value = band[i, part.col] if part.images_per_register > 1 else band[index, i]
    return value.astype(jnp.float32)


def _put(band: Ref, index: jax.Array, i: jax.Array, part: Part, value: jax.Array) -> None:
    """Stores a part's columns to row i of a block, without the padding of the row."""
    if part.images_per_register > 1:
        band[i, part.col] = value.astype(band.dtype)
    else:
        band[index, i] = value[: band.shape[2]].astype(band.dtype)
