"""The launches of `scaled.cu`, for any framework: kernels times scales, and their gradients."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from pallas_kernels.common.cuda import DTYPES, Kernel, Launch
from pallas_kernels.common.triton import AnyArray, cdiv
from pallas_kernels.common.types import Output
from pallas_kernels.wtconv.gradients_launches import Parameters

_SOURCE = Path(__file__).parent / "scaled.cu"
_THREADS = 256
"""Threads of a block."""


def scaled(
    parameters: Parameters[AnyArray],
    channels: int,
    kernel_size: int,
    launch: Launch[AnyArray],
    *,
    channels_last: bool,
    backward: bool = False,
) -> tuple[list[AnyArray], AnyArray | None]:
    """Kernels and bias times their scales, by one launch.

    Args:
        parameters: Weights of one level at least, scales and bias. Where they are `channels_last`,
            `[k, k, 1, C]` and `[k, k, 4, C]`, `[C]` and `[4, C]`.
        channels: C.
        kernel_size: k, 3, 5 or 7.
        launch: The framework's launch function.
        channels_last: How weights and scales lie.
        backward: Whether weights and bias are the gradients of products, in float32, and what comes
            is those of weights and bias, in the parameters' dtype.

    Returns:
        `[k, k, 1, C]` and `[k, k, 4, C]` of each level, and `[C]`, None without a bias: in float32,
        `backward` in the parameters' dtype.
    """
    weights, scales, bias, dtype = parameters
    levels = len(weights) - 1
    macros = _macros(parameters, kernel_size, channels_last, backward)
    kernel = Kernel(_SOURCE, "scaled_taps", macros, _THREADS, 0)
    side, made = (kernel_size, kernel_size), dtype if backward else "float32"
    of_base, *of_levels = (((*side, bands, channels), made) for bands in (1, *[4] * levels))
    outputs: list[Output] = [of_base, ((channels,), made), *of_levels]
    factors: Sequence[AnyArray | None] = scales or [None] * len(weights)
    pairs = zip(weights, factors, strict=True)
    arguments = [*chain.from_iterable(pairs), bias, channels]
    blocks = cdiv((1 + 4 * levels) * kernel_size**2 * channels, _THREADS)
    base, offset, *bands = launch(kernel, arguments, outputs, blocks)
    return [base, *bands], None if bias is None else offset


def scale_sums(
    gradients: Sequence[AnyArray],
    of_bias: AnyArray | None,
    parameters: Parameters[AnyArray],
    channels: int,
    kernel_size: int,
    launch: Launch[AnyArray],
) -> list[AnyArray]:
    """The gradients of the scales, by one launch; every sum has a fixed order.

    Args:
        gradients: In float32, of the products `[k, k, 1, C]` and `[k, k, 4, C]` of each level.
        of_bias: That of the bias times the scales of the base, `[C]`, or None.
        parameters: Weights like the gradients, of one level at least, and the bias; no scales.
        channels: C.
        kernel_size: k, 3, 5 or 7.
        launch: The framework's launch function.

    Returns:
        `[C]` of the base and `[4, C]` of each level, in the parameters' dtype.
    """
    weights, _, bias, dtype = parameters
    levels = len(weights) - 1
    macros = _macros(parameters, kernel_size, channels_last=True, backward=True)
    kernel = Kernel(_SOURCE, "scale_sums", macros, _THREADS, 0)
    outputs: list[Output] = [((channels,), dtype), *[((4, channels), dtype)] * levels]
    pairs = zip(gradients, weights, strict=True)
    arguments = [*chain.from_iterable(pairs), of_bias, bias, channels]
    return launch(kernel, arguments, outputs, cdiv((1 + 4 * levels) * channels, _THREADS))


def _macros(
    parameters: Parameters[AnyArray], kernel_size: int, channels_last: bool, backward: bool
) -> tuple[tuple[str, int], ...]:
    levels, dtype = len(parameters.weights) - 1, DTYPES[parameters.dtype]
    return (
        *(("KERNEL_SIZE", kernel_size), ("LEVELS", levels), ("DTYPE", dtype)),
        *(("CHANNELS_LAST", int(channels_last)), ("BACKWARD", int(backward))),
    )
