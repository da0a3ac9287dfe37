"""The dense convolution as Pallas TPU kernels: an implicit GEMM on the matrix unit (MXU).

One copy before the kernel pads the images. With a stride, the same copy gathers the samples of each
remainder modulo the stride into a plane of their own, so that every tap reads one plane at unit
stride, and the kernels know neither padding nor strides.

The forward kernel's grid is blocks of features, blocks of images, tiles of rows and columns, and
blocks of channels, the innermost axis, over which it accumulates. A grid step holds a tile of rows
with its halo for one block of channels, and the filters of one block of features; Pallas
double-buffers both in VMEM. For each tap it multiplies the window `[pixels, channels]` by the
filters `[channels, features]`. The float32 accumulators stay in VMEM scratch until the last block
of channels, whose epilogue adds the bias and applies the activation.

The gradient of x is the same kernel on dy, once for each plane. The gradient of the filters has its
own kernel, which contracts pixels and keeps the accumulators of all taps in VMEM until it has read
all images.

The kernels are bound by the matrix unit (v5e, from the compiler's final bundles, which leave out
waiting for memory). A layer of 640 channels, 3x3 and GELU, on two images of 64 x 64 in bfloat16
takes 466,000 cycles, its products alone 461,000; float32, which takes several bfloat16 products for
one, takes 5.8 times as many. Few channels or features leave the unit's rows or columns idle, and
widths that are no multiple of 8 are padded to one. None of this has run on a TPU.
"""

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.common._compat import in_32_bits, pallas_output, tpu_vmem_bytes
from pallas_kernels.common.dtypes import common_dtype
from pallas_kernels.common.linear import transposed
from pallas_kernels.common.mosaic_tpu import (
    LANES,
    SUBLANES,
    VMEM_SHARE,
    compiler_params,
    loop,
    round_up,
    unavailable,
)
from pallas_kernels.common.refusals import refusal, refuse, unsupported_sizes
from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.common.types import Index, Pair, Ref, Slice
from pallas_kernels.conv2d.activations import activate_in_kernel
from pallas_kernels.conv2d.moments import WithMoments, of_rows
from pallas_kernels.conv2d.problem import Problem, Window
from pallas_kernels.conv2d.xla import mirrored

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "forward",
    "input_grad",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False

Spans = tuple[Pair, Pair]
"""The first index and the count of some rows, and of some columns."""

_DTYPES = ("float32", "bfloat16")
_STATIC = ("window", "precision", "config")
_BLOCK_PIXELS = 256
"""Pixels of one matrix product, which all use the filters that the matrix unit has loaded."""
_BLOCKS = (640, 512, 384, 256, 128)
"""Candidate numbers of channels, or of features, for a grid step."""
_UNROLLED = 1 << 30
"""The most 16-bit multiplications of a pixel block; the compiler unrolls them in 1 or 2 seconds."""


class _Taps(NamedTuple):
    """The sample that each tap reads, on the planes of a stride."""

    fold: Pair
    """The neighbouring rows and columns that become channels of one pixel."""
    planes: tuple[Pair, ...]
    """The remainders of rows and columns modulo the stride, one pair for each plane read."""
    places: tuple[tuple[int, int, int], ...]
    """Each tap's plane, and the rows and columns from an output to the tap's sample."""

    @property
    def halo(self) -> Pair:
        """The rows and columns that the taps read after the last output's own."""
        return max(i for _, i, _ in self.places), max(j for _, _, j in self.places)


