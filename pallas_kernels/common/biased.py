"""Operators that add a bias, made linear in their signal: a one beside it multiplies the bias.

What adds a bias is not linear in its signal, but `common.multilinear` differentiates what is. With
a one beside the signal it is linear in the two together, and linear in the weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.sharding import gathered

Source = tuple[jax.Array, ArrayLike]
"""A signal `[..., C]`, and the one."""


def with_one(x: jax.Array) -> Source:
    """The signal with a one beside it.

    Example:
        >>> with_one(jnp.zeros((2, 3)))[1]
        array(1., dtype=float32)
    """
    return x, np.ones((), accumulation_dtype(x.dtype))


def scaled(bias: jax.Array | None, one: ArrayLike) -> jax.Array | None:
    """The bias times the one of a source.

    Example:
        >>> scaled(jnp.ones(2), 1.0)
        Array([1., 1.], dtype=float32)
    """
    return None if bias is None else bias * jnp.asarray(one, bias.dtype)


def in_one(bias: jax.Array | None, dy: jax.Array) -> jax.Array:
    """The transpose of adding a bias times one, in the one.

    Example:
        >>> in_one(jnp.array([1.0, 10.0]), jnp.ones((3, 2)))
        Array(33., dtype=float32)
    """
    total = summed(dy)
    zero = jnp.zeros((), total.dtype)
    if bias is None:
        return zero
    bias, total = map(gathered, (bias, total))
    return jnp.vdot(bias.astype(total.dtype), total)


def summed(dy: jax.Array) -> jax.Array:
    """The gradient of a bias, which is added to every pixel.

    Example:
        >>> summed(jnp.ones((3, 2)))
        Array([3., 3.], dtype=float32)
    """
    return dy.sum(range(dy.ndim - 1), dtype=accumulation_dtype(dy.dtype))
