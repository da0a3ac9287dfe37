"""The Triton launches of the depthwise sparse convolution, for any framework."""

from typing import NamedTuple

from pallas_kernels.common.refusals import refuse, unsupported_sizes
from pallas_kernels.common.tiles import power_of_two
from pallas_kernels.common.triton import Launch, cdiv
from pallas_kernels.sparse import triton_kernels as kernels
from pallas_kernels.sparse.depthwise.problem import Problem
from pallas_kernels.sparse.problem import TILE_ROWS
from pallas_kernels.sparse.triton_launches import DTYPES, AnyArray, RowTable

_PROGRAMS = 4096
"""The number of programs up to which a weight gradient's sums are split."""


class Tiles(NamedTuple):
    """Tiles of the depthwise kernels.

    Attributes:
        block_m: Rows of a tile, a power of two from 16 on.
        block_n: Channels of a tile, a power of two from 16 on.
        warps: Warps of a program.
        ordered: 1 where tiles take the rows in their order, and skip offsets that all lack; rows as
            they come have their neighbours nearer.
        at_once: Offsets for which a program of the weights' gradient loads a row of dy once, a
            power of two.
    """

    block_m: int = 32
    block_n: int = 128
    warps: int = 4
    ordered: int = 1
    at_once: int = 1


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
    sizes = [(32, 128, 4, 3), (16, 128, 4, 1), (16, 128, 4, 3), (64, 64, 4, 1), (32, 64, 4, 1)]
    sizes += [(64, 128, 8, 1), (16, 64, 2, 1)]
    found = [Tiles(*size) for size in sizes]
    ordered = [Tiles(ordered=1), found[1]._replace(ordered=1)]
    shared: list[Tiles] = []
    if direction == "bwd":
        shared = [Tiles(16, 128, 4, at_once=4), Tiles(16, 128, 8, at_once=8)]
        shared.append(Tiles(32, 128, 8, at_once=4))
    return [{}, *(each._asdict() for each in found + ordered + shared)]


def forward(
    x: AnyArray, w: AnyArray, rows: RowTable[AnyArray], tiles: Tiles, launch: Launch[AnyArray]
) -> AnyArray:
    """The convolution of contiguous arrays of one dtype; the gradient of x is that of dy.

    Args:
        x: `[N, C]`.
        w: `[K, C]`.
        rows: The rows of x that each row of the output reads.
        tiles: Tiles.
        launch: The framework's launch function.

    Returns:
        `[M, C]`.
    """
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
    x: AnyArray, dy: AnyArray, rows: RowTable[AnyArray], tiles: Tiles, launch: Launch[AnyArray]
) -> AnyArray:
    """The transpose of the convolution in w, applied to dy.

    Args:
        x: `[N, C]`, contiguous.
        dy: `[M, C]`, of x's dtype, contiguous.
        rows: See `forward`.
        tiles: Tiles; rows are taken as they come.
        launch: The framework's launch function.

    Returns:
        float32 `[splits, K, C]`, to be summed over the splits.
    """
    taps, count = rows.table.shape
    _, channels = x.shape
    block_n = min(tiles.block_n, power_of_two(channels))
    across = cdiv(channels, block_n)
    blocks = cdiv(count, tiles.block_m)
    groups = cdiv(taps, tiles.at_once)
    splits = min(blocks, max(1, _PROGRAMS // (groups * across)), 65535)
    rows_per_split = cdiv(blocks, splits) * tiles.block_m
    splits = cdiv(count, rows_per_split)
    (parts,) = launch(
        kernels.depthwise_weights,
        [x, dy, rows.table, count, rows_per_split],
        [((splits, taps, channels), "float32")],
        (groups, splits, across),
        K=taps,
        C=channels,
        BM=tiles.block_m,
        BN=block_n,
        AT_ONCE=tiles.at_once,
        num_warps=tiles.warps,
    )
    return parts
