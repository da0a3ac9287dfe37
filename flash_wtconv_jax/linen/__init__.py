"""Layers for flax.linen; `flash_wtconv_jax.nnx` has their twins, with the same parameters."""

from flash_wtconv_jax.linen.conv2d import Conv2D
from flash_wtconv_jax.linen.wtconv import SeparableWTConv2d, WTConv1d, WTConv2d, WTConv3d

__all__ = ["Conv2D", "SeparableWTConv2d", "WTConv1d", "WTConv2d", "WTConv3d"]
