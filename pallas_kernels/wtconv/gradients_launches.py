"""The launch of `gradients.cu`, for any framework: it ends the weight gradients of all levels."""

from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.common.cuda import Kernel, Launch
from pallas_kernels.common.triton import AnyArray, cdiv
from pallas_kernels.common.types import Output

_SOURCE = Path(__file__).parent / "gradients.cu"
_WARPS, _CHUNK = 8, 32


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

    Returns:
        float32 gradients of the base's taps, of each level's four bands, and of the bias, `[C]`.
    """
    levels = len(found)
    macros = (
        *(("KERNEL_SIZE", kernel_size), ("LEVELS", levels)),
        *(("WARPS", _WARPS), ("CHANNELS_LAST", int(channels_last))),
    )
    kernel = Kernel(_SOURCE, "gradients", macros, 32 * _WARPS, 0)
    side = kernel_size, kernel_size
    of_base, of_bands = (
        (*side, n, channels) if channels_last else (channels, n, *side) for n in (1, 4)
    )
    outputs: list[Output] = [(of_base, "float32"), ((channels,), "float32")]
    outputs += [(of_bands, "float32")] * levels
    blocks = levels * cdiv(numbers(kernel_size, base=True), _WARPS) * cdiv(channels, _CHUNK)
    arguments = [channels, *(each for level in found for each in level)]
    base, bias, *bands = launch(kernel, arguments, outputs, blocks)
    return [base, *bands, bias]
