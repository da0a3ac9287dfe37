"""Sparse convolution: a dense one of a grid that is zero but at some voxels, seen at its outputs.

Voxels are rows of `coords [N, 1 + D]`, the sample and the axes, and of `features [N, C]`. Offsets
are row-major, the first axis slowest; those of an odd size are centred, those of an even one begin
with 0.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pallas_kernels.oracle.arrays import Array

Places = NDArray[np.int64]
PerAxis = int | Sequence[int]


def sparse_offsets(
    kernel_size: PerAxis, ndim: int, dilation: PerAxis = 1, padding: PerAxis | None = None
) -> Places:
    """The coordinates that each offset adds to `stride u`, `[K, D]`.

    Args:
        kernel_size: Offsets along each axis.
        ndim: Axes, D.
        dilation: The steps between offsets.
        padding: The first offset is minus this; None centres odd sizes.

    Example:
        >>> sparse_offsets((3, 2), 2).tolist()
        [[-1, 0], [-1, 1], [0, 0], [0, 1], [1, 0], [1, 1]]
    """
    sizes, steps = _each(kernel_size, ndim), _each(dilation, ndim)
    first = [-d * (k // 2) * (k % 2) for k, d in zip(sizes, steps, strict=True)]
    if padding is not None:
        first = [-p for p in _each(padding, ndim)]
    axes = [[f + d * i for i in range(k)] for f, k, d in zip(first, sizes, steps, strict=True)]
    return np.array(list(product(*axes)), np.int64)


def sparse_outputs(
    coords: ArrayLike,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    *,
    rule: str = "floor",
    padding: PerAxis | None = None,
    transposed: bool = False,
) -> Places:
    """The voxels of an output, sorted.

    Args:
        coords: Voxels of the input.
        kernel_size: Offsets along each axis.
        stride: The stride.
        dilation: The dilation.
        rule: "floor": `floor(in / stride)`; "full": every voxel that reads one of the input.
        padding: As `sparse_offsets`.
        transposed: With "full", every voxel `stride in + dilation i`.

    Example:
        >>> sparse_outputs([[0, 1], [0, 2]], 3, 2).tolist()
        [[0, 0], [0, 1]]
        >>> sparse_outputs([[0, 1], [0, 2]], 3, 2, rule="full").tolist()
        [[0, 0], [0, 1]]
    """
    places = np.asarray(coords, np.int64)
    ndim = places.shape[1] - 1
    steps = _each(stride, ndim)
    if rule == "floor":
        return np.unique(np.floor_divide(places, [1, *steps]), axis=0)
    offsets = sparse_offsets(kernel_size, ndim, dilation, padding)
    if transposed:
        moved = [places * [1, *steps] + [0, *offset] for offset in offsets]
        return np.unique(np.concatenate(moved), axis=0)
    low, grid = _grid(places, np.ones((len(places), 1)))
    # Every place from which some offset may reach the grid.
    first = np.floor_divide(low[1:] - offsets.max(0), steps)
    last = np.floor_divide(low[1:] + grid.shape[1:-1] - offsets.min(0), steps) + 1
    axes = [
        np.arange(a, b) for a, b in zip([low[0], *first], [low[0] + len(grid), *last], strict=True)
    ]
    every = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, ndim + 1)
    read = [_read(low, grid, every * [1, *steps] + [0, *offset]) for offset in offsets]
    return every[np.any(read, 0)[:, 0]]


def sparse_conv(
    coords: ArrayLike,
    features: ArrayLike,
    weight: ArrayLike,
    outputs: ArrayLike,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    *,
    padding: PerAxis | None = None,
    transposed: bool = False,
) -> Array:
    """The convolution at some outputs: `y[u] = sum over i of x[stride u + dilation i] w[i]`.

    Args:
        coords: Voxels of the input, `[N, 1 + D]`.
        features: x, `[N, C]`.
        weight: `[K, G, C / G, F / G]`.
        outputs: Voxels of the output, `[M, 1 + D]`.
        kernel_size: Offsets along each axis, K in all.
        stride: The stride.
        dilation: The dilation.
        padding: As `sparse_offsets`.
        transposed: Voxel p is read by output `stride p + dilation i` instead.

    Returns:
        y, `[M, F]`.

    Example:
        >>> voxels = [[0, 1], [0, 2]]
        >>> sparse_conv(voxels, [[1.0], [10.0]], np.array([1, 2, 3]).reshape(3, 1, 1, 1), voxels, 3)
        array([[32.],
               [21.]])
    """
    x, w = np.asarray(features, np.float64), np.asarray(weight, np.float64)
    wanted = np.asarray(outputs, np.int64)
    y = np.zeros((len(wanted), w.shape[1] * w.shape[3]))
    offsets = sparse_offsets(kernel_size, wanted.shape[1] - 1, dilation, padding)
    low, grid = _grid(np.asarray(coords, np.int64), x)
    for offset, tap in zip(offsets, w, strict=True):
        read = _sources(low, grid, wanted, stride, offset, transposed)
        y += _grouped("mgc,gcf->mgf", read, tap)
    return y


def sparse_conv_vjp(
    coords: ArrayLike,
    features: ArrayLike,
    weight: ArrayLike,
    outputs: ArrayLike,
    dy: ArrayLike,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    *,
    padding: PerAxis | None = None,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """The transposes of `sparse_conv` in features and in weights, applied to dy `[M, F]`.

    Returns:
        `(dx, dw)` of the shapes of features and weight.

    Example:
        >>> voxels = [[0, 1], [0, 2]]
        >>> w = np.array([1.0, 2, 3]).reshape(3, 1, 1, 1)
        >>> dx, dw = sparse_conv_vjp(voxels, [[1.0], [10.0]], w, voxels, [[1.0], [1.0]], 3)
        >>> dx.ravel(), dw.ravel()
        (array([3., 5.]), array([ 1., 11., 10.]))
    """
    x, w = np.asarray(features, np.float64), np.asarray(weight, np.float64)
    wanted = np.asarray(outputs, np.int64)
    ndim = wanted.shape[1] - 1
    offsets = sparse_offsets(kernel_size, ndim, dilation, padding)
    places = np.asarray(coords, np.int64)
    low, grid = _grid(places, x)
    low_out, grid_out = _grid(wanted, np.asarray(dy, np.float64))
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for i, (offset, tap) in enumerate(zip(offsets, w, strict=True)):
        # The transposed convolution of dy, seen at the inputs.
        back = _sources(low_out, grid_out, places, stride, offset, not transposed)
        dx += _grouped("mgf,gcf->mgc", back, tap)
        read = _sources(low, grid, wanted, stride, offset, transposed)
        read, given = (
            a.reshape(len(wanted), len(tap), a.shape[1] // len(tap)) for a in (read, np.asarray(dy))
        )
        dw[i] = np.einsum("mgc,mgf->gcf", read, given)
    return dx, dw


def sparse_pool(
    coords: ArrayLike,
    features: ArrayLike,
    outputs: ArrayLike,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    *,
    padding: PerAxis = 0,
    reduce: str = "max",
) -> Array:
    """The "max", "mean" or "sum" of the voxels that each output reads, zero where there is none.

    Args:
        coords: Voxels of the input.
        features: `[N, C]`.
        outputs: Voxels of the output.
        kernel_size: Offsets along each axis.
        stride: The stride.
        padding: A window begins at `stride u - padding`.
        reduce: Which of them.

    Example:
        >>> sparse_pool([[0, 1], [0, 2], [0, 3]], [[1.0], [5.0], [7.0]], [[0, 0], [0, 1]], 2, 2)
        array([[1.],
               [7.]])
    """
    x, wanted = np.asarray(features, np.float64), np.asarray(outputs, np.int64)
    offsets = sparse_offsets(kernel_size, wanted.shape[1] - 1, padding=padding)
    read = np.zeros((len(offsets), len(wanted), x.shape[1]))
    there = np.zeros((len(offsets), len(wanted), 1))
    for grids, values in ((read, x), (there, np.ones((len(x), 1)))):
        low, grid = _grid(np.asarray(coords, np.int64), values)
        for i, offset in enumerate(offsets):
            grids[i] = _sources(low, grid, wanted, stride, offset, False)
    if reduce == "max":
        most = np.where(there > 0, read, -np.inf).max(0)
        return np.where(there.any(0), most, 0)
    total = read.sum(0)
    return total if reduce == "sum" else total / np.maximum(there.sum(0), 1)


def _each(value: PerAxis, ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def _grouped(subscripts: str, rows: Array, weight: Array) -> Array:
    """The product of rows with weights, each group apart."""
    groups = rows.reshape(len(rows), len(weight), rows.shape[1] // len(weight))
    product = np.einsum(subscripts, groups, weight)
    return product.reshape(len(rows), product.shape[1] * product.shape[2])


def _grid(places: Places, values: Array) -> tuple[Places, Array]:
    """The lowest place, and the dense grid `[samples, *axes, C]` from there on."""
    if not len(places):
        return np.zeros(places.shape[1], np.int64), np.zeros(
            (0,) * places.shape[1] + values.shape[1:]
        )
    low = places.min(0)
    grid = np.zeros((*(places.max(0) - low + 1), values.shape[1]))
    grid[tuple((places - low).T)] = values
    return low, grid


def _read(low: Places, grid: Array, places: Places) -> Array:
    """The values of a grid at some places, zero outside of it."""
    inside = ((places >= low) & (places < low + grid.shape[:-1])).all(1)
    values = np.zeros((len(places), grid.shape[-1]))
    values[inside] = grid[tuple((places[inside] - low).T)]
    return values


def _sources(
    low: Places, grid: Array, wanted: Places, stride: PerAxis, offset: Places, transposed: bool
) -> Array:
    """The values of a grid that outputs read through one offset."""
    steps = np.array([1, *_each(stride, len(offset))])
    if not transposed:
        return _read(low, grid, wanted * steps + [0, *offset])
    moved = wanted - [0, *offset]
    whole = (moved % steps == 0).all(1, keepdims=True)
    return np.where(whole, _read(low, grid, moved // steps), 0)
