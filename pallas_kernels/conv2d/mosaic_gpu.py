"""The dense convolution on Hopper GPUs: an implicit GEMM on `wgmma`, in Pallas' Mosaic GPU.

- **Tiles:** a tile is a rectangle of pixels of one image by some features, whose sums a consumer
  holds in registers. Blocks are persistent, one for each multiprocessor, and take one tile after
  the other.
- **Warpgroups:** 2 is the producer, which only issues TMA loads. 0 and 1 are consumers, which issue
  `wgmma`. They either share a tile (CUTLASS calls it cooperative) or take alternate tiles, so that
  one multiplies while the other runs its epilogue (ping-pong).
- **Pipeline:** up to `_STAGES` stages. A stage holds a block of channels of all pixels that a
  column of taps reads, and the filters of these taps: the next tap of the column reads the same
  pixels a row further down, so they are loaded once. The producer runs ahead into the next tile
  while the epilogue of one is under way.
- **TMA loads:** one for the pixels of a stage, with their halo, and one for the filters of each of
  its taps, swizzled as `wgmma` reads them. TMA fills what lies outside an image with zeros, which
  is the padding.
- **mbarriers:** `full` of a stage has one arrival for each TMA load; `empty` has one for each
  consumer that shares the tile. With ping-pong each consumer has mbarriers of its own.
- **Epilogue:** a consumer adds the bias, applies the activation, and writes its sums by TMA stores
  from two buffers in turn, which leave out what lies outside the result. Where moments are asked
  for, it adds up each feature's sums over its pixels, through shared memory, and their squared
  deviations from the mean in another round.
- **Products of an MLP:** beside the result, `mlp_product` writes what comes before the activation;
  or it multiplies by the slope of GELU at values that TMA loads two stores ahead, and sums each
  feature up.
- **Registers:** 40 a thread in the producer, 232 in the consumers (`setmaxnreg`).

`CUTLASS <https://github.com/NVIDIA/cutlass>`_ describes such warp-specialised pipelines.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial, reduce
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.common import gelu, mosaic_gpu_call
from pallas_kernels.common._compat import gpu_load, gpu_store, in_32_bits, vary_like
from pallas_kernels.common.linear import transposed
from pallas_kernels.common.mosaic_gpu import (
    MANUAL_BARRIERS,
    MULTIPROCESSORS,
    SHARED,
    Scratch,
    aligned,
    choose,
    seen_twice,
    swizzled,
    unavailable,
    when,
)
from pallas_kernels.common.refusals import refuse, unsupported_sizes
from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.common.types import Index, Ref, Slice
from pallas_kernels.conv2d import xla
from pallas_kernels.conv2d.activations import activate_in_kernel
from pallas_kernels.conv2d.moments import Moments, WithMoments, of_tiles
from pallas_kernels.conv2d.problem import Pair, Problem, Window
from pallas_kernels.conv2d.whole_rows import offered
from pallas_kernels.conv2d.xla import mirrored, weight_grad

__all__ = [
    "DIFFERENTIABLE",
    "DTYPES",
    "TILES",
    "check",
    "forward",
    "input_grad",
    "mlp_product",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False

DTYPES = ("bfloat16", "float16")
"""The dtypes of images and filters."""

_STATIC = ("window", "precision", "config")
_ROWS, _COLUMNS = 64, 256
"""The pixels (M) of a `wgmma` instruction, and the most features (N) of one."""
_SUMS = 160
"""The most sums of a thread, which take about two thirds of its registers."""
_BOX = 256
"""The most elements of a TMA copy along an axis."""
_CHANNELS = (64, 32, 16)
"""Channels of a stage (K); those of a pixel are the 128, 64 or 32 bytes of a swizzled row."""
_STORED = 64
"""Bytes of a pixel in one TMA store."""
_STAGES = 8
"""The most stages of the pipeline."""
_CHEAP_GELU = "gelu by a formula"
"""The activation of MLPs: the slope in their backward pass is that formula's."""
_CONSUMERS = 2
"""Consumer warpgroups of a block."""
_THREADS = 128
"""Threads of a warpgroup."""
_REGISTERS = {"producer": 40, "consumer": 232}
"""Registers of a thread by role: three warpgroups use almost all that a multiprocessor has."""
_PRODUCTS, _ARRIVING, _SHARED = 2048, 40, 128
"""The throughput of a multiprocessor a cycle: products, bytes loaded, bytes of shared memory."""
_LATENCY, _STAGE, _TILE = 1000, 40, 1500
"""Cycles of a TMA load's latency, and of a stage and a tile beyond their work; estimates."""


