"""JAX computes the cases of depthwise sparse convolution; see `common.conformance.Room`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Tree
from pallas_kernels.dispatch import Choice
from pallas_kernels.sparse import baseline_jax, conformance
from pallas_kernels.sparse.depthwise import api
from pallas_kernels.sparse.depthwise.cases import CASES, Case
from pallas_kernels.sparse.depthwise.problem import Problem
from pallas_kernels.sparse.maps import kernel_map

__all__ = ["CASES", "baseline", "computed", "problem"]


def problem(case: Case) -> Problem:
    """Returns the problem of a case, which an implementation's `check` takes.

    Example:
        >>> problem(CASES[0]).weight_shape
        (27, 6)
    """
    shape, dtype, features, window = conformance.problem(case)
    return Problem((1, *shape[1:]), dtype, features, window)


def computed(case: Case, implementation: Choice) -> Callable[..., dict[str, Tree]]:
    """Returns the function of a case's arrays that one implementation computes."""
    algorithms = implementation, implementation

    def function(
        coords: jax.Array, x: jax.Array, w: jax.Array, bias: None
    ) -> tuple[jax.Array, jax.Array]:
        voxels, onto = conformance.voxels(case, coords, x)
        found, out = kernel_map(
            voxels,
            case.kernel_size,
            case.stride,
            case.dilation,
            transposed=case.transposed,
            output_voxels=onto,
        )
        count = len(case.outputs())
        y = api.spatially_sparse_depthwise_conv(x, w, found, out.capacity, *algorithms)
        return y[:count], out.coords[:count]

    return partial(conformance.with_gradients, function)


def baseline(case: Case) -> Callable[..., dict[str, Tree]]:
    """Returns the same in plain JAX, every array in the case's dtype."""
    pairs, outputs = case.pairs(), case.outputs()

    def function(
        coords: jax.Array, x: jax.Array, w: jax.Array, bias: None
    ) -> tuple[jax.Array, jax.Array]:
        y = baseline_jax.sparse_depthwise_conv(x, w, pairs, len(outputs))
        return y, jnp.asarray(outputs)

    return partial(conformance.with_gradients, function)
