"""Kernel maps: which row of the input each row of the output reads through each offset.

They are those of `pallas_kernels.sparse.maps`, bit by bit. Coordinates are keys of 63 bits, sorted
and searched, on a GPU by the Triton kernel that JAX launches too: no hash table, no atomics, and
nothing that depends on an order in which threads run.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pallas_kernels.sparse.checks import MOST_SAMPLES, OUTSIDE, checked_request
from pallas_kernels.sparse.problem import TILE_ROWS, Problem, Window
from torch_bridge.runtime import calls
from torch_bridge.sparse.operators import OPERATOR
from torch_bridge.sparse.voxels import (
    MISSING,
    Voxels,
    counted,
    known,
    pack,
    packed,
    unique_keys,
    unpack,
)

_QUERIES_AT_ONCE = 1 << 24
"""Keys that are searched, or sorted, at once; more take turns."""
_WORD = 32
"""Offsets of a word of a mask."""


class Keys(NamedTuple):
    """Keys in halves, as those of `pallas_kernels.sparse.voxels`, and the rows that they come from.

    Attributes:
        high: `int32 [N]`, the upper 32 of 63 bits.
        low: `int32 [N]`, the lower 31 bits; both are -1 where a row does not count.
        rows: `int32 [N]`.
    """

    high: Tensor
    low: Tensor
    rows: Tensor


class RowTable(NamedTuple):
    """The rows that are gathered for each row of a result.

    Attributes:
        table: `int32 [K, M]`: the row that row m reads through offset k, or -1.
        order: `int32 [M]`, the rows sorted by the bitmask of their offsets.
        tile_masks: `int32 [ceil(K / 32), ceil(M / TILE_ROWS)]`: bit `k % 32` of word `k // 32` says
            whether any of a tile's rows, in this order, reads through offset k.
    """

    table: Tensor
    order: Tensor
    tile_masks: Tensor


@dataclass(frozen=True, eq=False)
class KernelMap:
    """Which rows a convolution reads, in both directions.

    Attributes:
        forward: For each output row the rows of the input.
        backward: For each input row the rows of the output that read it; None where that is
            `forward` with its offsets in the opposite order.
        window: The offsets.
    """

    forward: RowTable
    backward: RowTable | None
    window: Window

    @property
    def table(self) -> Tensor:
        """`int32 [K, out_capacity]`: the input's row that an output reads, -1 for none."""
        return self.forward.table

    @property
    def reverse(self) -> Tensor:
        """`int32 [K, in_capacity]`: the output's row that reads an input, -1 for none."""
        return self.table.flip(0) if self.backward is None else self.backward.table

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
            >>> from torch_bridge.sparse.voxels import from_coords
            >>> voxels = from_coords([[0, 1], [0, 2]], [[1.0], [2.0]])
            >>> forth, _ = kernel_map(voxels, 2, 2)
            >>> forth.table.tolist(), forth.swapped().table.tolist()
            ([[-1, 1], [0, -1]], [[-1, 1], [0, -1]])
        """
        forward = row_table(self.reverse) if self.backward is None else self.backward
        window = self.window._replace(transposed=not self.window.transposed)
        return KernelMap(forward, self.forward, window)


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
        ValueError: A bad argument; unless a program is compiled, more voxels than `out_capacity`
            too.

    Example:
        >>> from torch_bridge.sparse.voxels import from_coords
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
        voxels.features.new_zeros((rows, 0)),
        given.num_valid,
        given.overflow | voxels.overflow,
        voxels.batch_size,
        asked.tensor_stride,
    )
    # Else all outputs have room and a place, and to look would have the host wait for the device.
    made_here = output_voxels is None and not asked.keeps
    may_overflow = made_here and (out_capacity is not None or asked.full)
    return made, out.check() if may_overflow and known(out.overflow) else out


@contextmanager
def sparse_maps() -> Iterator[None]:
    """Keeps the maps that are made inside a `with` block of this thread, and gives them again.

    A map is found by the very tensor of coordinates that it was made for, which layers hand on: of
    two sets of voxels of equal size each gets its own. A program that `torch.compile` traces makes
    its own, each once: it drops what it would compute twice.

    Example:
        >>> from torch_bridge.sparse.voxels import from_coords
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

    coords: Tensor
    num_valid: Tensor
    overflow: Tensor

    def is_of(self, other: "_Sites") -> bool:
        """Whether these are the very tensors of others."""
        return self.coords is other.coords and self.num_valid is other.num_valid


