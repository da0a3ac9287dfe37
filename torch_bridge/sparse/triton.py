"""The sparse convolution on GPUs: the kernels that JAX launches too."""

import torch
from torch import Tensor
from torch.nn import functional

from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.sparse.problem import Problem, Window
from torch_bridge.runtime.triton import launch, unavailable
from torch_bridge.sparse.maps import Keys, RowTable

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "forward",
    "search",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that these kernels do not compute.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    from pallas_kernels.sparse import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The parameters that are worth timing, the default ones first; see `check`."""
    from pallas_kernels.sparse import triton_launches

    return triton_launches.search_space(direction, problem)


def search(keys: Keys, sites: Keys, columns: Tensor, window: Window) -> Tensor:
    """The table of a map, `int32 [K, M]`.

    Args:
        keys: The sorted keys of what is read.
        sites: Those of what reads.
        columns: `[columns, D]`: the first step of each column of offsets along the last axis.
        window: The offsets.
    """
    from pallas_kernels.sparse import triton_launches

    steps = functional.pad(columns, (3 - columns.shape[1], 0)).int()
    with torch.cuda.device_of(columns):
        return triton_launches.search(keys, sites, steps, window, launch)


def forward(
    x: Tensor,
    w: Tensor,
    rows: RowTable,
    *,
    precision: str,
    splits: int | None = None,
    ordered: int = 1,
    pairs: int | None = None,
    **tiles: int,
) -> Tensor:
    """The convolution `y [M, F]`; see `ops` for the arguments.

    The parameters are those of `triton_launches.search_space`; `pairs` is for the gradient of w.
    """
    from pallas_kernels.sparse import triton_launches

    config = TileConfig(**tiles) if tiles else None
    rest = precision, config, splits, bool(ordered), launch
    with torch.cuda.device_of(x):
        parts = triton_launches.forward(x.contiguous(), w.contiguous(), rows, *rest)
        return parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)


def weight_grad(
    x: Tensor,
    dy: Tensor,
    rows: RowTable,
    *,
    shape: tuple[int, ...],
    precision: str,
    splits: int | None = None,
    ordered: int = 1,
    pairs: int | None = None,
    **tiles: int,
) -> Tensor:
    """The transpose of the convolution in w, a tensor of its shape; see `ops` for the arguments.

    Every sum has a fixed order, so results are bitwise reproducible. Its sums are always divided,
    and rows taken in their order, whatever `splits` and `ordered` say of the gradient of x.
    """
    from pallas_kernels.sparse import triton_launches

    config = TileConfig(**tiles) if tiles else None
    rest = shape, precision, config, pairs, launch
    with torch.cuda.device_of(x):
        pieces = triton_launches.weight_grad(x.contiguous(), dy.contiguous(), rows, *rest)
    return torch.cat(pieces)
