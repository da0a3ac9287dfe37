"""The launches of `bands_forward.cu` and `bands_weights.cu`, for any framework: float32.

Forward the second level comes first, straight from x, which also leaves the means of squares that
deeper levels are made of; then each level from the deepest one on, which adds what the level below
has made. Gradients of taps begin with the first level, which leaves the means of squares of x and
dy for the next one. A level streams through shared memory once, by multiply-adds, and no band is
written to memory.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from pallas_kernels.common.cuda import Box, Device, Kernel, Launch
from pallas_kernels.common.triton import AnyArray, cdiv
from pallas_kernels.common.types import Output
from pallas_kernels.wtconv.folded_launches import means_shape
from pallas_kernels.wtconv.gradients_launches import Parameters, gradients, numbers

_FOLDER = Path(__file__).parent

KERNEL_SIZES = 3, 5
"""The kernel sizes whose taps and sums fit into a thread's registers."""
_CHUNK = 32
"""Channels of a warp."""
_STRIP = 4
"""Columns of a thread."""
_WARPS = 8
"""Warps that add, of a block and of a multiprocessor: their registers are all that there are."""
_COPIERS = 4
"""Warps that give their registers back, of which a thread starts copies."""
_HOPPER = 90
"""The compute capability times ten of GPUs whose warps give each other registers."""
_STAGES = 8
"""Pairs of rows in shared memory at most."""
_FARTHEST = 4
"""The last level that there may be."""
_AMPERE = 80
"""The compute capability times ten from which on copies to shared memory wait for nobody."""
_FEWEST = 4
"""Pairs of rows for which a block is worth its start."""
_INSTRUCTIONS = {(True, False): 570, (False, False): 350, (False, True): 500}
"""Instructions of a step of a warp, by whether there is a base, and whether images are halved."""
_CLOCK = 15
"""Bytes that a multiprocessor of an H200 copies in a clock, where all do nothing else."""
_GRADIENTS_INSTRUCTIONS = {True: 660, False: 420}
"""The same instructions of a step of gradients."""
_GRADIENTS_CLOCK = 23
"""The same bytes, of which those beside a tile come from nearer memory."""


