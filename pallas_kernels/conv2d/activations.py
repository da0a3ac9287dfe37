"""The activations of the epilogue: one table of their values and slopes for every implementation.

Kernels compute values alone. Slopes are those of `jax.nn`, at a kink too: that of ReLU is 0 at 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common._compat import gelu


class Activation(NamedTuple):
    """The forms of an activation.

    Attributes:
        differentiable: The function that JAX differentiates.
        in_kernel: The same values by operations that Mosaic lowers, which has no `erfc`.
    """

    differentiable: Callable[[jax.Array], jax.Array]
    in_kernel: Callable[[jax.Array], jax.Array]


ACTIVATIONS = {
    "relu": Activation(jax.nn.relu, lambda y: jnp.maximum(y, 0)),
    "gelu": Activation(gelu, lambda y: 0.5 * y * (1 + lax.erf(y * math.sqrt(0.5)))),
}


def activate(y: jax.Array, activation: str | None) -> jax.Array:
    """The value of an activation, which JAX can differentiate; `y` itself for None."""
    return y if activation is None else ACTIVATIONS[activation].differentiable(y)


def activate_in_kernel(y: jax.Array, activation: str | None) -> jax.Array:
    """The value of an activation inside a Pallas kernel; `y` itself for None."""
    return y if activation is None else ACTIVATIONS[activation].in_kernel(y)
