"""The launch of `gradients.cu`, for any framework: it ends the weight gradients of all levels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, NamedTuple

from pallas_kernels.common.cuda import DTYPES, Kernel, Launch
from pallas_kernels.common.triton import AnyArray, cdiv
from pallas_kernels.common.types import Output

_SOURCE = Path(__file__).parent / "gradients.cu"
_WIDTH = 8
"""Channels of a block."""


class Parameters(NamedTuple, Generic[AnyArray]):
    """The parameters of a layer, contiguous, as launches take them.

    They are of one dtype, and their channels come first, where a launch says nothing else.

    Attributes:
        weights: `[C, 1, k, k]` of the base, then `[C, 4, k, k]` of each level.
        scales: As many `[C]` and `[C, 4]`, in any shape; none where they are in the weights.
        bias: `[C]`, or None.
        dtype: The name of their dtype.
    """

    weights: Sequence[AnyArray]
    scales: Sequence[AnyArray]
    bias: AnyArray | None
    dtype: str


def numbers(kernel_size: int, base: bool) -> int:
    """The gradients of a channel of a level, with those of the base and of the bias if there are.

    Args:
        kernel_size: k.
        base: Whether there are, as for the first level.

    Example:
        >>> numbers(5, base=True), numbers(5, base=False)
        (126, 100)
    """
    return (5 if base else 4) * kernel_size**2 + base


def gradients(
    found: Sequence[tuple[AnyArray, int, int]],
    channels: int,
    kernel_size: int,
    launch: Launch[AnyArray],
    channels_last: bool,
    parameters: Parameters[AnyArray] | None = None,
) -> list[AnyArray]:
    """The gradients of taps and bias from partial sums, which are added in their order.

    Args:
        found: For each level float32 `[programs, numbers, C]`, of the first level with those of the
            base and the bias, as rows of C numbers of an array; which row is the first, and how
            many programs left them.
        channels: C.
        kernel_size: k.
        launch: The framework's launch function.
        channels_last: Whether they are `[k, k, 1, C]` and `[k, k, 4, C]`, else `[C, 1, k, k]` and
            `[C, 4, k, k]`.
        parameters: Weights and scales whose products the taps are, not `channels_last`; None where
            the gradients of the taps are wanted.

    Returns:
        float32 gradients of the base's taps, of each level's four bands, and of the bias, `[C]`. Or
        those of all weights, of all scales, and of the bias, in the parameters' dtype.
    """
    levels = len(found)
    dtype = "float32" if parameters is None else parameters.dtype
    macros = (
        *(("KERNEL_SIZE", kernel_size), ("LEVELS", levels), ("DTYPE", DTYPES[dtype])),
        *(("CHANNELS_LAST", int(channels_last)), ("SCALED", int(parameters is not None))),
        ("WIDTH", _WIDTH),
    )
    threads = _WIDTH * (kernel_size**2 + 1)
    shared = 0 if parameters is None else 4 * threads
    kernel = Kernel(_SOURCE, "gradients", macros, 32 * cdiv(threads, 32), shared)
    side = kernel_size, kernel_size
    of_base, of_bands = (
        (*side, n, channels) if channels_last else (channels, n, *side) for n in (1, 4)
    )
    blocks = (1 + 4 * levels) * cdiv(channels, _WIDTH)
    arguments: list[AnyArray | int | None] = [
        channels,
        *(each for level in found for each in level),
    ]
    outputs: list[Output] = [(of_base, dtype), ((channels,), dtype)]
    if parameters is None:
        base, bias, *bands = launch(
            kernel, arguments, outputs + [(of_bands, dtype)] * levels, blocks
        )
        return [base, *bands, bias]
    pairs = zip(parameters.weights, parameters.scales, strict=True)
    arguments += [*(each for pair in pairs for each in pair), parameters.bias]
    of_scales = (channels, 4), dtype
    outputs = [((channels,), dtype), *outputs, *[(of_bands, dtype), of_scales] * levels]
    base_scale, base, bias, *rest = launch(kernel, arguments, outputs, blocks)
    return [base, *rest[::2], base_scale, *rest[1::2], bias]