class _Kept(NamedTuple):
    """A map, with what it was made for: what is gone could lend its identity to another."""

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

    def key(given: _Sites | None) -> tuple[object, ...]:
        tensors = [*sites[:2], *(given[:2] if given else ())]
        return (*map(id, tensors), window, first, full and given is None, rows)

    # A tensor of a traced program is nothing outside of it.
    kept = None if torch.compiler.is_compiling() else _MAPS.get()
    if kept is not None and (found := kept.get(key(given))) is not None:
        return found.made, found.out
    same = given is not None and sites.is_of(given)
    with torch.no_grad():
        made, out = _made(sites, None if same else given, window, first, full, same, rows)
    out = given or out
    if kept is not None:
        # The map onto what came out is this one too.
        kept[key(given)] = kept[key(out)] = _Kept(sites, given, made, out)
    return made, out


def row_table(table: Tensor) -> RowTable:
    """A table with the order of its rows and the offsets of their tiles.

    Args:
        table: `int32 [K, M]`, -1 where a row reads nothing.

    Example:
        >>> row_table(torch.tensor([[-1, 4, -1], [0, -1, 2]], dtype=torch.int32)).order.tolist()
        [1, 0, 2]
    """
    masks = [_mask(part) for part in table.split(_WORD)]
    order = torch.arange(table.shape[1], device=table.device)
    for mask in reversed(masks):
        # In the order of numbers without a sign.
        moved = (mask[order] ^ torch.iinfo(torch.int32).min).sort(stable=True).indices
        order = order[moved]
    united = torch.stack([_united(mask[order]) for mask in masks])
    return RowTable(table.contiguous(), order.int(), united)


def _mask(table: Tensor) -> Tensor:
    """For each row a bit of each of up to 32 offsets, `int32 [M]`."""
    mask = torch.zeros_like(table[0])
    for k, rows in enumerate(table):
        mask = mask | ((rows >= 0).int() << k)
    return mask


