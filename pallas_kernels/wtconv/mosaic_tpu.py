"""The fused wavelet convolution as Pallas TPU kernels: x is read once, y is written once.

The grid is `common.mosaic_tpu.launch_grid`: blocks of 128 channels, blocks of images, tiles. A grid
step holds one tile and its halo in VMEM (whole images where they fit), which Pallas double-buffers:

1. x is copied into a zero-padded float32 VMEM scratch, with the halo that the deepest level needs;
2. each level's coefficients are sums and differences of strided loads of the level above;
3. from the deepest level up, the four bands are convolved and synthesised onto the level above;
4. the base convolution is added to the synthesis of the first level.

Where the batch is a multiple of eight images, arrays are `[H, W, N, C]`: a register holds the same
column of eight images, so that no width leaves sublanes empty and no shift crosses sublanes.
Otherwise a register holds eight columns of one image.

A convolution keeps the accumulators of a block of up to eight rows in registers, and its taps
beside them: each load of a shifted row serves every row of the block within the kernel's radius.
Analysis and synthesis run without their factors 1/2, which are folded into the taps (`4**-level`,
exact). The weight gradient runs the cascades of x and dy and correlates them, one accumulator
register a tap.

The kernels are bound by the four VALU slots (v5e, from the compiler's final bundles). The loop of a
convolution is within 1% of one multiply and one add for each tap. The rest of the time goes to
copies and cascades (load and store slots), to sublanes that widths such as 14 leave empty where
images do not share registers, and for tiny images to zeroing scratch (the store slot).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, product
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
from pallas_kernels.common.types import Index, Pair, Ref, Taps
from pallas_kernels.haar.butterfly import merge, split
from pallas_kernels.wtconv.problem import Problem

__all__ = [
    "BIAS_GRADIENT",
    "DIFFERENTIABLE",
    "check",
    "forward",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False
BIAS_GRADIENT = False

Accumulators = tuple[jax.Array, ...]
"""One register for each tap."""

_MAX_KERNEL = 9
_MOST_TILINGS = 4
_MAX_GROUP = 8
"""The most registers of a row that one loop body unrolls."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    refuse(problem.unsupported(("float32", "bfloat16"), _MAX_KERNEL))
    dtype = jnp.dtype(problem.dtype)
    _tilings(problem.shape, dtype, problem.kernel_size, problem.levels, direction == "bwd")


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The tilings that are worth timing, the one that is taken unasked first; see `check`.

    Both kernels of the backward pass take the same one.
    """
    dtype = jnp.dtype(problem.dtype)
    arguments = problem.shape, dtype, problem.kernel_size, problem.levels
    found = _tilings(*arguments, weights=direction == "bwd")
    if direction == "bwd":
        first, *others = found
        forward = set(_tilings(*arguments, weights=False))
        found = [first, *(tiling for tiling in others if tiling in forward)]
    return offered(found)


@partial(jax.jit, static_argnames=("wavelet", "transpose", "precision", *SIZES))
@in_32_bits
def forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    **tile: int,
) -> jax.Array:
    """The operator on `x [N, H, W, C]`, or its transpose; see `vjp` for the arguments.

    `wavelet` is Haar, and `tile` is of `search_space`. `precision` changes nothing: the kernel
    computes in float32 on the vector units and does not use the matrix unit.
    """
    kernel_size, levels = taps[0].shape[0], len(taps) - 1
    pads = (kernel_size - 1) // 2, kernel_size // 2
    if transpose:
        taps, pads = tuple(jnp.flip(tap, (0, 1)) for tap in taps), pads[::-1]
    tiling = chosen(_tilings(x.shape, x.dtype, kernel_size, levels, weights=False), tile)
    geometry = _geometry(tiling, tiling.halo, levels, pads)
    channels = x.shape[-1]
    lanes = min(channels, LANES)
    flat = [
        tap.astype(jnp.float32).reshape(kernel_size**2, -1, channels) * 4.0**-level
        for level, tap in enumerate(taps)
    ]
    if bias is None:
        bias = jnp.zeros(channels)
    windows = _windows(x.shape, tiling, tiling.halo, lanes)
    y = pl.pallas_call(
        partial(_forward_kernel, tiling, geometry, pads, (x.shape[1], x.shape[2]), len(windows)),
        out_shape=pallas_output(
            hwnc_shape(x.shape, tiling.images_per_register), x.dtype, x, *flat, bias
        ),
        grid=launch_grid(x.shape, tiling.images, tiling.size),
        in_specs=[
            *windows,
            *(pl.BlockSpec((*tap.shape[:2], lanes), lambda c, n, i, j: (0, 0, c)) for tap in flat),
            pl.BlockSpec((1, lanes), lambda c, n, i, j: (0, c)),
        ],
        out_specs=_windows(x.shape, tiling, (0, 0), lanes)[0],
        scratch_shapes=[
            *_cascade_scratch(geometry, tiling, lanes),
            # The filtered bands of one level at a time, and the synthesis onto each level.
            _scratch(_filtered_shape(geometry[min(levels, 1)]), tiling, lanes, 4),
            *(
                _scratch(_merged_shape(geometry, level), tiling, lanes)
                for level in range(max(levels, 1))
            ),
        ],
        compiler_params=compiler_params(),
        name=_name(levels, "forward"),
    )(
        *[to_hwnc(x, tiling.images_per_register)] * len(windows),
        *flat,
        bias.reshape(1, channels).astype(jnp.float32),
    )
    return from_hwnc(y, tiling.images_per_register)


@partial(jax.jit, static_argnames=("kernel_shapes", "wavelet", "precision", *SIZES))
@in_32_bits
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
    **tile: int,
) -> Taps:
    """The gradients of the taps: each level's coefficients of x correlated with those of dy.

    Grid steps add to the accumulators in a fixed order, so results are bitwise reproducible.
    """
    kernel_size, levels = kernel_shapes[0][0], len(kernel_shapes) - 1
    pads = (kernel_size - 1) // 2, kernel_size // 2
    tiling = chosen(_tilings(x.shape, x.dtype, kernel_size, levels, weights=True), tile)
    of_x = _geometry(tiling, tiling.halo, levels, pads)
    of_dy = _geometry(tiling, (0, 0), levels, (0, 0))
    lanes = min(x.shape[-1], LANES)
    x_windows = _windows(x.shape, tiling, tiling.halo, lanes)
    dy_windows = _windows(x.shape, tiling, (0, 0), lanes)
    shapes = [(1 if level == 0 else 4, kernel_size**2) for level in range(levels + 1)]
    image = x.shape[1], x.shape[2]
    sums = pl.pallas_call(
        partial(_weight_kernel, tiling, of_x, of_dy, pads, image, len(x_windows)),
        out_shape=[pallas_output((*s, x.shape[-1]), jnp.float32, x, dy) for s in shapes],
        grid=launch_grid(x.shape, tiling.images, tiling.size),
        in_specs=[*x_windows, *dy_windows],
        out_specs=[pl.BlockSpec((*s, lanes), lambda c, n, i, j: (0, 0, c)) for s in shapes],
        scratch_shapes=[
            *_cascade_scratch(of_x, tiling, lanes),
            *_cascade_scratch(of_dy, tiling, lanes),
            *(pltpu.VMEM((*s, SUBLANES, lanes), jnp.float32) for s in shapes),
        ],
        compiler_params=compiler_params(),
        name=_name(levels, "weight_grad"),
    )(
        *[to_hwnc(x, tiling.images_per_register)] * len(x_windows),
        to_hwnc(dy, tiling.images_per_register),
    )
    return tuple(
        jnp.moveaxis(s, 1, 0).reshape(shape) * 4.0**-level
        for level, (s, shape) in enumerate(zip(sums, kernel_shapes, strict=True))
    )


def _name(levels: int, kernel: str) -> str:
    """The name of a kernel in profiles: without levels it is a depthwise convolution."""
    return f"{'wtconv' if levels else 'depthwise'}_{kernel}"


# Tiles


class _Tiling(NamedTuple):
    """The tile of a grid step, and the layout of its registers."""

    images: int
    """The number of images of a grid step."""
    size: Pair
    """The height and width of the tile."""
    halo: Pair
    """The rows and columns that are read around the tile, on each side."""
    images_per_register: int = 1
    """All images of the step, a multiple of eight, where images share registers: neighbouring
    columns are then this many sublanes apart. Otherwise 1, and a register holds eight columns."""


def _tilings(
    shape: Sequence[int], dtype: jnp.dtype, kernel_size: int, levels: int, weights: bool
) -> list[_Tiling]:
    """The tilings that fit in VMEM and are worth timing, the one that is taken unasked first.

    They take whole images, of which several may share registers, or tiles with a halo.
    """
    _, h, w, channels = shape
    limit = int(tpu_vmem_bytes() * VMEM_SHARE)

    def fits(tiling: _Tiling) -> bool:
        return _vmem_use(tiling, dtype, channels, kernel_size, levels, weights) <= limit

    whole = whole_images(
        shape, dtype, lambda images, each: fits(_Tiling(images, (h, w), (0, 0), each))
    )
    if whole:
        return [_Tiling(images, (h, w), (0, 0), each) for images, each in whole]
    # The halo must be a multiple of 2**levels, and must divide the tile to be a block of its own.
    least = 1 << (levels + (max(kernel_size // 2, 1) - 1).bit_length())
    halos = least, max(least, 2 * SUBLANES)
    sizes = [
        [(size, 0), *((halo << i, halo) for i in range(9) if halo << i < size)]
        for size, halo in zip((h, w), halos, strict=True)
    ]
    fitting = []
    for (rows, row_halo), (cols, col_halo) in product(*sizes):
        tiling = _Tiling(1, (rows, cols), (row_halo, col_halo))
        if fits(tiling):
            read = (rows + 2 * row_halo) * (cols + 2 * col_halo)
            steps = math.ceil(h / rows) * math.ceil(w / cols)
            fitting.append((read * steps, tiling))
    if not fitting:
        raise refusal(
            [
                f"{levels} levels of kernel {kernel_size} on images of {h} x {w}: no tile with "
                f"its halo of {least} pixels fits in {limit / 2**20:.1f} MiB of VMEM"
            ]
        )
    return [tiling for _, tiling in sorted(fitting)[:_MOST_TILINGS]]


def _windows(shape: Sequence[int], tiling: _Tiling, halo: Pair, lanes: int) -> list[pl.BlockSpec]:
    """The blocks that a grid step reads: the tile first, then its halo, clamped to the image."""
    return [_window(shape, tiling, where, halo, lanes) for where in _places(halo)]


def _places(halo: Pair) -> list[Pair]:
    """The places of a tile's blocks along rows and columns: -1 before, 0 the tile, 1 after."""
    rows, columns = ((0, -1, 1) if h else (0,) for h in halo)
    return list(product(rows, columns))


