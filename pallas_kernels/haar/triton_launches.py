"""The Triton launches of the Haar cascade, for any framework."""

import math
from collections.abc import Sequence

from pallas_kernels.common.triton import AnyArray, Launch, cdiv, contiguous, strides
from pallas_kernels.common.types import DeviceArray
from pallas_kernels.haar import triton_kernels as kernels

_FUSED = 3
"""The most levels of a launch; the low band between two launches is then 1/64 of the image."""
_WARPS = 4
"""The number of warps of a program."""
_NAMES = ("X_", "LOW_", "HIGH1_", "HIGH2_", "HIGH3_")
"""Prefixes of the kernels' stride constants: the image, the low band, each level's details."""
_BYTES = {1: 16, 2: 8, 3: 4}
"""The bytes of neighbouring channels that a thread takes, by the number of fused levels."""


def search_space(levels: int) -> list[dict[str, int]]:
    """The ways to launch a cascade that are worth timing, the default first; see `wavedec`."""
    return [{}, {"warps": 2}, {"warps": 8}] + [{"fused": 1}, {"fused": 2}][: levels - 1]


def wavedec(
    x: AnyArray, levels: int, launch: Launch[AnyArray], *, fused: int = _FUSED, warps: int = _WARPS
) -> tuple[AnyArray, list[tuple[AnyArray, ...]]]:
    """The analysis of `x [N, H, W, C]`.

    Args:
        x: In float32, bfloat16 or float16, of any strides.
        levels: Number of levels, at least one.
        launch: The framework's launch function.
        fused: The most levels of a launch, up to three.
        warps: Number of warps of a program.

    Returns:
        The low band, and the three details of each level from coarse to fine, in x's dtype and
        contiguous.
    """
    low = x
    details: list[tuple[AnyArray, ...]] = []
    while len(details) < levels:
        n, h, w, c = low.shape
        count = min(fused, levels - len(details))
        shapes = [(n, cdiv(h, 2**level), cdiv(w, 2**level), c) for level in range(1, count + 1)]
        last = len(details) + count == levels
        wanted = [(shape, x.dtype) for shape in shapes for _ in range(3)]
        steps = [strides(low), contiguous(shapes[-1]), *map(contiguous, shapes)]
        sizes, blocks, constants = _layout(low, low.shape, steps, warps)
        low, *found = launch(
            kernels.analysis,
            [low, *sizes],
            # The kernel has details of three levels; it leaves those of unwanted levels unwritten.
            [(shapes[-1], x.dtype if last else "float32"), *wanted]
            + [((1,), x.dtype)] * (3 * (_FUSED - count)),
            blocks,
            **constants,
        )
        for first in range(0, 3 * count, 3):
            details.insert(0, tuple(found[first : first + 3]))
    return low, details


def waverec(
    low: AnyArray,
    details: Sequence[Sequence[AnyArray]],
    shape: Sequence[int],
    launch: Launch[AnyArray],
    *,
    fused: int = _FUSED,
    warps: int = _WARPS,
) -> AnyArray:
    """The synthesis of an image `[N, *shape, C]`.

    Args:
        low: The coarsest low band `[N, h, w, C]`, in float32, bfloat16 or float16.
        details: The three details of each level from coarse to fine, in low's dtype; the three of a
            level have the same strides.
        shape: H and W.
        launch: The framework's launch function.
        fused: See `wavedec`.
        warps: See `wavedec`.

    Returns:
        The image in low's dtype, contiguous.
    """
    dtype, left = low.dtype, list(details)
    while left:
        # The finest levels, which are the largest, fill their launches.
        count = (len(left) - 1) % fused + 1
        levels, left = left[:count][::-1], left[count:]
        height, width = left[0][0].shape[1:3] if left else shape
        image = low.shape[0], height, width, low.shape[3]
        steps = [contiguous(image), strides(low), *(strides(bands[0]) for bands in levels)]
        sizes, blocks, constants = _layout(levels[0][0], image, steps, warps)
        bands = [band for level in levels for band in level]
        (low,) = launch(
            kernels.synthesis,
            [low, *bands, *[low] * (3 * (_FUSED - count)), *sizes],
            [(image, "float32" if left else dtype)],
            blocks,
            **constants,
        )
    return low


def _layout(
    read: DeviceArray, shape: Sequence[int], steps: list[tuple[int, ...]], warps: int
) -> tuple[list[int], tuple[int], dict[str, int]]:
    """The sizes, the grid and the constants of a launch for an image `[N, H, W, C]`.

    Args:
        read: An array that the kernel reads.
        shape: Shape of the image.
        steps: Strides of the image, of the low band, and of the details from fine to coarse.
        warps: Number of warps of a program.
    """
    n, h, w, c = shape
    levels = len(steps) - 2
    side = 2**levels
    each = _BYTES[levels] // read.dtype.itemsize
    across = cdiv(w, side) * c
    elements = min(32 * each, 1 << (across - 1).bit_length())
    rows = 32 * warps * each // elements
    steps = steps + steps[-1:] * (_FUSED - levels)
    # One load takes at most eight elements.
    unit = math.gcd(8, *(step for along in steps for step in along[:2]))
    sizes = [n, h, w, *(step // unit for along in steps for step in along[:2])]
    constants: dict[str, int] = {}
    for name, (_, _, step_w, step_c) in zip(_NAMES, steps, strict=True):
        constants |= {f"{name}W": step_w, f"{name}C": step_c}
    constants |= {"C": c, "UNIT": unit, "LEVELS": levels, "P": rows, "BE": elements}
    blocks = cdiv(n * cdiv(h, side), rows) * cdiv(across, elements)
    return sizes, (blocks,), constants | {"num_warps": warps}
