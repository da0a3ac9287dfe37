"""Points of a file, by its extension."""

import os
from collections.abc import Sequence
from pathlib import Path

from flash_wtconv_jax.points.arrays import read_npy, read_npz
from flash_wtconv_jax.points.columns import Points, points_of
from flash_wtconv_jax.points.las import read_las
from flash_wtconv_jax.points.ply import read_ply
from flash_wtconv_jax.points.scans import read_bin

__all__ = ["Points", "read"]

_NAMING = {".ply": read_ply, ".las": read_las, ".laz": read_las}
"""Readers of files that name their columns."""
_NAMELESS = {".bin": read_bin, ".npy": read_npy, ".npz": read_npz}
"""Readers of files that may not name them."""


def read(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Points:
    """The points of a file.

    Coordinates are read as they are: those of a survey, metres from far away, lose their digits in
    JAX's float32 unless a corner is taken from them first, `coordinates - coordinates.min(0)`.

    Args:
        path: A file, which its extension describes:

            - `.bin`, a scan of float32: KITTI's x, y, z, intensity; where the name ends with
              `.pcd.bin`, nuScenes' x, y, z, intensity, ring.
            - `.ply`, ASCII or binary: the properties of its vertices; faces do not count.
            - `.npy`: an array `[n, 3 + C]`, or a structured one with fields x, y and z.
            - `.npz`: the same, alone; or one array of coordinates by a usual name (coord, coords,
              coordinates, points, pos, positions, xyz) and beside it what has as many rows.
            - `.las`, `.laz`: all dimensions, coordinates scaled; needs the extra `las`.
        columns: Names of all columns, x, y and z among them, of a file that does not name them: a
            `.bin` or an array `[n, 3 + C]`. None takes those above, and c3, c4, ... for others.

    Returns:
        `Points(coordinates, features, names)`: float64 `[n, 3]`, float32 `[n, C]`, and the names of
        the features. Numbers are those of the file: colours of 8 bits run from 0 to 255.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
        ValueError: It cannot be read: its content is cut off, does not fit its header, has no
            coordinates, or one that is not finite; or its extension is another.
        ModuleNotFoundError: It needs an extra; which.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> scan = np.array([[1, 2, 3, 0.5], [4, 5, 6, 0.25]], np.float32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     scan.tofile(f"{folder}/000000.bin")
        ...     points = read(f"{folder}/000000.bin")
        >>> points.coordinates.tolist(), points.features.tolist(), points.names
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[0.5], [0.25]], ('intensity',))
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in {**_NAMING, **_NAMELESS}:
        known = ", ".join(sorted({**_NAMING, **_NAMELESS}))
        raise ValueError(f"{path}: expected a file that ends with one of {known}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if kind in _NAMELESS:
        return points_of(path, _NAMELESS[kind](path, columns))
    if columns is not None:
        raise ValueError(f"columns={columns!r}: {path} names its columns itself; leave it out")
    return points_of(path, _NAMING[kind](path))
