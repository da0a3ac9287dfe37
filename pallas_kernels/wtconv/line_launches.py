"""The launches of `line.cu`, the wavelet convolution of signals in one pass, for any framework.

A block is a warp, which takes 32 channels of a part of one signal. Nothing is shared between parts
but the samples around them, which each reads for itself.
"""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.common.cuda import DTYPES, Device, Kernel, Launch
from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.triton import AnyArray, cdiv
from pallas_kernels.wtconv.problem import Problem

SOURCE = Path(__file__).with_name("line.cu")

_MAX_KERNEL = 9
_MAX_LEVELS = 5
_MAX_LENGTH = 2**30
"""Samples that numbers of 32 bits count, a segment more included."""
_MAX_BLOCKS = 2**31 - 1
"""Thread blocks of a launch, each of which may have no more than a block of samples."""
_WARP = 32
_BLOCK = 32
"""Samples that a warp treats at once."""
_PIECE = 16
"""Bytes that one access to memory takes at most."""
_RESIDENT = {1: 12, 3: 12, 5: 12, 7: 8, 9: 8}
"""Warps of a multiprocessor for which registers are enough, by kernel size, where they fit into
its shared memory."""
_WAVES = 8
"""The most times that parts of signals fill a GPU."""


def check(problem: Problem) -> None:
    """Raises `NotImplementedError` where the kernels do not take a problem."""
    dtypes, levels = tuple(DTYPES), range(_MAX_LEVELS + 1)
    reasons = problem.unsupported(dtypes, _MAX_KERNEL, levels, odd=True, axes=(1,))
    if not reasons:
        n, length, channels = problem.shape
        blocks = n * cdiv(length, _BLOCK) * cdiv(channels, _WARP)
        if length > _MAX_LENGTH:
            reasons.append(f"signals of {length} samples, up to {_MAX_LENGTH}")
        if blocks > _MAX_BLOCKS:
            size = f"{_BLOCK} samples of {_WARP} channels"
            reasons.append(f"{blocks} blocks of {size}, up to {_MAX_BLOCKS}")
    refuse(reasons)


def search_space(kernel_size: int) -> list[dict[str, int]]:
    """The numbers of resident warps of a multiprocessor that are worth timing; see `planned`."""
    return [{}, *({"resident": n} for n in (8, 12) if n != _RESIDENT[kernel_size])]


class Signals(NamedTuple):
    """Contiguous signals as launches see them, whichever framework has them.

    Attributes:
        shape: `(N, L, C)`.
        dtype: The name of the dtype.
        channels_last: Whether the channels of a sample are neighbours in memory; else the samples
            of a channel are.
    """

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool = True

    def contiguous(self) -> tuple[int, ...]:
        """The shape of the contiguous array."""
        n, length, c = self.shape
        return self.shape if self.channels_last else (n, c, length)


