"""Sparse convolution as one writes it in JAX without this package: gather, multiply, scatter-add.

Every array is in x's dtype. It is a baseline for the error of low precision, and for times.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Rows = Sequence[int] | np.ndarray | jax.Array
Pair = tuple[Rows, Rows]


def sparse_conv(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    pairs: Sequence[Pair],
    out_capacity: int,
) -> jax.Array:
    """The convolution by lists of pairs.

    Args:
        x: Features `[N, C]`.
        w: Weights `[K, G, C / G, F / G]`.
        bias: `[F]`, or None.
        pairs: For each offset rows of x, and the rows of the output that read them.
        out_capacity: Rows of the output.

    Example:
        >>> pairs = [([0], [1]), ([0, 1], [0, 1]), ([1], [0])]
        >>> x, w = jnp.array([[1.0], [10.0]]), jnp.array([1.0, 2, 3]).reshape(3, 1, 1, 1)
        >>> sparse_conv(x, w, None, pairs, 2).tolist()
        [[32.0], [21.0]]
    """
    _, groups, each, out = w.shape
    y = jnp.zeros((out_capacity, groups * out), x.dtype)
    for (rows, wanted), tap in zip(pairs, w, strict=True):
        gathered = x[jnp.asarray(rows, jnp.int32)].reshape(-1, groups, each)
        precision = lax.Precision.HIGHEST
        added = jnp.einsum("lgc,gcf->lgf", gathered, tap, precision=precision)
        y = y.at[jnp.asarray(wanted, jnp.int32)].add(added.reshape(-1, groups * out))
    return y if bias is None else y + bias.astype(y.dtype)


def sparse_depthwise_conv(
    x: jax.Array, w: jax.Array, pairs: Sequence[Pair], out_capacity: int
) -> jax.Array:
    """The depthwise convolution `[M, C]` by lists of pairs, for `w [K, C]`.

    Example:
        >>> pairs = [([0], [1]), ([0, 1], [0, 1]), ([1], [0])]
        >>> x, w = jnp.array([[1.0], [10.0]]), jnp.array([[1.0], [2.0], [3.0]])
        >>> sparse_depthwise_conv(x, w, pairs, 2).tolist()
        [[32.0], [21.0]]
    """
    y = jnp.zeros((out_capacity, x.shape[1]), x.dtype)
    for (rows, wanted), tap in zip(pairs, w, strict=True):
        added = x[jnp.asarray(rows, jnp.int32)] * tap
        y = y.at[jnp.asarray(wanted, jnp.int32)].add(added)
    return y


def pool(x: jax.Array, cells: Rows, count: int, reduce: str) -> jax.Array:
    """The "max", "mean" or "sum" of the rows of each cell.

    Args:
        x: Features `[N, C]`.
        cells: The cell of each row.
        count: Cells.
        reduce: Which of them.

    Example:
        >>> pool(jnp.array([[1.0], [5.0], [7.0]]), [0, 0, 1], 2, "mean").tolist()
        [[3.0], [7.0]]
    """
    own = jnp.asarray(cells, jnp.int32)
    if reduce == "max":
        return jax.ops.segment_max(x, own, count)
    total = jax.ops.segment_sum(x, own, count)
    if reduce == "sum":
        return total
    return total / jax.ops.segment_sum(jnp.ones_like(x), own, count)
