"""Voxels of a batch of samples: integer coordinates, a row of features each, padded to a capacity.

Only the first `num_valid` rows count. What stands in the rows behind them is never read, and
operators write zeros there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.arguments import checked_array
from pallas_kernels.common.device import platform
from pallas_kernels.common.dtypes import accumulation_dtype
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

_MISSING = np.uint32(0xFFFFFFFF)
"""Both halves of the key of a row that does not count: behind every key of 63 bits."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Voxels:
    """A batch of sparse grids, a pytree.

    It checks nothing: `from_coords`, `from_points`, `from_dense` and `from_list` do.

    Attributes:
        coords: `int32 [capacity, 1 + D]`: the sample, then one of 1, 2 or 3 axes each. Unique, in
            any order. Their unit is `tensor_stride` voxels of the finest grid.
        features: `[capacity, C]`.
        num_valid: `int32 []`; the rows behind the first so many do not count.
        overflow: `int32 []`: 0, or the sum of what went wrong under `jax.jit`, see `check`.
        batch_size: Samples, empty ones included.
        tensor_stride: Voxels of the finest grid along each axis of one of these.
    """

    coords: jax.Array
    features: jax.Array
    num_valid: jax.Array
    overflow: jax.Array
    batch_size: int = dataclasses.field(metadata={"static": True})
    tensor_stride: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """The number of rows."""
        return self.coords.shape[0]

    @property
    def ndim(self) -> int:
        """The number of axes, D."""
        return self.coords.shape[1] - 1

    @property
    def valid(self) -> jax.Array:
        """Whether a row counts, `bool [capacity]`."""
        return lax.iota(jnp.int32, self.capacity) < self.num_valid

    def with_features(self, features: jax.Array) -> "Voxels":
        """The same sites, and so the same kernel maps, with other features.

        Args:
            features: `[capacity, C]`.

        Raises:
            ValueError: Another number of rows.

        Example:
            >>> voxels = from_coords([[0, 1], [0, 4]], [[1.0], [2.0]])
            >>> voxels.with_features(voxels.features * 2).features.tolist()
            [[2.0], [4.0]]
        """
        check_rows(features.shape, self.capacity, "capacity")
        return dataclasses.replace(self, features=features)

    def check(self) -> "Voxels":
        """The voxels themselves, if nothing went wrong on their way.

        Call it outside of `jax.jit`, where the number has a value.

        Raises:
            ValueError: More voxels than a capacity, a coordinate beyond its limit, or one twice.

        Example:
            >>> from_coords([[0, 1], [0, 4]], [[1.0], [2.0]]).check().capacity
            2
        """
        check_faults(int(self.overflow), self.capacity)
        return self


class Keys(NamedTuple):
    """Coordinates as sorted keys, and the rows that they come from.

    Attributes:
        high: `uint32 [N]`, the upper 32 of 63 bits.
        low: `uint32 [N]`, the lower 31 bits.
        rows: `int32 [N]`, where a key stood before it was sorted.
    """

    high: jax.Array
    low: jax.Array
    rows: jax.Array


def is_missing(high: jax.Array, low: jax.Array) -> jax.Array:
    """Whether keys are those of no voxel: all ones.

    Example:
        >>> is_missing(*pack(jnp.array([[0, 1], [0, 131072]]))).tolist()
        [False, True]
    """
    return (high & low) == _MISSING


