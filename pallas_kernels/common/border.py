"""A border for XLA's CPU compiler: an identity that it does not fuse across.

XLA fuses an operation into all that reads it. So equal layers of a network, which stand beside
different ones, become loops that differ, as do those that read the same numbers in another shape.
XLA compiles equal loops once, and between borders the loops of equal layers are equal. A border
costs nothing where a program runs: it is a call of which the result is the argument.
"""

import jax

from pallas_kernels.common._compat import unfused
from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.multilinear import multilinear


def border(x: jax.Array) -> jax.Array:
    """The array itself, which a CPU's program computes by itself, as it does its gradient.

    Args:
        x: An array that is in memory in any case, or is cheaper there than computed twice.

    Example:
        >>> import jax.numpy as jnp
        >>> border(jnp.arange(3)).tolist()
        [0, 1, 2]
    """
    return multilinear(_same, (border,), x) if on_cpu() else x


@unfused
def _same(x: jax.Array) -> jax.Array:
    return x
