"""The dtypes that every operator accumulates in."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that sums over `dtype` are kept in: float32, or float64 for float64.

    Example:
        >>> accumulation_dtype(jnp.bfloat16)
        dtype('float32')
    """
    return jnp.promote_types(dtype, jnp.float32)
