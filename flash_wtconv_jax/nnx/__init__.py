"""Layers for flax.nnx; `flash_wtconv_jax.linen` has their twins, with the same parameters."""

from flash_wtconv_jax.nnx.conv2d import Conv2D
from flash_wtconv_jax.nnx.wtconv import SeparableWTConv2d, WTConv1d, WTConv2d, WTConv3d

__all__ = ["Conv2D", "SeparableWTConv2d", "WTConv1d", "WTConv2d", "WTConv3d"]
