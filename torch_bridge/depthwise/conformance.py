"""PyTorch computes the cases of the depthwise convolution, for the tests and `check`."""

import numpy as np
import torch
from torch import Tensor

from pallas_kernels.depthwise.cases import Case
from pallas_kernels.dispatch import Choice
from torch_bridge.depthwise import ops
from torch_bridge.runtime import conformance
from torch_bridge.runtime.conformance import CPU


def refusal(case: Case, implementation: str, device: torch.device) -> str | None:
    """The reason why an implementation does not take a case on a device, None if it does.

    Example:
        >>> refusal(Case(1, 4, 4, 2, 3), "eager", CPU)
    """
    if case.padding == "SAME" and case.stride not in (1, (1, 1)):
        return "PyTorch pads with a stride by numbers alone"
    if not isinstance(case.padding, str | int) or case.padding == "reflect":
        return "PyTorch's function pads each axis by one number"
    window = ops.window(case.taps, *_window(case))
    call = (case.n, case.c, case.h, case.w), getattr(torch, case.dtype), case.taps, window
    return conformance.refusal(case, implementation, device, ops.pick, *call)


def computed(
    case: Case,
    implementation: Choice,
    device: torch.device = CPU,
    memory_format: torch.memory_format = torch.channels_last,
) -> dict[str, np.ndarray]:
    """Output and gradients of a case by one implementation.

    Args:
        case: What is computed.
        implementation: The filter on implementations, of both directions.
        device: Where it is computed.
        memory_format: Of the images.

    Returns:
        Arrays by the names of `pallas_kernels.common.conformance`.

    Example:
        >>> sorted(computed(Case(1, 4, 4, 2, 3), "eager"))
        ['dbias', 'dkernel', 'dx', 'y']
    """

    def layer(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        weight = kernel.movedim((3, 2), (0, 1)).contiguous()
        call = x.movedim(-1, 1), weight, bias, *_window(case)
        return ops.depthwise_conv2d(*call, implementation=implementation).movedim(1, -1)

    *values, dy = case.drawn()
    arrays = dict(zip(("x", "kernel", "bias"), values, strict=True))
    # Or plain PyTorch rounds the factors of a convolution to 10 bits on a GPU.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return conformance.with_gradients(layer, arrays, dy, device, memory_format)


def baseline(case: Case, device: torch.device = CPU) -> dict[str, np.ndarray]:
    """The same in plain PyTorch, every array in the case's dtype."""
    return computed(case, "eager", device)


def _window(case: Case) -> tuple[int | tuple[int, int], str | int, int | tuple[int, int]]:
    """Stride, padding and dilation as PyTorch's function takes them."""
    assert isinstance(case.padding, str | int)
    padding = case.padding.lower() if isinstance(case.padding, str) else case.padding
    return case.stride, padding, case.dilation
