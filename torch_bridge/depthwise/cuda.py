"""The depthwise convolution on tensor cores: the CUDA kernels that JAX launches too.

They read channels last; images of another memory format are copied before and after.
"""

import torch
from torch import Tensor

from pallas_kernels.common.cuda import Device
from pallas_kernels.depthwise import cuda_launches
from pallas_kernels.depthwise.problem import Problem
from torch_bridge.runtime.calls import dtype_name
from torch_bridge.runtime.cuda import device_of, launch, unavailable

__all__ = ["DIFFERENTIABLE", "check", "forward", "unavailable", "weight_grad"]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that these kernels do not compute.

    Args:
        direction: "fwd" or "bwd".
        problem: The call, its shape channels-last.
    """
    cuda_launches.check(problem, device_of(torch.device("cuda")))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, transpose: bool) -> Tensor:
    """The convolution or its transpose; see `ops` for the arguments."""
    images, k = _pixels(x), weight.shape[-1]
    taps = weight.to(x.dtype)[:, 0].permute(1, 2, 0).contiguous()
    # A single tap is not copied, and may lie anywhere.
    taps = taps.clone() if taps.data_ptr() % 16 else taps
    offsets = None if bias is None else bias.float().contiguous()
    shape, dtype, device = _about(images)
    y = cuda_launches.forward(images, taps, offsets, shape, dtype, k, transpose, device, launch)
    return y.permute(0, 3, 1, 2)


def weight_grad(x: Tensor, dy: Tensor, *, kernel_size: int, biased: bool) -> list[Tensor]:
    """Gradients of the taps, and of the bias if there is one; see `ops`.

    Every sum has a fixed order, so they are bitwise reproducible.
    """
    images, gradients = _pixels(x), _pixels(dy)
    shape, dtype, device = _about(images)
    sums = cuda_launches.weight_grad(
        images, gradients, shape, dtype, kernel_size, biased, device, launch
    )
    parts = sums.split([kernel_size**2, 1] if biased else [kernel_size**2], 1)
    # Of one channel parts are views of one array, which operators may not return.
    taps, *bias = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return [taps.view(-1, 1, kernel_size, kernel_size), *(each[:, 0] for each in bias)]


def _about(images: Tensor) -> tuple[tuple[int, ...], str, Device]:
    """The shape and dtype of images, and their GPU."""
    return tuple(images.shape), dtype_name(images.dtype), device_of(images.device)


def _pixels(x: Tensor) -> Tensor:
    """Images `[N, C, H, W]` as `[N, H, W, C]`, at an address that copies of 16 bytes can have."""
    images = x.permute(0, 2, 3, 1).contiguous()
    return images.clone() if images.data_ptr() % 16 else images
