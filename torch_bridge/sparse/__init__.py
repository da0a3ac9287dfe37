"""Sparse convolution of voxels, regular and depthwise, for PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_bridge.sparse.api import (
        Implementation,
        spatially_sparse_conv,
        spatially_sparse_depthwise_conv,
    )
    from torch_bridge.sparse.maps import KernelMap, kernel_map, sparse_maps
    from torch_bridge.sparse.pooling import pool
    from torch_bridge.sparse.voxels import (
        Voxels,
        from_coords,
        from_dense,
        from_list,
        from_points,
        to_dense,
        to_list,
        to_points,
    )

_ROOMS = {
    "api": ("Implementation", "spatially_sparse_conv", "spatially_sparse_depthwise_conv"),
    "maps": ("KernelMap", "kernel_map", "sparse_maps"),
    "pooling": ("pool",),
    "voxels": (
        "Voxels",
        "from_coords",
        "from_dense",
        "from_list",
        "from_points",
        "to_dense",
        "to_list",
        "to_points",
    ),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Implementation",
    "KernelMap",
    "Voxels",
    "from_coords",
    "from_dense",
    "from_list",
    "from_points",
    "kernel_map",
    "pool",
    "sparse_maps",
    "spatially_sparse_conv",
    "spatially_sparse_depthwise_conv",
    "to_dense",
    "to_list",
    "to_points",
]


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        return getattr(import_module(f"torch_bridge.sparse.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
