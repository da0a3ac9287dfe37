"""Depthwise 2-D convolution for PyTorch."""

from torch_bridge.depthwise.layers import DepthwiseConv2d
from torch_bridge.depthwise.ops import depthwise_conv2d

__all__ = ["DepthwiseConv2d", "depthwise_conv2d"]
