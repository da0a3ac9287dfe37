"""The mask of the parameters of a model that take weight decay."""

import jax

from pallas_kernels.common.types import Tree


def weight_decay_mask(params: Tree) -> Tree:
    """The mask of the parameters that take weight decay: convolution and linear kernels alone.

    Scales, norms, biases and layer scale (`gamma`) take none, as in the published training.

    Args:
        params: Any tree of parameters: linen variables, `nnx.state(model, nnx.Param)`, a dict.

    Returns:
        The same tree with bools: True below a name that is, or ends in, `kernel`, and below
        `wavelet_kernel_{i}`; of nested names the innermost decides.

    Example:
        >>> weight_decay_mask({"conv_dw": {"base_kernel": 1.0, "base_scale": 1.0}, "gamma": 1.0})
        {'conv_dw': {'base_kernel': True, 'base_scale': False}, 'gamma': False}
        >>> import optax
        >>> optimizer = optax.adamw(4e-3, weight_decay=0.05, mask=weight_decay_mask)
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_kernel(path), params)


def _is_kernel(path: tuple[object, ...]) -> bool:
    keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    # An nnx variable adds an entry of its own below its name, a list the number of its place.
    names = [key for key in keys if isinstance(key, str) and key != "value"]
    return any(n.endswith("kernel") or n.startswith("wavelet_kernel_") for n in names[-1:])
