"""PyTorch computes the cases of the instance normalisation, for the tests and `check`."""

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from flash_wtconv_jax.checkpoints.tensors import to_array, to_tensors
from pallas_kernels.common.types import Keywords
from pallas_kernels.dispatch import Choice
from pallas_kernels.stylize.cases import Case
from torch_bridge.stylize import ops

CPU = torch.device("cpu")

Layer = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""A function of images `[N, C, H, W]`, scale, bias and the residual."""


def refusal(case: Case, implementation: str, device: torch.device) -> str | None:
    """The reason why an implementation does not take a case on a device, None if it does.

    Example:
        >>> refusal(Case(5, 4, 3), "eager", CPU)
    """
    shape = math.prod(case.batch), case.c, case.h, case.w
    try:
        ops.pick(implementation, device, shape, getattr(torch, case.dtype))
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
        >>> sorted(computed(Case(5, 4, 3), "eager"))
        ['dbias', 'dscale', 'dx', 'y']
    """

    def layer(x: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        rest: Keywords = {"activation": case.activation, "implementation": implementation}
        return ops.instance_norm(x, scale, bias, residual=residual, **rest)

    return _with_gradients(case, layer, device, memory_format)


def baseline(case: Case, device: torch.device = CPU) -> dict[str, np.ndarray]:
    """The same in plain PyTorch, every array in the case's dtype.

    Args:
        case: What is computed.
        device: Where it is computed.
    """

    def layer(x: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        scale, bias = (value.to(x.dtype)[..., None, None] for value in (scale, bias))
        centred = x - x.mean((2, 3), keepdim=True)
        variance = (centred * centred).mean((2, 3), keepdim=True)
        y = centred * torch.rsqrt(variance + 1e-5) * scale + bias
        y = y if residual is None else y + residual
        return y if case.activation is None else torch.relu(y)

    return _with_gradients(case, layer, device, torch.contiguous_format)


def _with_gradients(
    case: Case, layer: Layer, device: torch.device, memory_format: torch.memory_format
) -> dict[str, np.ndarray]:
    """The output and the gradients of a function of a case's tensors, channels last again."""
    x, scale, bias, residual, dy = case.drawn()
    n = math.prod(case.batch)

    def image(value: np.ndarray) -> Tensor:
        value = value.reshape(n, *value.shape[-3:])
        own = to_tensors({"": value})[""].to(device).movedim(-1, 1)
        return own.contiguous(memory_format=memory_format).detach()

    def parameter(value: np.ndarray) -> Tensor:
        own = to_tensors({"": value})[""].to(device)
        return own.reshape(n, case.c) if case.styles else own

    leaves = {"dx": image(x), "dscale": parameter(scale), "dbias": parameter(bias)}
    shapes = {"y": x.shape, "dx": x.shape, "dscale": scale.shape, "dbias": bias.shape}
    if residual is not None:
        leaves["dresidual"], shapes["dresidual"] = image(residual), x.shape
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = layer(leaves["dx"], leaves["dscale"], leaves["dbias"], leaves.get("dresidual"))
    y.backward(image(dy))
    found = {"y": y.detach()} | {name: cast(Tensor, leaf.grad) for name, leaf in leaves.items()}
    return {name: to_array(_last(value)).reshape(shapes[name]) for name, value in found.items()}


def _last(value: Tensor) -> Tensor:
    """Images with their channels last again; parameters as they are."""
    return value.movedim(1, -1) if value.ndim == 4 else value
