"""The pointwise MLP as one writes it in JAX without this package: baseline of benchmarks."""

from collections.abc import Sequence

import jax


def mlp(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array],
    residual: jax.Array | None = None,
) -> jax.Array:
    """The MLP; arguments as `pallas_kernels.mlp.mlp`.

    Example:
        >>> import jax.numpy as jnp
        >>> kernels, biases = (jnp.ones((4, 16)), jnp.ones((16, 4))), (jnp.ones(16), jnp.ones(4))
        >>> mlp(jnp.ones((2, 4)), kernels, biases).shape
        (2, 4)
    """
    (first, second), (inner, outer) = kernels, biases
    y = jax.nn.gelu(x @ first + inner, approximate=False) @ second + outer
    return y if residual is None else y + residual
