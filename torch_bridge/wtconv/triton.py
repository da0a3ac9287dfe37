"""The wavelet convolution on GPUs: the kernels that JAX launches too, on tensors of any strides."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pallas_kernels.wtconv.problem import Problem
from torch_bridge.runtime.triton import launch, unavailable

__all__ = ["DIFFERENTIABLE", "check", "forward", "search_space", "unavailable", "weight_grad"]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that these kernels do not compute.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    from pallas_kernels.wtconv import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The sizes of a program that are worth timing; see `check`."""
    from pallas_kernels.wtconv import triton_launches

    return triton_launches.search_space(direction, problem)


def forward(
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    *,
    wavelet: str,
    transpose: bool,
    **sizes: int,
) -> Tensor:
    """The operator on `x [N, C, H, W]`, or its transpose; see `ops` for the arguments.

    `sizes` are of `search_space`. y has the strides of `torch.empty_like(x)`: nothing is copied
    into another layout.
    """
    from pallas_kernels.wtconv import triton_launches

    flat = [
        _rows(tap, x.shape[1], 0.25 if level else 1.0, transpose) for level, tap in enumerate(taps)
    ]
    if bias is not None:
        bias = F.pad(bias, (0, flat[0].shape[-1] - x.shape[1]))
    n, c, h, w = torch.empty_like(x, device="meta").stride()
    with torch.cuda.device_of(x):
        y = triton_launches.forward(
            _channels_last(x), flat, bias, taps[0].shape[-1], launch, (n, h, w, c), **sizes
        )
    return y.permute(0, 3, 1, 2)


def weight_grad(
    x: Tensor, dy: Tensor, *, kernel_size: int, levels: int, wavelet: str, **sizes: int
) -> list[Tensor]:
    """Gradients of the taps; see `ops` for the arguments.

    Every sum runs in a fixed order, so they are bitwise reproducible.
    """
    from pallas_kernels.wtconv import triton_launches

    with torch.cuda.device_of(x):
        found = triton_launches.weight_grad(
            _channels_last(x), _channels_last(dy), kernel_size, levels, launch, **sizes
        )
        return [
            torch.cat(parts, 1)
            .mul_(0.25 if level else 1.0)
            .permute(2, 1, 0)
            .reshape(-1, 1, kernel_size, kernel_size)
            for level, parts in enumerate(found)
        ]


def _channels_last(x: Tensor) -> Tensor:
    """`[N, C, H, W]` seen as `[N, H, W, C]`."""
    return x.permute(0, 2, 3, 1)


def _rows(tap: Tensor, channels: int, factor: float, transpose: bool) -> Tensor:
    """Taps `[bands * C, 1, k, k]` as the kernels read them: `[(k + 1) * k, bands, C']`."""
    from pallas_kernels.wtconv import triton_launches

    kernel_size = tap.shape[-1]
    if transpose:
        tap = tap.flip((2, 3))
    rows = tap.reshape(channels, -1, kernel_size**2).permute(2, 1, 0)
    shape = (kernel_size * (kernel_size + 1), rows.shape[1], triton_launches.padded(channels))
    flat = tap.new_zeros(shape)
    torch.mul(rows, factor, out=flat[: kernel_size**2, :, :channels])
    return flat
