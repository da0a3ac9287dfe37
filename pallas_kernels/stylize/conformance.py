"""JAX computes the cases of the instance normalisation; see `common.conformance.Room`."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Tree
from pallas_kernels.dispatch import Choice
from pallas_kernels.stylize import api, baseline_jax
from pallas_kernels.stylize.cases import CASES, Case
from pallas_kernels.stylize.problem import Problem

__all__ = ["CASES", "baseline", "computed", "problem"]


def problem(case: Case) -> Problem:
    """Returns the problem of a case, which an implementation's `check` takes.

    Example:
        >>> problem(Case(5, 4, 3, (2, 3))).shape
        (6, 5, 4, 3)
    """
    shape = math.prod(case.batch), case.h, case.w, case.c
    return Problem(shape, jnp.dtype(case.dtype), case.activation, case.residual)


def computed(case: Case, implementation: Choice) -> Callable[..., dict[str, Tree]]:
    """Returns the function of a case's arrays that one implementation computes.

    Example:
        >>> case = Case(5, 4, 3)
        >>> sorted(computed(case, "xla")(*case.drawn()))
        ['dbias', 'dscale', 'dx', 'y']
    """

    def function(
        x: jax.Array, scale: jax.Array, bias: jax.Array, residual: jax.Array | None
    ) -> jax.Array:
        rest = {"activation": case.activation, "implementation": implementation}
        return api.instance_norm(x, scale, bias, residual=residual, **rest)

    return partial(_with_gradients, function)


def baseline(case: Case) -> Callable[..., dict[str, Tree]]:
    """Returns the same in plain JAX, every array in the case's dtype."""
    function = partial(baseline_jax.instance_norm, activation=case.activation)
    return partial(_with_gradients, function)


def _with_gradients(
    function: Callable[..., jax.Array],
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
) -> dict[str, Tree]:
    arrays = jax.tree.map(jnp.asarray, (x, scale, bias, residual))
    y, pullback = jax.vjp(function, *arrays)
    found = dict(
        zip(("dx", "dscale", "dbias", "dresidual"), pullback(jnp.asarray(dy)), strict=True)
    )
    return {"y": y} | {name: value for name, value in found.items() if value is not None}