class _Tiling(NamedTuple):
    """The tile of a grid step."""

    images: int
    rows: int
    cols: int
    """All columns of the output, up to whole registers, or a part of very wide images."""
    channels: int
    features: int
    pixel_block: Pair
    """The images and rows of one matrix product."""

    @property
    def pixels(self) -> int:
        """The number of pixels of a pixel block."""
        return math.prod(self.pixel_block) * self.cols

    @property
    def pixel_blocks(self) -> int:
        """The number of pixel blocks of a grid step."""
        return self.images * self.rows // math.prod(self.pixel_block)


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    reasons = [
        f"{dtype}, {' and '.join(_DTYPES)} alone"
        for dtype in sorted({str(problem.dtype), str(problem.out_dtype)} - set(_DTYPES))
    ]
    reasons += unsupported_sizes(problem.shape)
    if problem.window.groups > 1:
        reasons.append(f"{problem.window.groups} groups of channels")
    refuse(reasons)
    _tilings(direction, problem, None)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The tiles that are worth timing, the default ones first; see `check` for the arguments."""
    found: dict[tuple[_Tiling, ...], dict[str, int]] = {_tilings(direction, problem, None): {}}
    pixels_and_features = (512, 256), (1024, 128), (1024, 256), (1024, 512), (2048, 128)
    for (block_m, block_n), block_k in product(pixels_and_features, (256, 512)):
        config = TileConfig(block_m, block_n, block_k)
        with suppress(NotImplementedError):
            found.setdefault(_tilings(direction, problem, config), config._asdict())
    return list(found.values())


@partial(jax.jit, static_argnames=(*_STATIC, "activation", "out_dtype", "moments"))
@in_32_bits
def forward(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    *,
    window: Window,
    activation: str | None,
    out_dtype: DTypeLike,
    precision: lax.Precision | None,
    config: TileConfig | None,
    moments: bool = False,
) -> jax.Array | WithMoments:
    """The operator; see `vjp` for the arguments.

    The kernel reads the three blocks of `config` alone, and rounds them to whole rows and whole
    registers. Moments are read off its output, which is then float32 until they are.
    """
    taps, size = _taps_and_size(x.shape, w.shape, window)
    y = _convolve(
        _planes(x, window, taps, _read(taps, size)),
        _filters(w, window, taps),
        bias,
        taps,
        size,
        activation,
        jnp.float32 if moments else out_dtype,
        precision,
        config,
    )
    y = _from_nhwc(y, window)
    return (y.astype(out_dtype), of_rows(y, window)) if moments else y


@partial(jax.jit, static_argnames=(*_STATIC, "shape", "dtype"))
@in_32_bits
def input_grad(
    dy: jax.Array,
    w: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    window: Window,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> jax.Array:
    """The transpose of the convolution in x, applied to dy: an array `[N, *shape]`."""
    common = common_dtype(dy.dtype, w.dtype)
    image = dy.shape[0], *shape
    taps, size = _taps_and_size(image, w.shape, window)
    _, *shape_of_image, _ = window.images(image)
    spans = _inside(window, taps, size, shape_of_image)
    rows, cols = (count for _, count in spans)
    dy = _to_nhwc(dy, window).astype(common)
    edges = [
        (before - first, count - n + first, 0)
        for n, before, (first, count) in zip(size, taps.halo, spans, strict=True)
    ]
    dy = lax.pad(dy, jnp.zeros((), common), [(0, 0, 0), *edges, (0, 0, 0)])[:, None]
    filters = _filters(w.astype(common), window, taps).transpose(0, 2, 1)
    # Reflected samples are summed in float32, then rounded.
    written = jnp.float32 if window.reflect else dtype
    planes = []
    for plane in range(len(taps.planes)):
        used = [t for t, place in enumerate(taps.places) if place[0] == plane]
        planes.append(
            _convolve(
                dy,
                jnp.stack([filters[t] for t in used]),
                None,
                _mirror(taps, plane),
                (rows, cols),
                None,
                written,
                precision,
                config,
            )
        )
    cut = partial(_planes, window=window, taps=taps, spans=spans)
    return transposed(cut, image, jnp.stack(planes, axis=1)).astype(dtype)


@partial(jax.jit, static_argnames=(*_STATIC, "shape", "dtype"))
@in_32_bits
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    window: Window,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> jax.Array:
    """The transpose of the convolution in w, applied to dy: an array of the filters' shape.

    Grid steps add to the accumulators in a fixed order, so results are bitwise reproducible.
    """
    common = common_dtype(dy.dtype, x.dtype)
    taps, size = _taps_and_size(x.shape, shape, window)
    x = _planes(x.astype(common), window, taps, _read(taps, size))
    dy = _to_nhwc(dy, window).astype(common)
    sums = _correlate(x, dy, taps, precision, config)
    return transposed(partial(_filters, window=window, taps=taps), shape, sums).astype(dtype)


# The convolution without strides and padding


def _taps_and_size(
    image: Sequence[int], filters: Sequence[int], window: Window
) -> tuple[_Taps, Pair]:
    """The taps, and the output's height and width, of a call with arrays of these shapes."""
    _, *size, channels = window.images(image)
    height, width, _, _ = window.filters(filters)
    taps = _taps(window, (height, width), channels)
    return taps, window.output(size, (height, width))


