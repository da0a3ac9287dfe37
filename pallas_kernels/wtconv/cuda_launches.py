"""The CUDA launches of the wavelet convolution, for any framework: variants of `cuda_kernels.cu`.

Where a plane fits into a block's shared memory, one kernel does all levels. Larger images are cut
into tiles, which also read the halo that their levels need; of more than two or three levels the
deeper ones are computed first, from the low band of the last of these, and added.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

from pallas_kernels.common.cuda import DTYPES, Device, Kernel, Launch
from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.triton import AnyArray, cdiv
from pallas_kernels.common.types import Output
from pallas_kernels.wtconv.problem import Problem

SOURCE = Path(__file__).with_name("cuda_kernels.cu")

_MAX_KERNEL = 9
_MAX_LEVELS = 5
_TILES = ((64, 128), (32, 128), (32, 64), (32, 32), (16, 32), (16, 16))
"""Largest heights and widths of tiles; those of a weight gradient start with the second."""
_SECTOR = 32
"""Bytes of the smallest access to memory."""
_ROLES = 192
"""Threads of a block of a weight gradient, two of which fill a multiprocessor's registers."""
_REGISTERS = {1: 80, 3: 80, 5: 80, 7: 128, 9: 168}
"""Registers of a thread with which nothing is spilled, by kernel size."""
_SUMMING = {1: 128, 3: 128, 5: 168, 7: 255, 9: 255}
"""The same for a weight gradient, whose threads hold a sum a tap."""


def check(problem: Problem) -> None:
    """Raises `NotImplementedError` where the kernels do not take a problem."""
    levels = range(1, _MAX_LEVELS + 1)
    # Signals come to `line_launches`, so that they are no reason here.
    refuse(problem.unsupported(tuple(DTYPES), _MAX_KERNEL, levels, odd=True, axes=(1, 2)))


def search_space() -> list[dict[str, int]]:
    """The numbers of resident blocks of a multiprocessor that are worth timing; see `forward`."""
    return [{}, {"resident": 1}, {"resident": 4}]


