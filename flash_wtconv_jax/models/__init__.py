"""WTConvNeXt, ConvNeXt and TransformerNet for flax.nnx.

Example:
    >>> from flax import nnx
    >>> from flash_wtconv_jax.models import wtconvnext_tiny
    >>> model = nnx.eval_shape(lambda: wtconvnext_tiny(rngs=nnx.Rngs(0)))
    >>> model.config.levels
    (5, 4, 3, 2)
"""

from ..parameters import weight_decay_mask
from .convnext import (
    ConvNeXt,
    ConvNeXtConfig,
    convnext_base,
    convnext_small,
    convnext_tiny,
    wtconvnext_base,
    wtconvnext_small,
    wtconvnext_tiny,
)
from .network import load_network, save_network
from .transformer_net import TransformerNet

__all__ = [
    "ConvNeXt",
    "ConvNeXtConfig",
    "TransformerNet",
    "convnext_base",
    "convnext_small",
    "convnext_tiny",
    "load_network",
    "save_network",
    "weight_decay_mask",
    "wtconvnext_base",
    "wtconvnext_small",
    "wtconvnext_tiny",
]
