"""The MLP and its two products beside GELU in plain JAX: runs on every platform."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.gelu import gelu
from pallas_kernels.mlp.norm import normalized
from pallas_kernels.mlp.problem import Problem

DIFFERENTIABLE = True


def unavailable(platform: str) -> str | None:
    """None: plain JAX runs on every platform."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""


def whole(
    x: jax.Array,
    kernels: tuple[jax.Array, jax.Array],
    biases: tuple[jax.Array, jax.Array],
    residual: jax.Array | None,
    *,
    epsilon: float | None,
    precision: lax.Precision | None,
) -> jax.Array:
    """The MLP of rows; see `vjp`."""
    first = partial(widened, kept=False, precision=precision)
    return composed(first, x, kernels, biases, residual, epsilon, precision)


def composed(
    first: Callable[..., tuple[jax.Array, ...]],
    x: jax.Array,
    kernels: tuple[jax.Array, jax.Array],
    biases: tuple[jax.Array, jax.Array],
    residual: jax.Array | None,
    epsilon: float | None,
    precision: lax.Precision | None,
) -> jax.Array:
    """The MLP of rows by any first layer, whose hidden rows lie in memory."""
    if epsilon is not None:
        with jax.named_scope("norm"):
            x = normalized(x, epsilon)
    # Scopes are what profiles call the parts of a network.
    with jax.named_scope("fc1"):
        after, *_ = first(x, kernels[0], biases[0])
    with jax.named_scope("fc2"):
        y = jnp.matmul(after, kernels[1], precision=precision)
    y = y + biases[1].astype(y.dtype)[None]
    # Last, as it is the largest: a sum is rounded at its size.
    return y if residual is None else y + residual


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
