"""Networks for flax.nnx: classifiers, dense prediction, style transfer, sparse voxels.

Example:
    >>> from flax import nnx
    >>> from flash_wtconv_jax.models import wtconvnext_tiny
    >>> model = nnx.eval_shape(lambda: wtconvnext_tiny(rngs=nnx.Rngs(0)))
    >>> model.config.levels
    (5, 4, 3, 2)
"""

from flash_wtconv_jax.functional.weight_decay import weight_decay_mask
from flash_wtconv_jax.models.blending import blend_styles
from flash_wtconv_jax.models.convnext import (
    ConvNeXt,
    ConvNeXtConfig,
    convnext_base,
    convnext_small,
    convnext_tiny,
    wtconvnext_base,
    wtconvnext_small,
    wtconvnext_tiny,
)
from flash_wtconv_jax.models.multi_style import MultiStyleNet, load_multi_style
from flash_wtconv_jax.models.pretrained import load_network, save_network
from flash_wtconv_jax.models.public import PUBLIC, from_pretrained
from flash_wtconv_jax.models.segmenter import Segmenter
from flash_wtconv_jax.models.sparse import SparseResNet, SparseUNet, load_sparse_unet
from flash_wtconv_jax.models.style_vit import StyleViT
from flash_wtconv_jax.models.transformer_net import TransformerNet

__all__ = [
    "ConvNeXt",
    "ConvNeXtConfig",
    "PUBLIC",
    "MultiStyleNet",
    "Segmenter",
    "SparseResNet",
    "SparseUNet",
    "StyleViT",
    "TransformerNet",
    "blend_styles",
    "convnext_base",
    "convnext_small",
    "convnext_tiny",
    "from_pretrained",
    "load_multi_style",
    "load_network",
    "load_sparse_unet",
    "save_network",
    "weight_decay_mask",
    "wtconvnext_base",
    "wtconvnext_small",
    "wtconvnext_tiny",
]
