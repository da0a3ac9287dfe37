"""Depthwise sparse convolution in plain JAX: runs on every platform.

Rows are gathered by the table, multiplied and added up, one offset after the other.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.sparse.depthwise.problem import Problem
from pallas_kernels.sparse.maps import RowTable
from pallas_kernels.sparse.xla import take, unavailable

__all__ = ["DIFFERENTIABLE", "check", "forward", "input_grad", "unavailable", "weight_grad"]

DIFFERENTIABLE = True


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""


def forward(
    x: jax.Array, w: jax.Array, rows: RowTable, *, precision: lax.Precision | None
) -> jax.Array:
    """The convolution `y [M, C]`; see `vjp` for the arguments."""
    acc = accumulation_dtype(x.dtype)

    def step(total: jax.Array, tap: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        table, weights = tap
        return total + take(x, table).astype(acc) * weights.astype(acc), None

    zeros = jnp.zeros((rows.table.shape[1], x.shape[1]), acc)
    total, _ = lax.scan(step, vary_like((x, w, rows), zeros), (rows.table, w))
    return total.astype(x.dtype)


def input_grad(
    dy: jax.Array, w: jax.Array, rows: RowTable, *, precision: lax.Precision | None
) -> jax.Array:
    """The transpose of the convolution in x, `dx [N, C]`: the convolution by the reverse table."""
    return forward(dy, w, rows, precision=precision)


def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    rows: RowTable,
    *,
    shape: tuple[int, ...],
    precision: lax.Precision | None,
) -> jax.Array:
    """The transpose of the convolution in w, `dw [K, C]`."""
    acc = accumulation_dtype(x.dtype)
    # A row that reads nothing may hold anything, NaN too.
    reads = (rows.table >= 0).any(0)
    wanted = jnp.where(reads[:, None], dy, 0).astype(acc)

    def products(table: jax.Array) -> jax.Array:
        return (take(x, table).astype(acc) * wanted).sum(0)

    return lax.map(products, rows.table).astype(x.dtype)
