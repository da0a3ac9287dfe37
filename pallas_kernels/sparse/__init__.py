"""Sparse convolution of voxels, regular and depthwise, and what networks of it need."""

from importlib import import_module
from typing import Any

_ROOMS = {
    "algorithms": (
        "SPARSE_CONV_BWD_ALGO_MODE",
        "SPARSE_CONV_FWD_ALGO_MODE",
        "SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE",
        "SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE",
    ),
    "api": ("Implementation", "spatially_sparse_conv", "spatially_sparse_depthwise_conv"),
    "maps": ("KernelMap", "from_pairs", "kernel_map", "sparse_maps"),
    "norm": ("batch_norm", "instance_norm", "layer_norm"),
    "pooling": (
        "add",
        "concatenate",
        "global_pool",
        "multiply",
        "pool",
        "prune",
        "subtract",
        "union",
        "unpool",
    ),
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

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        return getattr(import_module(f"pallas_kernels.sparse.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