def _taps(window: Window, kernel: Pair, channels: int) -> _Taps:
    """The taps of a kernel, row by row."""
    fold, whole = (1, 1), not any(map(operator.mod, kernel, window.stride))
    if whole and window.dilation == (1, 1) and channels * math.prod(window.stride) <= LANES:
        # Few channels would leave lanes empty. The kernel is a whole multiple of the stride here,
        # as in a patch embedding, so a stride's samples may become channels.
        fold = window.stride
    at = [
        [divmod(d * k, s // f) for k in range(count // f)]
        for count, d, s, f in zip(kernel, window.dilation, window.stride, fold, strict=True)
    ]
    found = list(product(*at))
    planes = tuple(sorted({(row[1], col[1]) for row, col in found}))
    places = ((planes.index((row[1], col[1])), row[0], col[0]) for row, col in found)
    return _Taps(fold, planes, tuple(places))


def _read(taps: _Taps, size: Pair) -> Spans:
    """The rows and columns of the planes that the taps of all outputs read."""
    rows, cols = (n + after for n, after in zip(size, taps.halo, strict=True))
    return (0, rows), (0, cols)


def _inside(window: Window, taps: _Taps, size: Pair, image: Sequence[int]) -> Spans:
    """The part of `_read` that holds the samples of the images, with the least padding."""
    spans = []
    for axis, (_, read) in enumerate(_read(taps, size)):
        n, (before, after), stride = image[axis], window.pads[axis], window.stride[axis]
        if window.reflect:
            n, before = n + before + after, 0
        # A folded row holds the samples of all remainders.
        rests = {
            i for plane in taps.planes for i in range(plane[axis], plane[axis] + taps.fold[axis])
        }
        first = min(-((rest - before) // stride) for rest in rests)
        last = max((before + n - 1 - rest) // stride for rest in rests)
        first = min(max(first, 0), read - 1)
        spans.append((first, max(min(last + 1, read) - first, 1)))
    return spans[0], spans[1]


def _mirror(taps: _Taps, plane: int) -> _Taps:
    """The taps from a sample of one plane to the outputs that read it, on dy padded by the halo."""
    high, wide = taps.halo
    places = ((0, high - i, wide - j) for p, i, j in taps.places if p == plane)
    return _Taps((1, 1), ((0, 0),), tuple(places))


def _planes(x: jax.Array, window: Window, taps: _Taps, spans: Spans) -> jax.Array:
    """Padded images as planes `[N, planes, rows, columns, C]`, cut to spans of rows and columns."""
    pads = window.pads
    if window.reflect:
        x, pads = mirrored(x, window), ((0, 0), (0, 0))
    x = _to_nhwc(x, window)
    stride = window.stride
    # Negative edges cut off the samples outside the spans.
    edges = [
        (before - s * first, s * (first + count) - n - before, 0)
        for n, (before, _), s, (first, count) in zip(x.shape[1:3], pads, stride, spans, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    n, _, _, channels = x.shape
    rows, cols = (count for _, count in spans)
    split = x.reshape(n, rows, stride[0], cols, stride[1], channels)
    if taps.fold != (1, 1):
        return split.transpose(0, 1, 3, 2, 4, 5).reshape(n, 1, rows, cols, -1)
    return jnp.stack([split[:, :, i, :, j] for i, j in taps.planes], axis=1)


def _filters(w: jax.Array, window: Window, taps: _Taps) -> jax.Array:
    """The filters as `[taps, C, NF]`."""
    if window.layout == "nchw_fchw":
        w = w.transpose(2, 3, 1, 0)
    height, width, channels, features = w.shape
    rows, cols = taps.fold
    split = w.reshape(height // rows, rows, width // cols, cols, channels, features)
    return split.transpose(0, 2, 1, 3, 4, 5).reshape(-1, rows * cols * channels, features)


def _to_nhwc(x: jax.Array, window: Window) -> jax.Array:
    """Images in the window's layout as `[N, H, W, C]`."""
    return x if window.layout == "nhwc_hwcf" else x.transpose(0, 2, 3, 1)


def _from_nhwc(y: jax.Array, window: Window) -> jax.Array:
    """Images `[N, H, W, C]` in the window's layout."""
    return y if window.layout == "nhwc_hwcf" else y.transpose(0, 3, 1, 2)


# Kernels


def _convolve(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    taps: _Taps,
    size: Pair,
    activation: str | None,
    out_dtype: DTypeLike,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> jax.Array:
    """The convolution `[N, *size, NF]` of `x [N, planes, H, W, C]` with `w [taps, C, NF]`."""
    n, *_, channels = x.shape
    features = w.shape[-1]
    tiling = _tiling((n, *size, channels, features), taps, x.dtype, out_dtype, config)
    down, across = _steps(size, tiling)
    x = _overhung(x, tiling, taps, size)
    w = jnp.pad(w, [(0, 0), (0, x.shape[-1] - channels), (0, 0)])
    if bias is None:
        bias = jnp.zeros(features)
    return pl.pallas_call(
        partial(_forward_kernel, tiling, taps, activation, _precision(x.dtype, precision)),
        out_shape=pallas_output((n, *size, features), out_dtype, x, w, bias),
        grid=(
            math.ceil(features / tiling.features),
            n // tiling.images,
            down * across,
            x.shape[-1] // tiling.channels,
        ),
        in_specs=[
            _images_spec(x, tiling, taps, across, lambda f, n, i, c: (n, i, c)),
            pl.BlockSpec(
                (len(taps.places), tiling.channels, tiling.features), lambda f, n, i, c: (0, c, f)
            ),
            pl.BlockSpec((1, tiling.features), lambda f, n, i, c: (0, f)),
        ],
        out_specs=pl.BlockSpec(
            (tiling.images, tiling.rows, min(size[1], tiling.cols), tiling.features),
            lambda f, n, i, c: (n, i // across, i % across, f),
        ),
        scratch_shapes=[
            pltpu.VMEM((tiling.pixel_blocks, tiling.pixels, tiling.features), jnp.float32)
        ],
        compiler_params=compiler_params(),
        name="conv2d_forward",
    )(x, w, bias.reshape(1, features).astype(jnp.float32))


def _correlate(
    x: jax.Array,
    dy: jax.Array,
    taps: _Taps,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> jax.Array:
    """The filters' gradient `[taps, C, NF]` of `x [N, planes, H, W, C]` and `dy [N, H, W, NF]`."""
    n, *_, channels = x.shape
    _, *size, features = dy.shape
    tiling = _weight_tiling((n, *size, channels, features), taps, x.dtype, config)
    down, across = _steps(size, tiling)
    x = _overhung(x, tiling, taps, size)
    dy = _grown(dy, down * tiling.rows, across * tiling.cols)
    return pl.pallas_call(
        partial(_weight_kernel, tiling, taps, _precision(x.dtype, precision)),
        out_shape=pallas_output((len(taps.places), channels, features), jnp.float32, x, dy),
        grid=(
            math.ceil(channels / tiling.channels),
            math.ceil(features / tiling.features),
            n // tiling.images,
            down * across,
        ),
        in_specs=[
            _images_spec(x, tiling, taps, across, lambda c, f, n, i: (n, i, c)),
            pl.BlockSpec(
                (tiling.images, tiling.rows, tiling.cols, tiling.features),
                lambda c, f, n, i: (n, i // across, i % across, f),
            ),
        ],
        out_specs=pl.BlockSpec(
            (len(taps.places), tiling.channels, tiling.features), lambda c, f, n, i: (0, c, f)
        ),
        compiler_params=compiler_params(),
        name="conv2d_weight_grad",
    )(x, dy)


def _forward_kernel(
    tiling: _Tiling,
    taps: _Taps,
    activation: str | None,
    precision: lax.Precision,
    x: Ref,
    w: Ref,
    bias: Ref,
    out: Ref,
    sums: Ref,
) -> None:
    """One grid step of the forward: every tap's product, added to the accumulators `sums`."""
    first, last = pl.program_id(3) == 0, pl.program_id(3) == pl.num_programs(3) - 1

    def multiply(index: jax.Array) -> None:
        at = _pixel_block_at(tiling, index)
        total = jnp.where(first, 0.0, sums[index])
        for tap, place in enumerate(taps.places):
            window = _window(x, at, tiling, place)
            total += jnp.dot(
                window, w[tap], precision=precision, preferred_element_type=jnp.float32
            )
        sums[index] = total

        @pl.when(last)
        def _() -> None:
            y = activate_in_kernel(sums[index] + bias[...], activation)
            images, rows = at
            y = y.reshape(*tiling.pixel_block, tiling.cols, y.shape[-1])[:, :, : out.shape[2]]
            out[images, rows] = y.astype(out.dtype)

    loop(tiling.pixel_blocks, multiply)


def _weight_kernel(
    tiling: _Tiling, taps: _Taps, precision: lax.Precision, x: Ref, dy: Ref, out: Ref
) -> None:
    """One grid step of the filters' gradient: every tap's product, added to its accumulator."""

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    def multiply(index: jax.Array) -> None:
        at = _pixel_block_at(tiling, index)
        slopes = dy[at].reshape(-1, dy.shape[-1])
        for tap, place in enumerate(taps.places):
            window = _window(x, at, tiling, place)
            out[tap] += lax.dot_general(
                window,
                slopes,
                (((0,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )

    loop(tiling.pixel_blocks, multiply)


def _pixel_block_at(tiling: _Tiling, index: jax.Array) -> tuple[Slice, Slice]:
    """The images and rows of a pixel block."""
    images, rows = tiling.pixel_block
    along = tiling.rows // rows
    return pl.ds(index // along * images, images), pl.ds(index % along * rows, rows)


def _window(
    x: Ref, at: tuple[Slice, Slice], tiling: _Tiling, place: tuple[int, int, int]
) -> jax.Array:
    """The window `[pixels, channels]` that a tap reads for a pixel block."""
    images, rows = at
    plane, down, right = place
    rows = pl.ds(rows.start + down, tiling.pixel_block[1])
    value = x[images, plane, rows, right : right + tiling.cols]
    return value.reshape(-1, value.shape[-1])


def _precision(dtype: DTypeLike, precision: lax.Precision | None) -> lax.Precision:
    """The precision of a product: Mosaic multiplies float32 in full, or as bfloat16 if asked to."""
    if dtype == jnp.float32 and precision != lax.Precision.DEFAULT:
        return lax.Precision.HIGHEST
    return lax.Precision.DEFAULT


# Tiles


def _tilings(direction: str, problem: Problem, config: TileConfig | None) -> tuple[_Tiling, ...]:
    """The tiles of one direction; raises `NotImplementedError` where they do not fit."""
    n, *size, channels = problem.shape
    kernel = problem.kernel_height, problem.kernel_width
    output = problem.window.output(size, kernel)
    taps = _taps(problem.window, kernel, channels)
    shape = n, *output, channels * math.prod(taps.fold), problem.features
    if direction == "fwd":
        return (_tiling(shape, taps, problem.dtype, problem.out_dtype, config),)
    dtype = common_dtype(problem.dtype, problem.out_dtype)
    (_, rows), (_, cols) = _inside(problem.window, taps, output, size)
    image = n, rows, cols, *shape[:2:-1]
    # The gradient of x is sized for float32, the widest dtype that it may be written in.
    return (
        *(
            _tiling(image, _mirror(taps, plane), dtype, jnp.float32, config)
            for plane in range(len(taps.planes))
        ),
        _weight_tiling(shape, taps, dtype, config),
    )


def _tiling(
    shape: tuple[int, ...],
    taps: _Taps,
    dtype: DTypeLike,
    out_dtype: DTypeLike,
    config: TileConfig | None,
) -> _Tiling:
    """The tiles of a convolution to `[N, H, W]` pixels from channels to features."""

    def use(tiling: _Tiling) -> int:
        pixels = tiling.pixel_blocks * tiling.pixels
        out = (2 * jnp.dtype(out_dtype).itemsize + 4) * pixels
        filters = 2 * len(taps.places) * round_up(tiling.channels, 16) * jnp.dtype(dtype).itemsize
        return (out + filters) * round_up(tiling.features, LANES)

    return _fitting(shape, taps, dtype, config, use)


def _weight_tiling(
    shape: tuple[int, ...], taps: _Taps, dtype: DTypeLike, config: TileConfig | None
) -> _Tiling:
    """The tiles of the filters' gradient."""

    def use(tiling: _Tiling) -> int:
        sums = 2 * 4 * len(taps.places) * round_up(tiling.channels, SUBLANES)
        slopes = 2 * jnp.dtype(dtype).itemsize * tiling.pixel_blocks * tiling.pixels
        return (sums + slopes) * round_up(tiling.features, LANES)

    return _fitting(shape, taps, dtype, config, use)


def _fitting(
    shape: tuple[int, ...],
    taps: _Taps,
    dtype: DTypeLike,
    config: TileConfig | None,
    use: Callable[[_Tiling], int],
) -> _Tiling:
    """The tiles that fit in VMEM and leave the least of the matrix unit idle, large ones first.

    Args:
        shape: `(N, H, W, channels, features)` of the product.
        taps: Taps of the convolution.
        dtype: Dtype of the images.
        config: Tiles that the caller asks for, or None.
        use: Function of tiles to the bytes of VMEM that everything but the images takes.

    Raises:
        NotImplementedError: No tiles fit, or those of `config` do not.
    """
    *_, channels, features = shape
    itemsize = jnp.dtype(dtype).itemsize
    limit = int(tpu_vmem_bytes() * VMEM_SHARE)
    # One float32 product is several bfloat16 products.
    most = _UNROLLED if itemsize == 2 else _UNROLLED // 4

    def fits(tiling: _Tiling) -> bool:
        area = (tiling.rows + taps.halo[0]) * round_up(tiling.cols + taps.halo[1], 16)
        images = 2 * itemsize * tiling.images * len(taps.planes) * area
        lanes = round_up(tiling.channels, LANES), round_up(tiling.features, LANES)
        # The operands of a product take VMEM too: a window and the accumulators.
        operands = 4 * tiling.pixels * sum(lanes)
        return images * lanes[0] + operands + use(tiling) <= limit

    def idle(tiling: _Tiling) -> tuple[int, int, int]:
        blocks = round_up(tiling.channels, LANES), round_up(tiling.features, LANES)
        padded = round_up(channels, blocks[0]) * round_up(features, blocks[1])
        return padded, -min(blocks), -math.prod(blocks)

    if config:
        given = _tiles(shape, dtype, config.block_m, config.block_k, config.block_n)
        if fits(given):
            return given
    else:
        for block_m in (1024, 512, 256, 1):
            found = []
            for block_k, block_n in product(_BLOCKS, repeat=2):
                tiling = _tiles(shape, dtype, block_m, block_k, block_n)
                unrolled = len(taps.places) * tiling.channels * tiling.features * tiling.pixels
                if fits(tiling) and (unrolled <= most or (block_k, block_n) == (LANES, LANES)):
                    found.append(tiling)
            if found:
                return min(found, key=idle)
    high, wide = taps.halo
    raise refusal(
        [
            f"{len(taps.places)} taps over {high + 1} x {wide + 1} pixels with "
            f"{config or 'any tiles'}: they need more than {limit / 2**20:.1f} MiB of VMEM"
        ]
    )


def _tiles(
    shape: tuple[int, ...], dtype: DTypeLike, pixels: int, channels: int, features: int
) -> _Tiling:
    """Tiles of at most this many pixels, channels and features, but at least a row of registers."""
    n, height, width, read, written = shape
    # Columns fill whole registers, so that the pixels of several rows reshape to one axis.
    cols = round_up(width, SUBLANES)
    parts = 1
    if cols > 2 * _BLOCK_PIXELS:
        cols, parts = _BLOCK_PIXELS, math.ceil(width / _BLOCK_PIXELS)
    most = range(1, max(1, min(height, _BLOCK_PIXELS // cols)) + 1)
    rows = min(most, key=lambda rows: (round_up(height, rows), -rows))
    pixel_blocks = math.ceil(height / rows)
    step = rows * _divisor(pixel_blocks, pixels // (rows * cols))
    whole = step == rows * pixel_blocks and parts == 1
    images = _divisor(n, pixels // (step * cols)) if whole else 1
    images_per_block = _divisor(images, _BLOCK_PIXELS // (rows * cols)) if pixel_blocks == 1 else 1
    blocks = _block(read, channels), _block(written, features)
    return _Tiling(images, step, cols, *blocks, (images_per_block, rows))


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`, and at least 1."""
    return next(d for d in range(max(1, min(number, most)), 0, -1) if number % d == 0)


def _block(size: int, most: int) -> int:
    """The block of an axis of lanes: all of it, or one of equal blocks of whole registers."""
    blocks = math.ceil(size / round_up(most, LANES))
    return size if blocks == 1 else round_up(math.ceil(size / blocks), LANES)


def _steps(size: Sequence[int], tiling: _Tiling) -> Pair:
    """The number of tiles down and across an image."""
    return math.ceil(size[0] / tiling.rows), math.ceil(size[1] / tiling.cols)


def _images_spec(
    x: jax.Array,
    tiling: _Tiling,
    taps: _Taps,
    across: int,
    step: Callable[..., tuple[Index, Index, Index]],
) -> pl.BlockSpec:
    """The block of images that a grid step reads; blocks overlap by the taps' halo.

    Args:
        x: Planes `[N, planes, H, W, C]`.
        tiling: Tile of a grid step.
        taps: Taps of the convolution.
        across: Number of tiles across an image.
        step: Function of the grid's indices to the indices of the block of images, of the tile and
            of the block of channels.
    """
    planes = x.shape[1]
    rows = tiling.rows + taps.halo[0]
    cols = x.shape[3] - (across - 1) * tiling.cols
    block = tiling.images, planes, rows, cols, tiling.channels

    def start(*at: Index) -> tuple[Index, ...]:
        images, i, channels = step(*at)
        # The compiler must see that blocks start on a register.
        col = i % across * tiling.cols if across > 1 else 0
        lane = channels * tiling.channels if tiling.channels < x.shape[-1] else 0
        return images * tiling.images, 0, i // across * tiling.rows, col, lane

    # In JAX 0.10 a block that overlaps others counts in elements along every axis.
    return pl.BlockSpec(tuple(map(pl.Element, block)), start)


def _overhung(x: jax.Array, tiling: _Tiling, taps: _Taps, size: Sequence[int]) -> jax.Array:
    """The planes with zeros where the last tiles overhang, and up to whole blocks of channels."""
    down, across = _steps(size, tiling)
    cols = tiling.cols + taps.halo[1]
    if across > 1:
        cols = (across - 1) * tiling.cols + round_up(cols, 16)
    x = _grown(x, down * tiling.rows + taps.halo[0], cols)
    more = round_up(x.shape[-1], tiling.channels) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * 4 + [(0, more)])


def _grown(x: jax.Array, rows: int, cols: int) -> jax.Array:
    """Images `[..., rows, cols, C]`, filled with zeros below and on the right."""
    *_, height, width, _ = x.shape
    edges = [(0, 0)] * (x.ndim - 3) + [(0, rows - height), (0, cols - width), (0, 0)]
    return jnp.pad(x, edges)