def _united(mask: Tensor) -> Tensor:
    """The bits that any of each `TILE_ROWS` neighbouring masks has."""
    missing = -mask.shape[0] % TILE_ROWS
    grouped = torch.nn.functional.pad(mask, (0, missing)).reshape(-1, TILE_ROWS)
    while (half := grouped.shape[1] // 2) > 0:
        grouped = grouped[:, :half] | grouped[:, half:]
    return grouped[:, 0]


def _made(
    sites: _Sites,
    given: _Sites | None,
    window: Window,
    first: tuple[int, ...],
    full: bool,
    same: bool,
    rows: int,
) -> tuple[KernelMap, _Sites]:
    """The map, and the coordinates of the output, which are the input's if they are the `same`."""
    if same:
        out = sites
    elif given is not None:
        out = given
    elif full:
        out = _expanded(sites, window, first, rows)
    else:
        sample, *axes = sites.coords.long().unbind(1)
        cells = [
            axis.div(s, rounding_mode="floor") for axis, s in zip(axes, window.stride, strict=True)
        ]
        keys = packed(sample, cells, counted(*sites[:2]))
        out = _unpacked(keys, len(axes), rows)
    # A transposed map is the other one, read the other way round.
    read, reading = (out, sites) if window.transposed else (sites, out)
    table = _searched(read, reading, window, first, same)
    found = KernelMap(row_table(table), None, window._replace(transposed=False))
    if not (same and window.mirrored and first == window.offsets()[0]):
        reverse = _reversed(table, read.coords.shape[0])
        found = dataclasses.replace(found, backward=row_table(reverse))
    return found.swapped() if window.transposed else found, out


def _unpacked(keys: Tensor, ndim: int, rows: int) -> _Sites:
    """The coordinates of the different ones among keys."""
    found = unique_keys(keys, rows)
    return _Sites(unpack(found.keys, ndim), found.total, found.overflow)


def _steps(window: Window, first: tuple[int, ...], device: torch.device) -> Tensor:
    """The offsets that are added to `stride u`, `int64 [K, D]`."""
    # Reckoned there: a CUDA graph that is captured takes nothing from the host.
    offset = torch.arange(window.taps, device=device)
    columns = []
    sizes = zip(window.kernel_size, window.dilation, first, strict=True)
    for size, dilation, start in reversed(list(sizes)):
        columns.append(offset % size * dilation + start)
        offset = offset // size
    return torch.stack(columns[::-1], 1)


def _expanded(sites: _Sites, window: Window, first: tuple[int, ...], capacity: int) -> _Sites:
    """Every output that reads a voxel."""
    valid = counted(*sites[:2])
    sample, *axes = sites.coords.long().unbind(1)
    steps = _steps(window, first, sample.device)
    found, outside = sample.new_empty((0,)), sites.overflow.new_zeros(())
    for some in steps.split(max(1, _QUERIES_AT_ONCE // max(1, len(sample)))):
        wanted, places = valid, []
        for axis, step, s in zip(axes, some.unbind(1), window.stride, strict=True):
            if window.transposed:
                places.append(axis * s + step[:, None])
            else:
                read = axis - step[:, None]
                wanted = wanted & (read % s == 0)
                places.append(read.div(s, rounding_mode="floor"))
        keys = packed(sample, places, wanted)
        outside = outside | (wanted & (keys == MISSING)).any().int() * OUTSIDE
        # One more than there is room for, so that the last turn tells.
        found = unique_keys(torch.cat([found, keys.flatten()]), capacity + 1).keys
    made = _unpacked(found, len(axes), capacity)
    return made._replace(overflow=made.overflow | outside)


def _searched(
    read: _Sites, reading: _Sites, window: Window, first: tuple[int, ...], same: bool
) -> Tensor:
    """For each `u` of `reading` the rows of `read` at `stride u + first + dilation i`.

    The table is `int32 [K, M]`. What computes the forward pass of a convolution has the search.
    """
    keys, rows = pack(read.coords, counted(*read[:2])).sort(stable=True)
    rows = rows.int()
    valid = counted(*reading[:2])
    steps = _steps(window, first, keys.device)

    def compute(module: object, config: Mapping[str, int]) -> Tensor:
        search = getattr(module, "search", None)
        if search is None:
            return _found(keys, rows, reading.coords, valid, steps, window)
        sorted_keys = _halves(keys, rows)
        # Keys that follow each other search the same places.
        asked = sorted_keys if same else _halves(pack(reading.coords, valid))
        return cast(Tensor, search(sorted_keys, asked, steps[:: window.kernel_size[-1]], window))

    # A program that `torch.compile` traces has no launches but those of operators.
    if torch.compiler.is_compiling():
        return _found(keys, rows, reading.coords, valid, steps, window)
    problem = Problem((1, len(valid), 1), "float32", 1, window)
    try:
        text = f"{OPERATOR.pick('fwd', None, keys.device.type, problem)} {calls.ELSE}"
    except NotImplementedError:
        return _found(keys, rows, reading.coords, valid, steps, window)
    return calls.computed(OPERATOR, "fwd", text, keys.device, problem, compute)


def _halves(keys: Tensor, rows: Tensor | None = None) -> Keys:
    """Keys in halves, of rows as they come if None are told."""
    if rows is None:
        rows = torch.arange(len(keys), device=keys.device, dtype=torch.int32)
    positive = keys + (MOST_SAMPLES // 2 << 54)
    high, low = (
        half.masked_fill(keys == MISSING, -1).int()
        for half in (positive >> 31, positive & 0x7FFFFFFF)
    )
    return Keys(high, low, rows)


def _found(
    keys: Tensor, rows: Tensor, coords: Tensor, valid: Tensor, steps: Tensor, window: Window
) -> Tensor:
    """For each of some coordinates the rows of sorted keys at `stride u` and each of the steps."""
    sample, *axes = coords.long().unbind(1)
    centres = [axis * s for axis, s in zip(axes, window.stride, strict=True)]
    parts = []
    for some in steps.split(max(1, _QUERIES_AT_ONCE // max(1, len(sample)))):
        places = [
            centre + step[:, None] for centre, step in zip(centres, some.unbind(1), strict=True)
        ]
        wanted = packed(sample, places, valid)
        at = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        hit = (keys[at] == wanted) & (wanted != MISSING)
        parts.append(rows[at].masked_fill(~hit, -1))
    return torch.cat(parts)


def _reversed(table: Tensor, capacity: int) -> Tensor:
    """`int32 [K, capacity]`: for each row that is read, which row reads it through an offset.

    Through one offset a row is read once at most: each place is written once, in any order.
    """
    rows = torch.arange(table.shape[1], device=table.device, dtype=torch.int32)
    parts = []
    for some in table.split(max(1, _QUERIES_AT_ONCE // max(1, table.shape[1]))):
        # What is read by none falls behind the last.
        places = some.masked_fill(some < 0, capacity).long()
        empty = some.new_full((len(some), capacity + 1), -1)
        parts.append(empty.scatter(1, places, rows.expand_as(some))[:, :capacity])
    return torch.cat(parts).contiguous()
