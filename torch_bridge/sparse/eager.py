"""The sparse convolution in plain PyTorch: runs on every device.

Rows are gathered by the table, multiplied and added up in float32 or better, some offsets after
others. The gradient of x is gathered likewise, by the table of the other direction: nothing is
scattered, and results are the same bits every time. On a GPU float32 products are what
`torch.set_float32_matmul_precision` says, full float32 unless it was told otherwise.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pallas_kernels.sparse.problem import Problem
from torch_bridge.sparse.maps import RowTable
from torch_bridge.sparse.voxels import accumulation_dtype

DIFFERENTIABLE = False

_MOST_GATHERED = {False: 1 << 30, True: 1 << 33}
"""Bytes that a search may gather at once, without a GPU and with one."""


def unavailable(platform: str) -> str | None:
    """None, since plain PyTorch runs everywhere."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain PyTorch takes every problem."""


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """Offsets whose rows are gathered at once: one, some, or all of them (im2col).

    Example:
        >>> from pallas_kernels.sparse.problem import Window
        >>> search_space("fwd", Problem((1, 64, 8), "float32", 8, Window((3,), (1,), (1,))))
        [{}, {'at_once': 3}]
    """
    _, capacity, channels = problem.shape
    widest = max(channels, problem.features)
    each = capacity * widest * (8 if problem.dtype == "float64" else 4)
    taps, most = problem.window.taps, _MOST_GATHERED[torch.cuda.is_available()] // max(each, 1)
    return [{}, *({"at_once": n} for n in sorted({8, taps}) if 1 < n <= min(taps, most))]


def forward(x: Tensor, w: Tensor, rows: RowTable, *, precision: str, at_once: int = 1) -> Tensor:
    """The convolution `y [M, F]`; see `ops` for the arguments."""
    taps, groups, _, features = w.shape
    count, wide = rows.table.shape[1], w.to(accumulation_dtype(x.dtype))
    total = wide.new_zeros((groups, count, features))
    for first, gathered in _gathered(x, rows, groups, at_once):
        some = wide[first : first + at_once].transpose(0, 1).reshape(groups, -1, features)
        total.baddbmm_(gathered, some)
    return total.transpose(0, 1).reshape(count, groups * features).to(x.dtype)


def weight_grad(
    x: Tensor,
    dy: Tensor,
    rows: RowTable,
    *,
    shape: tuple[int, ...],
    precision: str,
    at_once: int = 1,
) -> Tensor:
    """The transpose of the convolution in w, a tensor of its shape; see `ops` for the arguments."""
    taps, groups, channels, features = shape
    wanted = read(dy, rows).reshape(-1, groups, features).transpose(0, 1)
    found = [
        (gathered.transpose(1, 2) @ wanted).reshape(groups, -1, channels, features).transpose(0, 1)
        for _, gathered in _gathered(x, rows, groups, at_once)
    ]
    return torch.cat(found).to(x.dtype)


def read(dy: Tensor, rows: RowTable) -> Tensor:
    """Rows of a gradient in float32 or better, zeros where nothing is read.

    A row that reads nothing may hold anything, NaN too.
    """
    nothing = (rows.table < 0).all(0)
    return dy.masked_fill(nothing[:, None], 0).to(accumulation_dtype(dy.dtype))


def with_zeros(x: Tensor) -> Tensor:
    """Rows in float32 or better, and a row of zeros behind them, see `take`."""
    return functional.pad(x.to(accumulation_dtype(x.dtype)), (0, 0, 0, 1))


def take(padded: Tensor, rows: Tensor) -> Tensor:
    """The rows of what `with_zeros` made, zeros for those that are -1.

    Example:
        >>> take(with_zeros(torch.tensor([[5.0], [6.0]])), torch.tensor([1, -1])).tolist()
        [[6.0], [0.0]]
    """
    return padded.index_select(0, rows.masked_fill(rows < 0, len(padded) - 1))


def _gathered(x: Tensor, rows: RowTable, groups: int, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """Yields the first of some offsets and what rows read through them, `[G, M, n C / G]`."""
    padded, channels = with_zeros(x), x.shape[1] // groups
    for first in range(0, len(rows.table), at_once):
        some = rows.table[first : first + at_once]
        taken = take(padded, some.T.reshape(-1)).reshape(-1, len(some), groups, channels)
        count = rows.table.shape[1]
        yield first, taken.permute(2, 0, 1, 3).reshape(groups, count, len(some) * channels)
