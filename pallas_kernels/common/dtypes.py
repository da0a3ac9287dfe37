"""The dtypes that every operator accumulates in."""

from functools import reduce

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def common_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The narrowest dtype that holds the values of all.

    It is meant, so `jax.numpy_dtype_promotion("strict")`, which finds what is not, allows it.

    Example:
        >>> common_dtype("bfloat16", "float16")
        dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(reduce(jnp.promote_types, dtypes))


def accumulation_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype that sums over `dtypes` are kept in: float32, or float64 with a float64.

    Example:
        >>> accumulation_dtype(jnp.bfloat16)
        dtype('float32')
    """
    return common_dtype(jnp.float32, *dtypes)
