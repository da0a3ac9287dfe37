"""Depthwise convolution in plain PyTorch: cuDNN's on NVIDIA GPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from pallas_kernels.depthwise.problem import Problem
from torch_bridge.runtime.calls import summed

DIFFERENTIABLE = False


def unavailable(platform: str) -> str | None:
    """None, since plain PyTorch runs everywhere."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Plain PyTorch takes every problem."""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, transpose: bool) -> Tensor:
    """The convolution or its transpose; see `ops` for the arguments."""
    k, weight = weight.shape[-1], weight.to(x.dtype)
    before, after = (k - 1) // 2, k // 2
    if transpose:
        weight, before, after = weight.flip(-2, -1), after, before
    padded = F.pad(x, (before, after, before, after))
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(padded, weight, bias, groups=x.shape[1])


def weight_grad(x: Tensor, dy: Tensor, *, kernel_size: int, biased: bool) -> list[Tensor]:
    """Gradients of the taps, and of the bias if there is one; see `ops` for the arguments."""
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    padded = F.pad(x, (before, after, before, after))
    shape = torch.Size((x.shape[1], 1, kernel_size, kernel_size))
    taps = grad.conv2d_weight(padded, shape, dy, groups=x.shape[1])
    return [taps, summed(dy)] if biased else [taps]
