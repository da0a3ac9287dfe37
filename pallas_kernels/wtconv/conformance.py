"""JAX computes the cases of the wavelet convolution; see `common.conformance.Room`."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Tree
from pallas_kernels.wtconv import api, baseline_jax
from pallas_kernels.wtconv.cases import CASES, Case
from pallas_kernels.wtconv.problem import Problem

__all__ = ["CASES", "baseline", "computed", "problem"]

_WTCONV = {1: api.wtconv1d, 2: api.wtconv2d, 3: api.wtconv3d}


def problem(case: Case) -> Problem:
    """Returns the problem of a case, which an implementation's `check` takes.

    Example:
        >>> problem(Case((7, 9), 1, 5, batch=(2, 3))).shape
        (6, 7, 9, 3)
    """
    shape = (math.prod(case.batch), *case.spatial, case.channels)
    return Problem(shape, jnp.dtype(case.dtype), case.kernel_size, case.levels, case.wavelet)


def computed(case: Case, implementation: str) -> Callable[..., dict[str, Tree]]:
    """Returns the function of a case's arrays that one implementation computes.

    Example:
        >>> case = Case((4,), 0, 3)
        >>> sorted(computed(case, "xla")(*case.drawn()))
        ['base_bias', 'base_kernel', 'base_scale', 'dx', 'y']
    """
    function = partial(
        _WTCONV[case.ndim],
        wavelet=case.wavelet,
        stride=case.stride,
        implementation=implementation,
    )
    return partial(_with_gradients, function)


def baseline(case: Case) -> Callable[..., dict[str, Tree]]:
    """Returns the same in plain JAX, every array in the case's dtype; Haar alone."""
    function = partial(baseline_jax.wtconv, ndim=case.ndim, stride=case.stride)
    return partial(_with_gradients, function)


def _with_gradients(
    function: Callable[..., jax.Array], x: jax.Array, params: dict[str, jax.Array], dy: jax.Array
) -> dict[str, Tree]:
    y, pullback = jax.vjp(function, x, params)
    dx, dparams = pullback(dy)
    return {"y": y, "dx": dx, **dparams}
