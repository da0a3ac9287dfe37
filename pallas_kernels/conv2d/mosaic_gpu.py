"""The dense convolution on Hopper GPUs: an implicit GEMM on `wgmma`, in Pallas' Mosaic GPU.

A tile is a rectangle of pixels of one image by some features. One warpgroup orders copies into a
ring of stages in shared memory, two others multiply what has arrived: both share a tile, or they
take turns, so that one multiplies while the other writes. A stage is a block of channels of all
pixels that a column of taps reads, and the filters of these taps: the next tap of the column reads
the same pixels a row further down, so they are copied once. The copy engine fills what lies outside
an image with zeros, which is the padding. A block takes one tile after the other, and the copies
for the next are under way while one is written.

`CUTLASS <https://github.com/NVIDIA/cutlass>`_ describes such pipelines of warps with roles.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.common._compat import gpu_load, in_32_bits, vary_over, varying_axes
from pallas_kernels.common.mosaic_gpu import (
    MULTIPROCESSORS,
    SHARED,
    UNSYNCHRONISED,
    aligned,
    size_in_bytes,
    unavailable,
)
from pallas_kernels.conv2d import xla
from pallas_kernels.conv2d.problem import Pair, Problem, TileConfig, Window
from pallas_kernels.conv2d.xla import mirrored, transposed, weight_grad

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

_DTYPES = ("bfloat16", "float16")
_STATIC = ("window", "precision", "config")
_ROWS, _COLUMNS = 64, 256
"""Pixels of a matrix instruction, and the most features of one."""
_SUMS = 160
"""Most sums of a thread: it has two registers for three of them."""
_BOX = 256
"""Most elements that the copy engine takes along an axis."""
_CHANNELS = (64, 32, 16)
"""Of a stage: a pixel's are what copies swizzle, of 128, 64 or 32 bytes."""
_STORED = 64
"""Bytes of a pixel that are written at once."""
_STAGES = 8
_GROUPS = 2
"""Warpgroups that multiply."""
_REGISTERS = {"copies": 40, "products": 232}
"""Registers of a thread, together what a multiprocessor has for three warpgroups."""
_PRODUCTS, _ARRIVING, _SHARED = 2048, 40, 128
"""A cycle of a multiprocessor: products, bytes that arrive, and bytes of its shared memory."""
_LATENCY, _STAGE, _TILE = 1000, 40, 1500
"""Cycles that a copy takes, and what a stage and a tile cost beyond their work; estimates."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd" or "bwd".
        problem: `pallas_kernels.conv2d.problem.Problem`.
    """
    reasons = []
    if problem.dtype not in _DTYPES:
        reasons.append(f"{problem.dtype}, {' and '.join(_DTYPES)} alone")
    if problem.out_dtype == "float64":
        reasons.append("float64 as what is written")
    if problem.window.groups > 1:
        reasons.append(f"{problem.window.groups} groups, one alone")
    sizes = problem.unsupported()
    reasons += sizes
    if not sizes:
        images, *size, _ = problem.shape
        height, width = (n + sum(pads) for n, pads in zip(size, problem.window.pads, strict=True))
        # They are counted in 32 bits, and some tiles beyond the last, too.
        if images * height * width >= 1 << 30:
            reasons.append(f"the pixels of {images} images, which are too many")
    if reasons:
        raise NotImplementedError(f"does not take {'; '.join(reasons)}")


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """Tiles that are worth timing, those made for the shape first; see `check`."""
    shared = [(256, 160, 32), (256, 128, 64), (256, 128, 32), (256, 96, 32), (256, 64, 64)]
    shared += [(128, 256, 64), (128, 192, 64), (128, 160, 32), (128, 128, 64), (128, 160, 16)]
    turns = [(128, 160, 32), (128, 128, 64), (128, 128, 32), (128, 160, 16), (64, 256, 64)]
    return [
        {},
        *(TileConfig(*size, 8, 1, _STAGES)._asdict() for size in shared),
        *(TileConfig(*size, 4, 1, _STAGES)._asdict() for size in turns),
    ]


