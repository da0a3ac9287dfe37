"""Blends networks of one architecture by a weighted sum of their parameters."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.common.types import Tree

Variables = TypeVar("Variables", bound=Tree)


def blend_styles(variables: Sequence[Variables], weights: ArrayLike) -> Variables:
    """The weighted sum of the variables of several style networks.

    Networks that started from one another blend into styles between theirs; of networks that were
    trained apart the sum may show neither.

    Args:
        variables: Variables of one architecture, such as `checkpoints.load` returns them.
        weights: One number for each, `[len(variables)]`, not normalised; it may be traced, and
            `jax.vmap` over it gives a batch of styles.

    Returns:
        Variables of the same names, shapes and dtypes.

    Raises:
        ValueError: If there are no variables, their names or shapes differ, or there is not one
            weight for each.

    Example:
        >>> import numpy as np
        >>> styles = [{"params": {"scale": np.full(2, value)}} for value in (1.0, 3.0)]
        >>> blend_styles(styles, [0.5, 0.5])["params"]["scale"]
        Array([2., 2.], dtype=float32)
    """
    if not variables:
        raise ValueError("variables is empty, expected those of at least one style")
    weights = jnp.asarray(weights)
    if weights.shape != (len(variables),):
        raise ValueError(
            f"weights must have shape ({len(variables)},), one for each style, got {weights.shape}"
        )
    shapes = [jax.tree_util.tree_map(np.shape, one) for one in variables]
    for index, other in enumerate(shapes[1:], 1):
        if other != shapes[0]:
            raise ValueError(
                f"variables[{index}] has other names or shapes than variables[0], expected styles "
                "of one architecture"
            )

    def blended(*leaves: ArrayLike) -> jax.Array:
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        total = sum(w * a.astype(jnp.float32) for w, a in zip(weights, arrays, strict=True))
        return total.astype(arrays[0].dtype)

    return jax.tree_util.tree_map(blended, *variables)
