"""Kernel maps: which row of the input each row of the output reads through each offset.

Coordinates are keys of 63 bits, radix-sorted and searched: no hash table, no atomics, and nothing
that depends on an order in which threads run. All of it is plain JAX, but for the search where the
convolution's Triton kernels run, and works under `jax.jit`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.common import sharding
from pallas_kernels.common._compat import trace_state, vary_like
from pallas_kernels.common.device import platform
from pallas_kernels.common.integers import checked_integer
from pallas_kernels.sparse.checks import LIMIT, OUTSIDE, checked_request, checked_window
from pallas_kernels.sparse.operators import OPERATOR
from pallas_kernels.sparse.problem import TILE_ROWS, Problem, Window
from pallas_kernels.sparse.voxels import (
    Keys,
    UniqueKeys,
    Voxels,
    is_missing,
    keys_in_order,
    pack,
    stable_order,
    unique_keys,
    unpack,
)

_QUERIES_AT_ONCE = 1 << 24
"""Keys that are searched, or sorted, at once; more take turns."""
_MOST_STEPS = 4
"""Voxels between two offsets of the last axis that are passed one by one, not searched anew."""


class RowTable(NamedTuple):
    """The rows that are gathered for each row of a result, a pytree.

    A kernel that computes a tile of results may take them in `order`: rows that lack the same
    offsets are neighbours there, and a tile skips what all of its rows lack.

    Attributes:
        table: `int32 [K, M]`: the row that row m reads through offset k, or -1.
        order: `int32 [M]`, the rows sorted by the bitmask of their offsets.
        tile_masks: `uint32 [ceil(K / 32), ceil(M / TILE_ROWS)]`: bit `k % 32` of word `k // 32`
            says whether any of a tile's rows, in this order, reads through offset k.
    """

    table: jax.Array
    order: jax.Array
    tile_masks: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KernelMap:
    """Which rows a convolution reads, in both directions; a pytree.

    Attributes:
        forward: For each output row the rows of the input.
        backward: For each input row the rows of the output that read it; None where that is
            `forward` with its offsets in the opposite order.
        window: The offsets.
    """

    forward: RowTable
    backward: RowTable | None
    window: Window = dataclasses.field(metadata={"static": True})

    @property
    def table(self) -> jax.Array:
        """`int32 [K, out_capacity]`: the input's row that an output reads, -1 for none."""
        return self.forward.table

    @property
    def reverse(self) -> jax.Array:
        """`int32 [K, in_capacity]`: the output's row that reads an input, -1 for none."""
        return self.table[::-1] if self.backward is None else self.backward.table

    @property
    def out_capacity(self) -> int:
        """Rows of the output."""
        return self.table.shape[1]

    @property
    def in_capacity(self) -> int:
        """Rows of the input."""
        return (self.forward if self.backward is None else self.backward).table.shape[1]

    def swapped(self) -> "KernelMap":
        """The map of the transposed convolution: inputs and outputs change places.

        Example:
            >>> from pallas_kernels.sparse.voxels import from_coords
            >>> voxels = from_coords([[0, 1], [0, 2]], [[1.0], [2.0]])
            >>> forth, _ = kernel_map(voxels, 2, 2)
            >>> forth.table.tolist(), forth.swapped().table.tolist()
            ([[-1, 1], [0, -1]], [[-1, 1], [0, -1]])
        """
        if self.backward is None:
            backward = self.forward
            forward = row_table(self.table[::-1])
        else:
            forward, backward = self.backward, self.forward
        window = self.window._replace(transposed=not self.window.transposed)
        return KernelMap(forward, backward, window)

    def pairs(self, size: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The map as lists of pairs, as other libraries have it.

        Args:
            size: Length of the lists; None is the number of pairs, which has no value under
                `jax.jit`.

        Returns:
            `(in_maps [size], out_maps [size], offsets [K + 1])`: the pairs of offset k stand from
            `offsets[k]` to `offsets[k + 1]`. Pairs behind the last are -1.

        Example:
            >>> from pallas_kernels.sparse.voxels import from_coords
            >>> voxels = from_coords([[0, 1], [0, 2]], [[1.0], [2.0]])
            >>> in_maps, out_maps, offsets = kernel_map(voxels, 3)[0].pairs()
            >>> in_maps.tolist(), out_maps.tolist(), offsets.tolist()
            ([0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 3, 4])
        """
        counts = (self.table >= 0).sum(1, dtype=jnp.int32)
        offsets = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
        if size is None:
            size = int(offsets[-1])
        taps, rows = jnp.nonzero(self.table >= 0, size=size, fill_value=-1)
        known = taps >= 0
        in_maps = jnp.where(known, self.table[taps, rows], -1)
        out_maps = jnp.where(known, rows, -1)
        return in_maps.astype(jnp.int32), out_maps.astype(jnp.int32), offsets


def from_pairs(
    in_maps: ArrayLike,
    out_maps: ArrayLike,
    offsets: ArrayLike,
    *,
    in_capacity: int,
    out_capacity: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    ndim: int = 3,
) -> KernelMap:
    """The map of lists of pairs, the inverse of `KernelMap.pairs`.

    Args:
        in_maps: Rows of the input, `[L]`.
        out_maps: Rows of the output that read them, `[L]`; through one offset an output reads one
            row at most, and an input is read by one at most.
        offsets: `[K + 1]`: the pairs of offset k stand from `offsets[k]` to `offsets[k + 1]`.
        in_capacity: Rows of the input.
        out_capacity: Rows of the output.
        kernel_size: Offsets along each axis, K in all.
        stride: Stride of the convolution.
        dilation: Its dilation.
        ndim: Axes, where the other numbers are one for all.

    Returns:
        The map.

    Raises:
        ValueError: Lists that do not fit each other.

    Example:
        >>> found = from_pairs([0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 3, 4], in_capacity=2,
        ...                    out_capacity=2, kernel_size=3, ndim=1)
        >>> found.table.tolist()
        [[-1, 0], [0, 1], [1, -1]]
    """
    rows_in, rows_out, starts = (
        jnp.asarray(each, jnp.int32) for each in (in_maps, out_maps, offsets)
    )
    window = checked_window(kernel_size, stride, dilation, ndim)
    if rows_in.shape != rows_out.shape or rows_in.ndim != 1:
        raise ValueError(
            f"out_maps: expected in_maps' shape [L], got {rows_out.shape} and {rows_in.shape}"
        )
    if starts.shape != (window.taps + 1,):
        raise ValueError(
            f"offsets: expected shape {(window.taps + 1,)}, one more than the kernel has offsets, "
            f"got {starts.shape}"
        )
    at = lax.iota(jnp.int32, rows_in.shape[0])
    tap = jnp.searchsorted(starts, at, side="right").astype(jnp.int32) - 1
    tap = jnp.where(at < starts[-1], tap, window.taps)

    def written(rows: jax.Array, values: jax.Array, capacity: int) -> jax.Array:
        empty = jnp.full((window.taps, capacity), -1, jnp.int32)
        return empty.at[tap, rows].set(values, mode="drop")

    forward, backward = (
        row_table(written(rows, values, checked_integer(capacity, name, least=1)))
        for rows, values, capacity, name in (
            (rows_out, rows_in, out_capacity, "out_capacity"),
            (rows_in, rows_out, in_capacity, "in_capacity"),
        )
    )
    return KernelMap(forward, backward, window)


def kernel_map(
    voxels: Voxels,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    *,
    transposed: bool = False,
    generative: bool = False,
    output_voxels: Voxels | None = None,
    output_rule: str = "floor",
    padding: int | Sequence[int] | None = None,
    out_capacity: int | None = None,
) -> tuple[KernelMap, Voxels]:
    """The map of a convolution, and the voxels of its output.

    Output `u` reads voxel `stride u + dilation i` through offset i. Offsets are row-major, the
    first axis slowest; those of an odd size are centred, those of an even one begin with 0.

    Args:
        voxels: The voxels of the input; their features do not count.
        kernel_size: Offsets along each axis, an int or one for each axis.
        stride: The stride, as kernel_size.
        dilation: Distance of the voxels that neighbouring offsets read, as kernel_size.
        transposed: Inputs and outputs change places: voxel `p` is read by output
            `stride p + dilation i`.
        generative: The output has every voxel that reads one of the input.
        output_voxels: The voxels of the output; transposed maps that are not generative need them.
        output_rule: "floor": a strided output has `floor(in / stride)` of every voxel; "full":
            every voxel that reads one of the input, as a dense convolution has.
        padding: With "full", and transposed: output `u` reads `stride u - padding + dilation i` for
            i from 0 on, as a dense convolution with so many zeros in front does. None centres odd
            sizes.
        out_capacity: Rows of the output; None takes the input's for "floor", and for other rules
            the power of two that is enough for any input.

    Returns:
        The map, and voxels of no channels. At stride 1 they are the input's, in the same order;
        others are sorted.

    Raises:
        ValueError: A bad argument; outside of `jax.jit`, more voxels than `out_capacity` too.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2], [0, 6]], [[1.0], [2.0], [3.0]])
        >>> found, out = kernel_map(voxels, 3, stride=2)
        >>> found.table[:, :3].tolist(), out.coords[:3].tolist()
        ([[-1, 0, -1], [-1, 1, 2], [0, -1, -1]], [[0, 0], [0, 1], [0, 3]])
    """
    asked = checked_request(
        voxels,
        kernel_size,
        stride,
        dilation,
        transposed=transposed,
        generative=generative,
        output_voxels=output_voxels,
        output_rule=output_rule,
        padding=padding,
        out_capacity=out_capacity,
    )
    window, first, rows = asked.window, asked.first, asked.rows
    sites = _sites(voxels)
    given = None if output_voxels is None else _sites(output_voxels)
    if given is None and asked.keeps:
        given = sites
    if transposed and given is not None:
        # The map from the output to the input, which a strided layer before may have made.
        untransposed = window._replace(transposed=False)
        made, _ = _kept(given, sites, untransposed, first, asked.full, voxels.capacity)
        made = made.swapped()
    else:
        made, given = _kept(sites, given, window, first, asked.full, rows)
    out = Voxels(
        given.coords,
        jnp.zeros((rows, 0), voxels.features.dtype),
        given.num_valid,
        given.overflow | voxels.overflow,
        voxels.batch_size,
        asked.tensor_stride,
    )
    if not (
        isinstance(out.overflow, jax.core.Tracer) or given is sites or output_voxels is not None
    ):
        out.check()
    return made, out


@contextmanager
def sparse_maps() -> Iterator[None]:
    """Keeps the maps that are made inside a `with` block of this thread, and gives them again.

    A map is found by the very array of coordinates that it was made for, which layers hand on: of
    two sets of voxels of equal size each gets its own. A map that was made while JAX traces a
    function serves that trace alone.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2]], [[1.0], [2.0]])
        >>> with sparse_maps():
        ...     kernel_map(voxels, 3)[0] is kernel_map(voxels, 3)[0]
        True
    """
    token = _MAPS.set({})
    try:
        yield
    finally:
        _MAPS.reset(token)


class _Sites(NamedTuple):
    """The coordinates of voxels."""

    coords: jax.Array
    num_valid: jax.Array
    overflow: jax.Array

    def is_of(self, other: "_Sites") -> bool:
        """Whether these are the very arrays of others."""
        return self.coords is other.coords and self.num_valid is other.num_valid


class _Kept(NamedTuple):
    """A map, with what it was made for: what is gone could lend its identity to another."""

    trace: object
    sites: _Sites
    given: _Sites | None
    made: KernelMap
    out: _Sites


_MAPS: ContextVar[dict[tuple[object, ...], _Kept] | None] = ContextVar("sparse_maps", default=None)


def _sites(voxels: Voxels) -> _Sites:
    return _Sites(voxels.coords, voxels.num_valid, voxels.overflow)


def _kept(
    sites: _Sites,
    given: _Sites | None,
    window: Window,
    first: tuple[int, ...],
    full: bool,
    rows: int,
) -> tuple[KernelMap, _Sites]:
    """The result of `_made`, from among the maps that `sparse_maps` keeps if it is there."""
    known = _MAPS.get()
    trace = None if known is None else trace_state()

    def key(given: _Sites | None) -> tuple[object, ...]:
        arrays = [*sites[:2], *(given[:2] if given else ())]
        return (*map(id, arrays), window, first, full and given is None, rows)

    if known is not None:
        found = known.get(key(given))
        if found is not None and found.trace == trace:
            return found.made, found.out
    same = given is not None and sites.is_of(given)
    asked = sites.coords.shape[0] if window.transposed else rows
    static = window, first, full, same, rows, _searches(asked, window)
    made, out = _made(sites, None if same else given, *static)
    out = given or out
    if known is not None:
        # The map onto what came out is this one too.
        known[key(given)] = known[key(out)] = _Kept(trace, sites, given, made, out)
    return made, out


def row_table(table: jax.Array) -> RowTable:
    """A table with the order of its rows and the offsets of their tiles.

    Args:
        table: `int32 [K, M]`, -1 where a row reads nothing.

    Example:
        >>> row_table(jnp.array([[-1, 4, -1], [0, -1, 2]])).order.tolist()
        [1, 0, 2]
    """
    taps, count = table.shape
    words = -(-taps // 32)
    bits = jnp.pad(table >= 0, ((0, 32 * words - taps), (0, 0))).reshape(words, 32, count)
    shifted = bits.astype(jnp.uint32) << lax.iota(jnp.uint32, 32)[:, None]
    masks = shifted.sum(1, dtype=jnp.uint32)
    order = stable_order(masks[::-1])
    return RowTable(table, order, _united(masks[:, order], TILE_ROWS))


def _united(masks: jax.Array, count: int) -> jax.Array:
    """The bits that any of each `count` neighbouring masks has: `[words, n]` to `[words, T]`."""
    words, size = masks.shape
    tiles = -(-size // count)
    padded = jnp.pad(masks, ((0, 0), (0, tiles * count - size)))
    grouped = padded.reshape(words, tiles, count)
    return lax.reduce(grouped, np.uint32(0), lax.bitwise_or, (2,))


def _searches(rows: int, window: Window) -> str:
    """The implementation that searches for so many rows: that of a convolution's forward pass."""
    try:
        return OPERATOR.pick("fwd", None, platform(), Problem((1, rows, 1), "float32", 1, window))
    except NotImplementedError:
        return "xla"


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _made(
    sites: _Sites,
    given: _Sites | None,
    window: Window,
    first: tuple[int, ...],
    full: bool,
    same: bool,
    rows: int,
    by: str,
) -> tuple[KernelMap, _Sites]:
    """The map, and the coordinates of the output, which are the input's if they are the `same`.

    What `by` names searches for rows.
    """
    ndim = sites.coords.shape[1] - 1
    if same:
        out = sites
    elif given is not None:
        out = given
    elif full:
        out = _expanded(sites, window, first, rows)
    else:
        steps = np.array([1, *window.stride], np.int32)
        out = _unpacked(unique_keys(*pack(sites.coords // steps, _counted(sites)), rows), ndim)
    # A transposed map is the other one, read the other way round.
    read, reading = (out, sites) if window.transposed else (sites, out)
    keys = keys_in_order(*pack(read.coords, _counted(read)))
    module = OPERATOR.module(by)
    if hasattr(module, "search"):
        asked = keys if same else _unsorted(reading)
        table = _by_kernel(module, keys, asked, _columns(window, first), window)
    else:
        table = _searched(keys, reading, window, first)
    found = KernelMap(row_table(table), None, window._replace(transposed=False))
    if not (same and window.mirrored and first == window.offsets()[0]):
        reverse = _reversed(table, read.coords.shape[0])
        found = dataclasses.replace(found, backward=row_table(reverse))
    return found.swapped() if window.transposed else found, out


def _expanded(sites: _Sites, window: Window, first: tuple[int, ...], capacity: int) -> _Sites:
    """Every output that reads a voxel."""
    valid, ndim = _counted(sites), sites.coords.shape[1] - 1
    origin = np.array(window.offsets()[0])
    steps = np.array([np.array(offset) - origin + first for offset in window.offsets()], np.int32)
    stride = np.array(window.stride, np.int32)

    def candidates(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        sample, places = sites.coords[:, :1], sites.coords[:, 1:]
        if window.transposed:
            found, wanted = places * stride + step, valid
        else:
            read = places - step
            found, wanted = read // stride, valid & (read % stride == 0).all(1)
        high, low = pack(jnp.concatenate([sample, found], 1), wanted)
        return high, low, is_missing(high, low) & wanted

    def merge(known: UniqueKeys, steps: jax.Array) -> tuple[UniqueKeys, None]:
        high, low, outside = jax.vmap(candidates)(steps)
        merged = unique_keys(
            jnp.concatenate([known.high, high.ravel()]),
            jnp.concatenate([known.low, low.ravel()]),
            capacity,
        )
        overflow = merged.overflow | known.overflow | jnp.where(outside.any(), OUTSIDE, 0)
        return merged._replace(overflow=overflow), None

    at_once = _at_once(valid.shape[0], len(steps))
    # The last turn is filled up by a step that was taken: what is there twice is one.
    turns = np.pad(steps, ((0, -len(steps) % at_once), (0, 0)), mode="edge")
    none = jnp.full((0,), 0, jnp.uint32)
    nothing = vary_like(sites, unique_keys(none, none, capacity))
    found, _ = lax.scan(merge, nothing, jnp.asarray(turns.reshape(-1, at_once, ndim)))
    return _unpacked(found, ndim)


def _unpacked(found: UniqueKeys, ndim: int) -> _Sites:
    """The coordinates of different keys."""
    return _Sites(unpack(found.high, found.low, ndim), found.total, found.overflow)


def _columns(window: Window, first: tuple[int, ...]) -> np.ndarray:
    """The first offset of each column along the last axis, added to `stride u`, `[columns, D]`.

    Example:
        >>> _columns(Window((2, 3), (1, 1), (1, 1)), (0, -1)).tolist()
        [[0, -1], [1, -1]]
    """
    firsts = window._replace(kernel_size=(*window.kernel_size[:-1], 1)).offsets()
    steps = np.array(firsts, np.int32) - np.array(firsts[0], np.int32)
    return steps + np.array(first, np.int32)


def _unsorted(sites: _Sites) -> Keys:
    """The keys of coordinates as they come."""
    rows = lax.iota(jnp.int32, sites.coords.shape[0])
    return Keys(*pack(sites.coords, _counted(sites)), vary_like(sites, rows))


class _Search(NamedTuple):
    """The plan of a search, see `sharding.Plan`: no other implementation takes its place."""

    module: Any
    request: None = None
    stated: None = None


def _by_kernel(
    module: Any, keys: Keys, sites: Keys, columns: np.ndarray, window: Window
) -> jax.Array:
    """The table of `_searched` by an implementation; of scenes that are stacked each device's."""

    def shard(plan: _Search, _: sharding.Shard, keys: Keys, sites: Keys) -> jax.Array:
        return cast(jax.Array, plan.module.search(keys, sites, columns, window))

    halves = ("_",) * len(keys)
    rule = sharding.Rule((*halves, *halves), ("_ _",), frozenset())
    unasked = Problem((1, *keys.high.shape, 1), "float32", 1, window)
    return cast(
        jax.Array,
        sharding.split_each(shard, rule, _Search(module), lambda *_: unasked, keys, sites),
    )


def _searched(keys: Keys, reading: _Sites, window: Window, first: tuple[int, ...]) -> jax.Array:
    """For each `u` of `reading` the row of the key at `stride u + first + dilation i`.

    The table is `int32 [K, M]`. Along the last axis keys that follow each other are neighbours, so
    that only the first offset of each column of them is searched.
    """
    counted, ndim = _counted(reading), reading.coords.shape[1] - 1
    centres = reading.coords * np.array([1, *window.stride], np.int32)
    steps = np.pad(_columns(window, first), ((0, 0), (1, 0)))
    step, last = window.dilation[-1], window.kernel_size[-1]

    def column(start: jax.Array) -> jax.Array:
        target = centres + start
        at = _lower_bound(keys, *_clamped(target))
        found = []
        for i in range(last):
            high, low = pack(target, counted)
            # Both halves are all ones where nothing is asked for, and where nothing counts.
            hit = _equal(keys, at, high, low) & ((high & low) != np.uint32(0xFFFFFFFF))
            found.append(jnp.where(hit, keys.rows.at[at].get(mode="clip"), -1))
            if i + 1 < last:
                target = target.at[:, ndim].add(step)
                at = _advanced(keys, at, target, step)
        return jnp.stack(found)

    at_once = _at_once(centres.shape[0], len(steps))
    found = lax.map(column, jnp.asarray(steps), batch_size=at_once)
    return found.reshape(window.taps, -1)


def _at_once(rows: int, steps: int) -> int:
    """The number of steps that are taken at once, each of so many keys; of a symbolic number one.

    Example:
        >>> _at_once(1 << 22, 9), _at_once(1 << 25, 9)
        (4, 1)
    """
    return min(steps, max(1, _QUERIES_AT_ONCE // rows)) if isinstance(rows, int) else 1


def _counted(sites: _Sites) -> jax.Array:
    """Whether a row counts."""
    return lax.iota(jnp.int32, sites.coords.shape[0]) < sites.num_valid


def _clamped(target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of places, of which one beyond the limit of the last axis counts as one at it."""
    return pack(target.at[:, -1].set(jnp.clip(target[:, -1], -LIMIT, LIMIT - 1)))


def _advanced(keys: Keys, at: jax.Array, target: jax.Array, step: int) -> jax.Array:
    """The first key that is not before a target, from that of the target `step` before it on."""
    high, low = _clamped(target)
    if step > _MOST_STEPS:
        return _lower_bound(keys, high, low)
    for _ in range(step):
        at = at + _before(keys, at, high, low).astype(jnp.int32)
    return at


def _lower_bound(keys: Keys, high: jax.Array, low: jax.Array) -> jax.Array:
    """The first sorted key that is not before another, `int32`; N where all are."""
    count = keys.high.shape[0]

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, right = between
        middle = (left + right) // 2
        before = _before(keys, middle, high, low) & (left < right)
        return jnp.where(before, middle + 1, left), jnp.where(before, right, middle)

    zeros = jnp.zeros(high.shape, jnp.int32)
    ends = vary_like((keys, high, low), (zeros, jnp.full_like(zeros, count)))
    # Of a symbolic number there may be as many as int32 can count.
    halvings = count.bit_length() if isinstance(count, int) else 31
    return lax.fori_loop(0, halvings, halve, ends)[0]


def _before(keys: Keys, at: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """Whether the key at a place is before another; behind the last there is none."""
    there, below = (half.at[at].get(mode="clip") for half in keys[:2])
    return ((there < high) | ((there == high) & (below < low))) & (at < keys.high.shape[0])


def _equal(keys: Keys, at: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """Whether the key at a place is another."""
    there, below = (half.at[at].get(mode="clip") for half in keys[:2])
    return (there == high) & (below == low)


def _reversed(table: jax.Array, capacity: int) -> jax.Array:
    """`int32 [K, capacity]`: for each row that is read, which row reads it through an offset.

    Through one offset a row is read once at most: each place is written once, in any order.
    """
    taps, count = table.shape
    rows = lax.iota(jnp.int32, count)

    def written(row: jax.Array) -> jax.Array:
        empty = vary_like(table, jnp.full((capacity,), -1, jnp.int32))
        return empty.at[jnp.where(row < 0, capacity, row)].set(rows, mode="drop")

    return lax.map(written, table)
