"""The wavelet convolution on NVIDIA GPUs: the kernels that JAX launches too, by the driver."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pallas_kernels.wtconv import cuda_launches
from pallas_kernels.wtconv.cuda_launches import Images
from pallas_kernels.wtconv.problem import Problem
from torch_bridge.runtime.cuda import device_of, launch, unavailable

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "forward",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that these kernels do not compute.

    Args:
        direction: "fwd" or "bwd".
        problem: `pallas_kernels.wtconv.problem.Problem`, its shape channels-last.
    """
    cuda_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The numbers of resident blocks of a multiprocessor that are worth timing; see `check`."""
    return cuda_launches.search_space()


def forward(
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    *,
    wavelet: str,
    transpose: bool,
    resident: int | None = None,
) -> Tensor:
    """The operator on `x [N, C, H, W]`, or its transpose; see `ops` for the arguments.

    `wavelet` is Haar; for `resident` see `search_space`.
    """
    x, taps = _dense(x), [tap.contiguous() for tap in taps]
    bias = None if bias is None else bias.contiguous()
    where = _images(x), device_of(x.device), launch
    y = cuda_launches.forward(x, taps, bias, *where, transpose, resident=resident)
    return y.permute(0, 3, 1, 2)


def weight_grad(
    x: Tensor,
    dy: Tensor,
    *,
    kernel_size: int,
    levels: int,
    wavelet: str,
    resident: int | None = None,
) -> list[Tensor]:
    """Gradients of the taps; every sum runs in a fixed order, so they are bitwise reproducible."""
    x = _dense(x)
    memory_format = torch.channels_last if _channels_last(x) else torch.contiguous_format
    dy = dy.contiguous(memory_format=memory_format)
    images = _images(x)
    images = images._replace(aligned=min(images.aligned, _images(dy).aligned))
    sizes = images, kernel_size, levels, device_of(x.device), launch
    first, *rest = cuda_launches.weight_grad(x, dy, *sizes, resident=resident)
    parts = [first[:, :1]]
    for sums in (first, *rest):
        parts += sums[:, 1:].split(4, 1)
    shape = -1, 1, kernel_size, kernel_size
    # Of one channel parts are views of one array, which operators may not return.
    copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [copy.view(shape) for copy in copies]


def _images(x: Tensor) -> Images:
    """The description of a dense `[N, C, H, W]`."""
    n, c, h, w = x.shape
    aligned = 4 if x.is_meta else math.gcd(4, x.data_ptr() // x.element_size())
    dtype = str(x.dtype).removeprefix("torch.")
    return Images((n, h, w, c), dtype, _channels_last(x), aligned)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()
