"""The Triton launches of the depthwise sparse convolution, for any framework."""

from typing import NamedTuple

from pallas_kernels.common.refusals import refuse, unsupported_sizes
from pallas_kernels.common.tiles import power_of_two
from pallas_kernels.common.triton import Launch, cdiv
from pallas_kernels.sparse import triton_kernels as kernels
from pallas_kernels.sparse.depthwise.problem import Problem
from pallas_kernels.sparse.problem import TILE_ROWS
from pallas_kernels.sparse.triton_launches import DTYPES, AnyArray, RowTable

_PROGRAMS = 1188
"""The number of programs of a weight gradient: nine for each multiprocessor of a large GPU."""
_PARTS = 1 << 22
"""The most numbers of these parts, or an eighth of those in x where that is more."""


class Tiles(NamedTuple):
    """Tiles of the depthwise kernels.

    Attributes:
        block_m: Rows of a tile, a power of two from 16 on.
        block_n: Channels of a tile, a power of two from 16 on.
        warps: Warps of a program.
        ordered: 1 where tiles take the rows in their order, and skip offsets that all lack; rows as
            they come have their neighbours nearer. Weights' gradients always take the order.
    """

    block_m: int = 32
    block_n: int = 64
    warps: int = 1
    ordered: int = 1


def check(problem: Problem) -> None:
    """Raises `NotImplementedError` where the kernels do not take a problem."""
    reasons = problem.unsupported(DTYPES) or unsupported_sizes(problem.shape)
    if not reasons and problem.features >= 1 << 20:
        reasons.append(f"{problem.features} channels, too many")
    refuse(reasons)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The parameters that are worth timing, the default ones first: fields of `Tiles`.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    sizes = [(64, 64, 2), (16, 128, 2), (16, 128, 1), (32, 128, 2), (32, 128, 4), (16, 64, 1)]
    sizes += [(64, 128, 8)]
    found = [Tiles(*size) for size in sizes]
    # Weights' gradients always take the order.
    found += [Tiles(ordered=0)] if direction == "fwd" else []
    return [{}, *(each._asdict() for each in found)]


def forward(
    x: AnyArray,
    w: AnyArray,
    rows: RowTable[AnyArray],
    tiles: Tiles | None,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The convolution of contiguous arrays of one dtype; the gradient of x is that of dy.

    Args:
        x: `[N, C]`.
        w: `[K, C]`.
        rows: The rows of x that each row of the output reads.
        tiles: Tiles, or None for those of `Tiles()`.
        launch: The framework's launch function.

    Returns:
        `[M, C]`.
    """
    tiles = tiles or Tiles()
    taps, channels = w.shape
    _, count = rows.table.shape
    block_n = min(tiles.block_n, power_of_two(channels))
    (y,) = launch(
        kernels.depthwise,
        [x, w, rows.table, rows.order, rows.tile_masks, count],
        [((count, channels), x.dtype)],
        (cdiv(count, tiles.block_m), cdiv(channels, block_n)),
        K=taps,
        C=channels,
        ORDERED=bool(tiles.ordered),
        TILE=TILE_ROWS,
        BM=tiles.block_m,
        BN=block_n,
        num_warps=tiles.warps,
    )
    return y


def weight_grad(
    x: AnyArray,
    dy: AnyArray,
    rows: RowTable[AnyArray],
    tiles: Tiles | None,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The transpose of the convolution in w, applied to dy.

    Args:
        x: `[N, C]`, contiguous.
        dy: `[M, C]`, of x's dtype, contiguous.
        rows: See `forward`.
        tiles: Tiles, or None for the default ones of the dtype.
        launch: The framework's launch function.

    Returns:
        float32 `[parts, K, C]`, to be summed over the parts.
    """
    taps, count = rows.table.shape
    _, channels = x.shape
    # One warp sums its rows without waiting for others, and has registers for so many.
    tiles = tiles or Tiles(16 if str(x.dtype).endswith("float32") else 32)
    block_n = min(tiles.block_n, power_of_two(channels))
    across = cdiv(channels, block_n)
    room = max(_PARTS, x.shape[0] * channels // 8) // (taps * channels)
    parts = max(1, min(cdiv(count, tiles.block_m), _PROGRAMS // across, room))
    (sums,) = launch(
        kernels.depthwise_weights,
        [x, dy, rows.table, rows.order, rows.tile_masks, count],
        [((parts, taps, channels), "float32")],
        (parts, across),
        K=taps,
        C=channels,
        TILE=TILE_ROWS,
        BM=tiles.block_m,
        BN=block_n,
        num_warps=tiles.warps,
    )
    return sums
