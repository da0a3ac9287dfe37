"""The launches of the `folded_*.cu`, for any framework: 16 bits, odd kernels, on tensor cores.

Where images of a level fit into a block's shared memory, one launch does it and all below, from the
pixels of the level above. Above are means of squares first, a launch two levels; then each level
from the deepest one on, which adds what the level below has made. Gradients of taps are a launch a
level; means that only they read are one array, of x and of dy.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.common.cuda import Box, Device, Kernel, Launch
from pallas_kernels.common.triton import AnyArray, cdiv
from pallas_kernels.common.types import Output
from pallas_kernels.wtconv.gradients_launches import Parameters, gradients, numbers

_FOLDER = Path(__file__).parent

KERNEL_SIZES = 3, 5, 7
"""The kernel sizes that there are products for."""
_BFLOAT16 = 80
"""The compute capability times ten from which on tensor cores take bfloat16."""
_BLOCKS = 16
"""Blocks of four columns that a product has rows for."""
_HOPPER = 90
"""The compute capability times ten of GPUs whose warps give each other registers by the same
instructions as an H200's."""
APART, _AHEAD = 1, 2
"""A warp of its own starts the copies of boxes, on GPUs that can; see `planned`."""
_COPIERS = 4
"""Warps that give their registers back, of which a thread starts copies."""
_GROUPS = 4
"""Groups of channels of a block that does all levels of small images."""
_CROWDED = 4, 3
"""Such blocks of a multiprocessor, whose registers are enough for four."""
_ALONE = 15
"""Steps in whose time such a block has read its images, and stored them."""
_TOGETHER = 13
"""The longest side of images that one launch does all levels of, where it has a multiprocessor for
each block. A launch a level streams through images of 14 pixels a side and more in less time, and
so where blocks share multiprocessors; see docs/performance.md."""
_NARROW = 4
"""The longest side of images that one launch does all levels of, though blocks share
multiprocessors: a step has all rows of eight images or more."""
_WORTH_TIMING = range(3, 33)
"""Such sides that are worth timing."""
_BELOW, _PARAMETERS = 2, 8
"""The number of the parameter that has what deeper levels add, and that of y where none has."""
_SUMS = 3
"""The number of the parameter that has the weight gradients of deeper levels."""
_SETS = {3: 4, 5: 8, 7: 15}
"""Products that a weight gradient has of a channel, by kernel size."""
_THREADS = 256
_MEANS_VECTOR = {False: 8, True: 4}
"""Channels of a thread that makes the means of one level, and of two: of more, the compiler lets
loads wait for each other, for want of registers."""
_PASSING = 4
"""Channels of the smallest access to memory that can say that it is the last one."""
_KEPT = 40_000_000
"""Bytes of the largest means that stay in L2 until the launch that reads them: most of an H200's,
the only GPU that was measured."""
_STAGES = {False: 4, True: 8}
"""Pairs of rows in shared memory, copied in pieces and as boxes."""
_OFFSETS = 2**31
"""Elements that the offsets inside a tile can count."""


