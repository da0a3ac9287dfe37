"""Points in NumPy's own files."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flash_wtconv_jax.points.columns import AXES, Columns, named, split

COORDINATES = ("coord", "coords", "coordinates", "points", "pos", "positions", "xyz")
"""Names of the array of coordinates among several."""


_DAMAGED = (ValueError, EOFError, MemoryError, KeyError, zipfile.BadZipFile, zlib.error)
"""The errors of files that are cut off or tell the wrong sizes."""


def read_npy(path: Path, columns: Sequence[str] | None = None) -> Columns:
    """The columns of a `.npy` file: an array `[n, 3 + C]`, or a structured one `[n]`.

    Args:
        path: The file.
        columns: Names of the columns; None are x, y, z, c3, c4, ..., or those of the fields.

    Raises:
        ValueError: It is no such file, is cut off, or its array has another shape.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except _DAMAGED as error:
        raise _unreadable(path, error) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path}: is an .npz file by its content, expected an array")
    return _columns(path, array, columns)


def read_npz(path: Path, columns: Sequence[str] | None = None) -> Columns:
    """The columns of a `.npz` file: of its one array, or of all that have a row a point.

    Args:
        path: The file.
        columns: Names of the columns of its one array, see `read_npy`.

    Raises:
        ValueError: It is no such file, is cut off, or has no array of coordinates.
    """
    try:
        with zipfile.ZipFile(path):
            pass  # np.load would take whatever else stands there.
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _DAMAGED as error:
        raise _unreadable(path, error) from None
    if len(arrays) == 1:
        (array,) = arrays.values()
        return _columns(path, array, columns)
    if columns is not None:
        raise ValueError(f"columns={columns!r}: {path} names its arrays itself; leave it out")
    places = [name for name in arrays if name.lower() in COORDINATES]
    axes = [name for name in arrays if name.lower() in AXES]
    if len(places) > 1 or not places and len(axes) < len(AXES):
        raise ValueError(
            f"{path}: has the arrays {', '.join(arrays) or '(none)'}, expected one of them to be "
            f"called {', '.join(COORDINATES)}, or three x, y and z"
        )
    found = dict(_columns(path, arrays.pop(places[0]), None)) if places else {}
    count = (found["x"] if places else arrays[axes[0]]).shape[:1]
    for name, array in arrays.items():
        # A file may hold faces, poses and the like too.
        if _numeric(array.dtype) and array.ndim in (1, 2) and array.shape[:1] == count:
            found.update(split(name, array))
    return found


def _columns(path: Path, array: NDArray, columns: Sequence[str] | None) -> Columns:
    """The columns of one array."""
    fields = array.dtype.names
    if fields is None:
        if array.ndim != 2 or not _numeric(array.dtype):
            raise ValueError(
                f"{path}: expected numbers [n, 3 + C], got {array.dtype} of shape {array.shape}"
            )
        return named(path, array, columns)
    if columns is not None:
        raise ValueError(f"columns={columns!r}: {path} names its columns itself; leave it out")
    flat = array.reshape(-1)
    return dict(
        column
        for name in fields
        if _numeric(array.dtype[name].base) and flat[name].ndim <= 2
        for column in split(name, flat[name])
    )


def _numeric(dtype: np.dtype) -> bool:
    """Whether these are real numbers, or booleans."""
    return dtype.kind in "biuf"


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{path}: no array can be read from it: {reason}")
