"""JAX computes the cases of the pointwise MLP; see `common.conformance.Room`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Tree
from pallas_kernels.mlp import api, baseline_jax
from pallas_kernels.mlp.cases import CASES, Case
from pallas_kernels.mlp.problem import Problem

__all__ = ["CASES", "baseline", "computed", "problem"]


def problem(case: Case) -> Problem:
    """Returns the problem of a case, which an implementation's `check` takes.

    Example:
        >>> problem(Case(5, 8, 32, 4)).features
        4
    """
    return Problem((case.rows, case.channels), jnp.dtype(case.dtype), case.hidden, case.features)


def computed(case: Case, implementation: str) -> Callable[..., dict[str, Tree]]:
    """Returns the function of a case's arrays that one implementation computes.

    Example:
        >>> case = Case(5, 8, 32, 4)
        >>> sorted(computed(case, "xla")(*case.drawn()))
        ['dbias1', 'dbias2', 'dkernel1', 'dkernel2', 'dx', 'y', 'y_alone']
    """
    return partial(_with_gradients, partial(api.mlp, implementation=implementation))


def baseline(case: Case) -> Callable[..., dict[str, Tree]]:
    """Returns the same in plain JAX, every array in the case's dtype."""
    return partial(_with_gradients, baseline_jax.mlp)


def _with_gradients(
    function: Callable[..., jax.Array],
    x: jax.Array,
    first: jax.Array,
    second: jax.Array,
    inner: jax.Array,
    outer: jax.Array,
    dy: jax.Array,
) -> dict[str, Tree]:
    *arrays, dy = map(jnp.asarray, (x, first, second, inner, outer, dy))
    y, pullback = jax.vjp(lambda x, a, b, c, d: function(x, (a, b), (c, d)), *arrays)
    names = "dx", "dkernel1", "dkernel2", "dbias1", "dbias2"
    x, first, second, *biases = arrays
    alone = function(x, (first, second), biases, residual=dy)
    return {"y": y, "y_alone": alone} | dict(zip(names, pullback(dy), strict=True))
