"""The Triton launches of the instance normalisation, for any framework."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.triton import AnyArray, Launch, cdiv
from pallas_kernels.common.types import Keywords
from pallas_kernels.stylize import triton_kernels as kernels
from pallas_kernels.stylize.problem import Problem

DTYPES = ("float32", "bfloat16", "float16")

_TILE = 4096
"""Elements of a tile that four warps keep in registers, 32 a thread."""
_ACROSS = 32
"""Channels of a tile that is taken unasked."""
_HELD = 16384
"""The most elements of an image's channels that a program holds unasked."""
_PROGRAMS = {"fwd": 512, "bwd": 1024}
"""The number of programs up to which an image is cut into slices."""
_CACHED = 1 << 17
"""The most elements of an image's channels that a multiprocessor's cache may have twice."""
_ALONE = 64
"""The fewest programs that are worth a launch without slices."""
_COMBINED = 16
"""Channels of a program that adds a convolution's tiles: few, so that there are more of them."""
_MOST_SLICES = 64
"""The most slices; each program reads what all of them summed."""


class Tiles(NamedTuple):
    """The tile of a program.

    Attributes:
        pixels: Pixels of a round, a power of two.
        channels: Neighbouring channels, a power of two.
        slices: Programs that share an image's channels; one launches once.
        warps: Warps of a program.
    """

    pixels: int
    channels: int
    slices: int
    warps: int