@partial(jax.jit, static_argnames=(*_STATIC, "activation", "out_dtype"))
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
) -> jax.Array:
    """The operator; see `vjp` for the arguments. `precision` is of float32, which is not taken."""
    axes = varying_axes((x, w, bias))
    _, *size, _ = window.images(x.shape)
    output = window.output(size, window.filters(w.shape)[:2])
    if window.reflect:
        x, window = mirrored(x, window), _unpadded(window)
    (above, _), (left, _) = window.pads
    y = _convolve(
        *(x, w, bias, window, output, (above, left)),
        flip=False,
        activation=activation,
        out_dtype=jnp.dtype(out_dtype),
        config=config,
    )
    return vary_over(axes, y)


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
    """The transpose in x, of the shape `[N, *shape]`; XLA's where dy and w are not of one dtype.

    It is the convolution of dy, spread by the stride, with the taps flipped.
    """
    if dy.dtype != w.dtype or dy.dtype not in _DTYPES:
        return xla.input_grad(
            *(dy, w),
            shape=shape,
            dtype=dtype,
            window=window,
            precision=precision,
            config=config,
        )
    axes = varying_axes((dy, w))
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
        between = ((0, 0, stride - 1) for stride in window.stride)
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), window.laid_out((0,) * 3, *between, (0,) * 3))
        window = window._replace(stride=(1, 1))
    _, *size, _ = window.images(padded)
    dx = _convolve(
        *(dy, w, None, window, (size[0], size[1]), (above, left)),
        flip=True,
        activation=None,
        out_dtype=written,
        config=config,
    )
    dx = vary_over(axes, dx)
    return dx if mirror is None else transposed(mirror, image, dx).astype(dtype)


def _unpadded(window: Window) -> Window:
    """The window on images that are padded already."""
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
) -> jax.Array:
    """One launch: images and filters in the window's layout, as is the result.

    Args:
        x: Images.
        w: Filters.
        bias: `[NF]`, or None.
        window: Which samples a tap reads, but for its pads.
        output: Height and width of the result.
        before: Zeros above and to the left of the images; less than zero leaves samples out.
        flip: Whether taps are read backwards, and channels and features change places.
        activation: See `vjp`.
        out_dtype: Of the result.
        config: Tiles, or None for those made for the shape.
    """
    if window.layout == "nchw_fchw":
        x, w = jnp.moveaxis(x, 1, -1), jnp.transpose(w, (2, 3, 1, 0))
    n, h, wide, _ = x.shape
    *taps, _, _ = w.shape
    channels, features = w.shape[:1:-1] if flip else w.shape[2:]
    height, width = output
    if (*taps, *window.stride, *before, *output) == (1, 1, 1, 1, 0, 0, h, wide):
        # Of a product of pixels alone, a tile is any of them.
        x, n, height, width = x.reshape(1, 1, -1, channels), 1, 1, n * h * wide
    layer = _Layer(
        *(n, height, width, channels, features, tuple(taps)),
        *(window.stride, window.dilation, before, flip, activation, out_dtype.itemsize),
    )
    tiling = _tiling(layer, config)
    y = _launch(x, w, bias, layer, tiling, out_dtype)
    y = y[..., :features].reshape(-1, *output, features)
    return y if window.layout == "nhwc_hwcf" else jnp.moveaxis(y, -1, 1)


class _Layer(NamedTuple):
    """What is computed: sizes of the result, what it is summed over, and which samples are read."""

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