class Variant(NamedTuple):
    """The constants of a kernel of one level; see the macros of `folded_streams.cuh`."""

    kernel: str
    bfloat16: bool
    kernel_size: int
    across: int
    images: int
    pairs: int
    vector: int
    group: int
    groups: int
    resident: int
    boxed: bool
    below: bool = False
    stages: int = 2
    apart: bool = False
    ahead: bool = False
    joined: bool = False

    def compiled(self, level: int = 0) -> Kernel:
        """The kernel to launch for the images of a level."""
        name, threads = f"folded_{self.kernel}", 32 * (self.groups + _COPIERS * self.apart)
        macros = (*_macros(self), (self.kernel.upper(), 1))
        boxes = self._boxes(level) if self.boxed else ()
        place = _BELOW if self.below else None
        return Kernel(_source(name), name, macros, threads, self.shared(), boxes, self.apart, place)

    def _boxes(self, level: int) -> tuple[Box, ...]:
        """The boxes of the images; those of results are of the pixels that a level writes."""
        width, channels = 4 * self.across, self.channels
        x, y = ((self.images, 2, columns, channels) for columns in (self._box(), width))
        if self.kernel == "weights":
            return Box(0, x), Box(1, y)
        squares = Box(_BELOW, (self.images, 1, width // 2, channels), 2 << level)
        last = _PARAMETERS + self.below
        return Box(0, x), *[squares] * self.below, Box(last, y, 1 << level)

    def _box(self) -> int:
        """Columns of a box of x."""
        return cdiv(4 * self.across + 4 * (self.kernel_size // 2), 8) * 8

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.group * self.groups

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        width = 4 * self.across
        if self.boxed:
            pixel = 2 * self.channels
            rows = 2 * self.images * self._box() * pixel
            results = cdiv(2 * self.images * width * pixel, 1024) * 1024
            squares = cdiv(self.below * self.images * width // 2 * pixel, 1024) * 1024
        else:
            rows = _group_bytes(2 * self.images * (width + 4 * (self.kernel_size // 2)), self)
            results = _group_bytes(2 * self.images * width, self)
            squares = _group_bytes(2 * self.images * self.across, self)
        barriers = 16 * self.boxed
        if self.kernel == "weights":
            read = self.stages * (rows + results + barriers)
            return max(read, 512 * self.groups * _SETS[self.kernel_size])
        waiting = self.stages + 1 if self.boxed else 2
        return self.stages * (rows + squares + barriers) + waiting * results

    def tiles(self, shape: tuple[int, ...]) -> int:
        """Tiles of a channel of images `[N, H, W, C]`."""
        n, h, w, _ = shape
        return cdiv(n, self.images) * cdiv(h, 2 * self.pairs) * cdiv(w, 4 * self.across)

    def chunks(self, shape: tuple[int, ...]) -> int:
        """Parts of the channels, which blocks treat by themselves."""
        return cdiv(shape[-1], self.channels)

    def programs(self, shape: tuple[int, ...], device: Device) -> int:
        """Blocks that share the tiles of a channel."""
        at_once = self.resident * device.multiprocessors // self.chunks(shape)
        tiles = self.tiles(shape)
        most = max(1, min(tiles, at_once))
        # As few as end at the same time.
        return cdiv(tiles, cdiv(tiles, most))

    def time(self, shape: tuple[int, ...], device: Device) -> int:
        """Pairs of rows that the busiest multiprocessor treats."""
        programs = self.programs(shape, device)
        waves = cdiv(programs * self.chunks(shape), self.resident * device.multiprocessors)
        around = 2 * (self.kernel_size // 2)
        return waves * cdiv(self.tiles(shape), programs) * (self.pairs + around)


class Whole(NamedTuple):
    """The constants of the kernel of some levels; see the macros of `folded_levels.cu`."""

    bfloat16: bool
    kernel_size: int
    levels: int
    height: int
    wide: int
    halved: bool
    high: int
    broad: int
    images: int
    vector: int
    group: int
    groups: int
    resident: int
    first: int = 0
    y_rows: int = 0
    y_columns: int = 0

    def compiled(self) -> Kernel:
        """The kernel to launch."""
        name, threads = "folded_levels", 32 * self.groups
        return Kernel(_source(name), name, _macros(self), threads, self.shared())

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        radius = self.kernel_size // 2
        found = 0
        for level in range(self.levels):
            _, h, w, _ = means_shape((1, self.height, self.wide, 1), level)
            line = 16 * (cdiv(w, 4) + cdiv(2 * radius, 4))
            words = self.images * cdiv(h, 2) * line + 16 * (1 + radius)
            found += cdiv(words, 128) * 128 + 16
        return found * self.group * self.groups

    def blocks(self, shape: tuple[int, ...]) -> int:
        """Thread blocks of images `[N, H, W, C]`."""
        return cdiv(shape[0], self.images) * cdiv(shape[-1], self.group * self.groups)

    def steps(self) -> int:
        """Products of 16 blocks of four columns that a warp makes of a channel, in turns."""
        found = 0
        for level in range(self.levels):
            _, h, w, _ = means_shape((1, self.height, self.wide, 1), level)
            down = _BLOCKS // (1 << (cdiv(w, 4) - 1).bit_length())
            found += cdiv(self.images * cdiv(h, 2), down) + cdiv(self.kernel_size // 2, down)
        return found

    def time(self, shape: tuple[int, ...], device: Device) -> int:
        """Steps that the busiest multiprocessor takes, whose blocks share its shared memory."""
        at_once, blocks = self.resident * device.multiprocessors, self.blocks(shape)
        waves, rest = divmod(blocks, at_once)
        crowd = waves * self.resident + cdiv(rest, device.multiprocessors)
        return crowd * self.steps() + cdiv(blocks, at_once) * _ALONE


def _source(name: str) -> Path:
    return _FOLDER / f"{name}.cu"


def _macros(variant: Variant | Whole) -> tuple[tuple[str, int], ...]:
    """The numbers of a variant, by the names of the macros that they are."""
    constants = variant._asdict().items()
    return tuple((name.upper(), int(value)) for name, value in constants if name != "kernel")


def _group_bytes(pixels: int, variant: Variant) -> int:
    """Bytes of shared memory of some pixels of all groups."""
    return variant.groups * (cdiv(2 * variant.group * pixels, 128) * 128 + 16)


def search_space(
    direction: str,
    shape: tuple[int, ...],
    dtype: str,
    kernel_size: int,
    levels: int,
    device: Device,
) -> list[dict[str, int]]:
    """The choices worth timing for images `[N, H, W, C]`; see `forward` and `weight_grad`.

    Args:
        direction: "fwd" or "bwd".
        shape: The images'.
        dtype: "bfloat16" or "float16".
        kernel_size: One of `KERNEL_SIZES`.
        levels: The number of levels.
        device: The GPU.
    """
    sizes = [means_shape(shape, level) for level in range(levels)]
    sides = [max(size[1:3]) for size in sizes]
    found: list[dict[str, int]] = [{}]
    # Whole images of more levels, and of fewer.
    ruled = _wholes(sizes, dtype, kernel_size, device, None)
    default = next((side for side, one in zip(sides, ruled, strict=True) if one), None)
    found += [{"together": side} for side in sides if side in _WORTH_TIMING and side != default]
    if device.boxes and device.capability == _HOPPER and shape[-1] % 8 == 0:
        found += [{"apart": who} for who in range(_AHEAD + 1) if who != APART]
    return [*found, {"resident": 1}, {"resident": 2}] if direction == "fwd" else found


def takes(shape: tuple[int, ...], dtype: str, kernel_size: int, device: Device) -> bool:
    """Whether these kernels take images `[N, H, W, C]` on a GPU."""
    n, h, w, c = shape
    high, wide = cdiv(h, 2), cdiv(w, 2)
    # Pixels of deeper levels may have twice the channels.
    lines = max(h * (w + 4 * _BLOCKS), 2 * high * (wide + 4 * _BLOCKS))
    tile = (min(n, _BLOCKS) + 1) * lines * c
    able = device.capability >= _BFLOAT16 if dtype == "bfloat16" else dtype == "float16"
    # The kernel of means, of one array or two, counts in 32 bits.
    means = 2 * n * high * wide * c < 2**32
    return able and kernel_size in KERNEL_SIZES and tile < _OFFSETS and means


@cache
def planned(
    kernel: str,
    shape: tuple[int, ...],
    dtype: str,
    kernel_size: int,
    device: Device,
    resident: int | None = None,
    below: bool = False,
    apart: int = APART,
) -> Variant:
    """The variant for images `[N, H, W, C]`.

    Args:
        kernel: "forward" or "weights".
        shape: The images'.
        dtype: "bfloat16" or "float16".
        kernel_size: One of `KERNEL_SIZES`.
        device: The GPU.
        resident: Blocks of a multiprocessor that copy in pieces, 1 of 32 channels or 2 of 16; None
            for the rule's: one, which copies boxes where it can.
        below: Whether deeper levels add something.
        apart: Who starts the copies of boxes: 0 a thread of the first warp, 1 a warp of its own, 2
            likewise, and a level's pixels are read a step before they are multiplied.
    """
    n, h, w, c = shape
    group = 2 if kernel_size == 7 else 4
    groups = 8 // (resident or 1)
    boxed = resident is None and device.boxes and group == 4 and c % 8 == 0
    if kernel == "weights":
        across = min(_BLOCKS, 1 << (cdiv(w, 4) - 1).bit_length())
        images = _BLOCKS // across
    else:
        across = cdiv(cdiv(w, 4), cdiv(w, 4 * _BLOCKS))
        images = min(n, _BLOCKS // across)
    copying = bool(apart) and boxed and device.capability == _HOPPER
    one = Variant(
        *(kernel, dtype == "bfloat16", kernel_size, across, images, 1, math.gcd(group, c)),
        *(group, groups, resident or 1, boxed, below, _STAGES[boxed]),
        apart=copying,
        ahead=copying and apart == _AHEAD and kernel == "forward",
    )
    high = cdiv(h, 2)
    cuts = [one._replace(pairs=cdiv(high, parts)) for parts in range(1, cdiv(high, 4) + 1)]
    best = min(cuts, key=lambda cut: cut.time(shape, device))
    share = device.share(best.resident)
    while best.stages > 2 and best.shared() > share:
        best = best._replace(stages=best.stages - 1)
    if resident is None and best.shared() > share:
        # A Turing's 64 KB are too few for sixteen images of 32 channels.
        return planned(kernel, shape, dtype, kernel_size, device, 2, below, apart)
    return best


@cache
def whole(
    shape: tuple[int, ...],
    dtype: str,
    kernel_size: int,
    levels: int,
    device: Device,
    above: tuple[int, ...] | None = None,
    together: int | None = None,
) -> Whole | None:
    """The variant that does some levels of images, or None where it has no room.

    Args:
        shape: The images', `[N, H, W, C]`.
        dtype: "bfloat16" or "float16".
        kernel_size: One of `KERNEL_SIZES`.
        levels: The number of levels.
        device: The GPU.
        above: The shape of the images whose means of squares these are, if they are.
        together: The longest side of images that are taken; None for `_TOGETHER`, and only where
            each block has a multiprocessor of its own or they are not longer than `_NARROW`.
    """
    n, h, w, c = shape
    across = cdiv(w, 4)
    if max(h, w) > min(together or _TOGETHER, 4 * _BLOCKS):
        return None
    group = 2 if kernel_size == 7 else 4
    _, high, broad, _ = above or shape
    one = Whole(
        *(dtype == "bfloat16", kernel_size, levels, h, w, above is not None, high, broad),
        *(1, math.gcd(8, c), group, _GROUPS, 1),
    )
    variants = [
        one._replace(images=images, resident=resident)
        for resident in _CROWDED
        for images in range(1, min(n, 2 * _BLOCKS // across) + 1)
    ]
    fitting = [each for each in variants if each.shared() <= device.share(each.resident)]
    best = min(fitting, key=lambda each: each.time(shape, device), default=None)
    if together or best is None or max(h, w) <= _NARROW:
        return best
    return best if best.blocks(shape) <= device.multiprocessors else None


def _wholes(
    sizes: Sequence[tuple[int, ...]],
    dtype: str,
    kernel_size: int,
    device: Device,
    together: int | None,
) -> list[Whole | None]:
    """`whole` of each level and all below it."""
    return [
        whole(size, dtype, kernel_size, len(sizes) - level, device, above, together)
        for level, (size, above) in enumerate(zip(sizes, [None, *sizes], strict=False))
    ]


def _first(wholes: Sequence[Whole | None]) -> int:
    """The first level that one launch does with all below it; the number of levels if none is."""
    return next((level for level, one in enumerate(wholes) if one), len(wholes))


def reads_means(
    shape: tuple[int, ...], dtype: str, kernel_size: int, levels: int, device: Device
) -> bool:
    """Whether `forward` reads means of squares, which `weight_grad` then reads too, by default.

    Args:
        shape: The images', `[N, H, W, C]`.
        dtype: "bfloat16" or "float16".
        kernel_size: One of `KERNEL_SIZES`.
        levels: The number of levels.
        device: The GPU.
    """
    sizes = [means_shape(shape, level) for level in range(levels)]
    return _first(_wholes(sizes, dtype, kernel_size, device, None)) > 1


def forward(
    x: AnyArray,
    taps: AnyArray,
    shape: tuple[int, ...],
    dtype: str,
    kernel_size: int,
    levels: int,
    device: Device,
    launch: Launch[AnyArray],
    *,
    resident: int | None = None,
    together: int | None = None,
    apart: int = APART,
) -> AnyArray:
    """The wavelet convolution.

    Args:
        x: Contiguous images `[N, H, W, C]`.
        taps: The bias and the folded taps, int32 `[1 + levels * k * 2k * 2 * 2, C]`: see `folded`.
        shape: x's.
        dtype: x's, "bfloat16" or "float16".
        kernel_size: One of `KERNEL_SIZES`.
        levels: The number of levels, at least one.
        device: The GPU.
        launch: The framework's launch function.
        resident: See `planned`.
        together: The longest side of images that one launch does all levels of, see `whole`.
        apart: See `planned`.

    Returns:
        y in x's shape and dtype.
    """
    sizes = [means_shape(shape, level) for level in range(levels)]
    about = dtype, kernel_size, device
    fitting = _wholes(sizes, *about, together)
    first = _first(fitting)
    images = [x, *means([x], sizes[: max(first, 1)], dtype, launch)]
    _, high, broad, _ = shape
    # Each level writes the first pixel of the squares that it is added to.
    y, output = None, [(shape, dtype)]
    if first < levels and (one := fitting[first]):
        n, _, _, c = size = sizes[first]
        one = one._replace(first=first, y_rows=high, y_columns=broad)
        (y,) = launch(one.compiled(), [images[-1], taps, n, c], output, one.blocks(size))
    for level in reversed(range(first)):
        n, h, w, c = size = sizes[level]
        added = y is not None
        variant = planned("forward", size, *about, resident, added, apart)
        programs = variant.programs(size, device)
        arrays = [images[level], taps, *[y] * (added or not variant.boxed)]
        numbers = [level, n, c, h, w, programs, *[high, broad] * (not variant.boxed)]
        blocks = programs * variant.chunks(size)
        (y,) = launch(variant.compiled(level), [*arrays, *numbers], output, blocks)
    assert y is not None
    return y


def folded(
    parameters: Parameters[AnyArray],
    channels: int,
    dtype: str,
    kernel_size: int,
    launch: Launch[AnyArray],
    transpose: bool,
) -> AnyArray:
    """The bias and the taps of each level's one convolution, as `forward` takes them.

    Args:
        parameters: Weights, scales and bias, in float32 or in `dtype`.
        channels: C.
        dtype: The taps', "bfloat16" or "float16".
        kernel_size: k, one of `KERNEL_SIZES`.
        launch: The framework's launch function.
        transpose: Whether they are flipped, for the transpose of the convolution.

    Returns:
        int32 `[1 + levels * k * 2k * 2 * 2, C]`: the scaled bias in float32, then words of the two
        rows of the input, by pair of rows and column of the input, column and row of the output.
    """
    weights, scales, bias, own = parameters
    levels = len(weights) - 1
    macros = (
        *(("BFLOAT16", int(dtype == "bfloat16")), ("WIDE", int(own == "float32"))),
        *(("KERNEL_SIZE", kernel_size), ("LEVELS", levels)),
    )
    kernel = Kernel(_source("folded_taps"), "folded_taps", macros, _THREADS, 0)
    squares = levels * kernel_size * 2 * kernel_size
    output: Output = ((1 + 4 * squares, channels), "int32")
    factors: Sequence[AnyArray | None] = scales or [None] * len(weights)
    pairs = zip(weights, factors, strict=True)
    arguments = [*(each for pair in pairs for each in pair), bias, channels, int(transpose)]
    (words,) = launch(kernel, arguments, [output], cdiv(squares * channels, _THREADS))
    return words


def means(
    arrays: Sequence[AnyArray],
    sizes: Sequence[tuple[int, ...]],
    dtype: str,
    launch: Launch[AnyArray],
) -> list[AnyArray]:
    """The means of the squares of two rows and columns, of their squares, and so on.

    Args:
        arrays: Contiguous images `[N, H, W, C]`, or two arrays of them.
        sizes: The shapes of the images and of the means of each level.
        dtype: "bfloat16" or "float16".
        launch: The framework's launch function.

    Returns:
        An array a level, in that dtype; of two arrays with twice the channels, those of the first
        before those of the second.
    """
    found: list[AnyArray] = []
    count, (n, _, _, c) = len(arrays), sizes[0]
    while (level := len(found) + 1) < len(sizes):
        twice = level + 1 < len(sizes)
        vector = math.gcd(_MEANS_VECTOR[twice], c)
        some = sizes[level : level + 1 + twice]
        kept = 2 * sum(map(math.prod, some)) <= _KEPT
        joined = len(arrays) > 1
        # The means of means are read again before long, and so is what two arrays are made of.
        passing = level == 1 and not joined and kept and vector >= _PASSING
        macros = (
            *(("BFLOAT16", int(dtype == "bfloat16")), ("VECTOR", vector), ("TWICE", int(twice))),
            *(("PASSING", int(passing)), ("JOINED", int(joined))),
        )
        kernel = Kernel(_source("folded_means"), "folded_means", macros, _THREADS, 0)
        _, h, w, _ = sizes[level - 1]
        channels = count * c // len(arrays)
        threads = len(arrays) * n * cdiv(h, 4) * cdiv(w, 2 + 2 * twice) * (channels // vector)
        outputs = [((*size[:-1], count * c), dtype) for size in some]
        blocks = cdiv(threads, _THREADS)
        found += launch(kernel, [*arrays, n, channels, h, w], outputs, blocks)
        arrays = found[-1:]
    return found


def weight_grad(
    x: AnyArray,
    dy: AnyArray,
    table: AnyArray,
    shape: tuple[int, ...],
    dtype: str,
    kernel_size: int,
    levels: int,
    device: Device,
    launch: Launch[AnyArray],
    *,
    channels_last: bool,
    parameters: Parameters[AnyArray] | None = None,
    resident: int | None = None,
    together: int | None = None,
    apart: int = APART,
) -> list[AnyArray]:
    """The weight gradients.

    Args:
        x: Contiguous images `[N, H, W, C]`.
        dy: The gradient of the output, of x's shape and dtype.
        table: `folding.products(kernel_size)`.
        shape: x's.
        dtype: x's, "bfloat16" or "float16".
        kernel_size: One of `KERNEL_SIZES`.
        levels: The number of levels, at least one.
        device: The GPU.
        launch: The framework's launch function.
        channels_last: Whether the taps' gradients are `[k, k, bands, C]`, else `[C, bands, k, k]`.
        parameters: See `gradients_launches.gradients`, which ends them.
        resident: See `planned`.
        together: See `forward`.
        apart: See `planned`.

    Returns:
        The gradients of the base's taps, of each level's four bands and of the bias, `[C]`, in
        float32; or of the parameters.
    """
    sizes = [means_shape(shape, level) for level in range(levels)]
    about = dtype, kernel_size, device
    # The first level whose means `forward` does not read.
    first = max(1, _first(_wholes(sizes, *about, together)))
    pairs = [*zip(*([a, *means([a], sizes[:first], dtype, launch)] for a in (x, dy)), strict=True)]
    # Those of x and of dy are in one array.
    pairs += [(both, both) for both in means(pairs[-1], sizes[first - 1 :], dtype, launch)]
    variants = [planned("weights", size, *about, resident, apart=apart) for size in sizes]
    programs = [one.programs(size, device) for one, size in zip(variants, sizes, strict=True)]
    counts = [numbers(kernel_size, base=level == 0) for level in range(levels)]
    found: list[tuple[AnyArray, int, int]] = []
    sums: AnyArray | None = None
    # The deepest level first, each after the one below, and levels whose means are made alike in
    # one array: so XLA knows that their means are needed no more when others begin.
    for some in (range(first, levels), range(first)):
        rows = [0, *accumulate(programs[level] * counts[level] for level in some)]
        output: Output = ((rows.pop(), shape[-1]), "float32")
        for level in reversed(some):
            n, h, w, c = sizes[level]
            variant, many, row = variants[level], programs[level], rows[level - some.start]
            kernel = variant._replace(joined=level >= first).compiled()
            kernel = kernel._replace(in_place=_SUMS if level + 1 in some else None)
            arrays = [*pairs[level], table, sums]
            integers = [n, c, h, w, many, counts[level], row]
            blocks = many * variant.chunks(sizes[level])
            (sums,) = launch(kernel, [*arrays, *integers], [output], blocks)
        if sums is not None:
            each = zip(rows, some, strict=True)
            found = [(sums, row, programs[level]) for row, level in each] + found
    return gradients(found, shape[-1], kernel_size, launch, channels_last, parameters)


def means_shape(shape: tuple[int, ...], level: int) -> tuple[int, ...]:
    """The shape of the means of squares of 2**level rows and columns."""
    n, h, w, c = shape
    return n, cdiv(h, 2**level), cdiv(w, 2**level), c
