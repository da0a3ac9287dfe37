"""PyTorch computes the cases of the instance normalisation, for the tests and `check`."""

import math

import numpy as np
import torch
from torch import Tensor

from pallas_kernels.common.types import Keywords
from pallas_kernels.dispatch import Choice
from pallas_kernels.stylize.cases import Case
from torch_bridge.runtime import conformance
from torch_bridge.runtime.conformance import CPU
from torch_bridge.stylize import ops


def refusal(case: Case, implementation: str, device: torch.device) -> str | None:
    """The reason why an implementation does not take a case on a device, None if it does.

    Example:
        >>> refusal(Case(5, 4, 3), "eager", CPU)
    """
    call = (math.prod(case.batch), case.c, case.h, case.w), getattr(torch, case.dtype)
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
        >>> sorted(computed(Case(5, 4, 3), "eager"))
        ['dbias', 'dscale', 'dx', 'y']
    """
    n = math.prod(case.batch)

    def images(x: Tensor) -> Tensor:
        return x.reshape(n, *x.shape[-3:]).movedim(-1, 1)

    def layer(x: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        scale, bias = (v.reshape(n, case.c) if case.styles else v for v in (scale, bias))
        rest: Keywords = {"activation": case.activation, "implementation": implementation}
        added = None if residual is None else images(residual)
        y = ops.instance_norm(images(x), scale, bias, residual=added, **rest)
        return y.movedim(1, -1).reshape(x.shape)

    return conformance.with_gradients(layer, *_drawn(case), device, memory_format)


def baseline(case: Case, device: torch.device = CPU) -> dict[str, np.ndarray]:
    """The same in plain PyTorch, every array in the case's dtype.

    Args:
        case: What is computed.
        device: Where it is computed.
    """

    def layer(x: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        scale, bias = (value.to(x.dtype)[..., None, None, :] for value in (scale, bias))
        centred = x - x.mean((-3, -2), keepdim=True)
        variance = (centred * centred).mean((-3, -2), keepdim=True)
        y = centred * torch.rsqrt(variance + 1e-5) * scale + bias
        y = y if residual is None else y + residual
        return y if case.activation is None else torch.relu(y)

    return conformance.with_gradients(layer, *_drawn(case), device, torch.contiguous_format)


def _drawn(case: Case) -> tuple[dict[str, np.ndarray | None], np.ndarray]:
    """The arrays of a case by name, and the gradient of its output."""
    *values, dy = case.drawn()
    return dict(zip(("x", "scale", "bias", "residual"), values, strict=True)), dy