class Images(NamedTuple):
    """Dense images as launches see them, whichever framework has them.

    Attributes:
        shape: `(N, H, W, C)`.
        dtype: The name of the dtype.
        channels_last: Whether the channels of a pixel are neighbours in memory; else the pixels of
            a plane are.
        aligned: The number of elements, a power of two up to 4, that the address is a multiple of.
    """

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool = True
    aligned: int = 4

    def output(self, dtype: str) -> Output:
        """An output of this shape and memory format, as launches take it."""
        _, h, w, c = self.shape
        if self.channels_last:
            return self.shape, dtype
        return self.shape, dtype, (c * h * w, w, 1, h * w)

    def vector(self, kernel_size: int) -> int:
        """The number of neighbours that a thread can load at once, by alignment and width."""
        _, _, w, c = self.shape
        if self.channels_last:
            return math.gcd(4, c, self.aligned)
        return math.gcd(2 if kernel_size // 2 % 2 else 4, w, self.aligned)

    def low(self, levels: int) -> "Images":
        """The low band of the last of some levels."""
        n, h, w, c = self.shape
        side = 2**levels
        return Images((n, cdiv(h, side), cdiv(w, side), c), "float32", self.channels_last)


class Variant(NamedTuple):
    """The constants that one kernel is compiled with; see the macros of `cuda_kernels.cu`."""

    kernel: str
    dtype: int
    kernel_size: int
    levels: int
    height: int = 2
    width: int = 8
    planes: int = 1
    rows: int = 2
    threads: int = 256
    blocks: int = 1
    channels_last: bool = False
    vector: int = 1
    base: bool = True
    below: bool = False
    tiled: bool = False
    segment: int = 1
    base_segment: int = 1

    def macros(self) -> dict[str, object]:
        """The definitions for the preprocessor, by name."""
        lists = self._lists()
        return {
            self.kernel.upper(): 1,
            "DTYPE": self.dtype,
            "KERNEL_SIZE": self.kernel_size,
            "LEVELS": self.levels,
            "TILE_H": self.height,
            "TILE_W": self.width,
            "PLANES": self.planes,
            "ROWS": self.rows,
            "THREADS": self.threads,
            "BLOCKS": self.blocks,
            "CHANNELS_LAST": int(self.channels_last),
            "VECTOR": self.vector,
            "TILED": int(self.tiled),
            "BASE": int(self.base),
            "BELOW": int(self.below),
            "SEGMENT": self.segment,
            "BASE_SEGMENT": self.base_segment,
            "PLANE": self.plane(),
            **{name: ",".join(map(str, values)) for name, values in lists.items()},
        }

    def _lists(self) -> dict[str, list[int]]:
        radius = self.kernel_size // 2
        window = _round_up(4 + 2 * radius, 4)
        lists: dict[str, list[int]] = {
            name: []
            for name in (
                *("TILE_ROWS", "TILE_COLUMNS", "HALO", "LEFT"),
                *("LOW_ROWS", "HIGH_ROWS", "STRIDE"),
            )
        }
        for level in range(1, self.levels + 1):
            rows, columns = cdiv(self.height, 2**level), cdiv(self.width, 2**level)
            # Each level below needs twice the halo; beyond a whole plane all is zero.
            halo = radius * 2 ** (self.levels - level) if self.tiled else radius
            left = radius + _round_up(halo - radius, 4)
            patches = _round_up(rows, self.rows) if level == 1 else rows
            across = cdiv(columns, 4)
            stride = _round_up(
                max(left - radius + 4 * across - 4 + window, left + columns + halo), 4
            )
            if level == 1:
                stride = self._spread(stride, across)
            values = (
                *(rows, columns, halo, left),
                *(halo + max(patches + radius, rows + halo), patches + 2 * radius, stride),
            )
            for found, value in zip(lists.values(), values, strict=True):
                found.append(value)
        return lists

    def _spread(self, stride: int, across: int) -> int:
        """A stride by which eight threads read from different banks, if one is near."""
        for wider in range(stride, stride + 16, 4):
            if (self.rows * wider // 4 - across) % 8 == 0:
                return wider
        return stride

    def plane(self) -> int:
        """Elements of shared memory between planes."""
        lists = self._lists()
        size = sum(
            (low + 3 * high) * stride
            for low, high, stride in zip(
                lists["LOW_ROWS"], lists["HIGH_ROWS"], lists["STRIDE"], strict=True
            )
        )
        if self.kernel == "forward":
            most = _round_up(lists["TILE_ROWS"][0], self.rows)
            for level in range(2, self.levels + 1 + self.below):
                rows, columns = (lists[n][level - 2] for n in ("TILE_ROWS", "TILE_COLUMNS"))
                needed = cdiv(most, 2 ** (level - 2))
                size += max(_round_up(rows, 2), needed) * _round_up(columns, 8)
        # Threads beside each other treat different planes, and read from different banks.
        spread = {2: 4, 4: 2}.get(self.planes, self.planes % 8 or 1)
        return _round_up(size, 32) + 4 * spread if self.planes > 1 else _round_up(size, 4)

    def compiled(self) -> Kernel:
        """The kernel to launch."""
        return _compiled(self, SOURCE)

    def groups(self, images: Images) -> int:
        """Groups of planes that blocks treat."""
        n, _, _, c = images.shape
        return n * self.parts(c) if self.channels_last else c * cdiv(n, self.planes)

    def parts(self, channels: int) -> int:
        """Parts of the channels, each of which blocks treat by themselves."""
        return cdiv(channels, self.planes) if self.channels_last else channels

    def tiles(self, images: Images) -> int:
        """Tiles of an image."""
        _, h, w, _ = images.shape
        return cdiv(h, self.height) * cdiv(w, self.width)

    def filled(self) -> "Variant":
        """The same variant with the threads that its planes take."""
        rows, across = self.height // 2, cdiv(self.width, 8)
        if self.kernel == "weights":
            segment = cdiv(rows, cdiv(rows, 28))
            # A row of the base's pixels is four times the work of one of coefficients.
            variant = self._replace(segment=segment, base_segment=cdiv(segment, 4))
            items = variant.roles()
        else:
            # Two rows at once load less, where a plane has the threads for it all the same.
            large = self.tiled or cdiv(rows, 2) * across >= 64
            variant = self._replace(rows=2 if large else 1)
            items = variant.items()
        if self.channels_last:
            variant = variant._replace(vector=math.gcd(self.vector, self.planes))
        iterations = cdiv(items, 32 * self.warps()) if self.kernel == "forward" else 1
        return variant._replace(threads=_round_up(max(cdiv(items, iterations), variant.line()), 32))

    def cut(self, height: int, width: int, most_h: int, most_w: int) -> "Variant":
        """The same variant for tiles of about even size of an image.

        They are cut where squares of the deepest level begin.
        """
        side = 2**self.levels
        return self._replace(
            height=_round_up(cdiv(height, cdiv(height, most_h)), side),
            width=_round_up(cdiv(width, cdiv(width, most_w)), max(side, 8)),
        ).filled()

    def suffices(self, device: Device) -> bool:
        """Whether a block has planes enough.

        Small blocks are in different phases, so that one computes while another waits for memory;
        but a block's own work is to be spread, and its warps are to be full.
        """
        if self.channels_last and self.planes * (2 if self.dtype else 4) < _SECTOR:
            return False
        if self.kernel == "weights":
            return self._replace(planes=2 * self.planes).filled().threads > _ROLES
        return self.items() >= 0.85 * self.threads and self.shared() >= device.share(8)

    def items(self) -> int:
        """Patches of the first level of a block."""
        return self.planes * cdiv(self.height // 2, self.rows) * cdiv(self.width, 8)

    def warps(self) -> int:
        """Warps of a multiprocessor that have registers enough."""
        if self.kernel == "weights":
            return 4 * (512 // _SUMMING[self.kernel_size])
        return 4 * (512 // (_REGISTERS[self.kernel_size] - 8 * (self.rows == 1)))

    def line(self) -> int:
        """Threads that load a row of a plane, or in channels-last of all planes of a block."""
        lists = self._lists()
        columns = lists["STRIDE" if self.tiled else "TILE_COLUMNS"][0]
        across = cdiv(columns, 1 if self.kernel_size // 2 % 2 else 2)
        return across * (self.planes // self.vector if self.channels_last else 1)

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        planes = self.planes * self.plane()
        if self.kernel == "low":
            return 0
        if self.kernel == "weights":
            return 4 * max(2 * planes, self.threads * self.kernel_size**2)
        taps = _round_up((1 + 4 * self.levels) * _round_up(self.kernel_size**2, 4), 32) + 4
        return 4 * (planes + (self.planes if self.channels_last else 1) * taps)

    def roles(self) -> int:
        """Threads that the sums of a weight gradient take."""
        lists = self._lists()
        count = 0
        for level, (rows, columns) in enumerate(
            zip(lists["TILE_ROWS"], lists["TILE_COLUMNS"], strict=True)
        ):
            across = cdiv(columns, 4) * self.planes
            if level == 0 and self.base:
                count = _round_up(across * cdiv(rows, self.base_segment), 32)
            count += 4 * across * cdiv(rows, self.segment)
        return _round_up(count, 32)


@cache
def _compiled(variant: Variant, source: Path) -> Kernel:
    """The kernel of a variant, remembered since PyTorch asks at every call."""
    macros = tuple(variant.macros().items())
    name = f"wtconv_{variant.kernel}"
    return Kernel(source, name, macros, variant.threads, variant.shared())


@cache
def planned(
    kernel: str,
    images: Images,
    kernel_size: int,
    levels: int,
    device: Device,
    base: bool = True,
    resident: int | None = None,
) -> Variant:
    """The variant of a kernel for images, of as many levels as tiles may have.

    A multiprocessor holds three blocks or two, so that one computes while another waits for memory;
    or as many as `resident` says.
    """
    n, height, width, c = images.shape
    channels_last, forward = images.channels_last, kernel == "forward"
    share = device.share(resident or (3 if forward and not channels_last else 2))
    variant = Variant(
        *(kernel, DTYPES[images.dtype], kernel_size, levels),
        height=_round_up(height, 2),
        width=_round_up(width, 4),
        channels_last=channels_last,
        vector=images.vector(kernel_size),
        base=base,
    )
    if variant.filled().shared() > share:
        # Channels-last, neighbours in memory are channels: a few of them are worth smaller tiles,
        # around which two levels read as much as three do elsewhere.
        planes = min(c, 4 if forward else 2) if channels_last else 1
        variant = variant._replace(tiled=True, planes=planes)
        cuts = [
            variant._replace(levels=count).cut(height, width, *tile)
            for count in range(min(levels, 2 if channels_last else 3), 0, -1)
            for tile in _TILES[not forward :]
        ]
        variant = next((cut for cut in cuts if cut.shared() <= share), cuts[-1])
    else:
        many = c if channels_last else n
        most = device.shared if channels_last else share
        fitting = [variant.filled()]
        for planes in (2, 4, *(6,) * channels_last, 8, 16, 32):
            wider = variant._replace(planes=planes).filled()
            few = planes < 2 * many and wider.threads <= 32 * wider.warps()
            if few and wider.shared() <= most:
                fitting.append(wider)
        variant = next((one for one in fitting if one.suffices(device)), fitting[-1])
    fit = (device.shared + 1024) // (variant.shared() + 1024)
    return variant._replace(blocks=max(1, min(fit, variant.warps() // (variant.threads // 32))))


def forward(
    x: AnyArray,
    taps: Sequence[AnyArray | None],
    bias: AnyArray | None,
    images: Images,
    device: Device,
    launch: Launch[AnyArray],
    transpose: bool,
    *,
    resident: int | None = None,
) -> AnyArray:
    """The operator, or its transpose.

    Args:
        x: Dense images.
        taps: float32, contiguous: `[C, 1, k, k]`, then for each level `[C, 4, k, k]`, in any shape
            that ends with k. Without the first there is no base convolution.
        bias: float32 `[C]`, or None.
        images: The description of x.
        device: The GPU.
        launch: The framework's launch function.
        transpose: Whether the taps are flipped.
        resident: The number of blocks of a multiprocessor; see `planned`.

    Returns:
        y in x's shape, dtype and memory format.
    """
    kernel_size, levels = cast(AnyArray, taps[-1]).shape[-1], len(taps) - 1
    base = taps[0] is not None
    variant = planned("forward", images, kernel_size, levels, device, base, resident)
    below = None
    if variant.levels < levels:
        deeper = [None, *taps[variant.levels + 1 :]]
        low, lows = low_band(x, images, variant.levels, launch)
        below = forward(low, deeper, None, lows, device, launch, transpose, resident=resident)
        variant = variant._replace(below=True)
    return launch_forward(
        variant, x, taps[: variant.levels + 1], bias, below, images, launch, transpose
    )


def launch_forward(
    variant: Variant,
    x: AnyArray,
    taps: Sequence[AnyArray | None],
    bias: AnyArray | None,
    below: AnyArray | None,
    images: Images,
    launch: Launch[AnyArray],
    transpose: bool,
) -> AnyArray:
    """Launches the kernel `wtconv_forward`; returns y."""
    n, h, w, c = images.shape
    levels = [*taps, *[None] * (_MAX_LEVELS + 1 - len(taps))]
    arguments = [x, below, *levels, bias, n, c, h, w, int(transpose)]
    blocks = variant.tiles(images) * variant.groups(images)
    (y,) = launch(variant.compiled(), arguments, [images.output(images.dtype)], blocks)
    return y


def low_band(
    x: AnyArray, images: Images, levels: int, launch: Launch[AnyArray]
) -> tuple[AnyArray, Images]:
    """The low band of the last of some levels, in float32 and x's memory format."""
    n, h, w, c = images.shape
    low = images.low(levels)
    vector = 1 if images.channels_last else min(2**levels, images.vector(1))
    variant = Variant(
        *("low", DTYPES[images.dtype], 1, levels),
        channels_last=images.channels_last,
        vector=vector,
    )
    blocks = cdiv(math.prod(low.shape), variant.threads)
    (y,) = launch(variant.compiled(), [x, n, c, h, w], [low.output(low.dtype)], blocks)
    return y, low


def weight_grad(
    x: AnyArray,
    dy: AnyArray,
    images: Images,
    kernel_size: int,
    levels: int,
    device: Device,
    launch: Launch[AnyArray],
    *,
    base: bool = True,
    resident: int | None = None,
) -> list[AnyArray]:
    """The gradients of the taps; every sum has a fixed order, so they are bitwise reproducible.

    Args:
        x: Dense images.
        dy: The gradient of the output, in x's shape, dtype and memory format.
        images: The description of both.
        kernel_size: k.
        levels: Number of levels, at least one.
        device: The GPU.
        launch: The framework's launch function.
        base: Whether the base's are asked for.
        resident: See `forward`.

    Returns:
        float32 arrays `[C, 1 + 4 * m, k * k]` of m levels each, which follow one another. The first
        row of the first array is the base's; that of another says nothing.
    """
    n, h, w, c = images.shape
    variant = planned("weights", images, kernel_size, levels, device, base, resident)
    count = programs(variant, images, device)
    shape = (count, c, 1 + 4 * variant.levels, kernel_size**2)
    blocks = variant.parts(c) * count
    arguments = [x, dy, n, c, h, w, count]
    (sums,) = launch(variant.compiled(), arguments, [(shape, "float32")], blocks)
    found = [sums.sum(0)]
    if variant.levels < levels:
        (low, lows), (dlow, _) = (
            low_band(image, images, variant.levels, launch) for image in (x, dy)
        )
        rest = lows, kernel_size, levels - variant.levels, device, launch
        found += weight_grad(low, dlow, *rest, base=False, resident=resident)
    return found


@cache
def programs(variant: Variant, images: Images, device: Device) -> int:
    """The number of blocks that share the sums of a channel, so that the last ends earliest."""
    n, _, _, c = images.shape
    channels = variant.parts(c)
    iterations = variant.tiles(images)
    iterations *= n if variant.channels_last else cdiv(n, variant.planes)
    at_once = variant.blocks * device.multiprocessors
    # Channels-last a block stores the sums of several channels.
    waves = 2 if variant.channels_last else 4
    most = max(1, min(iterations, waves * at_once // channels))

    def time(programs: int) -> tuple[int, int]:
        return cdiv(channels * programs, at_once) * cdiv(iterations, programs), -programs

    return min(range(1, most + 1), key=time)


def _round_up(size: int, multiple: int) -> int:
    return cdiv(size, multiple) * multiple
