"""The launches of `cuda_kernels.cu`, depthwise convolutions on tensor cores, for any framework."""

import math
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.common.cuda import Box, Device, Kernel, Launch
from pallas_kernels.common.refusals import refuse, unsupported_sizes
from pallas_kernels.common.triton import AnyArray, cdiv
from pallas_kernels.common.types import Output
from pallas_kernels.depthwise.problem import Problem

SOURCE = Path(__file__).with_name("cuda_kernels.cu")

MAX_KERNEL = 9
"""The largest kernel: a row of pixels is multiplied for two pairs of rows to each side."""
CHUNK = 32
"""Channels of a thread block."""
_PIXEL = 2 * CHUNK
_THREADS = 256
_BLOCKS = 16
"""Blocks of four columns that a product has."""
_MOST_IMAGES = 8
"""Images of a tile, of more of which two stages do not fit into a Turing's shared memory."""
_STAGES = {
    (False, 1): {True: 5, False: 4},
    (False, 2): {True: 10, False: 10},
    (True, 1): {True: 6, False: 6},
    (True, 2): {True: 4, False: 10},
}
"""Pairs of rows in shared memory of the weight gradient or not, by reach, with and without boxes:
of those that were tried on an H200 the best."""
_RESIDENT = {1: 2, 2: 1}
"""Thread blocks that a multiprocessor's registers hold, by reach."""
_DTYPES = "bfloat16", "float16"
_BFLOAT16 = 80
"""The compute capability times ten from which on tensor cores take bfloat16."""


def check(problem: Problem, device: Device) -> None:
    """Raises `NotImplementedError` where the kernels do not take a problem on a GPU."""
    reasons = problem.not_plain() + unsupported_sizes(problem.shape)
    if str(problem.dtype) not in _DTYPES:
        reasons.append(f"{problem.dtype}, 16 bits alone")
    if str(problem.dtype) == "bfloat16" and device.capability < _BFLOAT16:
        reasons.append(f"bfloat16 on GPUs older than compute capability {_BFLOAT16 / 10}")
    if max(problem.kernel_size) > MAX_KERNEL:
        reasons.append(f"kernels of {max(problem.kernel_size)}, up to {MAX_KERNEL}")
    refuse(reasons)


def _reach(kernel_size: int) -> int:
    return 2 if kernel_size > 5 else 1