class Variant(NamedTuple):
    """The constants of a kernel of one level; see the macros of `bands_forward.cu`."""

    kernel_size: int
    across: int
    images: int
    stages: int
    base: bool
    below: int
    halved: bool
    lows: int
    vector: int
    boxed: bool

    def compiled(self) -> Kernel:
        """The kernel to launch."""
        macros = tuple((name.upper(), int(value)) for name, value in self._asdict().items())
        warps = cdiv(self.warps, 4) * 4 + _COPIERS if self.boxed else self.warps
        rows, columns = 2 * (1 + self.halved), self._loaded()
        # Of x, and of what is added, which follows the taps.
        sizes = (rows, columns), (1, 2 * self.across), (1, self.across)
        parameters = 0, 2 + self.base, 3 + self.base
        boxes = tuple(
            Box(number, (self.images, *size, _CHUNK))
            for number, size in zip(parameters[: 1 + self.below], sizes, strict=False)
        )
        return Kernel(
            *(_FOLDER / "bands_forward.cu", "bands_forward", macros, 32 * warps, self.shared()),
            *(boxes if self.boxed else (), self.boxed),
        )

    @property
    def warps(self) -> int:
        """Warps that add."""
        return self.across * self.images

    def _loaded(self) -> int:
        """Columns of x that a tile reads."""
        return (1 + self.halved) * (_STRIP * self.across + 4 * (self.kernel_size // 2))

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.stages * (cdiv(self.bytes(), 1024) * 1024 + 16 * self.boxed)

    def bytes(self, columns: int | None = None) -> int:
        """Bytes of a stage: a pair of rows, and what is added; of so many columns of x."""
        x = 2 * (1 + self.halved) * (self._loaded() if columns is None else columns)
        added = (0, 2, 3)[self.below] * self.across
        return 4 * self.images * (x + added) * _CHUNK

    def programs(self, shape: tuple[int, ...], device: Device) -> int:
        """Blocks that share the pairs of a channel."""
        return _programs(self.across, self.images, shape, device)

    def time(self, shape: tuple[int, ...], device: Device) -> float:
        """The clocks of the busiest multiprocessor, about."""
        # Zeros outside of small images are not copied.
        copies = self.bytes(min(self._loaded(), (1 + self.halved) * shape[2])) / _CLOCK
        # A warp alone waits for itself.
        issue = (cdiv(self.warps, 4) + 0.3) * _INSTRUCTIONS[self.base, self.halved]
        rest = self.kernel_size // 2
        return _steps(self.across, self.images, rest, shape, device) * max(issue, copies)


class Gradients(NamedTuple):
    """The constants of a kernel of a level's gradients; see the macros of `bands_weights.cu`."""

    kernel_size: int
    across: int
    images: int
    stages: int
    base: bool
    lows: bool
    vector: int
    boxed: bool

    def compiled(self) -> Kernel:
        """The kernel to launch."""
        macros = tuple((name.upper(), int(value)) for name, value in self._asdict().items())
        warps = cdiv(self.warps, 4) * 4 + _COPIERS if self.boxed else self.warps
        columns = self._loaded(), _STRIP * self.across
        boxes = tuple(
            Box(number, (self.images, 2, each, _CHUNK)) for number, each in enumerate(columns)
        )
        return Kernel(
            *(_FOLDER / "bands_weights.cu", "bands_weights", macros, 32 * warps, self.shared()),
            *(boxes if self.boxed else (), self.boxed),
        )

    @property
    def warps(self) -> int:
        """Warps that add."""
        return self.across * self.images

    @property
    def sums(self) -> int:
        """The gradients of a channel, with that of the bias."""
        return numbers(self.kernel_size, self.base)

    def _loaded(self) -> int:
        """Columns of x that a tile reads."""
        return _STRIP * self.across + 4 * (self.kernel_size // 2)

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.stages * (cdiv(self.bytes(), 1024) * 1024 + 16 * self.boxed)

    def bytes(self, columns: int | None = None) -> int:
        """Bytes of a stage: a pair of rows of x, of so many columns, and one of dy."""
        x = self._loaded() if columns is None else columns
        return 4 * 2 * self.images * (x + _STRIP * self.across) * _CHUNK

    def programs(self, shape: tuple[int, ...], device: Device) -> int:
        """Blocks that share the pairs of a channel."""
        return _programs(self.across, self.images, shape, device)

    def time(self, shape: tuple[int, ...], device: Device) -> float:
        """The clocks of the busiest multiprocessor, about."""
        copies = self.bytes(min(self._loaded(), shape[2])) / _GRADIENTS_CLOCK
        # Warps wait for their sums and shared memory most of the time of one of them.
        issue = (cdiv(self.warps, 4) + 0.9) * _GRADIENTS_INSTRUCTIONS[self.base]
        rest = self.kernel_size // 2
        return _steps(self.across, self.images, rest, shape, device) * max(issue, copies)


AnyVariant = TypeVar("AnyVariant", Variant, Gradients)


def _pairs(across: int, images: int, shape: tuple[int, ...]) -> int:
    """Pairs of rows of all tiles of a channel of the images `[N, H, W, C]` that are treated."""
    n, h, w, _ = shape
    return cdiv(n, images) * cdiv(w, _STRIP * across) * cdiv(h, 2)


def _programs(across: int, images: int, shape: tuple[int, ...], device: Device) -> int:
    most = device.multiprocessors // cdiv(shape[-1], _CHUNK)
    return max(1, min(most, _pairs(across, images, shape) // _FEWEST))


def _steps(across: int, images: int, rest: int, shape: tuple[int, ...], device: Device) -> int:
    """Pairs of rows that the busiest multiprocessor treats one after the other, about.

    Args:
        across: Strips of an image in a tile.
        images: Images of a tile.
        rest: Pairs that a block takes beyond its own.
        shape: Those of all images.
        device: The GPU.
    """
    programs = _programs(across, images, shape, device)
    waves = cdiv(programs * cdiv(shape[-1], _CHUNK), device.multiprocessors)
    return waves * (cdiv(_pairs(across, images, shape), programs) + rest)


def takes(shape: tuple[int, ...], dtype: str, kernel_size: int, device: Device) -> bool:
    """Whether these kernels take images `[N, H, W, C]` on a GPU, faster than `cuda_launches`."""
    n, h, w, c = shape
    # Pairs of tiles, and elements from a pair of rows to the next, are counted in 32 bits.
    countable = n * h * cdiv(w, _STRIP) < 2**31 and w * c < 2**30
    # Half of the lanes have a channel at least.
    full = 2 * c >= cdiv(c, _CHUNK) * _CHUNK
    able = device.capability >= _AMPERE and dtype == "float32" and kernel_size in KERNEL_SIZES
    return able and countable and full


@cache
def planned(
    shapes: tuple[tuple[int, ...], ...],
    kernel_size: int,
    device: Device,
    *,
    base: bool = False,
    below: int = 0,
    halved: bool = False,
    lows: int = 0,
) -> Variant:
    """The variant for images of some levels, which is compiled once.

    Args:
        shapes: Those of the images that are treated, `[N, H, W, C]`.
        kernel_size: One of `KERNEL_SIZES`.
        device: The GPU.
        base: Whether there is a base convolution.
        below: How many are added to squares, and to squares of squares.
        halved: Whether the images are means of squares, which the kernel makes itself.
        lows: How many are made of their means of squares, and of the squares of these.
    """
    vector, boxed = math.gcd(4, shapes[0][-1]), _boxed(shapes, device)
    variants = [
        Variant(kernel_size, *tile, 2, base, below, halved, lows, vector, boxed)
        for tile in _tiles(shapes[0])
    ]
    return _best(variants, shapes, device)


@cache
def planned_gradients(
    shapes: tuple[tuple[int, ...], ...],
    kernel_size: int,
    device: Device,
    *,
    base: bool = False,
    lows: bool = False,
) -> Gradients:
    """The variant for the gradients of some levels, which is compiled once.

    Args:
        shapes: Those of the images of x and of dy, `[N, H, W, C]`.
        kernel_size: One of `KERNEL_SIZES`.
        device: The GPU.
        base: Whether there is a base convolution.
        lows: Whether the means of squares are made.
    """
    vector, boxed = math.gcd(4, shapes[0][-1]), _boxed(shapes, device)
    variants = [
        Gradients(kernel_size, *tile, 2, base, lows, vector, boxed) for tile in _tiles(shapes[0])
    ]
    return _best(variants, shapes, device)


def _boxed(shapes: tuple[tuple[int, ...], ...], device: Device) -> bool:
    return device.boxes and device.capability == _HOPPER and shapes[0][-1] % 4 == 0


def _tiles(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Strips of an image, and images, that a tile may have."""
    n, _, w, _ = shape
    return [
        (across, images)
        for across in range(1, min(_WARPS, cdiv(w, _STRIP)) + 1)
        for images in range(1, min(_WARPS // across, n) + 1)
    ]


def _best(
    variants: list[AnyVariant], shapes: tuple[tuple[int, ...], ...], device: Device
) -> AnyVariant:
    """The fastest variant, with as many stages as there is room for."""

    def time(variant: AnyVariant) -> tuple[float, int]:
        return sum(variant.time(shape, device) for shape in shapes), variant.bytes()

    best = min((one for one in variants if one.shared() <= device.shared), key=time)
    return best._replace(stages=min(_STAGES, 2 * device.shared // best.shared()))


def forward(
    x: AnyArray,
    taps: Sequence[AnyArray],
    bias: AnyArray | None,
    shape: tuple[int, ...],
    device: Device,
    launch: Launch[AnyArray],
    transpose: bool,
) -> AnyArray:
    """The wavelet convolution, or its transpose.

    Args:
        x: Contiguous images `[N, H, W, C]`, float32.
        taps: float32 `[k, k, 1, C]` of the base, then `[k, k, 4, C]` of each level.
        bias: float32 `[C]`, or None.
        shape: x's.
        device: The GPU.
        launch: The framework's launch function.
        transpose: Whether the taps are flipped.

    Returns:
        y in x's shape.
    """
    kernel_size = taps[0].shape[0]
    base, *bands = taps
    sizes = [means_shape(shape, level) for level in range(len(bands))]

    def level(
        number: int, shapes: tuple[tuple[int, ...], ...], image: AnyArray, *below: AnyArray
    ) -> list[AnyArray]:
        first, second = number == 0, number == 1
        lows = sizes[2:4] if second else []
        # There are no means of the squares of these: the kernel makes them of the level above.
        halved = second or number == _FARTHEST
        about = {"base": first, "below": len(below), "halved": halved, "lows": len(lows)}
        variant = planned(shapes, kernel_size, device, **about)
        n, h, w, c = sizes[number - halved]
        programs = variant.programs(sizes[number], device)
        arguments: list[AnyArray | int | None] = [image, *[base] * first, bands[number], *below]
        arguments += [bias] * first
        arguments += [n, c, h, w, programs, int(transpose)]
        outputs = [(each, "float32") for each in (sizes[number], *lows)]
        return launch(variant.compiled(), arguments, outputs, programs * cdiv(c, _CHUNK))

    below: list[AnyArray] = []
    if len(sizes) > 1:
        second, *lows = level(1, (sizes[1],), x)
        deeper: list[AnyArray] = []
        for number in reversed(range(2, len(sizes))):
            # All that have a level below are compiled once.
            shapes = tuple(sizes[2:-1]) if deeper else (sizes[number],)
            deeper = level(number, shapes, lows[min(number - 2, 1)], *deeper)
        below = [second, *deeper]
    return level(0, (shape,), x, *below)[0]


def weight_grad(
    x: AnyArray,
    dy: AnyArray,
    shape: tuple[int, ...],
    kernel_size: int,
    levels: int,
    device: Device,
    launch: Launch[AnyArray],
    channels_last: bool,
    parameters: Parameters[AnyArray] | None = None,
) -> list[AnyArray]:
    """The gradients of the taps; every sum has a fixed order, so they are bitwise reproducible.

    Args:
        x: Contiguous images `[N, H, W, C]`, float32.
        dy: The gradient of the output, in the same form.
        shape: That of both.
        kernel_size: k, one of `KERNEL_SIZES`.
        levels: Number of levels, at least one.
        device: The GPU.
        launch: The framework's launch function.
        channels_last: Whether they are `[k, k, 1, C]` and `[k, k, 4, C]`, else `[C, 1, k, k]` and
            `[C, 4, k, k]`.
        parameters: See `gradients_launches.gradients`, which ends them.

    Returns:
        float32 gradients of the base's taps, of each level's, and of the bias; or of parameters.
    """
    sizes = [means_shape(shape, level) for level in range(levels + 1)]
    channels = shape[-1]
    chunks = cdiv(channels, _CHUNK)
    found: list[tuple[AnyArray, int, int]] = []
    for level in range(levels):
        first = level == 0
        # All but the first are compiled once, so the last of several makes means that nobody reads.
        shapes = (sizes[0],) if first else tuple(sizes[1:levels])
        lows = levels > (1 if first else 2)
        variant = planned_gradients(shapes, kernel_size, device, base=first, lows=lows)
        n, h, w, c = sizes[level]
        programs = variant.programs(sizes[level], device)
        outputs: list[Output] = [((programs, variant.sums, c), "float32")]
        outputs += [((*sizes[level + 1][:-1], 2 * c), "float32")] * lows
        arguments = [x, dy, n, c, h, w, programs]
        sums, *means = launch(variant.compiled(), arguments, outputs, programs * chunks)
        found.append((sums, 0, programs))
        # Those of x and of dy are in one array.
        x, dy = 2 * means or (x, dy)
    return gradients(found, channels, kernel_size, launch, channels_last, parameters)
