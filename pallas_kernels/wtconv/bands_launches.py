"""The launches of the `bands_*.cu`, for any framework: float32, kernels of 3 and 5, by multiply-adds.

Means of squares first, two levels a launch; then each level from the deepest one on, which adds what
the level below has made. A level streams through shared memory once, and writes nothing but y.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.common.cuda import Device, Kernel, Launch
from pallas_kernels.common.triton import AnyArray, cdiv

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
_AMPERE = 80
"""The compute capability times ten from which on copies to shared memory wait for nobody."""
_FEWEST = 4
"""Pairs of rows for which a block is worth its start."""
_MEANS_THREADS = 256


class Variant(NamedTuple):
    """The constants of a kernel of one level; see the macros of `bands_forward.cu`."""

    kernel_size: int
    across: int
    images: int
    stages: int
    base: bool
    below: bool
    vector: int
    boxed: bool

    def compiled(self) -> Kernel:
        """The kernel to launch."""
        macros = tuple((name.upper(), int(value)) for name, value in self._asdict().items())
        warps = cdiv(self.warps, 4) * 4 + _COPIERS if self.boxed else self.warps
        box = self.images, 2, self._loaded(), _CHUNK
        return Kernel(
            *(_FOLDER / "bands_forward.cu", "bands_forward", macros, 32 * warps, self.shared()),
            *(((0, box),) if self.boxed else (), self.boxed),
        )

    @property
    def warps(self) -> int:
        """Warps that add."""
        return self.across * self.images

    def _loaded(self) -> int:
        """Columns of a tile's input."""
        return _STRIP * self.across + 4 * (self.kernel_size // 2)

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        stage = cdiv(4 * 2 * self.images * self._loaded() * _CHUNK, 1024) * 1024
        return self.stages * (stage + 16 * self.boxed)

    def pairs(self, shape: tuple[int, ...]) -> int:
        """Pairs of rows of all tiles of a channel of images `[N, H, W, C]`."""
        n, h, w, _ = shape
        return cdiv(n, self.images) * cdiv(w, _STRIP * self.across) * cdiv(h, 2)

    def programs(self, shape: tuple[int, ...], device: Device) -> int:
        """Blocks that share the pairs of a channel."""
        most = device.multiprocessors // cdiv(shape[-1], _CHUNK)
        return max(1, min(most, self.pairs(shape) // _FEWEST))

    def time(self, shape: tuple[int, ...], device: Device) -> tuple[float, int]:
        """Steps of the busiest warp scheduler, about, and what a block reads for them."""
        programs = self.programs(shape, device)
        waves = cdiv(programs * cdiv(shape[-1], _CHUNK), device.multiprocessors)
        steps = cdiv(self.pairs(shape), programs) + self.kernel_size // 2
        # A warp alone waits for itself.
        busy = cdiv(self.warps, 4) + 0.3
        return waves * steps * busy, self.images * self._loaded()


def takes(shape: tuple[int, ...], dtype: str, kernel_size: int, device: Device) -> bool:
    """Whether these kernels take images `[N, H, W, C]` on a GPU, and are the best for them."""
    n, h, w, c = shape
    # Pairs of tiles, and the threads of means, are counted in 32 bits.
    countable = n * cdiv(h, 2) * cdiv(w, 2) * c < 2**31 and h * w < 2**31
    # Half of the lanes have a channel at least.
    full = 2 * c >= cdiv(c, _CHUNK) * _CHUNK
    able = device.capability >= _AMPERE and dtype == "float32" and kernel_size in KERNEL_SIZES
    return able and countable and full


@cache
def planned(
    shape: tuple[int, ...],
    kernel_size: int,
    base: bool,
    below: bool,
    device: Device,
    boxed: bool = True,
) -> Variant:
    """The variant for images `[N, H, W, C]`.

    Args:
        shape: The images'.
        kernel_size: One of `KERNEL_SIZES`.
        base: Whether there is a base convolution.
        below: Whether something is added to squares.
        device: The GPU.
        boxed: Whether warps of their own copy boxes, where the GPU can.
    """
    n, _, w, c = shape
    boxed = boxed and device.boxes and device.capability == _HOPPER and c % 4 == 0
    variants = [
        Variant(kernel_size, across, images, 2, base, below, math.gcd(4, c), boxed)
        for across in range(1, min(_WARPS, cdiv(w, _STRIP)) + 1)
        for images in range(1, min(_WARPS // across, n) + 1)
    ]
    fitting = [one for one in variants if one.shared() <= device.shared]
    best = min(fitting, key=lambda one: one.time(shape, device))
    stages = min(_STAGES, 2 * device.shared // best.shared())
    return best._replace(stages=stages)


def forward(
    x: AnyArray,
    taps: Sequence[AnyArray],
    bias: AnyArray | None,
    shape: tuple[int, ...],
    device: Device,
    launch: Launch[AnyArray],
    transpose: bool,
    *,
    boxed: bool = True,
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
        boxed: See `planned`.

    Returns:
        y in x's shape.
    """
    kernel_size = taps[0].shape[0]
    base, *bands = taps
    sizes = [_means_shape(shape, level) for level in range(len(bands))]
    images = [x, *means(x, sizes, launch)]
    y = None
    for level in reversed(range(len(bands))):
        n, h, w, c = size = sizes[level]
        variant = planned(size, kernel_size, level == 0, y is not None, device, boxed)
        programs = variant.programs(size, device)
        arguments = [images[level], *[base] * (level == 0), bands[level], *[y] * (y is not None)]
        arguments += [*[bias] * (level == 0), n, c, h, w, programs, int(transpose)]
        blocks = programs * cdiv(c, _CHUNK)
        (y,) = launch(variant.compiled(), arguments, [(size, "float32")], blocks)
    assert y is not None
    return y


def means(
    x: AnyArray, sizes: Sequence[tuple[int, ...]], launch: Launch[AnyArray]
) -> list[AnyArray]:
    """The means of the squares of two rows and columns, of their squares, and so on.

    Args:
        x: Contiguous images `[N, H, W, C]`, float32.
        sizes: The shapes of x and of the means of each level.
        launch: The framework's launch function.

    Returns:
        An array a level.
    """
    found, image = [], x
    for level in range(0, len(sizes) - 1, 2):
        n, h, w, c = sizes[level]
        below = sizes[level + 1 : level + 3]
        vector, side = math.gcd(4, c), len(below)
        macros = ("VECTOR", vector), ("TWICE", side - 1)
        kernel = Kernel(_FOLDER / "bands_means.cu", "bands_means", macros, _MEANS_THREADS, 0)
        places = n * cdiv(h, 2 * side) * cdiv(w, 2 * side)
        blocks = cdiv(places * (c // vector), _MEANS_THREADS)
        outputs = [(size, "float32") for size in below]
        found += launch(kernel, [image, n, c, h, w], outputs, blocks)
        image = found[-1]
    return found


def _means_shape(shape: tuple[int, ...], level: int) -> tuple[int, ...]:
    """The shape of the means of squares of 2**level rows and columns."""
    n, h, w, c = shape
    return n, cdiv(h, 2**level), cdiv(w, 2**level), c
