"""Layers for flax.nnx; `flash_wtconv_jax.linen` has their twins, with the same parameters."""

from typing import Any

from flash_wtconv_jax.nnx.conv2d import Conv2d
from flash_wtconv_jax.nnx.depthwise import DepthwiseConv2d
from flash_wtconv_jax.nnx.sparse import (
    SparseBatchNorm,
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseDepthwiseConv,
    SparseGlobalPool,
    SparseInstanceNorm,
    SparseLayerNorm,
    SparsePool,
    SparseUnpool,
    SpatiallySparseConv,
)
from flash_wtconv_jax.nnx.stylize import ConvNormAct, InstanceNorm, ResidualBlock
from flash_wtconv_jax.nnx.wtconv import SeparableWTConv2d, WTConv1d, WTConv2d, WTConv3d
from pallas_kernels.common.deprecation import warn_renamed

__all__ = [
    "Conv2d",
    "ConvNormAct",
    "DepthwiseConv2d",
    "InstanceNorm",
    "ResidualBlock",
    "SeparableWTConv2d",
    "SparseBatchNorm",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseDepthwiseConv",
    "SparseGlobalPool",
    "SparseInstanceNorm",
    "SparseLayerNorm",
    "SparsePool",
    "SparseUnpool",
    "SpatiallySparseConv",
    "WTConv1d",
    "WTConv2d",
    "WTConv3d",
]


def __getattr__(name: str) -> Any:
    if name == "Conv2D":
        warn_renamed(__name__, name, "Conv2d", removed_in="0.2")
        return Conv2d
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
