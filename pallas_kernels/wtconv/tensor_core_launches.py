"""The launches of `tensor_core_kernels.cu`, for any framework."""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.cuda import Kernel, Launch
from pallas_kernels.common.triton import AnyArray, cdiv
from pallas_kernels.common.types import Output

SOURCE = Path(__file__).with_name("tensor_core_kernels.cu")

KERNEL_SIZES = 3, 5, 7
"""The kernel sizes that there are products for."""
CHANNELS = 32
"""Channels of a thread block."""
_THREADS = 256
_PAIRS = 14
"""The most pairs of rows of a strip, around which a pair or two are read twice."""
_STAGES = 4


class Variant(NamedTuple):
    """The constants that a kernel is compiled with; see the macros of `tensor_core_kernels.cu`."""

    bfloat16: bool
    kernel_size: int
    across: int
    pairs: int
    vector: int
    stages: int = _STAGES

    def compiled(self) -> Kernel:
        """The kernel to launch."""
        macros = {
            "BFLOAT16": int(self.bfloat16),
            "KERNEL_SIZE": self.kernel_size,
            "ACROSS": self.across,
            "PAIRS": self.pairs,
            "STAGES": self.stages,
            "VECTOR": self.vector,
        }
        return Kernel(SOURCE, "depthwise_forward", tuple(macros.items()), _THREADS, self.shared())

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        strips, width = 16 // self.across, 4 * self.across
        loaded = width + 2 * _halo(self.kernel_size)
        groups = self.stages * _group(2 * strips * loaded) + 2 * _group(2 * strips * width)
        return CHANNELS // 4 * groups

    def blocks(self, shape: tuple[int, ...]) -> int:
        """Thread blocks of images `[N, H, W, C]`."""
        n, h, w, c = shape
        tile = 2 * self.pairs * (16 // self.across), 4 * self.across
        return n * cdiv(h, tile[0]) * cdiv(w, tile[1]) * cdiv(c, CHANNELS)


def planned(shape: tuple[int, ...], dtype: str, kernel_size: int) -> Variant:
    """The variant for images `[N, H, W, C]` of a dtype, "bfloat16" or "float16"."""
    _, h, w, c = shape
    across = min(16, 1 << (cdiv(w, 4) - 1).bit_length())
    # Strips of about even height, none of more pairs than there are.
    below = 16 // across
    pairs = cdiv(h, 2)
    bands = cdiv(pairs, below * _PAIRS)
    pairs = cdiv(pairs, below * bands)
    return Variant(dtype == "bfloat16", kernel_size, across, pairs, math.gcd(4, c))


@cache
def toeplitz(kernel_size: int) -> np.ndarray:
    """The taps that the registers of a product's right-hand side hold.

    Args:
        kernel_size: One of `KERNEL_SIZES`.

    Returns:
        `[rows of pairs * parts, 32, 2]`: of each register of each lane, and of its two halves, the
        number `i * k + j` of a tap, or k * k for a zero.
    """
    radius, halo = kernel_size // 2, _halo(kernel_size)
    reach, parts = (radius + 1) // 2, 1 + halo // 2
    pair, part, lane, half = np.indices((2 * reach + 1, parts, 32, 2))
    # N counts columns and rows of the output, K those of the input, rows fastest.
    column, row = lane // 8, lane // 4 % 2
    i = 2 * (pair - reach) + half - row + radius
    j = lane % 4 + 4 * part - halo - column + radius
    inside = (0 <= i) & (i < kernel_size) & (0 <= j) & (j < kernel_size)
    return np.where(inside, i * kernel_size + j, kernel_size**2).reshape(-1, 32, 2)


def forward(
    x: AnyArray,
    taps: AnyArray,
    bias: AnyArray | None,
    shape: tuple[int, ...],
    dtype: str,
    kernel_size: int,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The depthwise convolution, stride 1, zeros outside.

    Args:
        x: Contiguous images `[N, H, W, C]`.
        taps: Of each channel the k * k taps and a zero, taken by `toeplitz(kernel_size)`:
            `[C, registers, 32, 2]` in x's dtype.
        bias: float32 `[C]`, or None.
        shape: x's.
        dtype: x's, "bfloat16" or "float16".
        kernel_size: One of `KERNEL_SIZES`.
        launch: The framework's launch function.

    Returns:
        y in x's shape and dtype.
    """
    _, h, w, c = shape
    variant = planned(shape, dtype, kernel_size)
    output: Output = (shape, dtype)
    blocks = variant.blocks(shape)
    (y,) = launch(variant.compiled(), [x, taps, bias, c, h, w], [output], blocks)
    return y


def _halo(kernel_size: int) -> int:
    """Columns that a block of four reads to each side, whole registers of a product."""
    return 4 if kernel_size > 5 else 2


def _group(pixels: int) -> int:
    """Bytes of shared memory from one group of four channels to the next."""
    return cdiv(8 * pixels, 128) * 128 + 16