def pack(coords: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The keys of coordinates: 9 bits of the sample and 18 of each of three axes, in that order.

    Keys order coordinates as tuples are ordered.

    Args:
        coords: `int32 [..., 1 + D]`.
        valid: Whether they count, `bool [...]`; None: all.

    Returns:
        The upper and the lower half, `uint32 [...]`, all ones where a coordinate does not count or
        lies beyond its limit.

    Example:
        >>> high, low = pack(jnp.array([[0, 0, 0, -131072], [0, 0, 0, -131071], [600, 0, 0, 0]]))
        >>> (low[1] - low[0]).item(), hex(high[2])
        (1, '0xffffffff')
    """
    sample, *axes = (coords[..., i] for i in range(coords.shape[-1]))
    axes = [jnp.zeros_like(sample)] * (3 - len(axes)) + [axis + LIMIT for axis in axes]
    inside = (sample >= 0) & (sample < MOST_SAMPLES)
    for axis in axes:
        inside &= (axis >= 0) & (axis < 2 * LIMIT)
    if valid is not None:
        inside &= valid
    b, x, y, z = (each.astype(jnp.uint32) for each in (sample, *axes))
    high = (b << 23) | (x << 5) | (y >> 13)
    low = ((y & 0x1FFF) << 18) | z
    return jnp.where(inside, high, _MISSING), jnp.where(inside, low, _MISSING)


def unpack(high: jax.Array, low: jax.Array, ndim: int) -> jax.Array:
    """The coordinates of keys, the inverse of `pack`.

    Args:
        high: Upper halves, `uint32 [N]`.
        low: Lower halves.
        ndim: Axes, D.

    Returns:
        `int32 [N, 1 + D]`; -1 where a key is missing.

    Example:
        >>> unpack(*pack(jnp.array([[3, -7, 5]])), 2).tolist()
        [[3, -7, 5]]
    """
    x, z = (high >> 5) & 0x3FFFF, low & 0x3FFFF
    y = ((high & 0x1F) << 13) | (low >> 18)
    axes = [axis.astype(jnp.int32) - LIMIT for axis in (x, y, z)]
    columns = [(high >> 23).astype(jnp.int32), *axes[3 - ndim :]]
    missing = is_missing(high, low)
    return jnp.where(missing[:, None], -1, jnp.stack(columns, 1))


def sort_keys(high: jax.Array, low: jax.Array) -> Keys:
    """The keys in their order: a radix sort, by the lower half, then by the upper, both stable.

    Example:
        >>> sort_keys(jnp.array([2, 1, 1], "uint32"), jnp.array([0, 5, 4], "uint32")).rows.tolist()
        [2, 1, 0]
    """
    if platform() == "tpu":
        order = stable_order(jnp.stack([low, high]))
        return Keys(high[order], low[order], order)
    rows = vary_like((high, low), lax.iota(jnp.int32, high.shape[0]))
    low, first = lax.sort((low, rows), num_keys=1, is_stable=True)
    high, second = lax.sort((high[first], rows), num_keys=1, is_stable=True)
    return Keys(high, low[second], first[second])


def keys_in_order(high: jax.Array, low: jax.Array) -> Keys:
    """The keys in their order, as `sort_keys`; the device sorts none that are in order already.

    Example:
        >>> keys_in_order(jnp.array([1, 1], "uint32"), jnp.array([4, 5], "uint32")).rows.tolist()
        [0, 1]
    """
    rows = vary_like((high, low), lax.iota(jnp.int32, high.shape[0]))
    falls = (high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))
    return lax.cond(falls.any(), sort_keys, lambda high, low: Keys(high, low, rows), high, low)


def stable_order(words: jax.Array) -> jax.Array:
    """The order of numbers of several words each, `int32 [N]`; of equal ones the first comes first.

    Args:
        words: `uint32 [words, N]`, the word that counts least first.

    Example:
        >>> stable_order(jnp.array([[0, 5, 4], [2, 1, 1]], "uint32")).tolist()
        [2, 1, 0]
    """
    rows = vary_like(words, lax.iota(jnp.int32, words.shape[1]))
    if platform() != "tpu":
        _, order = lax.sort((words[0], rows), num_keys=1, is_stable=True)
        for word in words[1:]:
            _, moved = lax.sort((word[order], rows), num_keys=1, is_stable=True)
            order = order[moved]
        return order

    def sort(order: jax.Array, word: jax.Array) -> tuple[jax.Array, None]:
        # Of equal words the rows decide. A stable sort is the same, but a third operand to XLA.
        _, moved = lax.sort((word[order], rows), num_keys=2, is_stable=False)
        return order[moved], None

    # One sort for all words: of a million rows XLA compiles each for a TPU for a minute.
    return lax.scan(sort, rows, words)[0]


def first_of_equals(keys: Keys) -> jax.Array:
    """Whether a sorted key is the first of its value, `bool [N]`; missing keys are not.

    Example:
        >>> high, low = jnp.array([1, 1, 2], "uint32"), jnp.array([5, 5, 5], "uint32")
        >>> first_of_equals(sort_keys(high, low)).tolist()
        [True, False, True]
    """
    high, low, _ = keys
    differs = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return jnp.pad(differs, (1, 0), constant_values=True) & ~is_missing(high, low)


class UniqueKeys(NamedTuple):
    """Different keys, sorted.

    Attributes:
        high: `uint32 [capacity]`, the upper halves, all ones behind the last.
        low: `uint32 [capacity]`, the lower halves, likewise.
        total: `int32 []`, how many there are.
        overflow: `int32 []`, as `Voxels.overflow`: whether there were more.
    """

    high: jax.Array
    low: jax.Array
    total: jax.Array
    overflow: jax.Array


def unique_keys(high: jax.Array, low: jax.Array, capacity: int) -> UniqueKeys:
    """The different ones among keys, as many as there is room for.

    Args:
        high: Upper halves, `uint32 [N]`.
        low: Lower halves.
        capacity: Rows of the result.

    Example:
        >>> found = unique_keys(*pack(jnp.array([[0, 7], [0, 2], [0, 7]])), 4)
        >>> unpack(found.high, found.low, 1)[: found.total].tolist()
        [[0, 2], [0, 7]]
    """
    keys = sort_keys(high, low)
    first = first_of_equals(keys)
    count = first.sum(dtype=jnp.int32)
    # A place of its own for each: nothing is added up, so nothing depends on an order.
    place = jnp.where(first, jnp.cumsum(first, dtype=jnp.int32) - 1, capacity)
    empty = vary_like((high, low), jnp.full((capacity,), _MISSING))
    high, low = (empty.at[place].set(half, mode="drop") for half in keys[:2])
    overflow = jnp.where(count > capacity, FULL, 0).astype(jnp.int32)
    return UniqueKeys(high, low, jnp.minimum(count, capacity), overflow)


def from_coords(
    coords: ArrayLike,
    features: ArrayLike,
    *,
    batch_size: int | None = None,
    capacity: int | None = None,
    tensor_stride: int | Sequence[int] = 1,
) -> Voxels:
    """Voxels of unique integer coordinates.

    Args:
        coords: `[n, 1 + D]`, integers: the sample, then 1, 2 or 3 axes.
        features: `[n, C]`; float16, bfloat16, float32 or float64.
        batch_size: Samples; None takes the greatest of `coords`, plus one.
        capacity: Rows, at least n; None takes the power of two from n on.
        tensor_stride: Voxels of the finest grid along an axis of one of these.

    Returns:
        The voxels in the same order.

    Raises:
        ValueError: A bad argument; for coordinates that are beyond their limits or there twice,
            which row. Under `jax.jit`, where they have no values, `overflow` tells.

    Example:
        >>> voxels = from_coords([[0, 1, 5], [0, 2, 5], [1, 0, 0]], [[1.0], [2.0], [3.0]])
        >>> voxels.capacity, voxels.num_valid.item(), voxels.batch_size
        (4, 3, 2)
    """
    features = checked_array(features, "features")
    places = _checked_coords(coords, "coords")
    count, width = places.shape
    if not 2 <= width <= 4:
        raise ValueError(f"coords: expected [n, 1 + D] with 1 to 3 axes, got shape {places.shape}")
    check_rows(features.shape, count)
    concrete = not isinstance(places, jax.core.Tracer)
    if batch_size is None:
        if not concrete:
            raise ValueError("batch_size=None: expected a number where coords have no values")
        # One beyond the limit is told below, with its row.
        batch_size = min(int(np.asarray(places)[:, 0].max(initial=0)) + 1, MOST_SAMPLES)
    samples = checked_samples(batch_size)
    rows = checked_capacity(capacity, count)
    if concrete:
        check_places(np.asarray(places), samples)
    places = _padded(places.astype(jnp.int32), rows, -1)
    valid = lax.iota(jnp.int32, rows) < count
    return Voxels(
        places,
        _padded(features, rows, 0),
        jnp.asarray(count, jnp.int32),
        jnp.zeros((), jnp.int32) if concrete else _faults(places, valid, samples),
        samples,
        per_axis(tensor_stride, "tensor_stride", width - 1),
    )


def from_list(
    samples: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    capacity: int | None = None,
    tensor_stride: int | Sequence[int] = 1,
) -> Voxels:
    """Voxels of a list of samples of different lengths, some of which may be empty.

    Args:
        samples: For each its coordinates `[n, D]`, integers, and its features `[n, C]`.
        capacity: Rows; None takes the power of two from the number of voxels on.
        tensor_stride: Voxels of the finest grid along an axis of one of these.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.

    Example:
        >>> empty = np.zeros((0, 1), int), np.zeros((0, 4))
        >>> voxels = from_list([([[1], [5]], np.ones((2, 4))), empty])
        >>> voxels.coords.tolist(), voxels.batch_size
        ([[0, 1], [0, 5]], 2)
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    places = [_checked_coords(coords, f"samples[{i}]") for i, (coords, _) in enumerate(samples)]
    values = [checked_array(features, f"samples[{i}]") for i, (_, features) in enumerate(samples)]
    for i, (one, rows) in enumerate(zip(places, values, strict=True)):
        ndim, dtype = places[0].shape[1], values[0].dtype
        if one.shape[1] != ndim or rows.shape != (one.shape[0], *values[0].shape[1:]):
            raise ValueError(
                f"samples[{i}]: expected coordinates [n, {ndim}] and features of n rows and shape "
                f"{values[0].shape[1:]}, got {one.shape} and {rows.shape}"
            )
        if rows.dtype != dtype:
            raise ValueError(f"samples[{i}]: expected features of {dtype}, got {rows.dtype}")
    stacked = isinstance(places[0], jax.core.Tracer)
    xp = jnp if stacked else np
    numbered = [xp.pad(one, ((0, 0), (1, 0)), constant_values=i) for i, one in enumerate(places)]
    return from_coords(
        xp.concatenate(numbered),
        jnp.concatenate(values),
        batch_size=len(samples),
        capacity=capacity,
        tensor_stride=tensor_stride,
    )


def to_list(voxels: Voxels) -> list[tuple[np.ndarray, np.ndarray]]:
    """The coordinates and features of each sample, the inverse of `from_list`; not under `jax.jit`.

    Example:
        >>> voxels = from_coords([[1, 5], [0, 2]], [[1.0], [2.0]])
        >>> [coords.tolist() for coords, _ in to_list(voxels)]
        [[[2]], [[5]]]
    """
    count = int(voxels.check().num_valid)
    coords, features = (np.asarray(array)[:count] for array in (voxels.coords, voxels.features))
    samples = [coords[:, 0] == i for i in range(voxels.batch_size)]
    return [(coords[own, 1:], features[own]) for own in samples]


def from_dense(
    dense: ArrayLike, *, occupied: ArrayLike | None = None, capacity: int | None = None
) -> Voxels:
    """The voxels of a dense grid, sorted.

    Args:
        dense: `[batch, *sizes, C]` of 1, 2 or 3 axes.
        occupied: `bool [batch, *sizes]`: which are there; None: those with a feature that is not 0.
        capacity: Rows; None takes the power of two from the number of voxels on, which has no
            value under `jax.jit`.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.

    Example:
        >>> from_dense(jnp.array([[[0.0], [3.0], [0.0], [4.0]]])).coords.tolist()
        [[0, 1], [0, 3]]
    """
    values = checked_array(dense, "dense")
    if not 3 <= values.ndim <= 5 or not 1 <= values.shape[0] <= MOST_SAMPLES:
        raise ValueError(
            f"dense: expected [batch, *sizes, C] of 1 to 3 axes and 1 to {MOST_SAMPLES} samples, "
            f"got shape {values.shape}"
        )
    there = (values != 0).any(-1) if occupied is None else jnp.asarray(occupied, bool)
    if there.shape != values.shape[:-1]:
        raise ValueError(f"occupied: expected shape {values.shape[:-1]}, got {there.shape}")
    total = there.sum(dtype=jnp.int32)
    if capacity is None:
        if isinstance(total, jax.core.Tracer):
            raise ValueError("capacity=None: expected a number under jax.jit")
        capacity = rounded_capacity(int(total))
    rows = checked_integer(capacity, "capacity", least=1)
    found = jnp.nonzero(there, size=rows, fill_value=0)
    valid = lax.iota(jnp.int32, rows) < total
    coords = jnp.stack([axis.astype(jnp.int32) for axis in found], 1)
    voxels = Voxels(
        jnp.where(valid[:, None], coords, -1),
        jnp.where(valid[:, None], values[found], 0),
        jnp.minimum(total, rows),
        jnp.where(total > rows, FULL, 0).astype(jnp.int32),
        values.shape[0],
        (1,) * (values.ndim - 2),
    )
    return voxels if isinstance(total, jax.core.Tracer) else voxels.check()


def to_dense(voxels: Voxels, sizes: Sequence[int]) -> jax.Array:
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
    shape = per_axis(tuple(sizes), "sizes", voxels.ndim)
    grid = jnp.zeros((voxels.batch_size, *shape, voxels.features.shape[1]), voxels.features.dtype)
    inside = voxels.valid & (voxels.coords >= 0).all(1)
    places = jnp.where(inside[:, None], voxels.coords, np.iinfo(np.int32).max)
    return grid.at[tuple(places.T)].set(voxels.features, mode="drop")


def from_points(
    points: ArrayLike,
    features: ArrayLike,
    voxel_size: float | Sequence[float],
    *,
    samples: ArrayLike | None = None,
    batch_size: int = 1,
    reduce: str = "mean",
    capacity: int | None = None,
) -> tuple[Voxels, jax.Array]:
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

    Returns:
        The voxels, and `int32 [n]`, for `to_points`.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected; outside of `jax.jit`
            also a point that is not finite or falls beyond the grid, and more voxels than
            `capacity`.

    Example:
        >>> voxels, rows = from_points([[0.5], [2.5], [2.75]], [[1.0], [2.0], [4.0]], 1.0)
        >>> voxels.coords[:2].tolist(), voxels.features[:2].tolist(), rows.tolist()
        ([[0, 0], [0, 2]], [[1.0], [3.0]], [0, 1, 1])
    """
    at, x = checked_array(points, "points"), checked_array(features, "features")
    if at.ndim != 2 or not 1 <= at.shape[1] <= 3:
        raise ValueError(f"points: expected [n, D] of 1 to 3 axes, got shape {at.shape}")
    check_rows(x.shape, at.shape[0])
    check_name(reduce, "reduce", POINT_REDUCTIONS)
    size = checked_voxel_size(voxel_size, at.shape[1])
    batch = checked_integer(batch_size, "batch_size", least=1)
    own = _checked_samples(samples, at.shape[0])
    if own.shape != at.shape[:1] or batch > MOST_SAMPLES:
        raise ValueError(
            f"samples: expected [n] of {at.shape[0]} rows and up to {MOST_SAMPLES} samples, got "
            f"shape {own.shape} and batch_size={batch}"
        )
    cells = jnp.floor(at.astype(accumulation_dtype(at.dtype)) / size)
    fits = (cells >= -LIMIT) & (cells < LIMIT)
    inside = fits.all(1) & (own >= 0) & (own < batch)
    if not isinstance(inside, jax.core.Tracer) and not inside.all():
        row = int(jnp.argmin(inside))
        raise ValueError(
            f"points: row {row} is {at[row].tolist()} of sample {own[row]}; expected finite "
            f"numbers that fall into voxels {-LIMIT} to {LIMIT - 1}, and samples 0 to {batch - 1}"
        )
    rows = rounded_capacity(at.shape[0])
    if capacity is not None:
        rows = checked_integer(capacity, "capacity", least=1)
    places = jnp.concatenate([own[:, None], jnp.where(fits, cells, 0).astype(jnp.int32)], 1)
    voxels, place = _merged(places, inside, x, rows, batch, reduce)
    if not isinstance(voxels.overflow, jax.core.Tracer):
        voxels.check()
    return voxels, place


@partial(jax.jit, static_argnums=(3, 4, 5))
def _merged(
    places: jax.Array, inside: jax.Array, x: jax.Array, rows: int, batch: int, reduce: str
) -> tuple[Voxels, jax.Array]:
    """The voxels of points whose places are known, and the row of each point."""
    ndim = places.shape[1] - 1
    keys = sort_keys(*pack(places, inside))
    found = unique_keys(keys.high, keys.low, rows)
    ranks = jnp.cumsum(first_of_equals(keys), dtype=jnp.int32) - 1
    known = ~is_missing(keys.high, keys.low) & (ranks < rows)
    place = jnp.zeros_like(keys.rows).at[keys.rows].set(jnp.where(known, ranks, -1))
    voxels = Voxels(
        unpack(found.high, found.low, ndim),
        _reduced(x, place, rows, reduce),
        found.total,
        found.overflow | jnp.where(inside.all(), 0, OUTSIDE),
        batch,
        (1,) * ndim,
    )
    return voxels, place


def to_points(voxels: Voxels, rows: jax.Array) -> jax.Array:
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
    return spread(voxels.features, rows)


def _reduced(x: jax.Array, place: jax.Array, rows: int, reduce: str) -> jax.Array:
    """The rows of x that share a place as one each, `[rows, C]`."""
    acc = accumulation_dtype(x.dtype)
    if reduce in ("sum", "mean"):
        total = _segment_sum(x.astype(acc), place, rows)
        if reduce == "mean":
            ones = jnp.ones((len(place), 1), acc)
            total = total / jnp.maximum(_segment_sum(ones, place, rows), 1)
        return total.astype(x.dtype)
    order, first, last, there = _segments(place, rows)
    if reduce == "first":
        return jnp.where(there[:, None], x[order[first]], 0)
    return jnp.where(there[:, None], _scanned(jnp.maximum, x[order], place[order])[last], 0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _segment_sum(x: jax.Array, place: jax.Array, rows: int) -> jax.Array:
    """The sum of the rows of x that share a place, in their order: nothing is scattered."""
    order, _, last, there = _segments(place, rows)
    return jnp.where(there[:, None], _scanned(jnp.add, x[order], place[order])[last], 0)


def _segment_sum_fwd(x: jax.Array, place: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    return _segment_sum(x, place, rows), place


def _segment_sum_bwd(rows: int, place: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
    return spread(dy, place), None


_segment_sum.defvjp(_segment_sum_fwd, _segment_sum_bwd)


@jax.custom_vjp
def spread(x: jax.Array, place: jax.Array) -> jax.Array:
    """The rows of x at some places, zeros for -1: the transpose of `_segment_sum`."""
    return x.at[place].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _spread_fwd(x: jax.Array, place: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return spread(x, place), (x[:, :0], place)


def _spread_bwd(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, None]:
    empty, place = kept
    return _segment_sum(dy, place, len(empty)), None


spread.defvjp(_spread_fwd, _spread_bwd)


def _segments(place: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The order by place, and for each place its first and its last row there, if there is one."""
    order = jnp.argsort(place, stable=True)
    ordered = place[order]
    wanted = lax.iota(jnp.int32, rows)
    first = jnp.searchsorted(ordered, wanted, side="left")
    last = jnp.searchsorted(ordered, wanted, side="right")
    return order, first, last - 1, last > first


def _scanned(
    combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, place: jax.Array
) -> jax.Array:
    """All rows of the same place up to each row, combined; the same places are neighbours."""
    starts = jnp.pad(place[1:] != place[:-1], (1, 0), constant_values=True)[:, None]

    def step(
        one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (a, begun), (b, begins) = one, other
        return jnp.where(begins, b, combine(a, b)), begun | begins

    return lax.associative_scan(step, (x, starts))[0]


def _checked_integers(array: ArrayLike, name: str, hint: str = "") -> jax.Array | np.ndarray:
    """Integers, of NumPy where they have values, so that none is cut to 32 bits."""
    if isinstance(array, jax.core.Tracer):
        found: jax.Array | np.ndarray = array
    else:
        try:
            found = np.asarray(array)
        except ValueError:
            raise ValueError(f"{name}: expected an array, got {type(array).__name__}") from None
    if not jnp.issubdtype(found.dtype, jnp.integer) and found.size:
        raise ValueError(f"{name}: expected integers, got {found.dtype}{hint}")
    return found


def _checked_coords(coords: ArrayLike, name: str) -> jax.Array | np.ndarray:
    """Integers `[n, width]`; see `_checked_integers`."""
    places = _checked_integers(coords, name, "; from_points takes floats")
    if places.ndim != 2:
        raise ValueError(f"{name}: expected [n, 1 + D], got shape {places.shape}")
    return places


def _checked_samples(samples: ArrayLike | None, count: int) -> jax.Array:
    """The sample of each point, `int32 [n]`; one that has no room there is beyond every limit."""
    if samples is None:
        return jnp.zeros((count,), jnp.int32)
    own = _checked_integers(samples, "samples")
    if isinstance(own, np.ndarray):
        own = np.clip(own.astype(np.int64), -1, np.iinfo(np.int32).max)
    return jnp.asarray(own, jnp.int32)


def _padded(array: jax.Array | np.ndarray, rows: int, fill: int) -> jax.Array:
    """An array with more rows."""
    pads = ((0, rows - array.shape[0]), (0, 0))
    return jnp.pad(jnp.asarray(array), pads, constant_values=fill)


def _faults(coords: jax.Array, valid: jax.Array, samples: int) -> jax.Array:
    """The faults of coordinates, as `Voxels.overflow` says them."""
    high, low = pack(coords, valid)
    outside = valid & (is_missing(high, low) | (coords[:, 0] >= samples))
    keys = sort_keys(high, low)
    known = ~is_missing(keys.high, keys.low)
    twice = known & ~first_of_equals(keys)
    return (jnp.where(outside.any(), OUTSIDE, 0) + jnp.where(twice.any(), TWICE, 0)).astype(
        jnp.int32
    )
