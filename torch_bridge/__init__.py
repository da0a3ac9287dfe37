"""Flash WTConv for PyTorch: layers with the published state dict, and sparse convolution.

Importing this package imports neither jax nor flax, and torch only when a layer is first used.

Example:
    >>> import torch, torch_bridge
    >>> layer = torch_bridge.WTConv2d(8, 8, wt_levels=2)
    >>> layer(torch.zeros(1, 8, 15, 20, device=layer.device)).shape
    torch.Size([1, 8, 15, 20])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_bridge.depthwise import DepthwiseConv2d, depthwise_conv2d
    from torch_bridge.exchange import from_jax, to_jax
    from torch_bridge.sparse import (
        KernelMap,
        Voxels,
        kernel_map,
        sparse_maps,
        spatially_sparse_conv,
        spatially_sparse_depthwise_conv,
    )
    from torch_bridge.stylize.convolution import conv2d_instance_norm, residual_block
    from torch_bridge.stylize.layers import FusedInstanceNorm2d, replace_instance_norm
    from torch_bridge.wtconv.layers import WTConv1d, WTConv2d, WTConv3d

__all__ = [
    "DepthwiseConv2d",
    "FusedInstanceNorm2d",
    "KernelMap",
    "Voxels",
    "WTConv1d",
    "WTConv2d",
    "WTConv3d",
    "conv2d_instance_norm",
    "depthwise_conv2d",
    "from_jax",
    "kernel_map",
    "replace_instance_norm",
    "residual_block",
    "sparse_maps",
    "spatially_sparse_conv",
    "spatially_sparse_depthwise_conv",
    "to_jax",
]


_DEPTHWISE = "DepthwiseConv2d", "depthwise_conv2d"
_STYLIZE = (
    "FusedInstanceNorm2d",
    "conv2d_instance_norm",
    "replace_instance_norm",
    "residual_block",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        room = "exchange" if name in ("from_jax", "to_jax") else "sparse"
        room = "wtconv" if name.startswith("WTConv") else room
        room = "stylize" if name in _STYLIZE else room
        room = "depthwise" if name in _DEPTHWISE else room
        return getattr(import_module(f"torch_bridge.{room}"), name)
    raise AttributeError(f"module 'torch_bridge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
