"""Scans of spinning lasers as KITTI and nuScenes store them: rows of float32, without a header.

Sources: Geiger et al., "Vision meets Robotics: The KITTI Dataset", IJRR 2013; Caesar et al.,
"nuScenes: A multimodal dataset for autonomous driving", CVPR 2020.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flash_wtconv_jax.points.columns import Columns, check_names, named

KITTI = ("x", "y", "z", "intensity")
NUSCENES = (*KITTI, "ring")


def read_bin(path: Path, columns: Sequence[str] | None = None) -> Columns:
    """The columns of a scan of little-endian float32.

    Args:
        path: A `.bin` file; the name of nuScenes' ends with `.pcd.bin`.
        columns: Names of the columns; None are those of KITTI, or of nuScenes.

    Raises:
        ValueError: The file does not consist of whole rows.
    """
    if columns is None:
        columns = NUSCENES if path.name.lower().endswith(".pcd.bin") else KITTI
    check_names(columns)
    size, row = path.stat().st_size, 4 * len(columns)
    if size % row:
        raise ValueError(
            f"{path}: has {size} bytes, which are no whole rows of {row}: {', '.join(columns)} in "
            "float32; the file is cut off, or columns= names others"
        )
    return named(path, np.fromfile(path, "<f4").reshape(-1, len(columns)), columns)
