"""The MLP's two products beside GELU in plain JAX: runs on every platform."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.gelu import gelu
from pallas_kernels.mlp.problem import Problem

DIFFERENTIABLE = True


def unavailable(platform: str) -> str | None:
    """None: plain JAX runs on every platform."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""


def widened(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    kept: bool,
    precision: lax.Precision | None,
) -> tuple[jax.Array, ...]:
    """GELU of the first layer, and if it is kept the layer itself; see `vjp`."""
    before = jnp.matmul(x, kernel, precision=precision) + bias.astype(x.dtype)[None]
    after = gelu(before)
    return (after, before) if kept else (after,)


def narrowed_grad(
    dy: jax.Array, kernel: jax.Array, before: jax.Array, *, precision: lax.Precision | None
) -> tuple[jax.Array, jax.Array]:
    """The gradient of the first layer's output, and its sum over the rows; see `vjp`."""
    # With a barrier: else XLA keeps the exponential of the forward pass in float32.
    before = lax.optimization_barrier(before)
    found = sloped(jnp.matmul(dy, kernel.T, precision=precision), before)
    # With another: else XLA writes it in float32 for the sum, and reads it again to round it.
    found = lax.optimization_barrier(found)
    return found, jnp.sum(found.astype(accumulation_dtype(dy.dtype)), axis=0)


def sloped(values: jax.Array, before: jax.Array) -> jax.Array:
    """Values times the slope of GELU, linear in them."""
    _, found = jax.jvp(gelu, (before,), (values,))
    return found
