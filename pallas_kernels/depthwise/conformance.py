"""JAX computes the cases of the depthwise convolution; see `common.conformance.Room`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Tree
from pallas_kernels.conv2d.api import checked_window
from pallas_kernels.depthwise import api, baseline_jax
from pallas_kernels.depthwise.cases import CASES, Case
from pallas_kernels.depthwise.problem import Problem

__all__ = ["CASES", "baseline", "computed", "problem"]


def problem(case: Case) -> Problem:
    """Returns the problem of a case, which an implementation's `check` takes.

    Example:
        >>> problem(Case(2, 9, 8, 4, 3, stride=2)).window.pads
        ((1, 1), (0, 1))
    """
    shape = (case.n, case.h, case.w, case.c)
    window = checked_window(shape, (*case.taps, 1, case.c), **case.arguments, groups=case.c)
    return Problem(shape, jnp.dtype(case.dtype), case.taps, window)


def computed(case: Case, implementation: str) -> Callable[..., dict[str, Tree]]:
    """Returns the function of a case's arrays that one implementation computes.

    Example:
        >>> case = Case(1, 4, 4, 2, 3)
        >>> sorted(computed(case, "xla")(*case.drawn()))
        ['dbias', 'dkernel', 'dx', 'y']
    """
    function = partial(api.depthwise_conv2d, **case.arguments, implementation=implementation)
    return partial(_with_gradients, function)


def baseline(case: Case) -> Callable[..., dict[str, Tree]]:
    """Returns the same in plain JAX, every array in the case's dtype."""
    return partial(_with_gradients, partial(baseline_jax.depthwise_conv2d, **case.arguments))


def _with_gradients(
    function: Callable[..., jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    dy: jax.Array,
) -> dict[str, Tree]:
    y, pullback = jax.vjp(function, x, kernel, bias)
    dx, dkernel, dbias = pullback(dy)
    found = {"y": y, "dx": dx, "dkernel": dkernel}
    return found | ({} if bias is None else {"dbias": dbias})
