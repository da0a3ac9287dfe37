"""Layers for flax.linen; `flash_wtconv_jax.nnx` has their twins, with the same parameters."""

from typing import Any

from flash_wtconv_jax.linen import conv2d
from flash_wtconv_jax.linen.conv2d import Conv2d
from flash_wtconv_jax.linen.depthwise import DepthwiseConv2d
from flash_wtconv_jax.linen.sparse import (
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
from flash_wtconv_jax.linen.stylize import ConvNormAct, InstanceNorm, ResidualBlock
from flash_wtconv_jax.linen.wtconv import SeparableWTConv2d, WTConv1d, WTConv2d, WTConv3d
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
        return conv2d.Conv2D
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
