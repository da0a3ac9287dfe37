"""Depthwise sparse convolution in plain PyTorch: runs on every device.

Rows are gathered by the table, multiplied and added up, one offset after the other.
"""

import torch
from torch import Tensor

from pallas_kernels.sparse.depthwise.problem import Problem
from torch_bridge.sparse.eager import DIFFERENTIABLE, read, take, unavailable, with_zeros
from torch_bridge.sparse.maps import RowTable

__all__ = ["DIFFERENTIABLE", "check", "forward", "unavailable", "weight_grad"]


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain PyTorch takes every problem."""


def forward(x: Tensor, w: Tensor, rows: RowTable, *, precision: str) -> Tensor:
    """The convolution `y [M, C]`; see `ops` for the arguments."""
    padded = with_zeros(x)
    total = padded.new_zeros((rows.table.shape[1], x.shape[1]))
    for some, taps in zip(rows.table, w.to(padded.dtype), strict=True):
        total.addcmul_(take(padded, some), taps)
    return total.to(x.dtype)


def weight_grad(
    x: Tensor, dy: Tensor, rows: RowTable, *, shape: tuple[int, ...], precision: str
) -> Tensor:
    """The transpose of the convolution in w, `dw [K, C]`; see `ops` for the arguments."""
    padded, wanted = with_zeros(x), read(dy, rows)
    return torch.stack([(take(padded, some) * wanted).sum(0) for some in rows.table]).to(x.dtype)