def check(problem: Problem) -> None:
    """Raises `NotImplementedError` where the kernels do not take a problem."""
    reasons = problem.unsupported(DTYPES)
    if not reasons:
        n, *_, channels = problem.shape
        if n * channels * _MOST_SLICES >= 1 << 31:
            reasons.append(f"{n} images of {channels} channels, which are too many")
    refuse(reasons)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The tiles that are worth timing, nothing for those that are taken unasked first."""
    shape = problem.shape
    default = tiles(direction, shape)
    size = math.prod(shape[1:3])
    found = []
    for channels in (8, 16, 32, 64, 128):
        block = min(_power_of_two(shape[-1]), channels)
        # An image's channels in the registers of a program of up to 32 warps, of 32 a thread.
        held = _power_of_two(size) * block
        if held <= 1024 * 32:
            found.append(Tiles(_power_of_two(size), block, 1, _warps(held)))
        elif size * block <= _CACHED and problem.shape[0] * cdiv(shape[-1], block) >= _ALONE:
            found.append(Tiles(2 * _TILE // block, block, 1, _warps(2 * _TILE)))
        for elements, slices in ((_TILE, 64), (_TILE, 32), (2 * _TILE, 64), (2 * _TILE, 16)):
            pixels = max(elements // block, 1)
            if pixels < size:
                found.append(_sliced(size, pixels, block, slices, _warps(elements)))
    others = [each._asdict() for each in dict.fromkeys(found) if each != default]
    return [{}, *others]


def tiles(direction: str, shape: Sequence[int]) -> Tiles:
    """The tiles that are taken unasked for images `[N, H, W, C]`, as they measured best on an H200.

    Args:
        direction: "fwd" or "bwd", which keeps twice as much of an element.
        shape: Of the images.

    Example:
        >>> tiles("fwd", (8, 512, 512, 32))
        Tiles(pixels=256, channels=32, slices=64, warps=8)
        >>> tiles("bwd", (8, 512, 512, 32))
        Tiles(pixels=128, channels=32, slices=64, warps=4)
        >>> tiles("fwd", (8, 16, 16, 32))
        Tiles(pixels=256, channels=32, slices=1, warps=8)
    """
    n, *size, c = shape
    pixels_of_image = math.prod(size)
    block = min(_power_of_two(c), _ACROSS)
    held = _power_of_two(pixels_of_image) * block
    if held <= _HELD:
        return Tiles(held // block, block, 1, _warps(held))
    elements = 2 * _TILE if direction == "fwd" else _TILE
    slices = min(_MOST_SLICES, cdiv(_PROGRAMS[direction], n * cdiv(c, block)))
    return _sliced(pixels_of_image, elements // block, block, slices, _warps(elements))


def forward(
    x: AnyArray,
    scale: AnyArray,
    bias: AnyArray,
    residual: AnyArray | None,
    eps: float,
    activation: str | None,
    chosen: Tiles | None,
    launch: Launch[AnyArray],
) -> tuple[AnyArray, AnyArray]:
    """The norm and the statistics of contiguous arrays.

    Args:
        x: `[N, H, W, C]` in float32, bfloat16 or float16.
        scale: float32 `[N, C]`.
        bias: float32 `[N, C]`.
        residual: Of x's shape and dtype, or None.
        eps: Is added to the variance.
        activation: None or "relu".
        chosen: Tiles; None takes those of `tiles`.
        launch: The framework's launch function.

    Returns:
        y of x's shape and dtype, and float32 `[N, 3, C]`.
    """
    n, *_, c = x.shape
    own, size, rounds, groups = _cut("fwd", x, chosen)
    flags: Keywords = {"RELU": activation == "relu", "ADD": residual is not None}
    constants: Keywords = {**flags, "EPS": eps, "C": c, **_block(own)}
    arrays = [x, scale, bias, x if residual is None else residual]
    outputs = [(x.shape, x.dtype), ((n, 3, c), "float32")]
    if own.slices == 1:
        alone = kernels.whole if rounds == 1 else kernels.rolled
        sizes = [size] if rounds == 1 else [size, rounds]
        y, statistics = launch(alone, [*arrays, *sizes], outputs, (groups,), **constants)
        return y, statistics
    read: list[AnyArray | int] = [x, size, rounds]
    (parts,) = _parts(kernels.moments, read, own, groups, launch, C=c)
    y, statistics = launch(
        kernels.apply,
        [*arrays, parts, size, rounds],
        outputs,
        (groups * own.slices,),
        **constants,
        **_shared(own),
    )
    return y, statistics


def normalise(
    x: AnyArray,
    moments: tuple[AnyArray, AnyArray, AnyArray],
    scale: AnyArray,
    bias: AnyArray,
    residual: AnyArray | None,
    eps: float,
    activation: str | None,
    launch: Launch[AnyArray],
    *,
    in_place: bool = False,
) -> tuple[AnyArray, AnyArray]:
    """The norm and the statistics of a convolution's output, which is read once.

    Args:
        x: As `forward` takes it.
        moments: The numbers of pixels `[N, tiles]` of the convolution's tiles, their means and
            their sums of squared deviations `[N, tiles, C]`, float32.
        scale: As `forward` takes it, as are the others.
        bias: float32 `[N, C]`.
        residual: Of x's shape and dtype, or None.
        eps: Is added to the variance.
        activation: None or "relu".
        launch: The framework's launch function.
        in_place: Whether y may be written over x; of JAX's launch alone.

    Returns:
        y of x's shape and dtype, and float32 `[N, 3, C]`.
    """
    n, h, w, c = x.shape
    count = moments[1].shape[1]
    few = min(_power_of_two(c), _COMBINED)
    block: Keywords = {"BT": min(_power_of_two(count), _TILE // few), "BC": few, "num_warps": 4}
    shape: Keywords = {"EPS": eps, "C": c}
    (statistics,) = launch(
        kernels.combine,
        [*moments, count],
        [((n, 3, c), "float32")],
        (n * cdiv(c, few),),
        **shape,
        **block,
    )
    channels = _channels(c, x.dtype)
    pixels = min(max(_TILE // channels, 1), _power_of_two(h * w))
    slices = cdiv(h * w, pixels)
    own = Tiles(pixels, channels, slices, _warps(pixels * channels))
    flags: Keywords = {"RELU": activation == "relu", "ADD": residual is not None, "C": c}
    over: Keywords = {"written_over": {0: 0}} if in_place else {}
    (y,) = launch(
        kernels.normalise,
        # Not x for what is not read: an argument that is given twice cannot be written over.
        [x, statistics, scale, bias, scale if residual is None else residual, h * w, slices],
        [(x.shape, x.dtype)],
        (n * cdiv(c, channels) * slices,),
        **flags,
        **_block(own),
        **over,
    )
    return y, statistics


def backward(
    x: AnyArray,
    statistics: AnyArray,
    scale: AnyArray,
    bias: AnyArray,
    residual: AnyArray | None,
    dy: AnyArray,
    activation: str | None,
    chosen: Tiles | None,
    launch: Launch[AnyArray],
) -> tuple[AnyArray, AnyArray, AnyArray, AnyArray | None]:
    """The gradients of contiguous arrays.

    Args:
        x: As `forward` takes it.
        statistics: As `forward` returns them.
        scale: As `forward` takes it.
        bias: As `forward` takes it.
        residual: As `forward` takes it, where there is an activation alone.
        dy: Of x's shape and dtype.
        activation: None or "relu".
        chosen: Tiles; None takes those of `tiles`.
        launch: The framework's launch function.

    Returns:
        dx of x's dtype, dscale and dbias in float32 `[N, C]`, and the residual's gradient where
        there is a residual.
    """
    n, *_, c = x.shape
    own, size, rounds, groups = _cut("bwd", x, chosen)
    constants: Keywords = {"RELU": activation == "relu", "ADD": residual is not None, "C": c}
    arrays = [x, statistics, scale, bias, x if residual is None else residual, dy]
    last = ((1,) if residual is None else x.shape, x.dtype)
    outputs = [(x.shape, x.dtype), ((n, c), "float32"), ((n, c), "float32"), last]
    if own.slices == 1:
        constants |= _block(own)
        kernel = kernels.whole_gradients if rounds == 1 else kernels.rolled_gradients
        sizes = [size] if rounds == 1 else [size, rounds]
        found = launch(kernel, [*arrays, *sizes], outputs, (groups,), **constants)
    else:
        read: list[AnyArray | int] = [*arrays, size, rounds]
        kernel = kernels.gradient_sums
        (parts,) = _parts(kernel, read, own, groups, launch, **constants)
        constants |= _block(own) | _shared(own)
        kernel, grid = kernels.apply_gradients, (groups * own.slices,)
        found = launch(kernel, [*arrays, parts, size, rounds], outputs, grid, **constants)
    dx, dscale, dbias, dresidual = found
    return dx, dscale, dbias, None if residual is None else dresidual


def _cut(direction: str, x: AnyArray, chosen: Tiles | None) -> tuple[Tiles, int, int, int]:
    """The tiles, pixels of an image, rounds of a slice, and groups of images and channels."""
    n, h, w, c = x.shape
    own = chosen or tiles(direction, x.shape)
    rounds = cdiv(cdiv(h * w, own.pixels), own.slices)
    # As rounds are whole, fewer slices may do.
    own = own._replace(slices=cdiv(h * w, rounds * own.pixels))
    return own, h * w, rounds, n * cdiv(c, own.channels)


def _parts(
    kernel: object,
    arguments: list[AnyArray | int],
    own: Tiles,
    groups: int,
    launch: Launch[AnyArray],
    **constants: object,
) -> list[AnyArray]:
    """The sums of each slice that a kernel writes."""
    shape = groups, own.slices, 2, own.channels
    constants |= {"SLICES": own.slices, **_block(own)}
    return launch(kernel, arguments, [(shape, "float32")], (groups * own.slices,), **constants)


def _block(own: Tiles) -> dict[str, int]:
    return {"PX": own.pixels, "BC": own.channels, "num_warps": own.warps}


def _shared(own: Tiles) -> dict[str, int]:
    return {"SLICES": own.slices, "BS": _power_of_two(own.slices)}


def _channels(c: int, dtype: object) -> int:
    """Channels of a tile: a row of 128 bytes is one transaction."""
    return min(_power_of_two(c), 32 if str(dtype).endswith("float32") else 64)


def _sliced(size: int, pixels: int, channels: int, slices: int, warps: int) -> Tiles:
    """Tiles of at most so many slices, each of which has pixels."""
    return Tiles(pixels, channels, min(slices, cdiv(size, pixels)), warps)


def _warps(elements: int) -> int:
    """The warps that keep so many elements, 32 a thread."""
    return min(32, max(1, elements // 1024))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
