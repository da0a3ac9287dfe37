"""PyTorch computes the cases of the depthwise convolution, for the tests and `check`."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flash_wtconv_jax.checkpoints.tensors import to_array, to_tensors
from pallas_kernels.depthwise.cases import Case
from pallas_kernels.dispatch import Choice
from torch_bridge.depthwise import ops

CPU = torch.device("cpu")

Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function of images `[N, C, H, W]`, the weight and the bias."""


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
    shape = case.n, case.c, case.h, case.w
    try:
        ops.pick(implementation, device, shape, getattr(torch, case.dtype), case.taps, window)
    except NotImplementedError as error:
        return str(error).split(f"{implementation}: ", 1)[1]
    return None


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

    def tensor(value: np.ndarray) -> Tensor:
        return to_tensors({"": value})[""].to(device)

    def image(value: np.ndarray) -> Tensor:
        return tensor(value).movedim(-1, 1).contiguous(memory_format=memory_format)

    x, kernel, drawn_bias, dy = case.drawn()
    images, weight = image(x), tensor(kernel).movedim((3, 2), (0, 1)).contiguous()
    bias = None if drawn_bias is None else tensor(drawn_bias)
    leaves = [value for value in (images, weight, bias) if value is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    # Or plain PyTorch rounds the factors of a convolution to 10 bits on a GPU.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = ops.depthwise_conv2d(
            images, weight, bias, *_window(case), implementation=implementation
        )
        y.backward(image(dy))
    found = {"y": y.movedim(1, -1)}
    for name, leaf in zip(("dx", "dkernel", "dbias"), leaves, strict=False):
        assert leaf.grad is not None
        found[name] = leaf.grad
    found["dx"] = found["dx"].movedim(1, -1)
    found["dkernel"] = found["dkernel"].movedim((0, 1), (3, 2))
    return {name: to_array(value.detach().contiguous()) for name, value in found.items()}


def baseline(case: Case, device: torch.device = CPU) -> dict[str, np.ndarray]:
    """The same in plain PyTorch, every array in the case's dtype."""
    return computed(case, "eager", device)


def _window(case: Case) -> tuple[int | tuple[int, int], str | int, int | tuple[int, int]]:
    """Stride, padding and dilation as PyTorch's function takes them."""
    assert isinstance(case.padding, str | int)
    padding = case.padding.lower() if isinstance(case.padding, str) else case.padding
    return case.stride, padding, case.dilation