class Variant(NamedTuple):
    """The constants that a kernel is compiled with; see the macros of `cuda_kernels.cu`."""

    weights: bool
    bfloat16: bool
    kernel_size: int
    height: int
    width: int
    channels: int
    blocks: int
    images: int
    columns: int
    pairs: int
    stages: int
    resident: int
    boxed: bool
    vector: int
    biased: bool = False
    transposed: bool = False

    def compiled(self) -> Kernel:
        """The kernel to launch."""
        macros = tuple((name.upper(), int(value)) for name, value in self._asdict().items())
        name = "depthwise_weights" if self.weights else "depthwise_forward"
        boxes: tuple[Box, ...] = ()
        if self.boxed:
            last = 1 if self.weights else _PARAMETERS - 1
            boxes = tuple(
                Box(number, (self.images, 2, columns, CHUNK))
                for number, columns in ((0, self.loaded), (last, self.columns))
            )
        return Kernel(SOURCE, name, macros, _THREADS, self.shared(), boxes)

    @property
    def reach(self) -> int:
        """Pairs of rows that a pair of the output reads to each side."""
        return _reach(self.kernel_size)

    @property
    def loaded(self) -> int:
        """Columns in shared memory: with those that a tile reads to its sides, whole swizzles."""
        return cdiv(4 * self.blocks + 4 * self.reach, 8) * 8

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        stage, result = self._stage(), self._result()
        if self.weights:
            products = 2 * self.reach + 1 + 3 * (self.reach == 2)
            read = self.stages * (stage + result) + 16 * self.stages * self.boxed
            return max(read, CHUNK // 4 * (products * 512 + 128))
        if self.boxed:
            return self.stages * (stage + result + 16) + result + 4 * CHUNK
        return self.stages * stage + 2 * result + 4 * CHUNK

    def fitting(self, bytes_: int) -> "Variant":
        """The variant with as many stages as fit into some bytes of shared memory."""
        stages = range(2, _STAGES[self.weights, self.reach][self.boxed] + 1)
        fitting = [n for n in stages if self._replace(stages=n).shared() <= bytes_]
        return self._replace(stages=max(fitting, default=2))

    def tiles(self, n: int) -> int:
        """Tiles of so many images, of 32 channels."""
        down, across = cdiv(self.height, 2 * self.pairs), cdiv(self.width, self.columns)
        return cdiv(n, self.images) * down * across

    def streams(self, n: int, device: Device) -> int:
        """Thread blocks of each 32 channels, which share the tiles of so many images."""
        most = device.multiprocessors * self.resident // cdiv(self.channels, CHUNK)
        return max(1, min(self.tiles(n), most))

    def steps(self, n: int, device: Device) -> int:
        """Pairs of rows that the busiest thread block goes through."""
        tiles = cdiv(self.tiles(n), self.streams(n, device))
        return tiles * (self.pairs + 2 * self.reach)

    def _stage(self) -> int:
        return 2 * self.loaded * _PIXEL * self.images

    def _result(self) -> int:
        return cdiv(2 * self.columns * _PIXEL * self.images, 1024) * 1024


_PARAMETERS = 5
"""The number of arguments of `depthwise_forward`."""


def planned(
    shape: tuple[int, ...], dtype: str, kernel_size: int, device: Device, weights: bool = False
) -> Variant:
    """The variant for images `[N, H, W, C]` of a dtype, "bfloat16" or "float16"."""
    n, h, w, c = shape
    across = cdiv(w, 4 * _BLOCKS)
    if weights:
        # All blocks of a product count, and their columns outside of an image are zeros.
        blocks = max(_BLOCKS // _MOST_IMAGES, min(_BLOCKS, 1 << (cdiv(w, 4) - 1).bit_length()))
        columns, images = 4 * blocks, _BLOCKS // blocks
    else:
        columns = w if across == 1 else cdiv(cdiv(w, across), 4) * 4
        blocks = cdiv(columns, 4)
        images = min(n, _BLOCKS // blocks, _MOST_IMAGES) if across == 1 else 1
    boxed, reach = device.boxes and c % 8 == 0, _reach(kernel_size)
    vector = math.gcd(8, c)
    most = cdiv(h, 2)
    # Strips of about even height; halos are read twice, and the busiest block is waited for.
    variants = [
        Variant(
            *(weights, dtype == "bfloat16", kernel_size, h, w, c, blocks, images, columns),
            *(cdiv(most, strips), 2, _RESIDENT[reach], boxed, vector),
        )
        for strips in range(1, min(most, 16) + 1)
    ]
    best = min(variants, key=lambda variant: variant.steps(n, device))
    if best.shared() > device.share(best.resident):
        best = best._replace(resident=1)
    return best.fitting(device.share(best.resident))


def forward(
    x: AnyArray,
    taps: AnyArray,
    bias: AnyArray | None,
    shape: tuple[int, ...],
    dtype: str,
    kernel_size: int,
    transpose: bool,
    device: Device,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The depthwise convolution, stride 1, zeros outside, or its adjoint.

    Args:
        x: Contiguous images `[N, H, W, C]`.
        taps: `[k, k, C]` in x's dtype.
        bias: float32 `[C]`, or None.
        shape: x's.
        dtype: x's, "bfloat16" or "float16".
        kernel_size: k, up to `MAX_KERNEL`.
        transpose: Whether it is the adjoint.
        device: The GPU.
        launch: The framework's launch function.

    Returns:
        y in x's shape and dtype.
    """
    n, _, _, c = shape
    variant = planned(shape, dtype, kernel_size, device)
    variant = variant._replace(biased=bias is not None, transposed=transpose)
    output: Output = (shape, dtype)
    blocks = variant.streams(n, device) * cdiv(c, CHUNK)
    (y,) = launch(variant.compiled(), [x, taps, bias, n], [output], blocks)
    return y


def weight_grad(
    x: AnyArray,
    dy: AnyArray,
    shape: tuple[int, ...],
    dtype: str,
    kernel_size: int,
    bias: bool,
    device: Device,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The gradient of the taps: x correlated with dy, in a fixed order of sums.

    Args:
        x: Contiguous images `[N, H, W, C]`.
        dy: The gradient of the output, likewise.
        shape: x's.
        dtype: x's, "bfloat16" or "float16".
        kernel_size: k, up to `MAX_KERNEL`.
        bias: Whether the gradient of a bias, the sum of dy, stands behind them.
        device: The GPU.
        launch: The framework's launch function.

    Returns:
        float32 `[C, k * k]`, or `[C, k * k + 1]`.
    """
    n, _, _, c = shape
    variant = planned(shape, dtype, kernel_size, device, weights=True)._replace(biased=bias)
    streams = variant.streams(n, device)
    output: Output = ((streams, c, kernel_size**2 + bias), "float32")
    blocks = streams * cdiv(c, CHUNK)
    (sums,) = launch(variant.compiled(), [x, dy, n], [output], blocks)
    return sums.sum(0)
