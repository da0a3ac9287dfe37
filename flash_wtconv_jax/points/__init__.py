"""Points in files: KITTI's and nuScenes' `.bin`, `.ply`, `.npy`, `.npz`, `.las` and `.laz`."""

from flash_wtconv_jax.points.reading import Points, read

__all__ = ["Points", "read"]
