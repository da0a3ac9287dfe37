"""JAX computes the cases of the dense convolution; see `common.conformance.Room`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Tree
from pallas_kernels.conv2d import api, baseline_jax, upsampling
from pallas_kernels.conv2d.cases import CASES, Case
from pallas_kernels.conv2d.problem import Problem, Window
from pallas_kernels.oracle import conv2d_pads, reflects

__all__ = ["CASES", "baseline", "computed", "problem"]


def problem(case: Case) -> Problem:
    """Returns the problem of a case, which an implementation's `check` takes.

    Example:
        >>> problem(Case(2, 6, 5, 4, 3, 2, 8, padding="SAME")).window.pads
        ((1, 1), (0, 1))
    """
    stride, dilation = (
        (value, value) if isinstance(value, int) else value
        for value in (case.stride, case.dilation)
    )
    size = case.upsample * case.h, case.upsample * case.w
    above, left = conv2d_pads(case.padding, size, (case.hf, case.wf), stride, dilation)
    window = Window(
        *(stride, (above, left), dilation, case.groups),
        *(reflects(case.padding), case.layout, case.upsample),
    )
    shape, dtype = (case.n, case.h, case.w, case.c), jnp.dtype(case.dtype)
    out_dtype = jnp.dtype(case.out_dtype or case.dtype)
    return upsampling.implemented(
        Problem(shape, dtype, case.hf, case.wf, case.nf, window, out_dtype)
    )


def computed(case: Case, implementation: str) -> Callable[..., dict[str, Tree]]:
    """Returns the function of a case's arrays that one implementation computes.

    Example:
        >>> case = Case(2, 6, 5, 4, 3, 2, 8)
        >>> sorted(computed(case, "xla")(*case.drawn()))
        ['dw', 'dx', 'y']
    """
    static = {**case.arguments, "out_dtype": case.out_dtype, "implementation": implementation}

    def function(x: jax.Array, w: jax.Array, bias: jax.Array | None) -> jax.Array:
        return api.conv2d(x, w, bias=bias, **static)

    return partial(_with_gradients, function)


def baseline(case: Case) -> Callable[..., dict[str, Tree]]:
    """Returns the same in plain JAX, every array in the case's dtype."""
    static = {**case.arguments, "out_dtype": case.out_dtype}
    return partial(_with_gradients, partial(baseline_jax.conv2d, **static))


def _with_gradients(
    function: Callable[..., jax.Array],
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    dy: jax.Array,
) -> dict[str, Tree]:
    y, pullback = jax.vjp(function, x, w, bias)
    dx, dw, dbias = pullback(dy)
    return {"y": y, "dx": dx, "dw": dw} | ({} if bias is None else {"dbias": dbias})
