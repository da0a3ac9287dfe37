"""The depthwise convolution on tensor cores: the CUDA kernels that JAX launches too.

They read channels last; images of another memory format are copied before and after.
"""

from functools import cache

import torch
from torch import Tensor

from pallas_kernels.common.cuda import Device
from pallas_kernels.depthwise import cuda_launches
from pallas_kernels.depthwise.problem import Problem
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
    channels, _, _, k = weight.shape
    images = _pixels(x)
    taps = torch.nn.functional.pad(weight.to(x.dtype).reshape(channels, k * k), (0, 1))
    matrices = taps[:, _toeplitz(k, transpose, x.device)].contiguous()
    offsets = None if bias is None else bias.float().contiguous()
    y = cuda_launches.forward(images, matrices, offsets, *_about(images, k), launch)
    return y.permute(0, 3, 1, 2)


def weight_grad(x: Tensor, dy: Tensor, *, kernel_size: int) -> Tensor:
    """The gradient of the taps; every sum has a fixed order, so it is bitwise reproducible."""
    images, gradients = _pixels(x), _pixels(dy)
    table, about = _products(kernel_size, x.device), _about(images, kernel_size)
    sums = cuda_launches.weight_grad(images, gradients, table, *about, launch)
    return sums.reshape(-1, 1, kernel_size, kernel_size)


def _about(images: Tensor, kernel_size: int) -> tuple[tuple[int, ...], str, int, Device]:
    """The shape and dtype of images, the reach of a kernel, and the device."""
    dtype = str(images.dtype).removeprefix("torch.")
    device = device_of(images.device)
    return tuple(images.shape), dtype, cuda_launches.reach(kernel_size), device


def _pixels(x: Tensor) -> Tensor:
    """Images `[N, C, H, W]` as `[N, H, W, C]`, at an address that copies of 16 bytes can have."""
    images = x.permute(0, 2, 3, 1).contiguous()
    return images.clone() if images.data_ptr() % 16 else images


@cache
def _toeplitz(kernel_size: int, transpose: bool, device: torch.device) -> Tensor:
    return torch.tensor(cuda_launches.toeplitz(kernel_size, transpose), device=device)


@cache
def _products(kernel_size: int, device: torch.device) -> Tensor:
    found = cuda_launches.products(kernel_size)
    return torch.tensor(found, dtype=torch.int32, device=device)
