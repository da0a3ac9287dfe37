"""Transposes of linear functions of arrays that may be split over a mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.arguments import sharded


def transposed(
    linear: Callable[[jax.Array], jax.Array],
    shape: tuple[int, ...],
    dy: jax.Array,
    *used: jax.Array,
    spec: jax.P = jax.P(),  # noqa: B008
) -> jax.Array:
    """The transpose of a linear function, applied to dy.

    It is not `jax.linear_transpose`, which refuses a dy that varies over an axis of a mesh, and
    sums over the axis what an argument that does not vary meets there. Under `jax.jit` XLA removes
    the function's own value, which nothing reads.

    Args:
        linear: Function of one array.
        shape: Shape of the function's argument, whose dtype is dy's.
        dy: Array of the shape of the function's value.
        *used: The arrays that the function closes over.
        spec: The sharding of the function's argument where others are sharded over Explicit axes.

    Example:
        >>> transposed(lambda x: jnp.pad(2 * x, 1), (2,), jnp.arange(4.0)).tolist()
        [2.0, 4.0]
    """
    zeros = vary_like((dy, used), jnp.zeros(shape, dy.dtype))
    for mesh in {jax.typeof(array).sharding.mesh for array in (dy, *used) if sharded(array)}:
        zeros = jax.sharding.reshard(zeros, jax.NamedSharding(mesh, spec))
    _, pullback = jax.vjp(linear, zeros)
    return pullback(dy)[0]
