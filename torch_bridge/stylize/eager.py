"""Instance normalisation in plain PyTorch, which every transformation of PyTorch takes.

The formulas are those of `pallas_kernels.stylize.formulas`, on channels-first tensors. PyTorch's
own keeps no memory format, refuses images of one pixel, and loses the digits that a mean of many
deviations takes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pallas_kernels.stylize.problem import Problem

DIFFERENTIABLE = False


class Known(NamedTuple):
    """The tensors that a derivative is taken at.

    Attributes:
        x: `[N, C, H, W]`.
        statistics: `[N, 3, C]`.
        scale: `[N, C]`.
        bias: `[N, C]`.
        residual: Of x's shape, where an activation's slope depends on it.
    """

    x: Tensor
    statistics: Tensor
    scale: Tensor
    bias: Tensor
    residual: Tensor | None


def unavailable(platform: str) -> str | None:
    """None, since plain PyTorch runs everywhere."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Plain PyTorch takes every problem."""


def forward(
    x: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, *, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """The norm and the statistics; see `ops` for the arguments. It is differentiable."""
    wide = x.to(scale.dtype)
    # A number, whatever the derivative is taken of.
    first = wide[:, :, 0, 0].detach()
    mean = (wide - _on_images(first)).mean((2, 3))
    centre = (first + mean).detach()
    offset = mean - (centre - first)
    centred = (wide - _on_images(centre)) - _on_images(offset)
    inverse = 1 / torch.sqrt((centred * centred).mean((2, 3)) + eps)
    statistics = torch.stack([centre, offset, inverse], 1)
    z = preactivation(Known(x, statistics, scale, bias, residual))
    return (torch.relu(z) if relu else z).to(x.dtype), statistics


def backward(known: Known, dy: Tensor, *, relu: bool) -> list[Tensor]:
    """The gradients of x, scale, bias and, where there is one, the residual. It is differentiable.

    Args:
        known: The tensors of the forward pass.
        dy: Gradient of the output.
        relu: Whether there is an activation.
    """
    x, statistics, scale, _, residual = known
    g = dy.to(scale.dtype)
    if relu:
        g = torch.where(preactivation(known) > 0, g, 0)
    n = normed(x, statistics)
    mean, covariance = (v.mean((2, 3), keepdim=True) for v in (g, n * g))
    dx = _on_images(scale * statistics[:, 2]) * (g - mean - n * covariance)
    found = [dx.to(x.dtype), (n * g).sum((2, 3)), g.sum((2, 3))]
    return found if residual is None else [*found, g.to(x.dtype)]


def statistics_backward(x: Tensor, statistics: Tensor, dstatistics: Tensor) -> Tensor:
    """The gradient of x by that of its statistics, of which the centre stands for a number."""
    pixels = x.shape[2] * x.shape[3]
    _, dmean, dinverse = dstatistics.unbind(1)
    slope = -(statistics[:, 2] ** 2) * dinverse
    found = _on_images(dmean) + _on_images(slope) * normed(x, statistics)
    return (found / pixels).to(x.dtype)


def normed(x: Tensor, statistics: Tensor) -> Tensor:
    """The images less their mean over their deviation, in the statistics' dtype."""
    centre, offset, inverse = (_on_images(row) for row in statistics.unbind(1))
    return ((x.to(statistics.dtype) - centre) - offset) * inverse


def preactivation(known: Known) -> Tensor:
    """The scaled and moved norm with its residual, which an activation takes."""
    z = normed(known.x, known.statistics) * _on_images(known.scale) + _on_images(known.bias)
    return z if known.residual is None else z + known.residual.to(z.dtype)


def _on_images(value: Tensor) -> Tensor:
    """Values `[N, C]` as images of one pixel."""
    return value[:, :, None, None]