@dataclass(frozen=True)
class _Tiling:
    """How blocks share the result: tiles of `height x width` pixels by `features`.

    Attributes:
        height: Rows of a tile's pixels.
        width: Columns, a multiple of the 8 rows that a tile of swizzled memory has.
        features: Of a tile.
        channels: Of a stage.
        column: Taps of a stage, one above the other.
        down: Warpgroups that share the pixels of a tile.
        across: Warpgroups that share its features.
        stages: Of the ring.
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
        """Warpgroups that share a tile."""
        return self.down * self.across

    @property
    def turns(self) -> int:
        """Tiles that are summed up or written at once."""
        return _GROUPS // self.shared

    @property
    def own(self) -> tuple[int, int]:
        """Pixels and features of a warpgroup."""
        return self.height * self.width // self.down, self.features // self.across

    @property
    def box(self) -> Pair:
        """Rows and columns of the pixels of a warpgroup."""
        height = max(1, self.height // self.down)
        return height, self.own[0] // height

    def stored(self, itemsize: int) -> int:
        """Features that are written at once."""
        return min(_STORED // itemsize, self.own[1])

    def reading(self, layer: _Layer) -> int:
        """Rows of pixels of a stage."""
        return self.height + (self.column - 1) * layer.dilation[0]

    def stage(self, layer: _Layer) -> int:
        """Bytes of a stage."""
        rows = self.reading(layer) * self.width + self.column * self.features
        return 2 * rows * self.channels

    def written(self, layer: _Layer) -> int:
        """Bytes that are on their way to the result, of two turns."""
        return 2 * _GROUPS * self.own[0] * self.stored(layer.itemsize) * layer.itemsize

    def steps(self, layer: _Layer) -> int:
        """Stages that a tile takes."""
        columns = layer.taps[0] // self.column * layer.taps[1]
        return columns * pl.cdiv(layer.channels, self.channels)

    def counts(self, layer: _Layer) -> tuple[int, int, int, int]:
        """Tiles along images, height, width and features."""
        return (
            layer.images,
            pl.cdiv(layer.height, self.height),
            pl.cdiv(layer.width, self.width),
            pl.cdiv(layer.features, self.features),
        )

    def tiles(self, layer: _Layer) -> int:
        """Of the whole result."""
        images, height, width, features = self.counts(layer)
        return images * height * width * features

    def possible(self, layer: _Layer) -> bool:
        """Whether warpgroups, instructions and copies can be of these sizes."""
        rows, columns = self.own
        return (
            rows % _ROWS == 0
            and columns % 16 == 0
            # Filters are swizzled along features, or, where these change places, channels.
            and (layer.flip or columns % self.channels == 0)
            and columns <= _COLUMNS
            and rows * columns <= 128 * _SUMS
            and max(self.reading(layer), self.width) <= _BOX
            # Mosaic takes a row to be inside of a result that has no other.
            and (layer.height > 1 or self.height == 1 or self.box[0] > 1)
            and self.stages >= 2
        )

    def cost(self, layer: _Layer) -> float:
        """Cycles of the busiest multiprocessor, estimated."""
        rounds = pl.cdiv(self.tiles(layer), MULTIPROCESSORS)
        pixels, columns = self.height * self.width, self.own[1]
        depth = self.column * self.channels
        products = pixels * self.features * depth / _PRODUCTS
        read = 2 * depth * (_ROWS + columns) * (pixels // _ROWS) * self.across
        arriving = self.stage(layer)
        moved = max(arriving / _ARRIVING, (arriving + read) / _SHARED)
        step = max(products, moved, _LATENCY / (self.stages - 1)) + _STAGE
        summed = self.steps(layer) * step
        written = pixels * self.features * layer.itemsize / _ARRIVING + _TILE
        if self.turns == 1:
            return rounds * (summed + written)
        return rounds * max(summed, (summed + written) / 2) + written


def _tilings(layer: _Layer, config: TileConfig) -> Iterator[_Tiling]:
    """Those of a size: every rectangle, and a column of taps a stage or one tap."""
    down = max(1, config.ratio_m // 4)
    across = config.ratio_m * config.ratio_n // 4 // down
    columns = {layer.taps[0], 1} if layer.stride[0] == 1 else {1}
    widths = [8 << i for i in range(6) if 8 << i <= config.block_m]
    for column, width in product(columns, widths):
        height = config.block_m // width
        tile = (height, width, config.block_n, config.block_k, column, down, across)
        tiling = _Tiling(*tile, stages=2)
        left = SHARED - tiling.written(layer)
        # One stage is written while another is read, whatever is asked.
        stages = min(max(2, config.stages), left // tiling.stage(layer))
        yield _Tiling(*tile, stages=stages)


@cache
def _tiling(layer: _Layer, config: TileConfig | None) -> _Tiling:
    """The tiling of a size, or of all, that takes the busiest multiprocessor the least work."""
    if config is not None and (
        config.block_k not in _CHANNELS or config.ratio_m * config.ratio_n not in (4, 8)
    ):
        raise NotImplementedError(
            f"{config}: mosaic_gpu takes block_k of 16, 32 or 64, and 4 or 8 warps"
        )
    configs = [config]
    if config is None:
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
) -> jax.Array:
    """The kernel, on channels last; features are filled up to what the copy engine takes."""
    arrays = {"x": _planes(x, layer), "w": _flat(w, tiling)}
    if bias is not None:
        fill = tiling.counts(layer)[3] * tiling.features - layer.features
        bias = bias if bias.dtype.itemsize <= 4 else bias.astype(jnp.float32)
        arrays["bias"] = jnp.pad(bias, (0, fill)) if fill else bias
    unit = 16 // dtype.itemsize
    shape = (layer.images, layer.height, layer.width, pl.cdiv(layer.features, unit) * unit)
    depth, size = tiling.channels, tiling.stages
    rows = tiling.reading(layer)
    pixels, _ = tiling.own
    filters = (tiling.features, depth) if layer.flip else (depth, tiling.features)
    turns, stored = (_GROUPS, 2), tiling.stored(dtype.itemsize)
    scratch = {
        "pixels": _seen_twice((size,), (rows, tiling.width), depth, x.dtype),
        "filters": plgpu.SMEM(
            (size, tiling.column, *filters), w.dtype, transforms=_swizzled(depth, w.dtype)
        ),
        "out": _seen_twice(turns, tiling.box, stored, dtype),
        "full": plgpu.Barrier(num_arrivals=1 + tiling.column, num_barriers=tiling.turns * size),
        "free": plgpu.Barrier(num_arrivals=tiling.shared, num_barriers=tiling.turns * size),
    }
    names = [*arrays, "y", *scratch]

    def body(*refs: Any) -> None:
        block = dict(zip(names, refs, strict=True))
        _Block(layer=layer, tiling=tiling, **block).run()

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=list(scratch.values()),
        grid=(min(tiling.tiles(layer), MULTIPROCESSORS),),
        grid_names=("block",),
        num_threads=1 + _GROUPS,
        thread_name="warpgroup",
        compiler_params=UNSYNCHRONISED,
    )
    return kernel(*arrays.values())


def _planes(x: jax.Array, layer: _Layer) -> jax.Array:
    """`[N, H, W, C]` as `[N, H / stride, stride, W / stride, stride, C]`: a tap reads one plane.

    Zeros fill up what is missing. An axis of one row gets another: Mosaic takes it to be read
    inside, whatever is asked.
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
    """`[HF, WF, C, NF]` as `[taps, C, NF]`, filled up with zeros to whole tiles of memory."""
    w = w.reshape(-1, *w.shape[2:])
    _, channels, features = w.shape
    more = -features % (tiling.channels if features > tiling.channels else 8)
    fill = ((0, 0), (0, -channels % 8), (0, more))
    return jnp.pad(w, fill) if any(map(any, fill)) else w


