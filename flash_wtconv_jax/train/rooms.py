"""Generated scans of furnished rooms: points with normals of floors, walls and furniture."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flash_wtconv_jax.train.segmentation import Labelled, voxelised

CLASSES = ("floor", "wall", "table", "chair", "cabinet")

_POINTS_A_VOXEL = 3
"""Points of the surfaces along a voxel's edge."""
_NOISE = 0.01
"""Standard deviation of a point, in metres."""
_TRAINING, _HELD_OUT = (0, 1, 2, 3), (100, 101)
"""Seeds of the rooms."""
_HEIGHT = 2.5

_Place = NDArray[np.float64]


class _Sheet(NamedTuple):
    """A rectangle: a corner and two edges, whose product points out of what it bounds."""

    corner: _Place
    u: _Place
    v: _Place
    label: int


def load_rooms(voxel_size: float = 0.1) -> tuple[Labelled, Labelled]:
    """Four rooms to learn from, and two others to test with; the same ones every time.

    Args:
        voxel_size: Edge of a voxel in metres.

    Returns:
        The rooms, a sample each; features are the mean normal of the surfaces in a voxel.

    Raises:
        ValueError: No positive size, or so small a one that voxels lie beyond the grid.
    """
    training, held_out = (
        voxelised([room(seed, voxel_size / _POINTS_A_VOXEL) for seed in seeds], voxel_size)
        for seeds in (_TRAINING, _HELD_OUT)
    )
    return training, held_out


def room(seed: int, spacing: float) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The points of a room of 4 to 5 by 3.5 to 4.5 metres, with a table, chairs and cabinets.

    Args:
        seed: Of the room's size and furniture, and of the noise.
        spacing: Distance of neighbouring points on a surface, in metres.

    Returns:
        Points and normals `[n, 6]`, and their classes `[n]`, of `CLASSES`.

    Example:
        >>> points, labels = room(0, 0.2)
        >>> points.shape[1], np.unique(labels).tolist()
        (6, [0, 1, 2, 3, 4])
    """
    rng = np.random.default_rng(seed)
    points, labels = [], []
    for sheet in _sheets(rng):
        edges = [np.linalg.norm(edge) for edge in (sheet.u, sheet.v)]
        steps = [np.linspace(0, 1, int(np.ceil(edge / spacing)) + 1) for edge in edges]
        a, b = (part.reshape(-1, 1) for part in np.meshgrid(*steps))
        normal = np.cross(sheet.u, sheet.v) / np.prod(edges)
        places = sheet.corner + a * sheet.u + b * sheet.v
        points.append(np.hstack([places, np.broadcast_to(normal, places.shape)]))
        labels.append(np.full(len(places), sheet.label, np.int32))
    scan = np.concatenate(points)
    scan[:, :3] += rng.normal(0, _NOISE, (len(scan), 3))
    return scan, np.concatenate(labels)


def _sheets(rng: np.random.Generator) -> Iterator[_Sheet]:
    """The surfaces of a room that a scan sees, and the hidden sides of its furniture."""
    floor, wall, table, chair, cabinet = range(len(CLASSES))
    width, depth = rng.uniform([4, 3.5], [5, 4.5])
    x, y, up = np.diag([width, depth, _HEIGHT])
    yield _Sheet(np.zeros(3), x, y, floor)
    # Their normals point into the room.
    for corner, along in ((np.zeros(3), y), (x + y, -y), (x, -x), (y, x)):
        yield _Sheet(corner, along, up, wall)
    size, height = np.array([rng.uniform(1.2, 1.8), rng.uniform(0.7, 0.9)]), rng.uniform(0.7, 0.8)
    centre = np.array([width, depth]) / 2 + rng.uniform(-0.4, 0.4, 2)
    turn = rng.uniform(0, np.pi)
    yield from _legged(centre, turn, size, height, 0.06, table)
    for side in (-1, 1):
        for along in (-0.25, 0.25):
            away = side * (size[1] / 2 + rng.uniform(0.1, 0.4))
            place = centre + _turned(np.array([along * size[0], away]), turn)
            facing = turn + (np.pi if side > 0 else 0) + rng.uniform(-0.3, 0.3)
            yield from _legged(place, facing, np.full(2, 0.42), 0.45, 0.04, chair)
            back = np.array([-0.21, -0.21, 0.45]), np.array([0.42, 0.05, rng.uniform(0.4, 0.55)])
            yield from _box(place, facing, *back, chair)
    for start in (0.2, width - 1.4):
        size3 = np.array([rng.uniform(0.8, 1.2), rng.uniform(0.35, 0.5), rng.uniform(0.9, 2.0)])
        for at in (0.0, depth - size3[1]):
            if rng.uniform() < 0.7:
                yield from _box(np.zeros(2), 0.0, np.array([start, at, 0]), size3, cabinet)


def _legged(
    centre: _Place, turn: float, size: _Place, height: float, thickness: float, label: int
) -> Iterator[_Sheet]:
    """A board on four legs."""
    corner = np.array([*-size / 2, height - thickness])
    yield from _box(centre, turn, corner, np.array([*size, thickness]), label)
    leg = np.array([thickness, thickness, height - thickness])
    for x in (-size[0] / 2, size[0] / 2 - thickness):
        for y in (-size[1] / 2, size[1] / 2 - thickness):
            yield from _box(centre, turn, np.array([x, y, 0]), leg, label)


def _box(centre: _Place, turn: float, corner: _Place, size: _Place, label: int) -> Iterator[_Sheet]:
    """The six sides of a box, turned around a centre."""
    cos, sin = np.cos(turn), np.sin(turn)
    axes = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) * size[:, None]
    start = np.array([*centre, 0]) + (corner / size) @ axes
    for i in range(3):
        u, v = axes[(i + 1) % 3], axes[(i + 2) % 3]
        yield _Sheet(start + axes[i], u, v, label)
        yield _Sheet(start, v, u, label)


def _turned(place: _Place, turn: float) -> _Place:
    """A place on the floor, turned around the origin."""
    cos, sin = np.cos(turn), np.sin(turn)
    return np.array([cos * place[0] - sin * place[1], sin * place[0] + cos * place[1]])