_COOPERATIVE = (
    *((256, 160, 32), (256, 128, 64), (256, 128, 32), (256, 96, 32), (256, 64, 64)),
    *((128, 256, 64), (128, 192, 64), (128, 160, 32), (128, 128, 64), (128, 160, 16)),
)
_PINGPONG = (128, 160, 32), (128, 128, 64), (128, 128, 32), (128, 160, 16), (64, 256, 64)
TILES = (
    *(TileConfig(*size, 8, 1, _STAGES) for size in _COOPERATIVE),
    *(TileConfig(*size, 4, 1, _STAGES) for size in _PINGPONG),
)
"""The tiles that are worth timing."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    reasons = []
    if problem.dtype not in DTYPES:
        reasons.append(f"{problem.dtype}, {' and '.join(DTYPES)} alone")
    if problem.out_dtype == "float64":
        reasons.append("float64 as what is written")
    if problem.window.groups > 1:
        reasons.append(f"{problem.window.groups} groups, one alone")
    sizes = unsupported_sizes(problem.shape)
    reasons += sizes
    if not sizes:
        images, *size, _ = problem.shape
        height, width = (n + sum(pads) for n, pads in zip(size, problem.window.pads, strict=True))
        # Pixels are counted in 32 bits, those of some tiles beyond the last one too.
        if images * height * width >= 1 << 30:
            reasons.append(f"the pixels of {images} images, which are too many")
    refuse(reasons)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """Returns the tiles that are worth timing, the default for the shape first; see `check`."""
    return [{}, *offered(problem), *(tile._asdict() for tile in TILES)]


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
    """Returns the operator's result; see `vjp` for the arguments.

    `precision` is ignored: it is about float32, which these kernels do not take.
    """
    inputs = x, w, bias
    _, *size, _ = window.images(x.shape)
    output = window.output(size, window.filters(w.shape)[:2])
    if window.reflect:
        x, window = mirrored(x, window), _unpadded(window)
    (above, _), (left, _) = window.pads
    y, found = _convolve(
        *(x, w, bias, window, output, (above, left)),
        flip=False,
        activation=activation,
        out_dtype=jnp.dtype(out_dtype),
        config=config,
        moments=moments,
    )
    return vary_like(inputs, y if found is None else (y, found))


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
    """Returns the gradient of x, `[N, *shape]`; XLA computes it where dy and w differ in dtype.

    It is the convolution of dy, spread by the stride, with the taps flipped.
    """
    if dy.dtype != w.dtype or dy.dtype not in DTYPES:
        return xla.input_grad(
            *(dy, w),
            shape=shape,
            dtype=dtype,
            window=window,
            precision=precision,
            config=config,
        )
    inputs = dy, w
    image, written, mirror = (dy.shape[0], *shape), jnp.dtype(dtype), None
    padded = image
    if window.reflect:
        # The gradient of the padded images, then the transpose of mirroring.
        mirror, written = partial(mirrored, window=window), jnp.dtype("float32")
        padded = jax.eval_shape(mirror, jax.ShapeDtypeStruct(image, written)).shape
        window = _unpadded(window)
    above, left = (
        d * (k - 1) - pad
        for d, k, (pad, _) in zip(
            window.dilation, window.filters(w.shape)[:2], window.pads, strict=True
        )
    )
    if window.stride != (1, 1):
        none, (down, across) = (0, 0, 0), ((0, 0, stride - 1) for stride in window.stride)
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), window.laid_out(none, down, across, none))
        window = window._replace(stride=(1, 1))
    _, *size, _ = window.images(padded)
    dx, _ = _convolve(
        *(dy, w, None, window, (size[0], size[1]), (above, left)),
        flip=True,
        activation=None,
        out_dtype=written,
        config=config,
    )
    dx = vary_like(inputs, dx)
    return dx if mirror is None else transposed(mirror, image, dx).astype(dtype)


def _unpadded(window: Window) -> Window:
    """Returns the window for images that are padded already."""
    return window._replace(pads=((0, 0), (0, 0)), reflect=False)


def _convolve(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    window: Window,
    output: Pair,
    before: Pair,
    *,
    flip: bool,
    activation: str | None,
    out_dtype: jnp.dtype,
    config: TileConfig | None,
    moments: bool = False,
) -> tuple[jax.Array, Moments | None]:
    """Returns the result of one launch, in the window's layout, as are images and filters.

    Args:
        x: The images.
        w: The filters.
        bias: `[NF]`, or None.
        window: Which samples a tap reads; its pads are ignored.
        output: The height and width of the result.
        before: Zeros above and to the left of the images; less than zero leaves samples out.
        flip: Whether taps are read backwards, and channels and features change places.
        activation: See `vjp`.
        out_dtype: The dtype of the result.
        config: The size of the tiles, or None for the default for the shape.
        moments: Whether to return moments beside it, which are None otherwise.
    """
    if window.layout == "nchw_fchw":
        x, w = jnp.moveaxis(x, 1, -1), jnp.transpose(w, (2, 3, 1, 0))
    n, h, wide, _ = x.shape
    taps = w.shape[0], w.shape[1]
    channels, features = w.shape[:1:-1] if flip else w.shape[2:]
    height, width = output
    alike = (*taps, *window.stride, *before, *output) == (1, 1, 1, 1, 0, 0, h, wide)
    if alike and not moments:
        # A 1 x 1 convolution is a product of matrices: a tile is any pixels, of any images.
        x, n, height, width = x.reshape(1, 1, -1, channels), 1, 1, n * h * wide
    layer = _Layer(
        *(n, height, width, channels, features, taps),
        *(window.stride, window.dilation, before, flip, activation, out_dtype.itemsize),
        moments=moments,
    )
    tiling = _tiling(layer, config)
    y, *found = _launch(x, w, bias, layer, tiling, out_dtype)
    y = y[..., :features].reshape(-1, *output, features)
    if window.layout != "nhwc_hwcf":
        y = jnp.moveaxis(y, -1, 1)
    if not moments:
        return y, None
    mean, squares = (one[..., :features] for one in found)
    return y, of_tiles(tiling.pixels(layer), mean, squares)


@partial(jax.jit, static_argnames=("transposed", "kept", "config"))
@in_32_bits
def mlp_product(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    before: jax.Array | None = None,
    *,
    transposed: bool = False,
    kept: bool = False,
    config: TileConfig | None = None,
) -> tuple[jax.Array, ...]:
    """Returns one of the two products of an MLP that GELU stands beside.

    Args:
        x: `[rows, C]` of one of this module's dtypes.
        w: `[C, F]`, or `[F, C]` if it is transposed, of the same dtype.
        bias: `[F]`, or None.
        before: `[rows, F]` of x's dtype, or None.
        transposed: Whether w is transposed.
        kept: Whether to return what the activation is applied to.
        config: The size of the tiles, or None for the default for the shape.

    Returns:
        Without `before` GELU of `x w + bias`, and if it is kept `x w + bias` in x's dtype. With it
        `x w` times the slope of GELU at `before`, and `[F]`, the sums of that over the rows before
        they are rounded, float32.
    """
    inputs = x, w, bias, before
    (rows, channels), features = x.shape, w.shape[0 if transposed else 1]
    sloped = before is not None
    layer = _Layer(
        *(1, 1, rows, channels, features, (1, 1), (1, 1), (1, 1), (0, 0), transposed),
        *(None if sloped else _CHEAP_GELU, x.dtype.itemsize),
        kept=kept,
        sloped=sloped,
    )
    found = _launch(
        *(x[None, None], w[None, None], bias, layer, _tiling(layer, config), x.dtype),
        None if before is None else before[None, None],
    )
    y, *others = (one[0, ..., :features] for one in found)
    others = [one.sum(0) if sloped else one[0] for one in others]
    return vary_like(inputs, (y[0], *others))


class _Layer(NamedTuple):
    """A convolution: the sizes of the result and of the sum, and which samples are read."""

    images: int
    height: int
    width: int
    channels: int
    features: int
    taps: Pair
    stride: Pair
    dilation: Pair
    before: Pair
    flip: bool
    activation: str | None
    itemsize: int
    moments: bool = False
    kept: bool = False
    sloped: bool = False


@dataclass(frozen=True)
class _Tiling:
    """The division of the result among blocks: tiles of `height x width` pixels by `features`.

    Attributes:
        height: Rows of a tile's pixels.
        width: Columns of a tile's pixels, a multiple of the 8 rows of a swizzled tile of memory.
        features: Features of a tile.
        channels: Channels of a stage.
        column: Taps of a stage, one above the other.
        down: Consumers that share the pixels of a tile.
        across: Consumers that share the features of a tile.
        stages: Stages of the pipeline.
    """

    height: int
    width: int
    features: int
    channels: int
    column: int
    down: int
    across: int
    stages: int

    @property
    def shared(self) -> int:
        """The number of consumers that share a tile: two if cooperative, one with ping-pong."""
        return self.down * self.across

    @property
    def groups(self) -> int:
        """The number of groups of consumers that share a tile, which take alternate tiles."""
        return _CONSUMERS // self.shared

    @property
    def own(self) -> tuple[int, int]:
        """The numbers of pixels and of features of a consumer."""
        return self.height * self.width // self.down, self.features // self.across

    @property
    def box(self) -> Pair:
        """The numbers of rows and of columns of the pixels of a consumer."""
        height = max(1, self.height // self.down)
        return height, self.own[0] // height

    def stored(self, itemsize: int) -> int:
        """Returns the number of features of one TMA store."""
        return min(_STORED // itemsize, self.own[1])

    def reading(self, layer: _Layer) -> int:
        """Returns the number of rows of pixels of a stage, halo included."""
        return self.height + (self.column - 1) * layer.dilation[0]

    def stage(self, layer: _Layer) -> int:
        """Returns the size of a stage in bytes."""
        rows = self.reading(layer) * self.width + self.column * self.features
        return 2 * rows * self.channels

    def written(self, layer: _Layer) -> int:
        """Returns the size in bytes of the buffers for TMA stores, two for each consumer.

        It includes those for a second array of the result's shape, and what is summed up in.
        """
        each = self.stored(layer.itemsize)
        size = 2 * _CONSUMERS * self.own[0] * each * layer.itemsize
        size *= 1 + (layer.kept or layer.sloped)
        if layer.moments or layer.sloped:
            size += _CONSUMERS * 4 * ((_ROWS + 2) * each + _THREADS)
        return size

    def steps(self, layer: _Layer) -> int:
        """Returns the number of pipeline steps of a tile."""
        columns = layer.taps[0] // self.column * layer.taps[1]
        return columns * pl.cdiv(layer.channels, self.channels)

    def counts(self, layer: _Layer) -> tuple[int, int, int, int]:
        """Returns the numbers of tiles along images, height, width and features."""
        return (
            layer.images,
            pl.cdiv(layer.height, self.height),
            pl.cdiv(layer.width, self.width),
            pl.cdiv(layer.features, self.features),
        )

    def pixels(self, layer: _Layer) -> list[int]:
        """Returns the number of pixels of an image in each consumer's part of each tile of it.

        These are the tiles of moments, in the order in which `_Block.tile` counts them.
        """
        _, rows, columns, _ = self.counts(layer)
        height, width = self.box
        found = []
        for row, column, part in product(range(rows), range(columns), range(self.down)):
            first, left = row * self.height, column * self.width
            if self.height >= self.down:
                first += part * height
            else:
                left += part * width
            high, wide = min(height, layer.height - first), min(width, layer.width - left)
            found.append(max(high, 0) * max(wide, 0))
        return found

    def whole(self, layer: _Layer) -> bool:
        """Returns whether no tile reaches beyond the rows and columns of an image."""
        return layer.height % self.height == 0 and layer.width % self.width == 0

    def tiles(self, layer: _Layer) -> int:
        """Returns the number of tiles of the whole result."""
        images, height, width, features = self.counts(layer)
        return images * height * width * features

    def possible(self, layer: _Layer) -> bool:
        """Returns whether consumers, `wgmma` instructions and TMA copies can be of these sizes."""
        rows, columns = self.own
        return (
            rows % _ROWS == 0
            and columns % 16 == 0
            # Filters are swizzled along features, or along channels where they change places.
            and (layer.flip or columns % self.channels == 0)
            and columns <= _COLUMNS
            and rows * columns <= 128 * _SUMS
            and max(self.reading(layer), self.width) <= _BOX
            # Where a result has only one row, Mosaic takes every row to be inside.
            and (layer.height > 1 or self.height == 1 or self.box[0] > 1)
            and self.stages >= 2
        )

    def cost(self, layer: _Layer) -> float:
        """Returns the estimated cycles of the busiest multiprocessor."""
        tiles = pl.cdiv(self.tiles(layer), MULTIPROCESSORS)
        pixels, columns = self.height * self.width, self.own[1]
        depth = self.column * self.channels
        products = pixels * self.features * depth / _PRODUCTS
        read = 2 * depth * (_ROWS + columns) * (pixels // _ROWS) * self.across
        arriving = self.stage(layer)
        moved = max(arriving / _ARRIVING, (arriving + read) / _SHARED)
        step = max(products, moved, _LATENCY / (self.stages - 1)) + _STAGE
        summed = self.steps(layer) * step
        written = pixels * self.features * layer.itemsize / _ARRIVING + _TILE
        if self.groups == 1:
            return tiles * (summed + written)
        return tiles * max(summed, (summed + written) / 2) + written


def _tilings(layer: _Layer, config: TileConfig) -> Iterator[_Tiling]:
    """Yields the tilings of a size: all rectangles, with a column of taps or one tap a stage."""
    down = max(1, config.ratio_m // 4)
    across = config.ratio_m * config.ratio_n // 4 // down
    columns = {layer.taps[0], 1} if layer.stride[0] == 1 else {1}
    widths = [8 << i for i in range(6) if 8 << i <= config.block_m]
    for column, width in product(columns, widths):
        height = config.block_m // width
        tile = (height, width, config.block_n, config.block_k, column, down, across)
        tiling = _Tiling(*tile, stages=2)
        left = SHARED - tiling.written(layer)
        # There are at least two stages, since one is filled while another is read.
        stages = min(max(2, config.stages), left // tiling.stage(layer))
        yield _Tiling(*tile, stages=stages)


@cache
def _tiling(layer: _Layer, config: TileConfig | None) -> _Tiling:
    """Returns the cheapest tiling of the size in `config`, or of all sizes for None."""
    if config is not None and (
        config.block_k not in _CHANNELS or config.ratio_m * config.ratio_n not in (4, 8)
    ):
        raise NotImplementedError(
            f"{config}: mosaic_gpu takes block_k of 16, 32 or 64, and 4 or 8 warps"
        )
    if config is not None:
        configs = [config]
    else:
        features = range(32, min(_COLUMNS, pl.cdiv(layer.features, 32) * 32) + 1, 32)
        configs = [
            TileConfig(pixels, columns, channels, warps, 1, _STAGES)
            for pixels, columns, channels, warps in product(
                (64, 128, 256), features, _CHANNELS, (8, 4)
            )
        ]
    tilings = [
        tiling for one in configs for tiling in _tilings(layer, one) if tiling.possible(layer)
    ]
    if not tilings:
        raise NotImplementedError(
            f"{config}: in mosaic_gpu four warps together take a multiple of {_ROWS} pixels and "
            f"of block_k features, up to {_COLUMNS}, and {_SUMS} sums a thread, of which two "
            f"stages fit in {SHARED} bytes"
        )
    return min(tilings, key=lambda tiling: tiling.cost(layer))


def _launch(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    layer: _Layer,
    tiling: _Tiling,
    dtype: jnp.dtype,
    before: jax.Array | None = None,
) -> list[jax.Array]:
    """Runs the kernel, and returns its results with features filled up to what TMA takes.

    They are the output, and what is kept, or the sums of tiles, or with moments the means and the
    squared deviations of tiles.
    """
    arrays = {"x": _planes(x, layer), "w": _flat(w, tiling)}
    if before is not None:
        arrays["before"] = aligned(before, dtype)
    if bias is not None:
        fill = tiling.counts(layer)[3] * tiling.features - layer.features
        bias = bias if bias.dtype.itemsize <= 4 else bias.astype(jnp.float32)
        arrays["bias"] = jnp.pad(bias, (0, fill)) if fill else bias
    unit = 16 // dtype.itemsize
    shape = (layer.images, layer.height, layer.width, pl.cdiv(layer.features, unit) * unit)
    results = {"y": jax.ShapeDtypeStruct(shape, dtype)}
    depth, size = tiling.channels, tiling.stages
    rows = tiling.reading(layer)
    pixels, _ = tiling.own
    filters = (tiling.features, depth) if layer.flip else (depth, tiling.features)
    buffers, stored = (_CONSUMERS, 2), tiling.stored(dtype.itemsize)
    scratch: dict[str, Scratch] = {
        "pixels": seen_twice((size,), (rows, tiling.width), depth, x.dtype),
        "filters": plgpu.SMEM(
            (size, tiling.column, *filters), w.dtype, transforms=swizzled(depth, w.dtype)
        ),
        "out": seen_twice(buffers, tiling.box, stored, dtype),
        "full": plgpu.Barrier(num_arrivals=1 + tiling.column, num_barriers=tiling.groups * size),
        "empty": plgpu.Barrier(num_arrivals=tiling.shared, num_barriers=tiling.groups * size),
    }
    if layer.kept or layer.sloped:
        scratch["held"] = seen_twice(buffers, tiling.box, stored, dtype)
    if layer.kept:
        results["kept"] = results["y"]
    if layer.sloped:
        scratch["arrived"] = plgpu.Barrier(num_barriers=2 * _CONSUMERS)
    if layer.moments or layer.sloped:
        # Copies of one axis leave nothing out, so that all features of a tile need room.
        wide = tiling.counts(layer)[3] * tiling.features
        tiles = (layer.images, len(tiling.pixels(layer)), wide)
        told = ("mean", "squares") if layer.moments else ("mean",)
        results |= dict.fromkeys(told, jax.ShapeDtypeStruct(tiles, jnp.float32))
        for name, rows in (("rows", _ROWS), ("groups", _THREADS // stored), ("told", 2)):
            scratch[name] = plgpu.SMEM((_CONSUMERS, rows, stored), jnp.float32)
    names = [*arrays, *results, *scratch]

    def body(*refs: Ref) -> None:
        block = dict(zip(names, refs, strict=True))
        _Block(layer=layer, tiling=tiling, **block).run()

    kernel = mosaic_gpu_call.kernel(
        body,
        out_type=list(results.values()) if len(results) > 1 else results["y"],
        scratch_types=list(scratch.values()),
        grid=(min(tiling.tiles(layer), MULTIPROCESSORS),),
        grid_names=("block",),
        num_threads=1 + _CONSUMERS,
        thread_name="warpgroup",
        compiler_params=MANUAL_BARRIERS,
    )
    found = kernel(*arrays.values())
    return found if len(results) > 1 else [found]


def _planes(x: jax.Array, layer: _Layer) -> jax.Array:
    """Returns `[N, H, W, C]` as planes `[N, H / stride, stride, W / stride, stride, C]`.

    A tap reads one plane. Zeros fill up what is missing. An axis of one row gets another one, since
    Mosaic takes every row of such an axis to be inside.
    """
    n, *size, _ = x.shape
    fill = [-length % stride for length, stride in zip(size, layer.stride, strict=True)]
    if size[0] <= layer.stride[0] and (layer.taps[0] > 1 or layer.before[0] or layer.height > 1):
        fill[0] += layer.stride[0]
    if any(fill):
        x = jnp.pad(x, ((0, 0), *((0, more) for more in fill), (0, 0)))
    x = aligned(x, x.dtype)
    (h, w), (down, across) = x.shape[1:3], layer.stride
    return x.reshape(n, h // down, down, w // across, across, -1)


def _flat(w: jax.Array, tiling: _Tiling) -> jax.Array:
    """Returns `[HF, WF, C, NF]` as `[taps, C, NF]`, with zeros up to whole tiles of memory."""
    w = w.reshape(-1, *w.shape[2:])
    _, channels, features = w.shape
    more = -features % (tiling.channels if features > tiling.channels else 8)
    fill = ((0, 0), (0, -channels % 8), (0, more))
    return jnp.pad(w, fill) if any(map(any, fill)) else w


def _activated(y: jax.Array, activation: str | None) -> jax.Array:
    """Returns the value of an activation, or of GELU by its formula."""
    return gelu.in_kernel(y) if activation == _CHEAP_GELU else activate_in_kernel(y, activation)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One persistent block: its references, and what each of its warpgroups does.

    Warpgroup 2 is the producer (`produce`), which fills the pipeline's stages by TMA loads; 0 and 1
    are the consumers (`consume`), which run the `epilogue` with its TMA stores after each tile.

    Attributes:
        layer: The convolution.
        tiling: How blocks share its result.
        x: The images in global memory, as `_planes` has them.
        w: The filters in global memory, as `_flat` has them.
        y: The result in global memory.
        pixels: The stages for pixels in shared memory, seen twice.
        filters: The stages for filters in shared memory.
        out: Two buffers for TMA stores of each consumer, seen twice.
        full: An mbarrier a stage, on which the TMA loads into it arrive.
        empty: An mbarrier a stage, on which its consumers arrive.
        bias: The bias in global memory, or None.
        before: What the slope of GELU is taken at, in global memory, or None.
        kept: The result before the activation in global memory, or None.
        held: Two buffers of each consumer, for `before` or `kept`, seen twice.
        arrived: An mbarrier for each of them, on which the TMA load of `before` arrives.
        mean: The means of the tiles in global memory, or their sums where there is a slope, or
            None; what follows serves these alone.
        squares: Their sums of squared deviations, for moments.
        rows: Shared memory for sums of pixels of each consumer, one for each row of a `wgmma`.
        groups: Likewise, for the sums of some of these rows, as many as its threads can add.
        told: Likewise, for the mean and the squared deviations.
    """

    layer: _Layer
    tiling: _Tiling
    x: Ref
    w: Ref
    y: Ref
    pixels: Ref
    filters: Ref
    out: Ref
    full: Ref
    empty: Ref
    bias: Ref = None
    before: Ref = None
    kept: Ref = None
    held: Ref = None
    arrived: Ref = None
    mean: Ref = None
    squares: Ref = None
    rows: Ref = None
    groups: Ref = None
    told: Ref = None

    def run(self) -> None:
        """Runs the role of this warpgroup."""
        warpgroup = lax.axis_index("warpgroup")
        # It is one branch, so that registers can go from one role to the other.
        consumes = warpgroup < _CONSUMERS
        choose(consumes, partial(self.consume, warpgroup), self.produce)

    @property
    def count(self) -> jax.Array:
        """The number of tiles of this block."""
        tiles, blocks = self.tiling.tiles(self.layer), lax.axis_size("block")
        return lax.div(tiles - lax.axis_index("block") + blocks - 1, blocks)

    @property
    def steps(self) -> int:
        """The number of pipeline steps of a tile."""
        return self.tiling.steps(self.layer)

    def origin(self, i: Index) -> tuple[jax.Array, ...]:
        """Returns the image, first row, column and feature of the block's i-th tile.

        Tiles of the same pixels follow each other.
        """
        tiling = self.tiling
        _, height, width, features = tiling.counts(self.layer)
        tile = lax.axis_index("block") + i * lax.axis_size("block")
        rest, feature = lax.div(tile, features), lax.rem(tile, features)
        rest, column = lax.div(rest, width), lax.rem(rest, width)
        image, row = lax.div(rest, height), lax.rem(rest, height)
        return image, row * tiling.height, column * tiling.width, feature * tiling.features

    def barrier(self, step: Index) -> jax.Array:
        """Returns the index of the mbarriers of a step, counted over all tiles of the block.

        Each group of consumers has a set of its own, since who waits for an mbarrier has to wait
        for every phase of it.
        """
        tiling = self.tiling
        group = lax.rem(lax.div(step, self.steps), tiling.groups)
        return group * tiling.stages + lax.rem(step, tiling.stages)

    def produce(self) -> None:
        """Issues the TMA loads of all steps of all tiles, each once its stage is empty."""
        plgpu.set_max_registers(_REGISTERS["producer"], action="decrease")
        stages, total_steps = self.tiling.stages, self.count * self.steps

        def load(step: Index, carry: tuple[()]) -> tuple[()]:
            @when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(self.empty.at[self.barrier(step - stages)])

            self.load_stage(step)
            return ()

        def drain(step: Index, carry: tuple[()]) -> tuple[()]:
            plgpu.barrier_wait(self.empty.at[self.barrier(step)])
            return ()

        lax.fori_loop(0, total_steps, load, ())
        lax.fori_loop(jnp.maximum(total_steps - stages, 0), total_steps, drain, ())

    def load_stage(self, step: Index) -> None:
        """Issues the TMA loads of a step, counted over all tiles of the block."""
        layer, tiling = self.layer, self.tiling
        image, row, column, feature = self.origin(lax.div(step, self.steps))
        within, stage = lax.rem(step, self.steps), lax.rem(step, tiling.stages)
        full = self.full.at[self.barrier(step)]
        columns = layer.taps[0] // tiling.column * layer.taps[1]
        # Taps change before channels do, so that one tap's pixels are in the L2 cache for the next.
        channels = pl.ds(lax.div(within, columns) * tiling.channels, tiling.channels)
        tap = lax.rem(within, columns)
        above, left = lax.div(tap, layer.taps[1]), lax.rem(tap, layer.taps[1])
        down, lower = self.place(above, 0)
        right, odd = self.place(left, 1)
        boxes, _ = self.pixels
        plgpu.copy_gmem_to_smem(
            self.x.at[
                image,
                pl.ds(row + down, tiling.reading(layer)),
                lower,
                pl.ds(column + right, tiling.width),
                odd,
                channels,
            ],
            boxes.at[stage],
            full,
        )
        features = pl.ds(feature, tiling.features)
        for i in range(tiling.column):
            tap = (above + i) * layer.taps[1] + left
            if layer.flip:
                filters = self.w.at[layer.taps[0] * layer.taps[1] - 1 - tap, features, channels]
            else:
                filters = self.w.at[tap, channels, features]
            plgpu.copy_gmem_to_smem(filters, self.filters.at[stage, i], full)

    def place(self, tap: Index, axis: int) -> tuple[Index, Index]:
        """Returns where a tap of the first pixel reads along an axis, and in which plane."""
        stride, before = self.layer.stride[axis], self.layer.before[axis]
        at = tap * self.layer.dilation[axis] - before
        if stride == 1:
            return at, 0
        # Division rounds towards zero.
        outside = max(0, pl.cdiv(before, stride))
        at = at + outside * stride
        return lax.div(at, stride) - outside, lax.rem(at, stride)

    def consume(self, warpgroup: Index) -> None:
        """Sums up the products of a consumer's part of its tiles, and runs their epilogues."""
        plgpu.set_max_registers(_REGISTERS["consumer"], action="increase")
        tiling, stages = self.tiling, self.tiling.stages
        group, part = lax.div(warpgroup, tiling.shared), lax.rem(warpgroup, tiling.shared)
        pixels, features = tiling.own
        first = lax.div(part, tiling.across) * pixels
        feature = lax.rem(part, tiling.across) * features
        rows = self.pixels[1]
        down = self.layer.dilation[0] * tiling.width

        def tile(own: Index, carry: tuple[()]) -> tuple[()]:
            # Stages come in the order of tiles, so groups need not wait for each other.
            i = own * tiling.groups + group
            if self.layer.sloped:
                for number in range(min(2, len(self.stores))):
                    self.fetch(i, warpgroup, number)

            def summed(sums: Ref) -> None:
                def step(s: Index, carry: tuple[()]) -> tuple[()]:
                    at = i * self.steps + s
                    stage = lax.rem(at, stages)
                    plgpu.barrier_wait(self.full.at[group * stages + stage])
                    for tap in range(tiling.column):
                        left = rows.at[stage, pl.ds(first + tap * down, pixels)]
                        if self.layer.flip:
                            right = self.filters.at[stage, tap, pl.ds(feature, features)]
                            right = right.transpose((1, 0))
                        else:
                            right = self.filters.at[stage, tap, :, pl.ds(feature, features)]
                        plgpu.wgmma(sums, left, right)
                    # This step's `wgmma` may go on while the next are issued; older ones are done.
                    plgpu.wgmma_wait(tiling.column)

                    @when(s > 0)
                    def _() -> None:
                        before = group * stages + lax.rem(at - 1, stages)
                        plgpu.barrier_arrive(self.empty.at[before])

                    return ()

                lax.fori_loop(0, self.steps, step, ())
                done = sums[...]
                last = lax.rem((i + 1) * self.steps - 1, stages)
                plgpu.barrier_arrive(self.empty.at[group * stages + last])
                self.epilogue(i, warpgroup, done)

            pl.run_scoped(summed, plgpu.ACC((pixels, features), jnp.float32))
            return ()

        lax.fori_loop(0, lax.div(self.count - group + tiling.groups - 1, tiling.groups), tile, ())
        plgpu.wait_smem_to_gmem(0)

    def epilogue(self, i: Index, warpgroup: Index, sums: jax.Array) -> None:
        """Finishes a consumer's part of the i-th tile, and issues its TMA stores."""
        layer = self.layer
        boxes, rows = self.out
        each = rows.shape[-1]
        part = lax.rem(warpgroup, self.tiling.shared)
        _, row, column, feature = self.corner(i, warpgroup)
        for number, first in enumerate(self.stores):
            buffer = warpgroup, number % 2
            # The first buffer may be the one that the last store of the tile before reads. With
            # sums there are other stores between, so none may be left.
            left = 0 if layer.moments or layer.sloped else min(number, 1)
            plgpu.wait_smem_to_gmem(left, wait_read_only=True)
            done = sums[:, first : first + each]
            if self.bias is not None:
                own = self.bias.at[pl.ds(feature + first, each)]
                offset = gpu_load(own, plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
                done = done + lax.broadcast_in_dim(offset, done.shape, (1,))
            if layer.kept:
                self.held[1].at[*buffer][...] = done.astype(self.y.dtype)
            if layer.sloped:
                done = done * self.slope(warpgroup, number)
            done = _activated(done, layer.activation)
            rows.at[*buffer][...] = done.astype(self.y.dtype)
            plgpu.commit_smem()
            at = self.box(i, warpgroup, number)
            if layer.kept:
                # Both stores are one group, for which the next waits.
                kept = self.held[0].at[*buffer]
                plgpu.copy_smem_to_gmem(kept, self.kept.at[*at], commit_group=False)
            plgpu.copy_smem_to_gmem(boxes.at[*buffer], self.y.at[*at])
            if layer.sloped and number + 2 < len(self.stores):
                # All threads have read this buffer: they have met since.
                self.fetch(i, warpgroup, number + 2)
            features = pl.ds(feature + first, each)
            if layer.moments:
                tile = at[0], self.tile(i, part), features
                self.tell(warpgroup, done, (row, column), tile)
            if layer.sloped:
                self.told.at[warpgroup, 0][...] = self.summed(warpgroup, done)
                plgpu.commit_smem()
                tile = at[0], self.tile(i, part), features
                plgpu.copy_smem_to_gmem(self.told.at[warpgroup, 0], self.mean.at[*tile])

    @property
    def stores(self) -> range:
        """The first features of each TMA store of a consumer's part of a tile."""
        return range(0, self.tiling.own[1], self.out[1].shape[-1])

    def corner(self, i: Index, warpgroup: Index) -> tuple[Index, Index, Index, Index]:
        """Returns the image, first row, column and feature of a consumer's part of a tile."""
        tiling = self.tiling
        image, row, column, feature = self.origin(i)
        height, width = tiling.box
        part = lax.rem(warpgroup, tiling.shared)
        if tiling.height >= tiling.down:
            row = row + lax.div(part, tiling.across) * height
        else:
            column = column + lax.div(part, tiling.across) * width
        return image, row, column, feature + lax.rem(part, tiling.across) * tiling.own[1]

    def box(self, i: Index, warpgroup: Index, number: int) -> tuple[Index, Slice, Slice, Slice]:
        """Returns where in the result a TMA store of a consumer's part of a tile goes."""
        image, row, column, feature = self.corner(i, warpgroup)
        height, width = self.tiling.box
        features = pl.ds(feature + self.stores[number], self.out[1].shape[-1])
        return image, pl.ds(row, height), pl.ds(column, width), features

    def fetch(self, i: Index, warpgroup: Index, number: int) -> None:
        """Issues the TMA load of what the slope of one store is taken at."""
        buffer = number % 2
        plgpu.copy_gmem_to_smem(
            self.before.at[*self.box(i, warpgroup, number)],
            self.held[0].at[warpgroup, buffer],
            self.arrived.at[2 * warpgroup + buffer],
        )

    def slope(self, warpgroup: Index, number: int) -> jax.Array:
        """Returns the slopes of GELU at what was loaded for one store."""
        buffer = number % 2
        plgpu.barrier_wait(self.arrived.at[2 * warpgroup + buffer])
        before = gpu_load(self.held[1].at[warpgroup, buffer], plgpu.Layout.WGMMA)
        return gelu.slope_in_kernel(before.astype(jnp.float32))

    def tile(self, i: Index, part: Index) -> Index:
        """Returns the number of a consumer's part of the i-th tile among those of its image."""
        tiling = self.tiling
        _, _, width, _ = tiling.counts(self.layer)
        _, row, column, _ = self.origin(i)
        number = lax.div(row, tiling.height) * width + lax.div(column, tiling.width)
        return number * tiling.down + lax.div(part, tiling.across)

    def tell(
        self,
        warpgroup: Index,
        done: jax.Array,
        first: tuple[Index, Index],
        at: tuple[Index, Index, Slice],
    ) -> None:
        """Stores the moments of some features of a consumer's part of a tile.

        Args:
            warpgroup: The consumer.
            done: The pixels by features, finished.
            first: The first row and column of the pixels.
            at: The place of the moments: image, tile and features.
        """
        height, width = self.tiling.box
        high = jnp.clip(self.layer.height - first[0], 0, height)
        wide = jnp.clip(self.layer.width - first[1], 0, width)

        def kept(values: jax.Array) -> jax.Array:
            if self.tiling.whole(self.layer):
                return values
            pixel = plgpu.broadcasted_iota(jnp.int32, done.shape, 0, layout=plgpu.Layout.WGMMA)
            inside = (lax.div(pixel, width) < high) & (lax.rem(pixel, width) < wide)
            return jnp.where(inside, values, 0.0)

        count = (high * wide).astype(jnp.float32)
        share = 1 / jnp.maximum(count, 1.0)
        mean = self.summed(warpgroup, kept(done)) * share
        # The mean of large numbers is inexact by some of their last bits; that of the rest is not.
        rest = kept(done - lax.broadcast_in_dim(mean, done.shape, (1,)))
        off = self.summed(warpgroup, rest) * share
        squares = self.summed(warpgroup, rest * rest) - count * off * off
        told = self.told.at[warpgroup]
        told.at[0][...] = mean + off
        told.at[1][...] = jnp.maximum(squares, 0.0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(told.at[0], self.mean.at[*at])
        plgpu.copy_smem_to_gmem(told.at[1], self.squares.at[*at])

    def summed(self, warpgroup: Index, values: jax.Array) -> jax.Array:
        """Returns the sums over a consumer's pixels, as `wgmma` lays out the features of a row.

        Not by a reduction of Pallas' own: all warpgroups would share one piece of memory for it.
        """
        pixels, each = values.shape
        total = values[:_ROWS]
        for first in range(_ROWS, pixels, _ROWS):
            total = total + values[first : first + _ROWS]
        rows, groups = self.rows.at[warpgroup], self.groups.at[warpgroup]
        gpu_store(rows, total)
        plgpu.commit_smem()
        # A thread has one feature of every so many rows.
        count = _THREADS // each
        strided = plgpu.Layout.WG_STRIDED((count, each), vec_size=1)
        parts = (gpu_load(rows.at[pl.ds(i, count)], strided) for i in range(0, _ROWS, count))
        groups[...] = reduce(operator.add, parts)
        plgpu.commit_smem()
        columns = plgpu.Layout.WGMMA.reduce(0)
        return reduce(operator.add, (gpu_load(groups.at[i], columns) for i in range(count)))
