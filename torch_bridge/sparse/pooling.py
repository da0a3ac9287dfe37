"""Pooling of voxels. Gradients gather by the reverse map, as those of convolutions do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pallas_kernels.sparse.checks import POOL_REDUCTIONS, check_name
from torch_bridge.sparse import ops
from torch_bridge.sparse.maps import KernelMap, kernel_map
from torch_bridge.sparse.voxels import Voxels, accumulation_dtype, floating


def pool(
    voxels: Voxels,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    padding: int | Sequence[int] = 0,
    reduce: str = "max",
    out_capacity: int | None = None,
) -> Voxels:
    """Pooling: output u is made of the voxels from `stride u - padding` on, `kernel_size` of them.

    Args:
        voxels: The input.
        kernel_size: Size of a window, an int or one for each axis.
        stride: Distance of windows; None is kernel_size, so that each voxel is in one window.
        padding: The first window begins so far before 0.
        reduce: "max", "mean" (of the voxels that are there) or "sum".
        out_capacity: Rows of the output; None takes the input's where windows do not overlap.

    Returns:
        Every window that holds a voxel, sorted.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.

    Example:
        >>> from torch_bridge.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2], [0, 3]], [[1.0], [5.0], [7.0]])
        >>> pooled = pool(voxels, 2)
        >>> pooled.coords[:2].tolist(), pooled.features[:2, 0].tolist()
        ([[0, 0], [0, 1]], [1.0, 7.0])
    """
    check_name(reduce, "reduce", POOL_REDUCTIONS)
    x = floating(voxels.features, "voxels.features")
    stride = kernel_size if stride is None else stride
    if out_capacity is None and stride == kernel_size:
        out_capacity = voxels.capacity
    maps, out = kernel_map(
        voxels,
        kernel_size,
        stride,
        output_rule="full",
        padding=padding,
        out_capacity=out_capacity,
    )
    if reduce == "max":
        return out.with_features(_Greatest.apply(x, maps.table, maps.reverse))
    total = _total(x.to(accumulation_dtype(x.dtype)), maps)
    if reduce == "mean":
        total = total / (maps.table >= 0).sum(0).clamp(min=1)[:, None]
    return out.with_features(total.to(x.dtype))


def _total(x: Tensor, maps: KernelMap) -> Tensor:
    """The sum of the rows that each row reads, `[M, C]`: a depthwise convolution with ones."""
    ones = x.new_ones((len(maps.table), x.shape[1]))
    return ops.convolution(x, ones, maps, "ieee", ("eager", "eager"))


class _Greatest(torch.autograd.Function):
    """The greatest of the rows that each row reads, `[M, C]`; zeros where it reads none.

    Its gradient is shared by those that are equal.
    """

    @staticmethod
    def forward(x: Tensor, table: Tensor, reverse: Tensor) -> Tensor:
        """The greatest rows."""
        most = x.new_full((table.shape[1], x.shape[1]), -torch.inf)
        for rows in table:
            most = torch.maximum(most, _read(x, rows, -torch.inf))
        return most.masked_fill((table < 0).all(0)[:, None], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Saves everything."""
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x, whose operations can be differentiated again."""
        (dy,) = grads
        x, table, reverse, y = ctx.saved_tensors
        ties = torch.zeros_like(y, dtype=accumulation_dtype(y.dtype))
        for rows in table:
            ties = ties + ((rows[:, None] >= 0) & (_read(x, rows, 0) == y))
        share = dy / ties.clamp(min=1)
        dx = torch.zeros_like(x, dtype=share.dtype)
        for rows in reverse:
            others = (rows[:, None] < 0) | (_read(y, rows, 0) != x)
            dx = dx + _read(share, rows, 0).masked_fill(others, 0)
        return dx.to(x.dtype), None, None


def _read(x: Tensor, rows: Tensor, otherwise: float) -> Tensor:
    """The rows of x, another number for those that are -1."""
    # The gradient of an embedding has a fixed order, unlike that of an index.
    found = functional.embedding(rows.clamp(min=0).long(), x)
    return found.masked_fill(rows[:, None] < 0, otherwise)
