"""Weights in and out: PyTorch state dicts, `.safetensors`, `.pth` and Orbax folders.

Variables are what linen's `apply` takes: `{"params": nested dict of arrays}`. An nnx model takes
them with `load_into(model, variables)` and gives them with `variables_of(model)`; in linen through
Flax's bridge it takes `for_bridge(variables)`.

Nothing here imports torch until a `.pth` file or a bfloat16 tensor asks for it.

Example:
    >>> import numpy as np
    >>> params = {"base_kernel": np.ones((3, 3, 1, 8)), "base_scale": np.ones(8)}
    >>> state_dict = to_torch({"params": params}, layout="published")
    >>> sorted(state_dict)
    ['base_conv.weight', 'base_scale.weight', 'iwt_filter', 'wt_filter']
    >>> from_torch(state_dict)["params"]["base_kernel"].shape
    (3, 3, 1, 8)
"""

from flash_wtconv_jax.checkpoints.files import load, read_state_dict, write_state_dict
from flash_wtconv_jax.checkpoints.modules import for_bridge, load_into, variables_of
from flash_wtconv_jax.checkpoints.names import LAYOUTS, Recognised, from_torch, recognise, to_torch
from flash_wtconv_jax.checkpoints.orbax import restore, save, wavelet_of
from flash_wtconv_jax.checkpoints.sparse import (
    SparseUNetWeights,
    sparse_kernel,
    sparse_unet_from_torch,
)
from flash_wtconv_jax.checkpoints.tensors import to_tensors

__all__ = [
    "LAYOUTS",
    "Recognised",
    "SparseUNetWeights",
    "for_bridge",
    "from_torch",
    "load",
    "load_into",
    "read_state_dict",
    "recognise",
    "restore",
    "save",
    "sparse_kernel",
    "sparse_unet_from_torch",
    "to_tensors",
    "to_torch",
    "variables_of",
    "wavelet_of",
    "write_state_dict",
]
