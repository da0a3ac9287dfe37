"""Columns of numbers by their names, as every reader hands them on, and the points of them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray]
"""An array `[n]` by the name of each column."""

AXES = ("x", "y", "z")
"""The names of the columns of coordinates, in lower or in upper case."""


class Points(NamedTuple):
    """Points, and what was measured at each.

    Attributes:
        coordinates: `[n, 3]`, float64, all finite.
        features: `[n, C]`, float32.
        names: The name of each feature.
    """

    coordinates: NDArray[np.float64]
    features: NDArray[np.float32]
    names: tuple[str, ...]


def points_of(path: Path, columns: Columns) -> Points:
    """The points of a file's columns.

    Args:
        path: The file, which errors name.
        columns: Its columns, of equal length.

    Returns:
        The points; features are in the order of the columns.

    Raises:
        ValueError: No x, y or z, or one that is not finite.

    Example:
        >>> columns = {"x": np.ones(2), "red": np.zeros(2), "y": np.ones(2), "z": np.ones(2)}
        >>> points_of(Path("a.ply"), columns).names
        ('red',)
    """
    found = {name.lower(): name for name in columns if name.lower() in AXES}
    missing = [axis for axis in AXES if axis not in found]
    if missing:
        raise ValueError(
            f"{path}: has no column {', '.join(missing)}, but {', '.join(columns) or 'none at all'}"
        )
    coordinates = _stacked([columns[found[axis]] for axis in AXES], np.float64)
    finite = np.isfinite(coordinates).all(1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(
            f"{path}: point {row} is {coordinates[row].tolist()}, expected finite coordinates; "
            f"{np.count_nonzero(~finite)} of {len(finite)} points have others"
        )
    others = [name for name in columns if name not in found.values()]
    features = _stacked([columns[name] for name in others], np.float32, len(coordinates))
    return Points(coordinates, features, tuple(others))


def split(name: str, array: NDArray) -> Iterator[tuple[str, NDArray]]:
    """The columns of an array `[n]` or `[n, k]` of numbers, those of a wide one numbered.

    Example:
        >>> [column for column, _ in split("normal", np.zeros((4, 3)))]
        ['normal_0', 'normal_1', 'normal_2']
    """
    if array.ndim == 1:
        yield name, array
    else:
        yield from ((f"{name}_{i}", column) for i, column in enumerate(array.T))


def named(path: Path, rows: NDArray, columns: Sequence[str] | None) -> Columns:
    """The columns of an array `[n, 3 + C]` that has no names for them.

    Args:
        path: The file, which errors name.
        rows: The array.
        columns: The names that the user gave; None: x, y, z, then c3, c4, ...

    Raises:
        ValueError: Another number of names than of columns, or no coordinates.

    Example:
        >>> list(named(Path("a.npy"), np.zeros((2, 5)), None))
        ['x', 'y', 'z', 'c3', 'c4']
    """
    width = rows.shape[1]
    if columns is None:
        if width < len(AXES):
            raise ValueError(f"{path}: expected an array [n, 3 + C], got shape {rows.shape}")
        columns = [*AXES, *(f"c{i}" for i in range(len(AXES), width))]
    if len(columns) != width:
        raise ValueError(
            f"columns={list(columns)!r}: expected {width} names, for {path} has shape {rows.shape}"
        )
    check_names(columns)
    return dict(zip(columns, rows.T, strict=True))


def check_names(columns: Sequence[str]) -> None:
    """Raises an error where names are not those of columns of points.

    Raises:
        ValueError: No x, y or z, one twice, or one string for many.
    """
    lower = [str(name).lower() for name in columns]
    if isinstance(columns, str) or len(set(lower)) < len(lower) or not set(AXES) <= set(lower):
        raise ValueError(
            f"columns={columns!r}: expected different names, and x, y and z among them"
        )


def _stacked(columns: Sequence[NDArray], dtype: type, count: int = 0) -> NDArray:
    """Columns side by side, `[n, C]`; n is `count` where there are none."""
    table: NDArray = np.empty((len(columns[0]) if columns else count, len(columns)), dtype)
    for i, column in enumerate(columns):
        # What is too large for float32 becomes infinite, as everywhere in NumPy, without a warning.
        with np.errstate(over="ignore"):
            table[:, i] = column
    return table