class Variant(NamedTuple):
    """The constants of a kernel, see the macros of `line.cu`, and the blocks of a segment."""

    kernel: str
    dtype: int
    kernel_size: int
    levels: int
    channels_last: bool
    vector: int
    resident: int
    span: int = 1

    def compiled(self) -> Kernel:
        """The kernel to launch."""
        numbers = self._asdict()
        kernel, _ = numbers.pop("kernel"), numbers.pop("span")
        macros = (kernel.upper(), 1), *((name.upper(), int(n)) for name, n in numbers.items())
        return Kernel(SOURCE, f"line_{self.kernel}", macros, _WARP, self.shared())

    def around(self) -> int:
        """Blocks that a segment reads before it, and behind it."""
        return cdiv(self.kernel_size // 2 << self.levels, _BLOCK)

    def shared(self) -> int:
        """Bytes of shared memory of a warp."""
        slots = self.around() + 2 + 2 * (self.kernel == "weights")
        size = 2 if self.dtype else 4
        return slots * _WARP * (size * _BLOCK + (0 if self.channels_last else _PIECE))

    def fitting(self, device: Device) -> int:
        """Warps that the shared memory of a multiprocessor is enough for."""
        return (device.shared + 1024) // (self.shared() + 1024)

    def at_once(self, device: Device) -> int:
        """Warps that a GPU runs at once."""
        return self.resident * device.multiprocessors

    def segments(self, shape: tuple[int, ...]) -> int:
        """Segments of signals `[N, L, C]`, for each group of channels."""
        return shape[0] * cdiv(cdiv(shape[1], _BLOCK), self.span)


@cache
def planned(
    kernel: str,
    signals: Signals,
    kernel_size: int,
    levels: int,
    device: Device,
    resident: int | None = None,
) -> Variant:
    """The variant for signals, whose segments end earliest.

    Args:
        kernel: "forward" or "weights".
        signals: Their description.
        kernel_size: k.
        levels: The number of levels, none included.
        device: The GPU.
        resident: Warps of a multiprocessor that registers are to suffice for; None for the rule's.
    """
    shape, dtype, channels_last = signals
    vector = math.gcd(signals.contiguous()[-1], _PIECE // (4 if dtype == "float32" else 2))
    one = Variant(
        *(kernel, DTYPES[dtype], kernel_size, levels, channels_last, vector),
        resident or _RESIDENT[kernel_size],
    )
    # What does not fit need not have registers.
    one = one._replace(resident=min(one.resident, one.fitting(device)))
    at_once, groups, blocks = one.at_once(device), cdiv(shape[2], _WARP), cdiv(shape[1], _BLOCK)
    parts = range(1, 1 + min(blocks, cdiv(_WAVES * at_once, shape[0] * groups)))
    # Fewest segments first, which is what counts of equal ones.
    cuts = [one._replace(span=span) for span in dict.fromkeys(cdiv(blocks, n) for n in parts)]

    def time(cut: Variant) -> int:
        return cdiv(groups * cut.segments(shape), at_once) * (cut.span + cut.around())

    return min(cuts, key=time)


def forward(
    x: AnyArray,
    taps: AnyArray,
    bias: AnyArray | None,
    signals: Signals,
    device: Device,
    launch: Launch[AnyArray],
    *,
    resident: int | None = None,
) -> AnyArray:
    """The wavelet convolution.

    Args:
        x: Contiguous signals.
        taps: float32 `[k, 1 + 2 * levels, C]`: the base's, then each level's low and high band's.
        bias: float32 `[C]`, or None.
        signals: The description of x.
        device: The GPU.
        launch: The framework's launch function.
        resident: See `planned`.

    Returns:
        y, contiguous in x's memory format and dtype.
    """
    kernel_size, bands, _ = taps.shape
    variant = planned("forward", signals, kernel_size, bands // 2, device, resident)
    _, length, channels = signals.shape
    blocks = cdiv(channels, _WARP) * variant.segments(signals.shape)
    arguments = [x, taps, bias, length, channels, variant.span]
    output = signals.contiguous(), signals.dtype
    (y,) = launch(variant.compiled(), arguments, [output], blocks)
    return y


def weight_grad(
    x: AnyArray,
    dy: AnyArray,
    signals: Signals,
    kernel_size: int,
    levels: int,
    device: Device,
    launch: Launch[AnyArray],
    *,
    resident: int | None = None,
) -> AnyArray:
    """The gradients of the taps and of the bias; every sum has a fixed order.

    Args:
        x: Contiguous signals.
        dy: The gradient of the output, likewise.
        signals: The description of both.
        kernel_size: k.
        levels: The number of levels.
        device: The GPU.
        launch: The framework's launch function.
        resident: See `planned`.

    Returns:
        float32 `[k * (1 + 2 * levels) + 1, C]`: the taps' in the order that `forward` has them in,
        then the bias's.
    """
    variant = planned("weights", signals, kernel_size, levels, device, resident)
    count, length, channels = signals.shape
    groups, segments = cdiv(channels, _WARP), variant.segments(signals.shape)
    # As few as end at the same time.
    most = max(1, variant.at_once(device) // groups)
    programs = cdiv(segments, cdiv(segments, most))
    output = (programs, kernel_size * (1 + 2 * levels) + 1, channels), "float32"
    arguments = [x, dy, count, length, channels, variant.span, programs]
    (sums,) = launch(variant.compiled(), arguments, [output], groups * programs)
    return sums.sum(0)
