"""The norm as one writes it in JAX without this package, every array in x's dtype.

It is a baseline for the error of low precision, and a row of benchmarks.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.conv2d.baseline_jax import conv2d
from pallas_kernels.oracle.conv2d import Padding


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


def conv2d_instance_norm(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> jax.Array:
    """A convolution of `x [N, H, W, C]` and its norm; arguments as `pallas_kernels.stylize`'s.

    Example:
        >>> x, w, ones = jnp.ones((2, 9, 8, 4)), jnp.ones((3, 3, 4, 16)), jnp.ones(16)
        >>> conv2d_instance_norm(x, w, ones, ones, upsample=2, padding="reflect").shape
        (2, 18, 16, 16)
    """
    z = conv2d(x, w, stride=stride, padding=padding, upsample=upsample)
    return instance_norm(z, scale, bias, residual, eps=eps, activation=activation)
