"""The parts of computing an operator's cases that all operators of PyTorch share."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flash_wtconv_jax.checkpoints.tensors import to_array, to_tensors

CPU = torch.device("cpu")


def refusal(
    case: Any, implementation: str, device: torch.device, pick: Callable[..., object], *call: Any
) -> str | None:
    """The reason why an implementation does not take a case on a device, None if it does.

    Args:
        case: What is computed.
        implementation: The name.
        device: Where it is computed.
        pick: An operator's `pick`, of a filter, the device and the rest of a call.
        *call: The rest.
    """
    if device.type == "mps" and case.dtype == "float64":
        return "MPS has no float64"
    try:
        pick(implementation, device, *call)
    except NotImplementedError as error:
        return str(error).split(f"{implementation}: ", 1)[1]
    return None


def with_gradients(
    layer: Callable[..., Tensor],
    arrays: Mapping[str, np.ndarray | None],
    dy: np.ndarray,
    device: torch.device,
    memory_format: torch.memory_format = torch.channels_last,
) -> dict[str, np.ndarray]:
    """The output and the gradients of a function of tensors.

    Args:
        layer: The function; its images, and those that it returns, are `[..., H, W, C]`.
        arrays: Its arguments by name; None has no gradient.
        dy: The gradient of its output.
        device: Where it is computed.
        memory_format: The memory format of images, seen as `[N, C, H, W]`.

    Returns:
        "y", and "d" and the name of each argument.

    Example:
        >>> one = np.ones((2, 2, 3), "float32")
        >>> sorted(with_gradients(torch.mul, {"x": one, "scale": one[0, 0]}, one, CPU))
        ['dscale', 'dx', 'y']
    """

    def tensor(value: np.ndarray) -> Tensor:
        own = to_tensors({"": value})[""].to(device)
        if memory_format == torch.channels_last or own.ndim < 3:
            return own
        return own.movedim(-1, -3).contiguous().movedim(-3, -1)

    leaves = {
        name: None if value is None else tensor(value).requires_grad_()
        for name, value in arrays.items()
    }
    y = layer(*leaves.values())
    y.backward(tensor(dy))
    found = {"y": y}
    for name, leaf in leaves.items():
        if leaf is not None:
            found[f"d{name}"] = cast(Tensor, leaf.grad)
    return {name: to_array(value.detach().contiguous()) for name, value in found.items()}
