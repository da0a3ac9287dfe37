"""Points of laser surveys in `.las` and `.laz` files, read by laspy."""

from pathlib import Path

import numpy as np

from flash_wtconv_jax.points.columns import Columns, split


def read_las(path: Path) -> Columns:
    """The dimensions of a `.las` or `.laz` file, coordinates scaled, the others as they are.

    Args:
        path: The file.

    Raises:
        ValueError: It cannot be read.
        ModuleNotFoundError: The extra `las` is not installed.
    """
    try:
        import laspy
    except ModuleNotFoundError as error:
        raise _missing(path, error.name or "laspy") from error
    compressed = path.suffix.lower() == ".laz"
    if compressed and not laspy.LazBackend.detect_available():
        raise _missing(path, "lazrs")
    try:
        with laspy.open(path) as file:
            told = file.header.point_count
            found = file.read()
        columns = dict(zip("xyz", (np.asarray(found[axis]) for axis in "xyz"), strict=True))
        for name in found.point_format.dimension_names:
            if name not in ("X", "Y", "Z"):
                columns.update(split(name, np.asarray(found[name])))
    except (MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # laspy and its decompressors fail in their own ways.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no points can be read from it: {reason}") from None
    if len(columns["x"]) < told:
        raise ValueError(
            f"{path}: ends after {len(columns['x'])} of the {told} points of its header"
        )
    return columns


def _missing(path: Path, name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{path} needs {name}, which is not installed: pip install 'flash-wtconv[las]'", name=name
    )
