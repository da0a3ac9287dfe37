"""Voxels of a batch of samples: integer coordinates, a row of features each, padded to a capacity.

They are those of `pallas_kernels.sparse.voxels`, row by row. Only the first `num_valid` rows count.
What stands in the rows behind them is never read, and operators write zeros there.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from pallas_kernels.common.integers import checked_integer
from pallas_kernels.sparse.checks import (
    FULL,
    LIMIT,
    MOST_SAMPLES,
    OUTSIDE,
    POINT_REDUCTIONS,
    TWICE,
    check_faults,
    check_name,
    check_places,
    check_rows,
    checked_capacity,
    checked_samples,
    checked_voxel_size,
    per_axis,
    rounded_capacity,
)

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that features may have."""
MISSING = torch.iinfo(torch.int64).max
"""The key of a row that does not count: behind every key of a coordinate."""

_BITS = 18
"""Bits of an axis in a key."""


@dataclass(frozen=True, eq=False)
class Voxels:
    """A batch of sparse grids.

    It checks nothing: `from_coords`, `from_points`, `from_dense` and `from_list` do.

    Attributes:
        coords: `int32 [capacity, 1 + D]`: the sample, then one of 1, 2 or 3 axes each. Unique, in
            any order. Their unit is `tensor_stride` voxels of the finest grid.
        features: `[capacity, C]`.
        num_valid: `int32 []`; the rows behind the first so many do not count.
        overflow: `int32 []`: 0, or the sum of what went wrong in a compiled program, see `check`.
        batch_size: Samples, empty ones included.
        tensor_stride: Voxels of the finest grid along each axis of one of these.
    """

    coords: Tensor
    features: Tensor
    num_valid: Tensor
    overflow: Tensor
    batch_size: int
    tensor_stride: tuple[int, ...]

    @property
    def capacity(self) -> int:
        """The number of rows."""
        return self.coords.shape[0]

    @property
    def ndim(self) -> int:
        """The number of axes, D."""
        return self.coords.shape[1] - 1

    @property
    def valid(self) -> Tensor:
        """Whether a row counts, `bool [capacity]`."""
        return counted(self.coords, self.num_valid)

    def with_features(self, features: Tensor) -> "Voxels":
        """The same sites, and so the same kernel maps, with other features.

        Args:
            features: `[capacity, C]`.

        Raises:
            ValueError: Another number of rows.

        Example:
            >>> voxels = from_coords([[0, 1], [0, 4]], [[1.0], [2.0]], device="cpu")
            >>> voxels.with_features(voxels.features * 2).features.tolist()
            [[2.0], [4.0]]
        """
        check_rows(features.shape, self.capacity, "capacity")
        return dataclasses.replace(self, features=features)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Voxels":
        """The voxels on a device.

        Args:
            device: The device.
            non_blocking: As `torch.Tensor.to` takes it.

        Example:
            >>> from_coords([[0, 1]], [[1.0]]).to("cpu").coords.device
            device(type='cpu')
        """
        names = "coords", "features", "num_valid", "overflow"
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return dataclasses.replace(self, **moved)

    def check(self) -> "Voxels":
        """The voxels themselves, if nothing went wrong on their way.

        Call it outside of `torch.compile`: it waits for the device.

        Raises:
            ValueError: More voxels than a capacity, a coordinate beyond its limit, or one twice.

        Example:
            >>> from_coords([[0, 1], [0, 4]], [[1.0], [2.0]]).check().capacity
            2
        """
        check_faults(int(self.overflow), self.capacity)
        return self


def known(value: Tensor) -> bool:
    """Whether a tensor has values that one may wait for: no program is traced or captured.

    Example:
        >>> known(torch.zeros(2)), known(torch.zeros(2, device="meta"))
        (True, False)
    """
    if torch.compiler.is_compiling() or value.is_meta:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def counted(coords: Tensor, num_valid: Tensor) -> Tensor:
    """Whether a row counts, `bool [capacity]`."""
    return torch.arange(coords.shape[0], device=coords.device) < num_valid


