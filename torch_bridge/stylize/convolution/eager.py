"""PyTorch's own convolution, and the norm of its output by what that picks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pallas_kernels.stylize.convolution.problem import Problem
from torch_bridge.runtime import calls
from torch_bridge.stylize import eager as norm
from torch_bridge.stylize import ops as norm_ops

DIFFERENTIABLE = False


class Padded(NamedTuple):
    """The samples around an image, and the steps between those that are read.

    Attributes:
        stride: Along H and W.
        pads: Left, right, top and bottom, in the order of `torch.nn.functional.pad`.
        reflect: Whether the image is mirrored about its edge samples, not padded by zeros.
    """

    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    reflect: bool


def unavailable(platform: str) -> str | None:
    """None, since plain PyTorch runs everywhere."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Plain PyTorch takes every problem."""


def forward(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    *,
    window: Padded,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the convolution's output and its statistics; see `ops` for the arguments."""
    z = convolution(x, w, window)
    picked = norm_ops.pick(
        *(None, z.device, tuple(z.shape), z.dtype, z.stride(), relu, residual is not None, False)
    )
    if calls.names(picked) == ["eager"]:
        y, statistics = norm.forward(z, scale, bias, residual, eps=eps, relu=relu)
    else:
        y, statistics = norm_ops.apply(z, scale, bias, residual, eps, relu, *picked)
    return y, z, statistics


def convolution(x: Tensor, w: Tensor, window: Padded) -> Tensor:
    """The convolution `[N, NF, H, W]`, in x's memory format. It is differentiable."""
    return functional.conv2d(padded(x, window), w, None, window.stride)


def padded(x: Tensor, window: Padded) -> Tensor:
    """The images with what is around them, in their memory format."""
    if not any(window.pads):
        return x
    made = functional.pad(x, window.pads, "reflect" if window.reflect else "constant")
    if not calls.channels_last(x.stride()):
        return made
    # Not every kernel of PyTorch keeps channels last; so said, `torch.vmap` takes it.
    return made.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def backward(
    x: Tensor, w: Tensor, dz: Tensor, window: Padded, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and w by that of the convolution's output. It is differentiable.

    Args:
        x: The images.
        w: The filters.
        dz: The gradient.
        window: Which samples are read.
        needs: Whether x, and whether w, needs one.
    """
    seen = padded(x, window)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        *(dz, seen, w, None, window.stride, (0, 0), (1, 1), False, (0, 0), 1),
        (*needs, False),
    )
    if needs[0] and any(window.pads):
        left, _, top, _ = window.pads
        if window.reflect:
            dx = torch.ops.aten.reflection_pad2d_backward(dx, x, window.pads)
        else:
            dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return (dx if needs[0] else None), (dw if needs[1] else None)
