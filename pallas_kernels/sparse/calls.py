"""The parts of a call that the two operators share: operands, and the plan."""

from collections.abc import Sequence

import jax
from jax.typing import DTypeLike

from pallas_kernels.common import sharding
from pallas_kernels.common.arguments import checked_dtype
from pallas_kernels.common.measurement import request
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.sparse import vjp
from pallas_kernels.sparse.problem import Problem


def operands(
    x: jax.Array, w: jax.Array, compute_dtype: DTypeLike | None
) -> tuple[jax.Array, jax.Array]:
    """Features and weights in the dtype that a call computes in.

    Raises:
        ValueError: No such dtype, or none is given and the two differ.

    Example:
        >>> import jax.numpy as jnp
        >>> operands(jnp.ones(2), jnp.ones(2), "bfloat16")[0].dtype
        dtype(bfloat16)
    """
    if compute_dtype is not None:
        dtype = checked_dtype(compute_dtype, "compute_dtype")
        return x.astype(dtype), w.astype(dtype)
    if x.dtype != w.dtype:
        raise ValueError(
            f"weight: expected the features' dtype, {x.dtype}, got {w.dtype}; cast one of them, or "
            "give compute_dtype="
        )
    return x, w


def planned(
    operator: Operator,
    problem: Problem,
    arrays: Sequence[jax.Array],
    fwd_algo: Choice,
    bwd_algo: Choice,
    precision: jax.lax.Precision | None,
) -> vjp.Plan:
    """The plan of a call, whose forward implementation is chosen here.

    Args:
        operator: The operator.
        problem: The call.
        arrays: Features and weights.
        fwd_algo: Filter on the implementations of the forward pass.
        bwd_algo: Filter on those of the backward pass.
        precision: The precision of products on matrix units.

    Raises:
        ValueError: An unknown or empty filter.
        NotImplementedError: No allowed implementation can run here; says why for each.
    """
    forward = request(operator, "fwd", fwd_algo)
    backward = request(operator, "bwd", bwd_algo)
    shard = sharding.spread(vjp.rule(problem), arrays).shard
    own = vjp.of_shard(problem, shard)
    chosen = forward.choose(own, vjp.measurement, operator, "fwd", own, precision)
    module = operator.module(chosen.implementation)
    return vjp.Plan(module, chosen.config, problem, precision, backward, forward)
