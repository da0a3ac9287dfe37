"""Sparse convolution in plain JAX: runs on every platform.

Rows are gathered by the table, multiplied and added up, some offsets after others. Gradients are
gathered likewise, by the table of the other direction: nothing is scattered.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.device import on_cpu, platform
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.sparse.maps import RowTable
from pallas_kernels.sparse.problem import Problem

DIFFERENTIABLE = True

_MOST_GATHERED = {"cpu": 1 << 30, "gpu": 1 << 33, "tpu": 1 << 31}
"""Bytes that a search may gather at once."""


def unavailable(platform: str) -> str | None:
    """None: plain JAX runs on every platform."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """Offsets whose rows are gathered at once: one (a scan), some, or all of them (im2col).

    Example:
        >>> from pallas_kernels.sparse.problem import Window
        >>> search_space("fwd", Problem((1, 64, 8), "float32", 8, Window((3,), (1,), (1,))))
        [{}, {'at_once': 3}]
    """
    _, capacity, channels = problem.shape
    if not isinstance(capacity, int):
        return [{}]
    widest = max(channels, problem.features)
    each = capacity * widest * jnp.dtype(problem.dtype).itemsize
    taps, most = problem.window.taps, _MOST_GATHERED[platform()] // each
    return [{}, *({"at_once": n} for n in sorted({8, taps}) if 1 < n <= min(taps, most))]


def forward(
    x: jax.Array,
    w: jax.Array,
    rows: RowTable,
    *,
    precision: lax.Precision | None,
    at_once: int = 1,
) -> jax.Array:
    """The convolution `y [M, F]`; see `vjp` for the arguments."""
    return _summed(x, w, rows, "mkgc,kgcf->mgf", precision, at_once)


def input_grad(
    dy: jax.Array,
    w: jax.Array,
    rows: RowTable,
    *,
    precision: lax.Precision | None,
    at_once: int = 1,
) -> jax.Array:
    """The transpose of the convolution in x, `dx [N, C]`, gathered by the reverse table."""
    return _summed(dy, w, rows, "mkgf,kgcf->mgc", precision, at_once)


def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    rows: RowTable,
    *,
    shape: tuple[int, ...],
    precision: lax.Precision | None,
    at_once: int = 1,
) -> jax.Array:
    """The transpose of the convolution in w, an array of its shape."""
    taps, groups, *_ = shape
    # A row that reads nothing may hold anything, NaN too.
    reads = (rows.table >= 0).any(0)
    wanted = jnp.where(reads[:, None], dy, 0).reshape(len(reads), groups, -1)

    def products(table: jax.Array) -> jax.Array:
        gathered = take(x, table.T).reshape(len(reads), at_once, groups, -1)
        return contracted("mkgc,mgf->kgcf", gathered, wanted, precision)

    found = lax.map(products, _chunks(rows.table, at_once, -1))
    return found.reshape(-1, *shape[1:])[:taps].astype(x.dtype)


def take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """The rows of x, zeros for those that are -1.

    Example:
        >>> take(jnp.array([[5.0], [6.0]]), jnp.array([1, -1])).tolist()
        [[6.0], [0.0]]
    """
    return x.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def contracted(
    subscripts: str, a: jax.Array, b: jax.Array, precision: lax.Precision | None
) -> jax.Array:
    """The product of an einsum, summed in float32 or better."""
    acc = accumulation_dtype(a.dtype)
    if on_cpu():
        # Which would sum 16 bits in 16 bits.
        a, b = a.astype(acc), b.astype(acc)
    if precision is None and a.dtype == jnp.float32:
        # None would mean less than float32 on GPUs and TPUs.
        precision = lax.Precision.HIGHEST
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=acc)


def _summed(
    x: jax.Array,
    w: jax.Array,
    rows: RowTable,
    subscripts: str,
    precision: lax.Precision | None,
    at_once: int,
) -> jax.Array:
    """The sum over offsets of gathered rows times weights, `at_once` offsets a step."""
    count, groups = rows.table.shape[1], w.shape[1]
    multiplied = partial(contracted, subscripts, precision=precision)

    def step(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        table, weights = chunk
        gathered = take(x, table.T).reshape(count, at_once, groups, -1)
        return total + multiplied(gathered, weights), None

    chunks = _chunks(rows.table, at_once, -1), _chunks(w, at_once, 0)
    features = w.shape[2] if subscripts.endswith("c") else w.shape[3]
    zeros = jnp.zeros((count, groups, features), accumulation_dtype(x.dtype))
    total, _ = lax.scan(step, vary_like((x, w, rows), zeros), chunks)
    return total.reshape(count, -1).astype(x.dtype)


def _chunks(array: jax.Array, size: int, fill: int) -> jax.Array:
    """`[K, ...]` as `[ceil(K / size), size, ...]`, filled up."""
    missing = -array.shape[0] % size
    pads = ((0, missing), *((0, 0) for _ in array.shape[1:]))
    return jnp.pad(array, pads, constant_values=fill).reshape(-1, size, *array.shape[1:])
