"""JAX computes the cases of a convolution with its norm; see `common.conformance.Room`."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Keywords, Tree
from pallas_kernels.conv2d.api import checked_call
from pallas_kernels.dispatch import Choice
from pallas_kernels.stylize import baseline_jax
from pallas_kernels.stylize.convolution import api
from pallas_kernels.stylize.convolution.cases import CASES, Case
from pallas_kernels.stylize.convolution.problem import Problem

__all__ = ["CASES", "baseline", "computed", "problem"]


def problem(case: Case) -> Problem:
    """Returns the problem of a case, which an implementation's `check` takes.

    Example:
        >>> problem(Case(6, 5, 3, 3, 4, (2, 3), stride=2)).norm.shape
        (6, 3, 3, 4)
    """
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype))
        for shape in (
            (math.prod(case.batch), case.h, case.w, case.c),
            (case.k, case.k, case.c, case.nf),
        )
    )
    window: Keywords = {"stride": case.stride, "padding": case.padding, "upsample": case.upsample}
    call = checked_call(x, w, None, **window)
    return Problem(*call.problem[:6], case.activation, case.residual)


def computed(case: Case, implementation: Choice) -> Callable[..., dict[str, Tree]]:
    """Returns the function of a case's arrays that one implementation computes.

    Example:
        >>> case = Case(6, 5, 3, 3, 4)
        >>> sorted(computed(case, "xla")(*case.drawn()))
        ['dbias', 'dscale', 'dw', 'dx', 'y']
    """

    def function(*arrays: jax.Array) -> jax.Array:
        *required, residual = arrays
        rest: Keywords = {"residual": residual, "implementation": implementation, **case.arguments}
        return api.conv2d_instance_norm(*required, **rest)

    return partial(with_gradients, function)


def baseline(case: Case) -> Callable[..., dict[str, Tree]]:
    """Returns the same in plain JAX, every array in the case's dtype."""

    def function(x: jax.Array, *rest: jax.Array) -> jax.Array:
        images = x.reshape(-1, *x.shape[-3:])
        y = baseline_jax.conv2d_instance_norm(images, *rest, **case.arguments)
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    return partial(with_gradients, function)


def with_gradients(
    function: Callable[..., jax.Array], *arrays: jax.Array | None
) -> dict[str, Tree]:
    """The results of a function of a case's arrays, of which the last is the output's gradient."""
    *given, dy = jax.tree.map(jnp.asarray, arrays)
    y, pullback = jax.vjp(function, *given)
    names = "dx", "dw", "dscale", "dbias", "dresidual"
    found = dict(zip(names, pullback(dy), strict=True))
    return {"y": y} | {name: value for name, value in found.items() if value is not None}
