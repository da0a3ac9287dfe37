"""Wavelet convolutions for Flax: layers (linen and nnx), models, checkpoints, tools.

The layers at the top level are linen modules; their nnx twins are in `flash_wtconv_jax.nnx`.
Beside them are the operators, functions on arrays, that `pallas_kernels` has by room.
Importing this package is cheap: a submodule, and Flax with it, is imported when one of its names
is first asked for.

Example:
    >>> import jax
    >>> from flash_wtconv_jax import WTConv2d
    >>> model = WTConv2d(channels=8, kernel_size=5, depth=2)
    >>> x = jax.numpy.ones((1, 16, 16, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> model.apply(variables, x).shape
    (1, 16, 16, 8)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_wtconv_jax import checkpoints as checkpoints
    from flash_wtconv_jax import linen as linen
    from flash_wtconv_jax import models as models
    from flash_wtconv_jax import nnx as nnx
    from flash_wtconv_jax import surgery as surgery
    from flash_wtconv_jax.autotune import tune, tuning
    from flash_wtconv_jax.functional.weight_decay import weight_decay_mask
    from flash_wtconv_jax.functional.wtconv import deepest_level
    from flash_wtconv_jax.linen import (
        Conv2d,
        ConvNormAct,
        DepthwiseConv2d,
        InstanceNorm,
        ResidualBlock,
        SeparableWTConv2d,
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
        WTConv1d,
        WTConv2d,
        WTConv3d,
    )
    from pallas_kernels.conv2d import conv2d
    from pallas_kernels.depthwise import depthwise_conv2d
    from pallas_kernels.haar import (
        dwt,
        dwt2,
        dwt3,
        dwtn,
        idwt,
        idwt2,
        idwt3,
        idwtn,
        wavedec,
        wavedec2,
        wavedec3,
        wavedecn,
        waverec,
        waverec2,
        waverec3,
        waverecn,
    )
    from pallas_kernels.sparse import Voxels, spatially_sparse_conv, spatially_sparse_depthwise_conv
    from pallas_kernels.stylize import conv2d_instance_norm, instance_norm, residual_block
    from pallas_kernels.wtconv import wtconv1d, wtconv2d, wtconv3d

    __version__: str

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
    "Voxels",
    "WTConv1d",
    "WTConv2d",
    "WTConv3d",
    "__version__",
    "conv2d",
    "conv2d_instance_norm",
    "deepest_level",
    "depthwise_conv2d",
    "dwt",
    "dwt2",
    "dwt3",
    "dwtn",
    "idwt",
    "idwt2",
    "idwt3",
    "idwtn",
    "instance_norm",
    "residual_block",
    "spatially_sparse_conv",
    "spatially_sparse_depthwise_conv",
    "tune",
    "tuning",
    "wavedec",
    "wavedec2",
    "wavedec3",
    "wavedecn",
    "waverec",
    "waverec2",
    "waverec3",
    "waverecn",
    "weight_decay_mask",
    "wtconv1d",
    "wtconv2d",
    "wtconv3d",
]

_SUBMODULES = frozenset({"checkpoints", "linen", "models", "nnx", "surgery"})
_HOME = {
    "Conv2d": "linen",
    "ConvNormAct": "linen",
    "DepthwiseConv2d": "linen",
    "InstanceNorm": "linen",
    "ResidualBlock": "linen",
    "SeparableWTConv2d": "linen",
    "SparseBatchNorm": "linen",
    "SparseConv1d": "linen",
    "SparseConv2d": "linen",
    "SparseConv3d": "linen",
    "SparseDepthwiseConv": "linen",
    "SparseGlobalPool": "linen",
    "SparseInstanceNorm": "linen",
    "SparseLayerNorm": "linen",
    "SparsePool": "linen",
    "SparseUnpool": "linen",
    "SpatiallySparseConv": "linen",
    "WTConv1d": "linen",
    "WTConv2d": "linen",
    "WTConv3d": "linen",
    "deepest_level": "functional.wtconv",
    "tune": "autotune",
    "tuning": "autotune",
    "weight_decay_mask": "functional.weight_decay",
}
_OPERATORS = {
    "conv2d": "conv2d",
    "depthwise_conv2d": "depthwise",
    "dwt": "haar",
    "dwt2": "haar",
    "dwt3": "haar",
    "dwtn": "haar",
    "idwt": "haar",
    "idwt2": "haar",
    "idwt3": "haar",
    "idwtn": "haar",
    "wavedec": "haar",
    "wavedec2": "haar",
    "wavedec3": "haar",
    "wavedecn": "haar",
    "waverec": "haar",
    "waverec2": "haar",
    "waverec3": "haar",
    "waverecn": "haar",
    "Voxels": "sparse",
    "spatially_sparse_conv": "sparse",
    "spatially_sparse_depthwise_conv": "sparse",
    "conv2d_instance_norm": "stylize",
    "instance_norm": "stylize",
    "residual_block": "stylize",
    "wtconv1d": "wtconv",
    "wtconv2d": "wtconv",
    "wtconv3d": "wtconv",
}
"""The rooms of `pallas_kernels` that the operators are in."""


def __getattr__(name: str) -> Any:
    """Import the submodule that holds `name` and remember the result."""
    if name == "Conv2D":
        from flash_wtconv_jax.linen.conv2d import Conv2D
        from pallas_kernels.common.deprecation import warn_renamed

        warn_renamed(__name__, name, "Conv2d", removed_in="0.2")
        return Conv2D
    if name in _SUBMODULES:
        value: Any = importlib.import_module(f".{name}", __name__)
    elif name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name in _OPERATORS:
        room = importlib.import_module(f"pallas_kernels.{_OPERATORS[name]}")
        value = getattr(room, name)
    elif name == "__version__":
        value = importlib.import_module("pallas_kernels.common.versions").package()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__) | _SUBMODULES)
