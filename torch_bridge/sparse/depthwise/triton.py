"""The depthwise sparse convolution on GPUs: the kernels that JAX launches too."""

import torch
from torch import Tensor

from pallas_kernels.sparse.depthwise.problem import Problem
from torch_bridge.runtime.triton import launch, unavailable
from torch_bridge.sparse.maps import RowTable

__all__ = ["DIFFERENTIABLE", "check", "forward", "search_space", "unavailable", "weight_grad"]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that these kernels do not compute.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    from pallas_kernels.sparse.depthwise import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The parameters that are worth timing, the default ones first; see `check`."""
    from pallas_kernels.sparse.depthwise import triton_launches

    return triton_launches.search_space(direction, problem)


def forward(x: Tensor, w: Tensor, rows: RowTable, *, precision: str, **tiles: int) -> Tensor:
    """The convolution `y [M, C]`; see `ops` for the arguments.

    The parameters are those of `triton_launches.search_space`.
    """
    from pallas_kernels.sparse.depthwise import triton_launches

    own = triton_launches.Tiles(**tiles) if tiles else None
    with torch.cuda.device_of(x):
        return triton_launches.forward(x.contiguous(), w.contiguous(), rows, own, launch)


def weight_grad(
    x: Tensor,
    dy: Tensor,
    rows: RowTable,
    *,
    shape: tuple[int, ...],
    precision: str,
    **tiles: int,
) -> Tensor:
    """The transpose of the convolution in w, `dw [K, C]`; see `ops` for the arguments.

    Every sum has a fixed order, so results are bitwise reproducible.
    """
    from pallas_kernels.sparse.depthwise import triton_launches

    own = triton_launches.Tiles(**tiles) if tiles else None
    with torch.cuda.device_of(x):
        parts = triton_launches.weight_grad(x.contiguous(), dy.contiguous(), rows, own, launch)
        return parts.sum(0).to(x.dtype)
