"""The Triton launches of the sparse convolution, for any framework."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from pallas_kernels.common.refusals import refuse, unsupported_sizes
from pallas_kernels.common.tiles import TileConfig, launched, power_of_two, tiles
from pallas_kernels.common.triton import Launch, cdiv
from pallas_kernels.common.types import DeviceArray
from pallas_kernels.sparse import triton_kernels as kernels
from pallas_kernels.sparse.problem import TILE_ROWS, Problem, Window

AnyArray = TypeVar("AnyArray", bound=DeviceArray)
Held = TypeVar("Held", bound=DeviceArray, covariant=True)

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that the kernels take."""
_PROGRAMS = 264
"""The number of programs up to which sums are split: two for each multiprocessor of a large GPU."""
_MOST_SPLITS = 8
_LISTS = 0.9
"""The share of x's memory that the lists of rows of a weight gradient may take."""
_SITES = 256
"""Sites that a program searches for."""


class RowTable(Protocol[Held]):
    """The rows that are gathered for each row of a result, see `maps.RowTable`."""

    @property
    def table(self) -> Held:
        """`int32 [K, M]`, -1 where nothing is read."""

    @property
    def order(self) -> Held:
        """`int32 [M]`, the rows sorted by the bitmask of their offsets."""

    @property
    def tile_masks(self) -> Held:
        """`uint32 [ceil(K / 32), ceil(M / TILE_ROWS)]`, or the same bits as int32."""


class Keys(Protocol[Held]):
    """Coordinates as keys, see `voxels.Keys`."""

    @property
    def high(self) -> Held:
        """`uint32 [N]`, the upper halves, or the same bits as int32."""

    @property
    def low(self) -> Held:
        """The lower halves, likewise."""

    @property
    def rows(self) -> Held:
        """`int32 [N]`: the row of each key."""


