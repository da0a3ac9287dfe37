"""The dtypes that every operator computes in."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that sums over `dtype` are kept in: float32, or float64 for float64.

    Example:
        >>> accumulator(jnp.bfloat16)
        dtype('float32')
    """
    return jnp.promote_types(dtype, jnp.float32)