def pack(coords: Tensor, valid: Tensor | None = None) -> Tensor:
    """The keys of coordinates: 9 bits of the sample and 18 of each of three axes, in that order.

    Keys order coordinates as tuples are ordered.

    Args:
        coords: Integers, `[..., 1 + D]`.
        valid: Whether they count, `bool [...]`; None: all.

    Returns:
        `int64 [...]`, `MISSING` where a coordinate does not count or lies beyond its limit.

    Example:
        >>> keys = pack(torch.tensor([[0, -131072], [0, -131071], [600, 0]]))
        >>> (keys[1] - keys[0]).item(), keys[2].item() == MISSING
        (1, True)
    """
    sample, *axes = coords.long().unbind(-1)
    return packed(sample, axes, valid)


def packed(sample: Tensor, axes: Sequence[Tensor], valid: Tensor | None = None) -> Tensor:
    """The keys of samples and axes, int64 of shapes that fit each other; see `pack`."""
    outside = (sample < 0) | (sample >= MOST_SAMPLES)
    # Of half the samples the keys are negative, so that the greatest number is left for the rest.
    key = (sample - MOST_SAMPLES // 2) << (3 * _BITS)
    for i, axis in enumerate(reversed(axes)):
        outside = outside | (axis < -LIMIT) | (axis >= LIMIT)
        key = key + ((axis + LIMIT) << (i * _BITS))
    if valid is not None:
        outside = outside | ~valid
    return key.masked_fill(outside, MISSING)


def unpack(keys: Tensor, ndim: int) -> Tensor:
    """The coordinates of keys, the inverse of `pack`.

    Args:
        keys: `int64 [N]`.
        ndim: Axes, D.

    Returns:
        `int32 [N, 1 + D]`; -1 where a key is missing.

    Example:
        >>> unpack(pack(torch.tensor([[3, -7, 5]])), 2).tolist()
        [[3, -7, 5]]
    """
    columns = [(keys >> (3 * _BITS)) + MOST_SAMPLES // 2]
    for i in reversed(range(ndim)):
        columns.append(((keys >> (i * _BITS)) & (2 * LIMIT - 1)) - LIMIT)
    found = torch.stack(columns, 1).int()
    return found.masked_fill((keys == MISSING)[:, None], -1)


def first_of_equals(keys: Tensor) -> Tensor:
    """Whether a sorted key is the first of its value, `bool [N]`; missing keys are not.

    Example:
        >>> first_of_equals(torch.tensor([4, 4, 7])).tolist()
        [True, False, True]
    """
    differs = torch.ones_like(keys, dtype=torch.bool)
    differs[1:] = keys[1:] != keys[:-1]
    return differs & (keys != MISSING)


class UniqueKeys(NamedTuple):
    """Different keys, sorted.

    Attributes:
        keys: `int64 [capacity]`, `MISSING` behind the last.
        total: `int32 []`, how many there are.
        overflow: `int32 []`, as `Voxels.overflow`: whether there were more.
    """

    keys: Tensor
    total: Tensor
    overflow: Tensor


def unique_keys(keys: Tensor, capacity: int) -> UniqueKeys:
    """The different ones among keys, as many as there is room for.

    Args:
        keys: `int64 [N]`.
        capacity: Rows of the result.

    Example:
        >>> found = unique_keys(pack(torch.tensor([[0, 7], [0, 2], [0, 7]])), 4)
        >>> unpack(found.keys, 1)[: found.total].tolist()
        [[0, 2], [0, 7]]
    """
    ordered = keys.sort().values
    ranks = first_of_equals(ordered).cumsum(0)
    count = ranks[-1:].sum()
    # Each looks for its own key: nothing is scattered, so nothing depends on an order.
    wanted = torch.arange(1, capacity + 1, device=keys.device)
    at = torch.searchsorted(ranks, wanted).clamp_(max=max(len(ordered) - 1, 0))
    padded = ordered if len(ordered) else ordered.new_full((1,), MISSING)
    found = padded[at].masked_fill(wanted > count, MISSING)
    overflow = (count > capacity).int() * FULL
    return UniqueKeys(found, count.clamp(max=capacity).int(), overflow)


def from_coords(
    coords: ArrayLike | Tensor,
    features: ArrayLike | Tensor,
    *,
    batch_size: int | None = None,
    capacity: int | None = None,
    tensor_stride: int | Sequence[int] = 1,
    device: torch.device | str | None = None,
) -> Voxels:
    """Voxels of unique integer coordinates.

    Args:
        coords: `[n, 1 + D]`, integers: the sample, then 1, 2 or 3 axes.
        features: `[n, C]`; float16, bfloat16, float32 or float64.
        batch_size: Samples; None takes the greatest of `coords`, plus one.
        capacity: Rows, at least n; None takes the power of two from n on.
        tensor_stride: Voxels of the finest grid along an axis of one of these.
        device: Where they are; None is where `features` is.

    Returns:
        The voxels in the same order.

    Raises:
        ValueError: A bad argument; for coordinates that are beyond their limits or there twice,
            which row. While a program is compiled, `overflow` tells.

    Example:
        >>> voxels = from_coords([[0, 1, 5], [0, 2, 5], [1, 0, 0]], [[1.0], [2.0], [3.0]])
        >>> voxels.capacity, voxels.num_valid.item(), voxels.batch_size
        (4, 3, 2)
    """
    x = floating(features, "features", device)
    places = _coords(coords, "coords", x.device)
    count, width = places.shape
    if not 2 <= width <= 4:
        shape = tuple(places.shape)
        raise ValueError(f"coords: expected [n, 1 + D] with 1 to 3 axes, got shape {shape}")
    check_rows(x.shape, count)
    concrete = known(places)
    if batch_size is None:
        if not concrete:
            raise ValueError("batch_size=None: expected a number where coords have no values")
        # One beyond the limit is told below, with its row.
        batch_size = min(int(places[:, 0].clamp(0).max()) + 1, MOST_SAMPLES) if count else 1
    samples = checked_samples(batch_size)
    rows = checked_capacity(capacity, count)
    faults = _faults(places, samples)
    if concrete and int(faults):
        # Tells the row.
        check_places(places.cpu().numpy(), samples)
    return Voxels(
        _padded(places.int(), rows, -1),
        _padded(x, rows, 0),
        torch.full((), count, dtype=torch.int32, device=x.device),
        faults,
        samples,
        per_axis(tensor_stride, "tensor_stride", width - 1),
    )


def from_list(
    samples: Sequence[tuple[ArrayLike | Tensor, ArrayLike | Tensor]],
    *,
    capacity: int | None = None,
    tensor_stride: int | Sequence[int] = 1,
    device: torch.device | str | None = None,
) -> Voxels:
    """Voxels of a list of samples of different lengths, some of which may be empty.

    Args:
        samples: For each its coordinates `[n, D]`, integers, and its features `[n, C]`.
        capacity: Rows; None takes the power of two from the number of voxels on.
        tensor_stride: Voxels of the finest grid along an axis of one of these.
        device: Where they are; None is where the first features are.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.

    Example:
        >>> empty = torch.zeros((0, 1), dtype=torch.int32), torch.zeros(0, 4)
        >>> voxels = from_list([([[1], [5]], torch.ones(2, 4)), empty])
        >>> voxels.coords.tolist(), voxels.batch_size
        ([[0, 1], [0, 5]], 2)
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    values = [floating(x, f"samples[{i}]", device) for i, (_, x) in enumerate(samples)]
    places = [
        _coords(coords, f"samples[{i}]", x.device)
        for i, ((coords, _), x) in enumerate(zip(samples, values, strict=True))
    ]
    ndim, dtype = places[0].shape[1], values[0].dtype
    for i, (one, rows) in enumerate(zip(places, values, strict=True)):
        if one.shape[1] != ndim or rows.dtype != dtype or rows.shape[:-1] != one.shape[:1]:
            raise ValueError(
                f"samples[{i}]: expected coordinates [n, {ndim}] and features [n, C] of {dtype}, "
                f"got shapes {tuple(one.shape)} and {tuple(rows.shape)} of {rows.dtype}"
            )
    numbers = [torch.full_like(one[:, :1], i) for i, one in enumerate(places)]
    coords = torch.cat([torch.cat(pair, 1) for pair in zip(numbers, places, strict=True)])
    return from_coords(
        coords,
        torch.cat(values),
        batch_size=len(samples),
        capacity=capacity,
        tensor_stride=tensor_stride,
    )


def to_list(voxels: Voxels) -> list[tuple[Tensor, Tensor]]:
    """For each sample its coordinates `[n, D]` and features `[n, C]`: what `from_list` undoes.

    Raises:
        ValueError: Something went wrong on the voxels' way, see `Voxels.check`.

    Example:
        >>> voxels = from_coords([[1, 5], [0, 2]], [[1.0], [2.0]])
        >>> [coords.tolist() for coords, _ in to_list(voxels)]
        [[[2]], [[5]]]
    """
    count = int(voxels.check().num_valid)
    coords, features = voxels.coords[:count], voxels.features[:count]
    samples = [coords[:, 0] == i for i in range(voxels.batch_size)]
    return [(coords[own, 1:], features[own]) for own in samples]


def from_dense(
    dense: ArrayLike | Tensor,
    *,
    occupied: ArrayLike | Tensor | None = None,
    capacity: int | None = None,
) -> Voxels:
    """The voxels of a dense grid, sorted.

    Args:
        dense: `[batch, *sizes, C]` of 1, 2 or 3 axes.
        occupied: `bool [batch, *sizes]`: which are there; None: those with a feature that is not 0.
        capacity: Rows; None takes the power of two from the number of voxels on.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.

    Example:
        >>> from_dense(torch.tensor([[[0.0], [3.0], [0.0], [4.0]]])).coords.tolist()
        [[0, 1], [0, 3]]
    """
    values = floating(dense, "dense")
    if not 3 <= values.ndim <= 5 or not 1 <= values.shape[0] <= MOST_SAMPLES:
        raise ValueError(
            f"dense: expected [batch, *sizes, C] of 1 to 3 axes and 1 to {MOST_SAMPLES} samples, "
            f"got shape {tuple(values.shape)}"
        )
    there = (values != 0).any(-1)
    if occupied is not None:
        there = torch.as_tensor(occupied, dtype=torch.bool, device=values.device)
    if there.shape != values.shape[:-1]:
        raise ValueError(
            f"occupied: expected shape {tuple(values.shape[:-1])}, got {tuple(there.shape)}"
        )
    found = there.nonzero()
    if capacity is not None and checked_integer(capacity, "capacity", least=1) < len(found):
        check_faults(FULL, capacity)
    return from_coords(
        found, values[found.unbind(1)], batch_size=values.shape[0], capacity=capacity
    )


def to_dense(voxels: Voxels, sizes: Sequence[int]) -> Tensor:
    """The dense grid `[batch, *sizes, C]`, zero where there is no voxel: what `from_dense` undoes.

    Args:
        voxels: The voxels; those that lie beyond the grid are left out.
        sizes: Its size along each axis, from coordinate 0 on.

    Raises:
        ValueError: Not one size for each axis.

    Example:
        >>> to_dense(from_coords([[0, 1], [0, 3]], [[5.0], [6.0]]), (4,))[0, :, 0].tolist()
        [0.0, 5.0, 0.0, 6.0]
    """
    shape = voxels.batch_size, *per_axis(tuple(sizes), "sizes", voxels.ndim)
    x, coords = voxels.features, voxels.coords.long()
    ends = torch.tensor(shape, device=coords.device)
    inside = voxels.valid & ((coords >= 0) & (coords < ends)).all(1)
    cells = 1
    for size in shape:
        cells *= size
    cell = torch.zeros_like(coords[:, 0])
    for size, column in zip(shape, coords.unbind(1), strict=True):
        cell = cell * size + column
    # The rows that are left out share a cell behind the last.
    cell = cell.masked_fill(~inside, cells)
    grid = x.new_zeros((cells + 1, x.shape[1])).index_put((cell,), x)
    return grid[:cells].reshape(*shape, x.shape[1])


def from_points(
    points: ArrayLike | Tensor,
    features: ArrayLike | Tensor,
    voxel_size: float | Sequence[float],
    *,
    samples: ArrayLike | Tensor | None = None,
    batch_size: int = 1,
    reduce: str = "mean",
    capacity: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Voxels, Tensor]:
    """The voxels that points fall into, sorted, and which voxel each point fell into.

    Args:
        points: `[n, D]`, real numbers; voxel i holds those from `i voxel_size` on.
        features: `[n, C]` of the points.
        voxel_size: The size of a voxel, one for all axes or one for each.
        samples: `[n]`, integers: the sample of each point; None: all are of the first.
        batch_size: Samples.
        reduce: What is made of the points of a voxel: "mean", "max", "sum" or "first", the one
            that comes first.
        capacity: Rows; None takes the power of two from n on.
        device: Where they are; None is where `features` is.

    Returns:
        The voxels, and `int32 [n]`, for `to_points`.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected; a point that is not
            finite or falls beyond the grid, and more voxels than `capacity`.

    Example:
        >>> voxels, rows = from_points([[0.5], [2.5], [2.75]], [[1.0], [2.0], [4.0]], 1.0)
        >>> voxels.coords[:2].tolist(), voxels.features[:2].tolist(), rows.tolist()
        ([[0, 0], [0, 2]], [[1.0], [3.0]], [0, 1, 1])
    """
    x = floating(features, "features", device)
    at = floating(points, "points", x.device)
    if at.ndim != 2 or not 1 <= at.shape[1] <= 3:
        raise ValueError(f"points: expected [n, D] of 1 to 3 axes, got shape {tuple(at.shape)}")
    check_rows(x.shape, at.shape[0])
    check_name(reduce, "reduce", POINT_REDUCTIONS)
    size = checked_voxel_size(voxel_size, at.shape[1])
    batch = checked_samples(batch_size)
    own = torch.zeros(at.shape[:1], dtype=torch.int64, device=x.device)
    if samples is not None:
        own = _integers(samples, "samples", x.device)
    if own.shape != at.shape[:1]:
        raise ValueError(
            f"samples: expected [n] of {at.shape[0]} rows, got shape {tuple(own.shape)}"
        )
    wide = at.to(accumulation_dtype(at.dtype))
    cells = (wide / torch.as_tensor(size, dtype=wide.dtype, device=wide.device)).floor()
    fits = (cells >= -LIMIT) & (cells < LIMIT)
    inside = fits.all(1) & (own >= 0) & (own < batch)
    if known(inside) and not bool(inside.all()):
        row = int(inside.int().argmin())
        raise ValueError(
            f"points: row {row} is {at[row].tolist()} of sample {int(own[row])}; expected finite "
            f"numbers that fall into voxels {-LIMIT} to {LIMIT - 1}, and samples 0 to {batch - 1}"
        )
    rows = rounded_capacity(at.shape[0])
    if capacity is not None:
        rows = checked_integer(capacity, "capacity", least=1)
    places = torch.cat([own[:, None], cells.masked_fill(~fits, 0).long()], 1)
    keys = pack(places, inside)
    found = unique_keys(keys, rows)
    place = torch.searchsorted(found.keys, keys).int()
    place = place.masked_fill((keys == MISSING) | (place >= rows), -1)
    voxels = Voxels(
        unpack(found.keys, at.shape[1]),
        _reduced(x, place, rows, reduce),
        found.total,
        found.overflow | (~inside.all()).int() * OUTSIDE,
        batch,
        (1,) * at.shape[1],
    )
    return voxels.check() if known(voxels.overflow) else voxels, place


def to_points(voxels: Voxels, rows: Tensor) -> Tensor:
    """For each point the features of the voxel that it fell into, zeros for a point that fell out.

    Args:
        voxels: Voxels with the sites that `from_points` returned.
        rows: The rows that it returned beside them, `int32 [n]`.

    Returns:
        `[n, C]`.

    Example:
        >>> voxels, rows = from_points([[0.5], [2.5], [2.75]], [[1.0], [2.0], [4.0]], 1.0)
        >>> to_points(voxels, rows).tolist()
        [[1.0], [3.0], [3.0]]
    """
    # The gradient of an embedding has a fixed order, unlike that of an index.
    found = functional.embedding(rows.clamp(min=0).long(), voxels.features)
    return found.masked_fill((rows < 0)[:, None], 0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float32, or float64 for a float64.

    Example:
        >>> accumulation_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def floating(
    value: ArrayLike | Tensor, name: str, device: torch.device | str | None = None
) -> Tensor:
    """A floating-point argument as a tensor.

    Raises:
        ValueError: It is no array, or its dtype is none that features may have.

    Example:
        >>> floating([1.0, 2.0], "features").shape
        torch.Size([2])
    """
    try:
        x = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}") from None
    if x.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise ValueError(
            f"{name}: expected a floating-point tensor ({names}), got {x.dtype}; cast it first"
        )
    return x


def _integers(array: ArrayLike | Tensor, name: str, device: torch.device, hint: str = "") -> Tensor:
    """Integers of 64 bits, so that none is cut to 32."""
    try:
        found = torch.as_tensor(array, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected a tensor, got {type(array).__name__}") from None
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not integers and found.numel():
        raise ValueError(f"{name}: expected integers, got {found.dtype}{hint}")
    return found.long()


def _coords(coords: ArrayLike | Tensor, name: str, device: torch.device) -> Tensor:
    """Coordinates as `int64 [n, width]`."""
    places = _integers(coords, name, device, "; from_points takes floats")
    if places.ndim != 2:
        raise ValueError(f"{name}: expected [n, 1 + D], got shape {tuple(places.shape)}")
    return places


def _padded(value: Tensor, rows: int, fill: int) -> Tensor:
    """A tensor with more rows."""
    return functional.pad(value, (0, 0, 0, rows - value.shape[0]), value=fill)


def _faults(coords: Tensor, samples: int) -> Tensor:
    """The faults of coordinates, as `Voxels.overflow` says them."""
    keys = pack(coords)
    outside = (keys == MISSING) | (coords[:, 0] >= samples)
    ordered = keys.sort().values
    twice = (ordered != MISSING) & ~first_of_equals(ordered)
    return outside.any().int() * OUTSIDE + twice.any().int() * TWICE


def _reduced(x: Tensor, place: Tensor, rows: int, reduce: str) -> Tensor:
    """The rows of x that share a place as one each, `[rows, C]`; no sum depends on threads."""
    if not len(x):
        return x.new_zeros((rows, x.shape[1]))
    ordered, order = place.sort(stable=True)
    bounds = torch.arange(rows + 1, device=place.device, dtype=place.dtype)
    starts = torch.searchsorted(ordered, bounds)
    empty = (starts[1:] == starts[:-1])[:, None]
    if reduce == "first":
        chosen = order[starts[:-1].clamp(max=len(order) - 1)]
        return functional.embedding(chosen, x).masked_fill(empty, 0)
    wide = functional.embedding(order, x.to(accumulation_dtype(x.dtype)))
    found = torch.segment_reduce(wide, reduce, offsets=starts, axis=0)
    return found.masked_fill(empty, 0).to(x.dtype)