def _swizzled(columns: int, dtype: jnp.dtype) -> tuple[Any, ...]:
    """How products want their operands: tiles of 8 rows, their columns swizzled."""
    swizzle = plgpu.SwizzleTransform(size_in_bytes((columns,), dtype))
    return plgpu.TilingTransform((8, columns)), swizzle


def _seen_twice(
    outer: tuple[int, ...], box: Pair, columns: int, dtype: jnp.dtype
) -> plgpu.RefUnion:
    """Pixels as the copy engine sees them, a box `[rows, width, C]`, and as products do, `[M, C]`.

    Both are the same bytes: tiles of 8 pixels, each of which is as wide as all channels, lie one
    after the other. Tiles of the image itself could not begin at any pixel.
    """
    tiles, swizzle = _swizzled(columns, dtype)
    seen = plgpu.SMEM((*outer, *box, columns), dtype, transforms=(swizzle,))
    rows = (*outer, box[0] * box[1], columns)
    return plgpu.RefUnion(seen, plgpu.SMEM(rows, dtype, transforms=(tiles, swizzle)))


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One block: its references, and what each of its warpgroups does."""

    layer: _Layer
    tiling: _Tiling
    x: Any
    w: Any
    y: Any
    pixels: Any
    filters: Any
    out: Any
    full: Any
    free: Any
    bias: Any = None

    def run(self) -> None:
        """Gives each warpgroup its role."""
        warpgroup = lax.axis_index("warpgroup")
        # One branch, or registers cannot go from one role to the other.
        multiplies = warpgroup < _GROUPS
        lax.cond(multiplies, partial(self.multiply, warpgroup), self.copy)

    @property
    def count(self) -> Any:
        """Tiles of this block."""
        tiles, blocks = self.tiling.tiles(self.layer), lax.axis_size("block")
        return lax.div(tiles - lax.axis_index("block") + blocks - 1, blocks)

    @property
    def steps(self) -> int:
        """Stages that a tile takes."""
        return self.tiling.steps(self.layer)

    def origin(self, i: Any) -> tuple[Any, Any, Any, Any]:
        """Image, first row, column and feature of the block's i-th tile.

        Tiles of the same pixels follow each other.
        """
        tiling = self.tiling
        _, height, width, features = tiling.counts(self.layer)
        tile = lax.axis_index("block") + i * lax.axis_size("block")
        rest, feature = lax.div(tile, features), lax.rem(tile, features)
        rest, column = lax.div(rest, width), lax.rem(rest, width)
        image, row = lax.div(rest, height), lax.rem(rest, height)
        return image, row * tiling.height, column * tiling.width, feature * tiling.features

    def barrier(self, turn: Any) -> Any:
        """That of a stage and of those who multiply it: who waits has to see every phase."""
        tiling = self.tiling
        who = lax.rem(lax.div(turn, self.steps), tiling.turns)
        return who * tiling.stages + lax.rem(turn, tiling.stages)

    def copy(self) -> None:
        """Orders the copies of all stages of all tiles, each once its place is free."""
        plgpu.set_max_registers(_REGISTERS["copies"], action="decrease")
        stages, turns = self.tiling.stages, self.count * self.steps

        def one(turn: Any, _: Any) -> tuple[()]:
            @pl.when(turn >= stages)
            def _() -> None:
                plgpu.barrier_wait(self.free.at[self.barrier(turn - stages)])

            self.fetch(turn)
            return ()

        def last(turn: Any, _: Any) -> tuple[()]:
            plgpu.barrier_wait(self.free.at[self.barrier(turn)])
            return ()

        lax.fori_loop(0, turns, one, ())
        lax.fori_loop(jnp.maximum(turns - stages, 0), turns, last, ())

    def fetch(self, turn: Any) -> None:
        """Orders the copies of a stage."""
        layer, tiling = self.layer, self.tiling
        image, row, column, feature = self.origin(lax.div(turn, self.steps))
        step, slot = lax.rem(turn, self.steps), lax.rem(turn, tiling.stages)
        full = self.full.at[self.barrier(turn)]
        columns = layer.taps[0] // tiling.column * layer.taps[1]
        # Taps change first, so that what one brings into the cache is there for the next.
        channels = pl.ds(lax.div(step, columns) * tiling.channels, tiling.channels)
        tap = lax.rem(step, columns)
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
            boxes.at[slot],
            full,
        )
        features = pl.ds(feature, tiling.features)
        for i in range(tiling.column):
            tap = (above + i) * layer.taps[1] + left
            if layer.flip:
                filters = self.w.at[layer.taps[0] * layer.taps[1] - 1 - tap, features, channels]
            else:
                filters = self.w.at[tap, channels, features]
            plgpu.copy_gmem_to_smem(filters, self.filters.at[slot, i], full)

    def place(self, tap: Any, axis: int) -> tuple[Any, Any]:
        """Where a tap of the first pixel reads along an axis, and in which plane of the stride."""
        stride, before = self.layer.stride[axis], self.layer.before[axis]
        at = tap * self.layer.dilation[axis] - before
        if stride == 1:
            return at, 0
        # Division rounds towards zero.
        outside = max(0, pl.cdiv(before, stride))
        at = at + outside * stride
        return lax.div(at, stride) - outside, lax.rem(at, stride)

    def multiply(self, warpgroup: Any) -> None:
        """Sums up the products of a warpgroup's part of its tiles, and writes them."""
        plgpu.set_max_registers(_REGISTERS["products"], action="increase")
        tiling, stages = self.tiling, self.tiling.stages
        turn, part = lax.div(warpgroup, tiling.shared), lax.rem(warpgroup, tiling.shared)
        pixels, features = tiling.own
        first = lax.div(part, tiling.across) * pixels
        feature = lax.rem(part, tiling.across) * features
        _, rows = self.pixels
        down = self.layer.dilation[0] * tiling.width

        def tile(own: Any, _: Any) -> tuple[()]:
            # Stages come in the order of tiles: who takes the next one waits for nothing else.
            i = own * tiling.turns + turn

            def summed(sums: Any) -> None:
                def step(s: Any, _: Any) -> tuple[()]:
                    at = i * self.steps + s
                    slot = lax.rem(at, stages)
                    plgpu.barrier_wait(self.full.at[turn * stages + slot])
                    for tap in range(tiling.column):
                        left = rows.at[slot, pl.ds(first + tap * down, pixels)]
                        if self.layer.flip:
                            right = self.filters.at[slot, tap, pl.ds(feature, features)]
                            right = right.transpose((1, 0))
                        else:
                            right = self.filters.at[slot, tap, :, pl.ds(feature, features)]
                        plgpu.wgmma(sums, left, right)
                    # These products may go on while the next are ordered; those before are done.
                    plgpu.wgmma_wait(tiling.column)

                    @pl.when(s > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(self.free.at[turn * stages + lax.rem(at - 1, stages)])

                    return ()

                lax.fori_loop(0, self.steps, step, ())
                done = sums[...]
                last = lax.rem((i + 1) * self.steps - 1, stages)
                plgpu.barrier_arrive(self.free.at[turn * stages + last])
                self.write(i, warpgroup, done)

            pl.run_scoped(summed, plgpu.ACC((pixels, features), jnp.float32))
            return ()

        lax.fori_loop(0, lax.div(self.count - turn + tiling.turns - 1, tiling.turns), tile, ())
        plgpu.wait_smem_to_gmem(0)

    def write(self, i: Any, warpgroup: Any, sums: Any) -> None:
        """Writes a warpgroup's part of the i-th tile, but for what lies outside of the result."""
        tiling = self.tiling
        image, row, column, feature = self.origin(i)
        height, width = tiling.box
        part = lax.rem(warpgroup, tiling.shared)
        if tiling.height >= tiling.down:
            row = row + lax.div(part, tiling.across) * height
        else:
            column = column + lax.div(part, tiling.across) * width
        feature = feature + lax.rem(part, tiling.across) * tiling.own[1]
        boxes, rows = self.out
        each = rows.shape[-1]
        for turn, first in enumerate(range(0, tiling.own[1], each)):
            place = warpgroup, turn % 2
            # The first place may be where the last of the tile before is.
            plgpu.wait_smem_to_gmem(min(turn, 1), wait_read_only=True)
            done = sums[:, first : first + each]
            if self.bias is not None:
                own = self.bias.at[pl.ds(feature + first, each)]
                offset = gpu_load(own, plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
                done = done + lax.broadcast_in_dim(offset, done.shape, (1,))
            rows.at[*place][...] = _activated(done, self.layer.activation).astype(self.y.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                boxes.at[*place],
                self.y.at[
                    image,
                    pl.ds(row, height),
                    pl.ds(column, width),
                    pl.ds(feature + first, each),
                ],
            )


def _activated(y: Any, activation: str | None) -> Any:
    """As `xla.activate`, of what Mosaic knows: no complement of the error function."""
    if activation == "gelu":
        return 0.5 * y * (1 + lax.erf(y * 0.5**0.5))
    return xla.activate(y, activation)
