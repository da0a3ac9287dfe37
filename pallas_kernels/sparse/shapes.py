"""Named shapes and the scene that benchmarks and the tuner take. Imports NumPy alone."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Coords = NDArray[np.int32]
Values = NDArray[np.float64]
Sheet = tuple[Callable[[Values, Values], tuple[Values, ...]], float, float]
"""A surface: a function of two parameters, and how far they run."""

_VOXELS_OF_A_SQUARE_METRE = 640.0
"""Voxels of the room at one voxel a metre, about."""


class Shape(NamedTuple):
    """One layer over the room: voxels, channels, features, kernel size and stride of 3 axes."""

    voxels: int
    channels: int
    features: int
    kernel_size: int = 3
    stride: int = 1


SHAPES: dict[str, Shape] = {
    f"room_{count}_{c}_{f}_s{stride}": Shape(count, c, f, 3, stride)
    for count, (c, f), stride in product(
        (10_000, 100_000, 1_000_000), ((32, 32), (64, 128), (128, 128)), (1, 2)
    )
}
"""Layers of networks of rooms, by voxels, channels and stride."""


def room(n: int, *, seed: int = 0, batch: int = 1, ndim: int = 3) -> Coords:
    """Exactly n voxels of a furnished room, the same ones every time.

    Surfaces, as a scan has them: a floor, four walls, an uneven ground, spheres, columns and boxes,
    as fine as n asks for. A voxel has about ten neighbours of its 27 in three dimensions.

    Args:
        n: Voxels in all samples together.
        seed: Of the furniture of the first sample; each has its own.
        batch: Samples, of equal size but for the last.
        ndim: The axes that are kept, of x, y and z.

    Returns:
        `int32 [n, 1 + ndim]`, unique and sorted: the sample, then the axes.

    Example:
        >>> room(1000, batch=2).shape
        (1000, 4)
    """
    each = -(-n // batch)
    samples = []
    for sample in range(batch):
        count = min(each, n - sample * each)
        places = _voxels(count, seed + sample, ndim)
        samples.append(np.insert(places, 0, sample, axis=1))
    return np.concatenate(samples)


def _voxels(count: int, seed: int, ndim: int) -> Coords:
    """So many voxels of one sample, or a little part of them where there are more."""
    cells = np.sqrt(max(count, 1) / _VOXELS_OF_A_SQUARE_METRE)
    while True:
        spacing = 0.7 / cells
        points = np.concatenate(
            [_points(sheet, spacing) for sheet in _sheets(np.random.default_rng(seed))]
        )
        places = np.floor(points[:, :ndim] * cells).astype(np.int32)
        places = np.unique(places - places.min(0), axis=0)
        if len(places) >= count:
            return places[:count]
        cells *= np.sqrt(1.01 * count / len(places))


def _points(sheet: Sheet, spacing: float) -> Values:
    """Points of a surface, no further apart than `spacing` along each parameter."""
    surface, far_u, far_v = sheet
    u, v = np.meshgrid(np.arange(0, far_u, spacing), np.arange(0, far_v, spacing), indexing="ij")
    return np.stack(np.broadcast_arrays(*surface(u, v)), -1).reshape(-1, 3)


def _sheets(rng: np.random.Generator) -> list[Sheet]:
    """The surfaces of a room of 10 by 10 by 3 metres."""
    sheets: list[Sheet] = [(_floor, 10, 10), (_ground, 10, 10)]
    sheets += [(partial(_wall, axis, at), 10, 3) for at in (0.0, 10.0) for axis in (0, 1)]
    for _ in range(24):
        sheets.append(_sphere(rng.uniform([1, 1, 0.6], [9, 9, 2.4]), rng.uniform(0.15, 0.5)))
    for _ in range(16):
        sheets.append(_column(rng.uniform([1, 1], [9, 9]), rng.uniform(0.05, 0.3)))
    for _ in range(20):
        corner, size = rng.uniform([1, 1, 0.3], [9, 9, 1.5]), rng.uniform(0.3, 1.2, 3)
        sheets += _box(corner, size, rng.uniform(0, np.pi))
    return sheets


def _floor(u: Values, v: Values) -> tuple[Values, ...]:
    return u, v, 0 * u


def _ground(u: Values, v: Values) -> tuple[Values, ...]:
    return u, v, 0.35 + 0.12 * np.sin(1.3 * u) * np.cos(1.7 * v + 0.4 * u)


def _wall(axis: int, at: float, u: Values, v: Values) -> tuple[Values, ...]:
    """A wall across an axis."""
    return (at + 0 * u, u, v) if axis == 0 else (u, at + 0 * u, v)


def _sphere(centre: Values, radius: float) -> Sheet:
    def surface(t: Values, p: Values) -> tuple[Values, ...]:
        flat = radius * np.sin(t / radius)
        x, y = flat * np.cos(p / radius), flat * np.sin(p / radius)
        return centre[0] + x, centre[1] + y, centre[2] + radius * np.cos(t / radius)

    return surface, np.pi * radius, 2 * np.pi * radius


def _column(centre: Values, radius: float) -> Sheet:
    def surface(z: Values, p: Values) -> tuple[Values, ...]:
        x, y = radius * np.cos(p / radius), radius * np.sin(p / radius)
        return centre[0] + x, centre[1] + y, z

    return surface, 2.5, 2 * np.pi * radius


def _box(corner: Values, size: Values, angle: float) -> list[Sheet]:
    """The six sides of a box that stands turned."""
    cos, sin = np.cos(angle), np.sin(angle)

    def side(axes: tuple[int, int, int], at: float) -> Sheet:
        def surface(u: Values, v: Values) -> tuple[Values, ...]:
            x, y, z = (dict(zip(axes, (u, v, at + 0 * u), strict=True))[axis] for axis in range(3))
            return corner[0] + cos * x - sin * y, corner[1] + sin * x + cos * y, corner[2] + z

        return surface, size[axes[0]], size[axes[1]]

    return [
        side(axes, far * size[axes[2]])
        for axes in ((0, 1, 2), (1, 2, 0), (0, 2, 1))
        for far in (0.0, 1.0)
    ]
