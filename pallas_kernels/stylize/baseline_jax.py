"""The norm as one writes it in JAX without this package, every array in x's dtype.

It is a baseline for the error of low precision, and a row of benchmarks.
"""

import jax
import jax.numpy as jnp


def instance_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
) -> jax.Array:
    """Instance norm of `x [*batch, H, W, C]`; arguments as `pallas_kernels.stylize` has them.

    Example:
        >>> ones = jnp.ones(4)
        >>> instance_norm(jnp.ones((2, 5, 4, 4)), ones, ones, activation="relu").shape
        (2, 5, 4, 4)
    """
    scale, bias = (value.astype(x.dtype)[..., None, None, :] for value in (scale, bias))
    centred = x - x.mean((-3, -2), keepdims=True)
    variance = (centred * centred).mean((-3, -2), keepdims=True)
    y = centred * jax.lax.rsqrt(variance + jnp.asarray(eps, x.dtype)) * scale + bias
    y = y if residual is None else y + residual
    return y if activation is None else jax.nn.relu(y)