def check(problem: Problem) -> None:
    """Raises `NotImplementedError` where the kernels do not take a problem."""
    reasons = problem.unsupported(DTYPES) or unsupported_sizes(problem.shape)
    groups, channels = problem.window.groups, problem.shape[-1]
    if not reasons:
        if groups > 65535:
            reasons.append(f"{groups} groups, up to 65535")
        if channels * problem.features // groups >= 1 << 30:
            reasons.append(f"{problem.features} features of {channels} channels, too many")
    refuse(reasons)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The parameters that are worth timing, the default ones first.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.

    Returns:
        The fields of a `TileConfig`; `splits`, see `forward`; `ordered`, 1 where rows are taken in
        their order; `pairs`, see `weight_grad`.

    Example:
        >>> from pallas_kernels.sparse.problem import Window
        >>> window = Window((3,), (1,), (1,))
        >>> len(search_space("fwd", Problem((1, 100, 8), "float32", 8, window)))
        9
    """
    if problem.dtype == "float32":
        sizes = [(64, 64, 32, 4, 5), (64, 32, 32, 4, 5), (128, 64, 16, 4, 5), (64, 64, 16, 4, 5)]
        sizes += [(128, 128, 16, 8, 5)]
        paired, twins = [(64, 128, 32, 8, 5), (64, 64, 16, 4, 7)], []
    else:
        sizes = [(128, 128, 64, 8, 5), (128, 128, 64, 8, 9), (128, 128, 64, 4, 5)]
        sizes += [(128, 128, 32, 8, 9), (64, 128, 64, 4, 5), (128, 64, 64, 4, 5)]
        sizes += [(64, 64, 64, 4, 5), (256, 128, 64, 8, 5)]
        # Over lists of rows long sums pay: an index is loaded in two steps before its row is.
        paired = [(64, 128, 128, 4, 4), (128, 128, 64, 4, 5), (128, 128, 64, 8, 5)]
        paired += [(64, 128, 64, 4, 7)]
        # The first is an H200's at 64 channels; elsewhere registers or shared memory are too few.
        twins = [(64, 128, 128, 4, 7), (64, 128, 64, 4, 7)]
    tiled, listed, mirrored = (
        [TileConfig(m, n, k, warps // 2, 2, stages)._asdict() for m, n, k, warps, stages in each]
        for each in (sizes, paired, twins)
    )
    groups, taps = problem.window.groups, problem.window.taps
    programs = cdiv(problem.shape[1], 64) * cdiv(problem.features // groups, 64) * groups
    most = _splits(programs, taps)
    split: list[dict[str, int]] = [{"splits": n} for n in (1, 2, 4, 8) if n <= most > 1]
    pairs: list[dict[str, int]] = []
    if direction == "bwd":
        pairs = [{"pairs": 0}, {"pairs": 1}, *(each | {"pairs": 1} for each in listed)]
        pairs += [{"pairs": 2}, *(each | {"pairs": 2} for each in mirrored)]
    return [{}, *tiled, *split, {"ordered": 0}, *pairs]


def search(
    keys: Keys[AnyArray],
    sites: Keys[AnyArray],
    steps: AnyArray,
    window: Window,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The table of a map.

    Args:
        keys: The sorted keys of what is read.
        sites: Those of what reads, in any order; it is fastest where neighbours are neighbours.
        steps: `int32 [columns, 3]`: the first step of each column of offsets along the last axis,
            zeros for axes that are not there.
        window: The offsets.
        launch: The framework's launch function.

    Returns:
        `int32 [K, M]`: for each row of `sites` the row of `keys` that it reads, or -1.
    """
    (count,), (asked,) = keys.high.shape, sites.high.shape
    last, near = window.kernel_size[-1], window.dilation[-1]
    (table,) = launch(
        kernels.search,
        [
            *(keys.high, keys.low, keys.rows, sites.high, sites.low, sites.rows, steps),
            *(count, asked, last, near, count.bit_length(), near.bit_length()),
            *((1,) * (3 - len(window.stride)) + window.stride),
        ],
        [((window.taps, asked), "int32")],
        (cdiv(asked, _SITES), window.taps // last),
        BLOCK=_SITES,
        num_warps=4,
    )
    return table


def forward(
    x: AnyArray,
    w: AnyArray,
    rows: RowTable[AnyArray],
    precision: str,
    config: TileConfig | None,
    splits: int | None,
    ordered: bool,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The convolution of contiguous arrays; the gradient of x is that of dy by transposed weights.

    Args:
        x: `[N, G C]`.
        w: `[K, G, C, F]`, of x's dtype.
        rows: The rows of x that each row of the output reads.
        precision: Triton's name for the precision of float32 products.
        config: Tiles, or None for the default ones of the shape.
        splits: The number of programs that share the offsets of a tile; None is one, or as many as
            fill a device.
        ordered: Whether tiles take the rows in their order, and skip offsets.
        launch: The framework's launch function.

    Returns:
        `[splits, M, G F]`, to be summed over the splits; in float32 where there are several.
    """
    taps, groups, channels, features = w.shape
    _, count = rows.table.shape
    config = config or _tiles(count, features, channels, x.dtype)
    config = config._replace(
        block_n=min(config.block_n, power_of_two(features)),
        block_k=min(config.block_k, power_of_two(channels)),
    )
    grid = cdiv(count, config.block_m) * cdiv(features, config.block_n), groups
    splits = min(splits or _splits(grid[0] * groups, taps), taps)
    (y,) = launch(
        kernels.conv,
        [x, w, rows.table, rows.order, rows.tile_masks, count],
        [((splits, count, groups * features), "float32" if splits > 1 else x.dtype)],
        (*grid, splits),
        **_sizes(w.shape, precision),
        ORDERED=ordered,
        SPLITS=splits,
        **launched(config),
    )
    return y


def weight_grad(
    x: AnyArray,
    dy: AnyArray,
    rows: RowTable[AnyArray],
    shape: Sequence[int],
    precision: str,
    config: TileConfig | None,
    pairs: int | None,
    launch: Launch[AnyArray],
) -> list[AnyArray]:
    """The transpose of the convolution in w, applied to dy.

    What reads through an offset is listed first, so that the sums of all offsets are divided into
    parts of equal length, however many rows read through each.

    Args:
        x: `[N, G C]`, contiguous.
        dy: `[M, G F]`, of x's dtype, contiguous.
        rows: See `forward`.
        shape: Shape of the weights, `[K, G, C, F]`.
        precision: See `forward`.
        config: See `forward`; here `block_m` counts channels of an offset, and `block_k` rows.
        pairs: 1 lists rows as they come, each by itself, for one offset after the other: nothing is
            summed that does not read, and the parts of all offsets read the same rows at about the
            same time, but the lists take memory: up to `_LISTS` of that of x, so that some offsets
            are listed, and summed, after others. 2 lists the rows that read through an offset or
            its mirror image: half as many lists, and dy is read once for the two. 0 lists tiles of
            rows in their order. None lists rows where there is memory for all offsets at once.
        launch: The framework's launch function.

    Returns:
        The gradient of the weights, of x's dtype, in pieces along the offsets.
    """
    taps, groups, channels, features = shape
    _, count = rows.table.shape
    wide = str(x.dtype).endswith("float32")
    size = x.shape[0] * x.shape[1] * (4 if wide else 2)
    at_once = max(1, int(_LISTS * size) // (4 * max(count, 1)))
    if pairs is None:
        pairs = 1 if taps <= at_once else 0
    # Indices of rows are loaded in two or three steps before the rows are: each is a stage.
    if config is None and wide:
        config = TileConfig(64, 128, 32, 4, 2, 5)
    elif config is None:
        half = power_of_two(channels) <= 64
        config = TileConfig(64, 128, 128, 2, 2, 4) if half else TileConfig(128, 128, 64, 2, 2, 5)
        # The sums of two offsets take the registers of twice as many warps.
        config = TileConfig(64, 128, 64, 4, 2, 7) if pairs == 2 else config
    config = config._replace(
        block_m=min(config.block_m, power_of_two(channels)),
        block_n=min(config.block_n, power_of_two(features)),
    )
    lists = cdiv(taps, pairs or 1)
    step = cdiv(lists, cdiv(lists, at_once)) if pairs else lists
    pieces: list[AnyArray] = []
    mirrored: list[AnyArray] = []
    after = rows.table
    for first in range(0, lists, step):
        some = min(step, lists - first), groups, channels, features
        found = (
            _pairs_of(rows, first, some[0], pairs == 2, after, launch)
            if pairs
            else _tiles_of(rows, launch)
        )
        after = _piece(x, dy, rows, first, found, some, precision, config, pairs, launch)
        pieces.append(after[0])
        if pairs == 2:
            # The offset in the middle is its own mirror image.
            middle = taps % 2 == 1 and first + step >= lists
            mirrored.append(after[1][1:] if middle else after[1])
    return pieces + mirrored[::-1]


def _piece(
    x: AnyArray,
    dy: AnyArray,
    rows: RowTable[AnyArray],
    first: int,
    found: list[AnyArray],
    shape: Sequence[int],
    precision: str,
    config: TileConfig,
    pairs: int,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The weights' gradient of some offsets from `first` on, from their lists of rows or tiles.

    Returns:
        `[1, *shape]`; where `pairs` is 2 `[2, *shape]`, the others being those of mirrored offsets.
    """
    taps, groups, channels, features = shape
    every, count = rows.table.shape
    tile, twins = 1 if pairs else TILE_ROWS, pairs == 2
    blocks = cdiv(channels, config.block_m) * cdiv(features, config.block_n)
    per = config.block_k // tile
    parts = _parts(taps, blocks * groups, cdiv(taps * count, config.block_k))
    sizes = _sizes(shape, precision) | {"TILE": tile}
    (sums,) = launch(
        kernels.weights,
        [x, dy, rows.table, rows.order, *found, first, every - 1, count],
        [((parts, 1 + twins, groups, channels, features), "float32")],
        (parts * blocks, groups),
        **sizes,
        ORDERED=not pairs,
        TWINS=twins,
        PARTS=parts,
        **launched(config),
    )
    size = groups * channels * features
    block = min(256, power_of_two(size))
    (dw,) = launch(
        kernels.sum_parts,
        [sums, found[1]],
        [((1 + twins, *shape), x.dtype)],
        (taps, cdiv(size, block), 1 + twins),
        K=taps,
        SIZE=size,
        PARTS=parts,
        PER=per,
        AT_ONCE=8,
        BLOCK=block,
        TWINS=twins,
        num_warps=4,
    )
    return dw


def _tiles(rows: int, features: int, channels: int, dtype: object) -> TileConfig:
    """The tiles that are taken unasked, as they measured best on an H200.

    Example:
        >>> _tiles(10**6, 128, 64, "bfloat16")
        TileConfig(block_m=128, block_n=128, block_k=64, ratio_m=2, ratio_n=2, stages=5)
    """
    found = tiles(rows, features, channels, dtype)
    # An index of a row is loaded before the row is, a stage each.
    return found._replace(ratio_m=2, ratio_n=2, stages=5) if found.block_k == 64 else found


def _tiles_of(rows: RowTable[AnyArray], launch: Launch[AnyArray]) -> list[AnyArray]:
    """For each offset the tiles that need it, `int32 [K, tiles]`, and their number, `[K]`."""
    taps, count = rows.table.shape
    listed = cdiv(count, TILE_ROWS)
    return launch(
        kernels.tile_lists,
        [rows.tile_masks, listed],
        [((taps, listed), "int32"), ((taps,), "int32")],
        (taps,),
        BLOCK=min(4096, power_of_two(listed)),
        num_warps=8,
    )


def _pairs_of(
    rows: RowTable[AnyArray],
    first: int,
    taps: int,
    twins: bool,
    after: AnyArray,
    launch: Launch[AnyArray],
) -> list[AnyArray]:
    """For each of some offsets from `first` on the rows that read through it, and their number.

    Args:
        rows: The rows.
        first: The first offset.
        taps: The number of offsets.
        twins: Whether rows that read through its mirror image are listed too.
        after: An array that is there before the lists are.
        launch: The framework's launch function.

    Returns:
        `int32 [taps, M]` and `[taps]`.
    """
    every, count = rows.table.shape
    block = min(4096, power_of_two(count))
    grid = cdiv(count, block), taps
    rest = {"BLOCK": block, "TWINS": twins, "num_warps": 8}
    which = first, every - 1, count
    (counts,) = launch(
        kernels.pair_counts,
        [rows.table, after, *which],
        [((taps, grid[0]), "int32")],
        grid,
        **rest,
    )
    return launch(
        kernels.pair_lists,
        [rows.table, counts, *which],
        [((taps, count), "int32"), ((taps,), "int32")],
        grid,
        AT_ONCE=512,
        **rest,
    )


def _parts(taps: int, blocks: int, steps: int) -> int:
    """The number of parts of the sums of a weight gradient, at least one more than offsets.

    Args:
        taps: Offsets.
        blocks: Programs of a part.
        steps: The most rows of all lists, by as many as a program sums at a time.

    Example:
        >>> _parts(27, 1, 10**6), _parts(27, 4, 10**6), _parts(27, 1, 100)
        (264, 132, 40)
    """
    # All run at once, or as many times as leaves each offset a few parts of equal length.
    waves = cdiv(3 * taps * blocks, _PROGRAMS)
    return taps + max(1, min(waves * _PROGRAMS // blocks - taps, cdiv(steps, 8)))


def _splits(programs: int, taps: int) -> int:
    """The number of splits of the offsets with which programs fill a device."""
    return max(1, min(_MOST_SPLITS, taps, _PROGRAMS // max(1, programs)))


def _sizes(weights: Sequence[int], precision: str) -> dict[str, object]:
    """The constants of a launch of the regular convolution."""
    taps, groups, channels, features = weights
    sizes: dict[str, object] = {"K": taps, "G": groups, "C": channels, "F": features}
    return sizes | {"TILE": TILE_ROWS, "PRECISION": precision}
