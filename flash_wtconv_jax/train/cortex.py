"""The human cortex as voxels: the white surface of fsaverage, both halves, gyri and sulci.

Source: Fischl, Sereno, Tootell and Dale, "High-resolution intersubject averaging and a coordinate
system for the cortical surface", Human Brain Mapping 1999. The surfaces come with nilearn.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flash_wtconv_jax.train.segmentation import Labelled, voxelised

CLASSES = ("gyrus", "sulcus")

_POINTS_A_VOXEL = 8
"""Points of the surface along a voxel's edge, so that few voxels that it passes are missed."""


class Surface(NamedTuple):
    """A mesh of triangles, and a depth at its vertices.

    Attributes:
        vertices: `[n, 3]`.
        triangles: `[m, 3]`, integers, counterclockwise as seen from outside.
        depth: `[n]`, positive in sulci.
    """

    vertices: NDArray[np.float64]
    triangles: NDArray[np.int64]
    depth: NDArray[np.float64]

    def mirrored(self) -> "Surface":
        """The surface on the other side of the plane x = 0."""
        return Surface(self.vertices * [-1, 1, 1], self.triangles[:, ::-1], self.depth)


def load_cortex(voxel_size: float = 2.0) -> tuple[Labelled, Labelled]:
    """The left half of the cortex to learn from, and the right one, mirrored, to test with.

    Args:
        voxel_size: Edge of a voxel in millimetres.

    Returns:
        The halves; features are the mean normal of the surface in a voxel, labels are gyrus or
        sulcus by the sign of the sulcal depth. Nothing is downloaded.

    Raises:
        ValueError: No positive size, or so small a one that voxels lie beyond the grid.
        ModuleNotFoundError: nilearn is not installed.
    """
    halves = _loaded("left"), _loaded("right").mirrored()
    left, right = (
        voxelised([sampled(half, voxel_size / _POINTS_A_VOXEL)], voxel_size) for half in halves
    )
    return left, right


def sampled(surface: Surface, spacing: float) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Points on a surface, with normals and classes.

    Args:
        surface: The surface.
        spacing: Distance of neighbouring points on a triangle's edges, at most.

    Returns:
        Points and normals `[n, 6]`, and 1 where the surface is deep, 0 elsewhere, `[n]`. What lies
        between vertices is interpolated.

    Example:
        >>> triangle = Surface(np.eye(3), np.array([[0, 1, 2]]), np.array([-1.0, -1.0, 2.0]))
        >>> points, labels = sampled(triangle, 0.75)
        >>> points[0].round(2).tolist(), labels.tolist()
        ([0.0, 0.0, 1.0, 0.58, 0.58, 0.58], [1, 1, 0, 1, 0, 0])
    """
    vertices, triangles, depth = surface
    table = np.hstack([vertices, _normals(vertices, triangles), depth[:, None]])[triangles]
    edges = np.linalg.norm(table[..., :3] - np.roll(table[..., :3], 1, axis=1), axis=-1).max(1)
    steps = np.ceil(edges / spacing).astype(int)
    found = []
    for count in np.unique(steps):
        i, j = np.nonzero(np.add.outer(np.arange(count + 1), np.arange(count + 1)) <= count)
        weights = np.stack([i, j, count - i - j], 1) / count
        found.append((weights @ table[steps == count]).reshape(-1, table.shape[2]))
    points = np.concatenate(found)
    return points[:, :6], (points[:, 6] > 0).astype(np.int32)


def _normals(vertices: NDArray[np.float64], triangles: NDArray[np.int64]) -> NDArray[np.float64]:
    """The normals of a mesh at its vertices: the mean of its triangles', by their areas."""
    a, b, c = (vertices[corner] for corner in triangles.T)
    areas = np.cross(b - a, c - a)
    total = np.zeros_like(vertices)
    for corner in triangles.T:
        np.add.at(total, corner, areas)
    return total / np.linalg.norm(total, axis=1, keepdims=True)


def _loaded(side: str) -> Surface:
    """A half of the cortex from nilearn's wheel."""
    from nilearn import datasets, surface

    files = datasets.fetch_surf_fsaverage("fsaverage5")
    mesh = surface.load_surf_mesh(files[f"white_{side}"])
    vertices, triangles = (np.asarray(part) for part in (mesh.coordinates, mesh.faces))
    depth = np.asarray(surface.load_surf_data(files[f"sulc_{side}"]))
    return Surface(vertices.astype(np.float64), triangles.astype(np.int64), depth)
