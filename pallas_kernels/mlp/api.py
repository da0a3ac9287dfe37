"""The pointwise MLP as a function: validate, pick, call.

`pallas_kernels.oracle.mlp` is the definition.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

import jax
from jax.typing import ArrayLike

from pallas_kernels.common import sharding
from pallas_kernels.common.arguments import (
    Precision,
    checked_array,
    checked_eps,
    checked_precision,
)
from pallas_kernels.common.measurement import request
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.mlp import vjp
from pallas_kernels.mlp.problem import Problem


class Implementation(StrEnum):
    """Implementations of the pointwise MLP."""

    MOSAIC_GPU = "mosaic_gpu"
    XLA = "xla"


OPERATOR = Operator(
    name="mlp",
    package="pallas_kernels.mlp",
    implementations=Implementation,
    # Where our kernels were measured to be faster, the table of that kind of GPU goes before this.
    rule={"tpu": ("xla",), "gpu": ("xla", "mosaic_gpu"), "cpu": ("xla",)},
    # A call that nothing differentiates is chosen for itself: it needs no hidden rows in memory.
    directions={"fwd": ("widened",), "bwd": ("narrowed_grad",), "whole": ("whole",)},
)


def mlp(
    x: ArrayLike,
    kernels: Sequence[ArrayLike],
    biases: Sequence[ArrayLike],
    *,
    residual: ArrayLike | None = None,
    epsilon: float | None = None,
    precision: Precision = None,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """A pointwise MLP: two linear layers, an exact GELU between them.

    GELU and its slope are computed where the products beside it are, and in 16 bits by a formula
    that costs half of `erf` (`pallas_kernels.common.gelu`). Derivatives are of every order, in
    reverse and in forward mode.

    Args:
        x: `[*batch, C]`, float16, bfloat16, float32 or float64.
        kernels: `[C, hidden]` and `[hidden, features]`, of x's dtype.
        biases: `[hidden]` and `[features]`, any floating dtype; they are added in x's.
        residual: `[*batch, features]` of x's dtype, which is added to the output, or None.
        epsilon: Greater than 0, what is added to the variance of each row of x, over its channels,
            by which it is divided once it has no mean: LayerNorm without scale and bias. None takes
            x as it is.
        precision: The precision of products of float32, as `jax.lax.dot_general` takes it.
        implementation: Filter on the implementations: a name, a sequence of names or `"auto"`
            for the fastest of them, which is measured once and remembered, or `None` for the
            environment's (`FLASH_WTCONV_MLP_WHOLE` for a call that nothing differentiates, else
            `FLASH_WTCONV_MLP_FWD` and `..._BWD`), the one that was the fastest for such a call on
            this kind of device, where that was measured, or the device's rule.
        out_sharding: How the output is split over a mesh, by its first axis; None takes x's.

    Returns:
        `[*batch, features]` in x's dtype.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> kernels, biases = (jnp.ones((4, 16)), jnp.ones((16, 4))), (jnp.ones(16), jnp.ones(4))
        >>> mlp(jnp.ones((2, 7, 7, 4)), kernels, biases).shape
        (2, 7, 7, 4)
    """
    x = checked_array(x, "x")
    first, second = (checked_array(kernel, "kernels") for kernel in kernels)
    inner, outer = (checked_array(bias, "biases") for bias in biases)
    _check(x, first, second, inner, outer)
    if residual is not None:
        residual = checked_array(residual, "residual")
        shape = (*x.shape[:-1], second.shape[1])
        if (residual.shape, residual.dtype) != (shape, x.dtype):
            raise ValueError(
                f"residual: expected shape {shape} and x's dtype, {x.dtype}, got "
                f"{residual.shape} and {residual.dtype}"
            )
    if epsilon is not None:
        epsilon = checked_eps(epsilon, "epsilon")
    precision = checked_precision(precision)
    requests = (request(OPERATOR, direction, implementation) for direction in OPERATOR.directions)
    rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    spread = sharding.spread(vjp.RULE, [x], out_sharding)
    fwd, bwd, whole = spread.allowed(*requests)
    shape = spread.shard.local(rows.shape, vjp.RULE.operands[0])
    problem = Problem(shape, x.dtype, *second.shape)
    chosen = whole.choose(problem, vjp.measurement, OPERATOR, "whole", problem, precision, epsilon)
    module = OPERATOR.module(chosen.implementation)
    plan = vjp.Plan(module, chosen.config, precision, epsilon, fwd, bwd, whole, spread.stated)
    return vjp.mlp(plan, x, (first, second), (inner, outer), residual)


def _check(
    x: jax.Array, first: jax.Array, second: jax.Array, inner: jax.Array, outer: jax.Array
) -> None:
    """Raises a `ValueError` for arrays that do not fit each other."""
    if x.ndim < 1:
        raise ValueError(f"x: expected [*batch, C], got shape {x.shape}")
    shapes = first.shape, second.shape
    hidden = first.shape[-1:]
    fits = len(first.shape) == len(second.shape) == 2 and second.shape[:1] == hidden
    if not fits or first.shape[:1] != x.shape[-1:]:
        raise ValueError(
            f"kernels: expected [C, hidden] and [hidden, features] with C = {x.shape[-1]}, the "
            f"channels of x, got shapes {shapes}"
        )
    if {first.dtype, second.dtype} != {x.dtype}:
        raise ValueError(
            f"kernels: expected x's dtype, {x.dtype}, got {first.dtype} and {second.dtype}"
        )
    expected = hidden, second.shape[1:]
    if (inner.shape, outer.shape) != expected:
        raise ValueError(
            f"biases: expected shapes {expected}, one number a channel, got "
            f"{(inner.shape, outer.shape)}"
        )
