"""JAX computes the cases of sparse convolution; see `common.conformance.Room`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.types import Tree
from pallas_kernels.dispatch import Choice
from pallas_kernels.sparse import api, baseline_jax
from pallas_kernels.sparse.cases import CASES, Case, PerAxis
from pallas_kernels.sparse.checks import checked_window, per_axis
from pallas_kernels.sparse.problem import Problem
from pallas_kernels.sparse.voxels import Voxels

__all__ = ["CASES", "baseline", "computed", "problem"]


def problem(case: Case) -> Problem:
    """Returns the problem of a case, which an implementation's `check` takes.

    Example:
        >>> problem(Case((40, 0), 6, 4, 8, stride=2)).shape
        (2, 64, 4)
    """
    stride = 1 if case.pools else case.stride
    window = checked_window(case.kernel_size, stride, case.dilation, case.ndim)
    window = window._replace(groups=case.groups, transposed=case.transposed)
    shape = len(case.voxels), case.capacity(), case.channels
    return Problem(shape, jnp.dtype(case.dtype), case.features, window)


def computed(case: Case, implementation: Choice) -> Callable[..., dict[str, Tree]]:
    """Returns the function of a case's arrays that one implementation computes."""
    count = len(case.outputs())

    def function(
        coords: jax.Array, x: jax.Array, w: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        given, onto = voxels(case, coords, x)
        out = api.spatially_sparse_conv(
            given,
            w,
            bias=bias,
            output_voxels=onto,
            fwd_algo=implementation,
            bwd_algo=implementation,
            **case.arguments,
        )
        return out.features[:count], out.coords[:count]

    return partial(with_gradients, function)


def baseline(case: Case) -> Callable[..., dict[str, Tree]]:
    """Returns the same in plain JAX, every array in the case's dtype."""
    pairs, outputs = case.pairs(), case.outputs()

    def function(
        coords: jax.Array, x: jax.Array, w: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        if case.pools:
            cells = case.cells()
            x = baseline_jax.pool(x[: len(cells)], cells, max(cells) + 1, case.stride_reduce)
        y = baseline_jax.sparse_conv(x, w, bias, pairs, len(outputs))
        return y, jnp.asarray(outputs)

    return partial(with_gradients, function)


def with_gradients(
    function: Callable[..., tuple[jax.Array, jax.Array]],
    coords: jax.Array,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    dy: jax.Array,
) -> dict[str, Tree]:
    """The output, its coordinates, and the gradients of a function of a case's arrays."""
    arrays = jnp.asarray(x), jnp.asarray(w), bias if bias is None else jnp.asarray(bias)
    y, pullback, places = jax.vjp(partial(function, jnp.asarray(coords)), *arrays, has_aux=True)
    dx, dw, dbias = pullback(jnp.asarray(dy))
    found = {"y": y, "coords": places, "dx": dx, "dw": dw}
    return found | ({} if bias is None else {"dbias": dbias})


def voxels(case: Case, coords: jax.Array, x: jax.Array) -> tuple[Voxels, Voxels | None]:
    """The voxels of a case's arrays, and those that its output is given, if it is.

    Example:
        >>> case = Case((5,), 6, 2, 3, ndim=1)
        >>> given, onto = voxels(case, *case.drawn()[:2])
        >>> given.num_valid.item(), onto
        (5, None)
    """
    given = _of_first(case, coords, x, len(case.inputs()), case.tensor_stride)
    if not case.onto:
        return given, None
    drawn = case.sites()
    places = np.full(coords.shape, -1, np.int32)
    places[: len(drawn)] = drawn
    return given, _of_first(case, places, x[:, :0], len(drawn), 1)


def _of_first(
    case: Case,
    coords: jax.Array | np.ndarray,
    x: jax.Array | np.ndarray,
    count: int,
    tensor_stride: PerAxis,
) -> Voxels:
    """Voxels of arrays whose first `count` rows count."""
    return Voxels(
        jnp.asarray(coords),
        jnp.asarray(x),
        jnp.asarray(count, jnp.int32),
        jnp.zeros((), jnp.int32),
        len(case.voxels),
        per_axis(tensor_stride, "tensor_stride", case.ndim),
    )