def _window(
    shape: Sequence[int], tiling: _Tiling, where: Pair, halo: Pair, lanes: int
) -> pl.BlockSpec:
    """The block of the tile at place (0, 0), or of its halo at another place."""
    block = [h if p else t for h, p, t in zip(halo, where, tiling.size, strict=True)]
    ratio = [t // b for t, b in zip(tiling.size, block, strict=True)]
    last = [math.ceil(s / b) - 1 for s, b in zip(shape[1:3], block, strict=True)]

    def index(c: Index, n: Index, i: Index, j: Index) -> tuple[Index, ...]:
        tile = (
            jnp.clip(t * r + {-1: -1, 1: r}[p], 0, m) if p else t
            for t, r, p, m in zip((i, j), ratio, where, last, strict=True)
        )
        return n, *tile, c

    if tiling.images_per_register > 1:
        return pl.BlockSpec((*block, tiling.images, lanes), lambda c, n, i, j: (i, j, n, c))
    return pl.BlockSpec((tiling.images, *block, lanes), index)


class _Level(NamedTuple):
    """The place of one level's coefficients in VMEM scratch; level 0 is x."""

    size: Pair
    """The rows and columns of the tile at this level."""
    margin: Pair
    """The rows and columns that are computed around them, on each side."""
    origin: Pair
    """The row and column of the tile's first coefficient in scratch."""
    shape: Pair
    """The rows and columns of the scratch."""
    images_per_register: int
    """The tiling's `images_per_register`."""


def _geometry(tiling: _Tiling, halo: Pair, levels: int, pads: Pair) -> list[_Level]:
    """The place of every level in scratch.

    A level has room for its padding, for whole registers, and for the next level's reads.

    Args:
        tiling: The tile of a grid step.
        halo: Rows and columns around the tile at level 0.
        levels: Number of levels below level 0.
        pads: The convolution's padding before and after.
    """
    sizes = halved(tiling.size, levels)
    margins = [(halo[0] >> level, halo[1] >> level) for level in range(levels + 1)]
    found: list[_Level] = []
    images_per_register = tiling.images_per_register
    whole = columns_per_register(images_per_register)
    for size, margin in zip(reversed(sizes), reversed(margins), strict=True):
        before = [max(pads[0], m) for m in margin]
        origin = before[0], round_up(before[1], whole)
        level = _Level(size, margin, origin, (0, 0), images_per_register)
        filtered = _filtered_shape(level)
        rows = [size[0] + margin[0], filtered[0] + pads[1]]
        cols = [round_up(size[1] + 2 * margin[1], whole) - margin[1], filtered[1] + pads[1]]
        if found:
            # The next level's analysis reads two rows and columns for each one that it writes.
            rows.append(2 * (found[-1].size[0] + found[-1].margin[0]))
            cols.append(
                2 * round_up(found[-1].size[1] + 2 * found[-1].margin[1], whole) - margin[1]
            )
        shape = origin[0] + max(rows), round_up(origin[1] + max(cols), whole)
        found.append(level._replace(shape=shape))
    return found[::-1]


def _row_block(rows: int) -> int:
    """The rows whose accumulators are in registers at once: up to 8, with the least remainder."""
    return min(rows, min((8, 7, 6, 5, 4), key=lambda block: (round_up(rows, block), -block)))


def _column_groups(cols: int, images_per_register: int) -> Pair:
    """The number of groups that a row of columns is cut into, and of registers in each."""
    registers = math.ceil(cols * images_per_register / SUBLANES)
    if registers <= _MAX_GROUP:
        return 1, registers
    size = min((8, 7, 6, 5, 4), key=lambda size: (round_up(registers, size), -size))
    return math.ceil(registers / size), size


def _filtered_shape(level: _Level) -> Pair:
    """The rows and columns that the convolution of a level writes, up to whole blocks."""
    rows, cols = level.size
    registers = math.prod(_column_groups(cols, level.images_per_register))
    return round_up(rows, _row_block(rows)), -(-registers * SUBLANES // level.images_per_register)


def _merged_shape(geometry: list[_Level], level: int) -> Pair:
    """The rows and columns of the synthesis onto `level`, twice those of the next level."""
    rows, cols = _filtered_shape(geometry[level])
    if level + 1 == len(geometry):
        return rows, cols
    below = geometry[level + 1].size
    whole = columns_per_register(geometry[level].images_per_register)
    return max(rows, 2 * below[0]), max(cols, 2 * round_up(below[1], whole))


def _scratch(shape: Pair, tiling: _Tiling, lanes: int, *bands: int) -> pl.MemoryRef:
    """A float32 VMEM scratch of some rows and columns, for all bands."""
    rows, cols = shape
    return pltpu.VMEM((*bands, rows, cols * tiling.images_per_register, lanes), jnp.float32)


def _cascade_scratch(geometry: list[_Level], tiling: _Tiling, lanes: int) -> list[pl.MemoryRef]:
    """The VMEM scratch of every level: one band for x, four for each level of coefficients."""
    return [_scratch(g.shape, tiling, lanes, 4 if level else 1) for level, g in enumerate(geometry)]


def _vmem_use(
    tiling: _Tiling,
    dtype: jnp.dtype,
    channels: int,
    kernel_size: int,
    levels: int,
    weights: bool,
) -> int:
    """The bytes of VMEM of one kernel: scratch once, and every double-buffered block twice."""
    radius = kernel_size // 2
    of_x = _geometry(tiling, tiling.halo, levels, (radius, radius))
    elements = sum((4 if level else 1) * math.prod(g.shape) for level, g in enumerate(of_x))
    if weights:
        of_dy = _geometry(tiling, (0, 0), levels, (0, 0))
        elements += sum((4 if level else 1) * math.prod(g.shape) for level, g in enumerate(of_dy))
    else:
        elements += 4 * math.prod(_filtered_shape(of_x[min(levels, 1)]))
        elements += sum(math.prod(_merged_shape(of_x, level)) for level in range(max(levels, 1)))
    # The compiler spills values as wide as a row to its stack.
    elements = tiling.images_per_register * (elements + round_up(tiling.size[1], SUBLANES))
    if weights:
        # One accumulator register for each tap.
        elements += (1 + 4 * levels) * kernel_size**2 * SUBLANES
    rows, cols = (size + 2 * halo for size, halo in zip(tiling.size, tiling.halo, strict=True))
    blocks = tiling.images * rows * round_up(cols, 16)
    blocks += tiling.images * tiling.size[0] * round_up(tiling.size[1], 16)
    taps = (1 + 4 * levels) * round_up(kernel_size**2, SUBLANES)
    return LANES * (4 * elements + 2 * dtype.itemsize * blocks + 2 * 4 * taps)


# Kernels


def _forward_kernel(
    tiling: _Tiling,
    geometry: list[_Level],
    pads: Pair,
    image: Pair,
    windows: int,
    *refs: Ref,
) -> None:
    """One grid step of the forward: a tile of x through the cascade and back to a tile of y."""
    levels = len(geometry) - 1
    blocks = iter(refs)
    xs, taps, (bias, out), coefficients, (filtered,), merged = (
        list(islice(blocks, count))
        for count in (windows, levels + 1, 2, levels + 1, 1, max(levels, 1))
    )
    _zero_at_first(coefficients)

    def one(index: jax.Array) -> None:
        _load(xs, index, coefficients[0], geometry[0], tiling, tiling.halo, image)
        _cascade(coefficients, geometry)
        for level in range(levels, 0, -1):
            _filter(coefficients[level], geometry[level], taps[level], pads, filtered)
            below = merged[level] if level < levels else None
            _synthesise(filtered, below, merged[level - 1], geometry[level])
        _add_base(coefficients[0], geometry[0], taps[0], pads, bias, merged[0], levels > 0)
        loop(tiling.size[0], partial(store_row, merged[0], out, index, tiling.images_per_register))

    loop(tiling.images // tiling.images_per_register, one)


def _weight_kernel(
    tiling: _Tiling,
    of_x: list[_Level],
    of_dy: list[_Level],
    pads: Pair,
    image: Pair,
    windows: int,
    *refs: Ref,
) -> None:
    """One grid step of the weight gradient: the tile's correlations, added to the accumulators."""
    levels = len(of_x)
    blocks = iter(refs)
    xs, dys, out, x_bands, dy_bands, sums = (
        list(islice(blocks, count)) for count in (windows, 1, levels, levels, levels, levels)
    )
    _zero_at_first([*x_bands, *dy_bands, *sums])

    def one(index: jax.Array) -> None:
        _load(xs, index, x_bands[0], of_x[0], tiling, tiling.halo, image)
        _load(dys, index, dy_bands[0], of_dy[0], tiling, (0, 0), image)
        _cascade(x_bands, of_x)
        _cascade(dy_bands, of_dy)
        for level in range(levels):
            _correlate(
                x_bands[level], dy_bands[level], of_x[level], of_dy[level], pads, sums[level]
            )

    loop(tiling.images // tiling.images_per_register, one)

    @pl.when(_is_step(last=True))
    def _() -> None:
        for total, result in zip(sums, out, strict=True):
            result[...] = jnp.sum(total[...], axis=2)


def _is_step(last: bool) -> jax.Array:
    """Whether this is the first, or with `last` the last, grid step of a block of channels."""
    ends = [pl.num_programs(axis) - 1 if last else 0 for axis in (1, 2, 3)]
    here = [pl.program_id(axis) == end for axis, end in zip((1, 2, 3), ends, strict=True)]
    return here[0] & here[1] & here[2]


def _zero_at_first(refs: Sequence[Ref]) -> None:
    """Zeros scratch at the first grid step; what no step writes, such as padding, stays zero."""

    @pl.when(_is_step(last=False))
    def _() -> None:
        for ref in refs:
            for band in range(ref.shape[0]):

                def row(i: jax.Array, ref: Ref = ref, band: int = band) -> None:
                    ref[band, i] = jnp.zeros(ref.shape[2:], ref.dtype)

                loop(ref.shape[1], row)


def _load(
    windows: Sequence[Ref],
    index: jax.Array,
    target: Ref,
    level: _Level,
    tiling: _Tiling,
    halo: Pair,
    image: Pair,
) -> None:
    """Copies a tile and its halo to float32 scratch, zero outside the image."""
    if tiling.images_per_register > 1:
        first = level.origin[1] * level.images_per_register

        def copy_row(i: jax.Array) -> None:
            value = load_hwnc_row(windows[0], i)
            target[0, level.origin[0] + i, first : first + value.shape[0]] = value

        loop(tiling.size[0], copy_row)
        return
    tile = [pl.program_id(axis) * size for axis, size in zip((2, 3), tiling.size, strict=True)]
    # Blocks hold undefined values, not zeros, where the tile or its halo lies outside the image.
    outside = [
        bool(h) or size < whole for h, size, whole in zip(halo, tiling.size, image, strict=True)
    ]
    for where, window in zip(_places(halo), windows, strict=True):
        start = [
            {-1: -h, 0: 0, 1: size}[p] for h, p, size in zip(halo, where, tiling.size, strict=True)
        ]
        first_col = level.origin[1] + start[1]
        cols = window.shape[2]
        at = lax.broadcasted_iota(jnp.int32, window.shape[2:], 0) + (tile[1] + start[1])
        inside = (at >= 0) & (at < image[1])

        def row(
            i: jax.Array,
            window: Ref = window,
            start: list[int] = start,
            first_col: int = first_col,
            cols: int = cols,
            inside: jax.Array = inside,
        ) -> None:
            value = window[index, i].astype(jnp.float32)
            if outside[1]:
                value = jnp.where(inside, value, 0.0)
            if outside[0]:
                at = tile[0] + start[0] + i
                value = jnp.where((at >= 0) & (at < image[0]), value, 0.0)
            target[0, level.origin[0] + start[0] + i, first_col : first_col + cols] = value

        loop(window.shape[1], row)


def _cascade(coefficients: Sequence[Ref], geometry: list[_Level]) -> None:
    """Computes each level's four bands from the low band of the level above, in scratch."""
    for level in range(1, len(geometry)):
        here, above = geometry[level], geometry[level - 1]
        source, target = coefficients[level - 1], coefficients[level]
        first = [o - m for o, m in zip(above.origin, above.margin, strict=True)]
        to = [o - m for o, m in zip(here.origin, here.margin, strict=True)]
        images, cols = here.images_per_register, here.size[1] + 2 * here.margin[1]
        row_parts = parts(round_up(cols, columns_per_register(images)), images)

        def row(
            i: jax.Array,
            source: Ref = source,
            target: Ref = target,
            first: list[int] = first,
            to: list[int] = to,
            row_parts: list[Part] = row_parts,
        ) -> None:
            for part in row_parts:
                pixels = (
                    source[0, first[0] + 2 * i + v, part.pixels(first[1], u)]
                    for v, u in product((0, 1), repeat=2)
                )
                for band, value in enumerate(split(*pixels)):
                    target[band, to[0] + i, part.bands(to[1])] = value

        loop(here.size[0] + 2 * here.margin[0], row)


def _convolve(
    source: Ref,
    band: Index,
    level: _Level,
    taps: Sequence[jax.Array],
    pads: Pair,
    start: Callable[[Index, Index], jax.Array | None],
    store: Callable[[Index, Index, jax.Array], None],
) -> None:
    """Depthwise convolution of one band.

    Args:
        source: Scratch of the level's bands.
        band: Index of the band.
        level: Place of the level in scratch.
        taps: Taps, row by row.
        pads: Padding before and after.
        start: Function of a row and a column to the accumulator's initial value; None is zero.
        store: Function that takes a row, a column and the accumulator's final value.
    """
    top, left = (o - pads[0] for o in level.origin)
    kernel_size = sum(pads) + 1
    row_block = _row_block(level.size[0])
    groups, blocks = _column_groups(level.size[1], level.images_per_register)

    def rows(r: jax.Array) -> None:
        def cols(g: jax.Array | int) -> None:
            for block in range(blocks):
                col = _column(g, blocks, block)
                sums = [start(r * row_block + k, col) for k in range(row_block)]
                for i, j in product(range(row_block + kernel_size - 1), range(kernel_size)):
                    at = pl.ds(col + (left + j) * level.images_per_register, SUBLANES)
                    value = source[band, top + r * row_block + i, at]
                    for k in range(max(0, i - kernel_size + 1), min(row_block, i + 1)):
                        term = value * taps[(i - k) * kernel_size + j]
                        sums[k] = term if sums[k] is None else sums[k] + term
                for k, total in enumerate(sums):
                    assert total is not None
                    store(r * row_block + k, col, total)

        _for_groups(groups, cols)

    loop(math.ceil(level.size[0] / row_block), rows)


def _column(group: jax.Array | int, blocks: int, block: int) -> Index:
    """The first sublane of a register of a row, which the compiler can see is a multiple of 8."""
    if isinstance(group, int):
        return (group * blocks + block) * SUBLANES
    return pl.multiple_of(group * (blocks * SUBLANES), SUBLANES) + block * SUBLANES


def _for_groups(groups: int, body: Callable[[Index], None]) -> None:
    """Runs `body` for each group of columns; a single group has static columns, which cost less."""
    if groups == 1:
        body(0)
    else:
        loop(groups, body)


def _filter(source: Ref, level: _Level, taps: Ref, pads: Pair, target: Ref) -> None:
    """Convolves the four bands of one level into the scratch `target`."""

    def band(s: jax.Array) -> None:
        def store(row: Index, col: Index, value: jax.Array) -> None:
            target[s, row, pl.ds(col, SUBLANES)] = value

        _convolve(
            source,
            s,
            level,
            [taps[t, pl.ds(s, 1)] for t in range(taps.shape[0])],
            pads,
            lambda row, col: None,
            store,
        )

    loop(4, band)


def _synthesise(filtered: Ref, below: Ref, target: Ref, level: _Level) -> None:
    """Synthesises four filtered bands; the synthesis onto this level is first added to the low one.

    Args:
        filtered: Scratch of the filtered bands.
        below: Scratch of the synthesis onto this level, or None at the deepest one.
        target: Scratch of the synthesis onto the level above.
        level: Place of this level in scratch.
    """
    images = level.images_per_register
    row_parts = parts(round_up(level.size[1], columns_per_register(images)), images)

    def row(i: jax.Array) -> None:
        for part in row_parts:
            low, *high = (filtered[s, i, part.bands(0)] for s in range(4))
            if below is not None:
                low = low + below[i, part.bands(0)]
            pixels = merge(low, *high)
            for (v, u), value in zip(product((0, 1), repeat=2), pixels, strict=True):
                target[2 * i + v, part.pixels(0, u)] = value

    loop(level.size[0], row)


def _add_base(
    source: Ref, level: _Level, taps: Ref, pads: Pair, bias: Ref, y: Ref, accumulate: bool
) -> None:
    """Adds the base convolution and the bias to `y`, or overwrites it without `accumulate`."""
    offset = jnp.broadcast_to(bias[...], (SUBLANES, bias.shape[1]))

    def start(row: Index, col: Index) -> jax.Array:
        return offset + y[row, pl.ds(col, SUBLANES)] if accumulate else offset

    def store(row: Index, col: Index, value: jax.Array) -> None:
        y[row, pl.ds(col, SUBLANES)] = value

    every_tap = [taps[t] for t in range(taps.shape[0])]
    _convolve(source, 0, level, every_tap, pads, start, store)


def _correlate(
    of_x: Ref, of_dy: Ref, x_level: _Level, dy_level: _Level, pads: Pair, sums: Ref
) -> None:
    """Adds `sum_p x[p + tap - r] * dy[p]` of every band to its accumulators, sublane by sublane."""
    top, left = (o - pads[0] for o in x_level.origin)
    kernel_size = sum(pads) + 1
    dy_top, dy_left = dy_level.origin
    images = x_level.images_per_register
    row_block = _row_block(x_level.size[0])
    groups, blocks = _column_groups(x_level.size[1], images)
    taps = list(product(range(kernel_size), range(kernel_size)))

    def band(s: jax.Array) -> None:
        def add_block(found: dict[Pair, jax.Array], r: Index, col: Index) -> None:
            dy = [
                of_dy[s, dy_top + r * row_block + k, pl.ds(dy_left * images + col, SUBLANES)]
                for k in range(row_block)
            ]
            for i, j in product(range(row_block + kernel_size - 1), range(kernel_size)):
                at = pl.ds(col + (left + j) * images, SUBLANES)
                value = of_x[s, top + r * row_block + i, at]
                for k in range(max(0, i - kernel_size + 1), min(row_block, i + 1)):
                    found[i - k, j] += value * dy[k]

        def rows(r: jax.Array, totals: Accumulators) -> Accumulators:
            def cols(g: Index, totals: Accumulators) -> Accumulators:
                found = dict(zip(taps, totals, strict=True))
                for b in range(blocks):
                    add_block(found, r, _column(g, blocks, b))
                return tuple(found.values())

            return cols(0, totals) if groups == 1 else lax.fori_loop(0, groups, cols, totals)

        zeros = tuple(jnp.zeros(sums.shape[2:], jnp.float32) for _ in taps)
        found = lax.fori_loop(0, math.ceil(x_level.size[0] / row_block), rows, zeros)
        for t, total in enumerate(found):
            sums[s, t] = sums[s, t] + total

    loop(sums.shape[0], band)
