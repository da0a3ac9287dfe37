"""Functions that change the voxels of a batch: pooling and its inverse, pruning, union, arithmetic.

Gradients gather by the reverse map, as those of convolutions do.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.arguments import checked_array, checked_integer
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.sparse.checks import FULL, POOL_REDUCTIONS, check_name
from pallas_kernels.sparse.maps import KernelMap, kernel_map
from pallas_kernels.sparse.voxels import Voxels, pack, unique_keys, unpack
from pallas_kernels.sparse.xla import take


def pool(
    voxels: Voxels,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    padding: int | Sequence[int] = 0,
    reduce: str = "max",
    out_capacity: int | None = None,
) -> Voxels:
    """Pooling: output u is made of the voxels from `stride u - padding` on, `kernel_size` of them.

    Args:
        voxels: The input.
        kernel_size: Size of a window, an int or one for each axis.
        stride: Distance of windows; None is kernel_size, so that each voxel is in one window.
        padding: The first window begins so far before 0.
        reduce: "max", "mean" (of the voxels that are there) or "sum".
        out_capacity: Rows of the output; None takes the input's where windows do not overlap.

    Returns:
        Every window that holds a voxel, sorted.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2], [0, 3]], [[1.0], [5.0], [7.0]])
        >>> pooled = pool(voxels, 2)
        >>> pooled.coords[:2].tolist(), pooled.features[:2, 0].tolist()
        ([[0, 0], [0, 1]], [1.0, 7.0])
    """
    check_name(reduce, "reduce", POOL_REDUCTIONS)
    stride = kernel_size if stride is None else stride
    if out_capacity is None and stride == kernel_size:
        out_capacity = voxels.capacity
    maps, out = kernel_map(
        voxels,
        kernel_size,
        stride,
        output_rule="full",
        padding=padding,
        out_capacity=out_capacity,
    )
    x = checked_array(voxels.features, "voxels.features")
    if reduce == "max":
        return out.with_features(_greatest(x, maps))
    total = _total(x.astype(accumulation_dtype(x.dtype)), maps)
    if reduce == "mean":
        total = total / jnp.maximum((maps.table >= 0).sum(0, dtype=jnp.int32), 1)[:, None]
    return out.with_features(total.astype(x.dtype))


def unpool(
    voxels: Voxels,
    output_voxels: Voxels,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    padding: int | Sequence[int] = 0,
) -> Voxels:
    """The inverse of pooling: each voxel gets the sum of the windows that it is in.

    Args:
        voxels: The windows.
        output_voxels: The voxels that `pool` was given.
        kernel_size: As `pool`.
        stride: As `pool`.
        padding: As `pool`.

    Returns:
        The voxels of `output_voxels`; zeros where a voxel is in no window.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2], [0, 3]], [[1.0], [5.0], [7.0]])
        >>> unpool(pool(voxels, 2), voxels, 2).features[:3, 0].tolist()
        [1.0, 7.0, 7.0]
    """
    stride = kernel_size if stride is None else stride
    x = checked_array(voxels.features, "voxels.features")
    maps, out = kernel_map(
        voxels,
        kernel_size,
        stride,
        transposed=True,
        output_voxels=output_voxels,
        padding=padding,
    )
    return out.with_features(_total(x.astype(accumulation_dtype(x.dtype)), maps).astype(x.dtype))


def global_pool(voxels: Voxels, *, reduce: str = "mean") -> jax.Array:
    """The "max", "mean" or "sum" of the voxels of each sample.

    Args:
        voxels: The input.
        reduce: Which of them.

    Returns:
        `[batch_size, C]`, zeros for a sample without voxels.

    Raises:
        ValueError: Another name.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2], [2, 3]], [[1.0], [5.0], [7.0]])
        >>> global_pool(voxels).tolist()
        [[3.0], [0.0], [7.0]]
    """
    check_name(reduce, "reduce", POOL_REDUCTIONS)
    x = checked_array(voxels.features, "voxels.features")
    wide = x.astype(accumulation_dtype(x.dtype))

    # A sample at a time: what is not a number in one does not reach another.
    def one(sample: jax.Array) -> jax.Array:
        own = (voxels.valid & (voxels.coords[:, 0] == sample))[:, None]
        if reduce == "max":
            return jnp.where(own.any(), jnp.where(own, wide, -jnp.inf).max(0), 0)
        total = jnp.where(own, wide, 0).sum(0)
        return total / jnp.maximum(own.sum(), 1) if reduce == "mean" else total

    return lax.map(one, lax.iota(jnp.int32, voxels.batch_size)).astype(x.dtype)


def prune(voxels: Voxels, keep: jax.Array, *, out_capacity: int | None = None) -> Voxels:
    """The voxels that are kept, in the same order.

    Args:
        voxels: The input.
        keep: `bool [capacity]`.
        out_capacity: Rows of the output; None takes the input's.

    Raises:
        ValueError: A bad argument; outside of `jax.jit`, more voxels than `out_capacity` too.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2]], [[1.0], [5.0]])
        >>> pruned = prune(voxels, voxels.features[:, 0] > 2)
        >>> pruned.num_valid.item(), pruned.coords[0].tolist()
        (1, [0, 2])
    """
    keep = jnp.asarray(keep)
    if keep.dtype != bool or keep.shape != (voxels.capacity,):
        raise ValueError(
            f"keep: expected bool [{voxels.capacity}], got {keep.dtype} {list(keep.shape)}"
        )
    rows = voxels.capacity
    if out_capacity is not None:
        rows = checked_integer(out_capacity, "out_capacity", least=1)
    kept = keep & voxels.valid
    count = kept.sum(dtype=jnp.int32)
    from_row = jnp.nonzero(kept, size=rows, fill_value=-1)[0].astype(jnp.int32)
    to_row = jnp.where(kept, jnp.cumsum(kept, dtype=jnp.int32) - 1, -1)
    to_row = jnp.where(to_row < rows, to_row, -1)
    coords = jnp.where(from_row[:, None] < 0, -1, voxels.coords[from_row])
    pruned = dataclasses.replace(
        voxels,
        coords=coords,
        features=_moved(voxels.features, from_row, to_row),
        num_valid=jnp.minimum(count, rows),
        overflow=voxels.overflow | jnp.where(count > rows, FULL, 0),
    )
    return _checked(pruned)


def union(first: Voxels, second: Voxels, *, out_capacity: int | None = None) -> Voxels:
    """The voxels of both, sorted; where both have one, the sum of their features.

    Args:
        first: Voxels.
        second: Voxels of as many samples, axes and channels, and of the same tensor stride.
        out_capacity: Rows of the output; None takes as many as both have.

    Raises:
        ValueError: A bad argument; outside of `jax.jit`, more voxels than `out_capacity` too.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> both = union(*(from_coords([[0, 1], [0, i]], [[1.0], [5.0]]) for i in (2, 3)))
        >>> both.coords[:3].tolist(), both.features[:3, 0].tolist()
        ([[0, 1], [0, 2], [0, 3]], [2.0, 5.0, 5.0])
    """
    _check_alike(first, second)
    rows = first.capacity + second.capacity
    if out_capacity is not None:
        rows = checked_integer(out_capacity, "out_capacity", least=1)
    keys = [pack(one.coords, one.valid) for one in (first, second)]
    high, low = (jnp.concatenate(half) for half in zip(*keys, strict=True))
    found = unique_keys(high, low, rows)
    sites = dataclasses.replace(
        first,
        coords=unpack(found.high, found.low, first.ndim),
        features=jnp.zeros((rows, 0), first.features.dtype),
        num_valid=found.total,
        overflow=found.overflow | first.overflow | second.overflow,
    )
    features = [
        _total(one.features, kernel_map(one, 1, output_voxels=sites)[0]) for one in (first, second)
    ]
    return _checked(sites.with_features(features[0] + features[1]))


def add(first: Voxels, second: Voxels) -> Voxels:
    """The sum of features of the same voxels in the same order, as of a skip connection.

    Raises:
        ValueError: Voxels that differ in number, samples, axes or tensor stride; outside of
            `jax.jit`, in coordinates too.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1]], [[1.0]])
        >>> add(voxels, voxels).features.tolist()
        [[2.0]]
    """
    return _combined(operator.add, first, second)


def subtract(first: Voxels, second: Voxels) -> Voxels:
    """The difference of features of the same voxels in the same order.

    Raises:
        ValueError: As `add`.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> one, other = (from_coords([[0, 1]], [[value]]) for value in (3.0, 1.0))
        >>> subtract(one, other).features.tolist()
        [[2.0]]
    """
    return _combined(operator.sub, first, second)


def multiply(first: Voxels, second: Voxels) -> Voxels:
    """The product of features of the same voxels in the same order.

    Raises:
        ValueError: As `add`.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1]], [[3.0]])
        >>> multiply(voxels, voxels).features.tolist()
        [[9.0]]
    """
    return _combined(operator.mul, first, second)


def concatenate(first: Voxels, second: Voxels) -> Voxels:
    """The channels of both, of the same voxels in the same order.

    Raises:
        ValueError: As `add`.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1]], [[3.0]])
        >>> concatenate(voxels, voxels).features.tolist()
        [[3.0, 3.0]]
    """
    return _combined(lambda *features: jnp.concatenate(features, 1), first, second)


def _combined(
    combine: Callable[[jax.Array, jax.Array], jax.Array], first: Voxels, second: Voxels
) -> Voxels:
    _check_alike(first, second)
    arrays = first.coords, second.coords, first.num_valid, second.num_valid
    if first.coords is not second.coords:
        same = first.capacity == second.capacity
        if same and not any(isinstance(array, jax.core.Tracer) for array in arrays):
            count = int(first.num_valid)
            same = count == int(second.num_valid) and np.array_equal(
                first.coords[:count], second.coords[:count]
            )
        if not same:
            raise ValueError("second: expected first's coordinates in the same order; try union")
    made = first.with_features(combine(first.features, second.features))
    return dataclasses.replace(made, overflow=first.overflow | second.overflow)


def _check_alike(first: Voxels, second: Voxels) -> None:
    """Raises an error where two sets of voxels are not of one grid."""
    for name in ("batch_size", "ndim", "tensor_stride"):
        expected, got = getattr(first, name), getattr(second, name)
        if expected != got:
            raise ValueError(f"second: expected first's {name}, {expected}, got {got}")


def _checked(voxels: Voxels) -> Voxels:
    """The voxels, checked where they have values."""
    return voxels if isinstance(voxels.overflow, jax.core.Tracer) else voxels.check()


@jax.custom_vjp
def _total(x: jax.Array, maps: KernelMap) -> jax.Array:
    """The sum of the rows that each row reads, `[M, C]`."""

    def step(total: jax.Array, rows: jax.Array) -> tuple[jax.Array, None]:
        return total + take(x, rows), None

    zeros = jnp.zeros((maps.out_capacity, x.shape[1]), x.dtype)
    return lax.scan(step, vary_like((x, maps), zeros), maps.table)[0]


_total.defvjp(
    lambda x, maps: (_total(x, maps), maps),
    lambda maps, dy: (_total(dy, maps.swapped()), None),
)


@jax.custom_vjp
def _greatest(x: jax.Array, maps: KernelMap) -> jax.Array:
    """The greatest of the rows that each row reads, `[M, C]`; zeros where it reads none."""

    def step(most: jax.Array, rows: jax.Array) -> tuple[jax.Array, None]:
        return jnp.maximum(most, jnp.where(rows[:, None] < 0, -jnp.inf, take(x, rows))), None

    least = jnp.full((maps.out_capacity, x.shape[1]), -jnp.inf, x.dtype)
    most, _ = lax.scan(step, vary_like((x, maps), least), maps.table)
    return jnp.where((maps.table >= 0).any(0)[:, None], most, 0)


def _greatest_fwd(
    x: jax.Array, maps: KernelMap
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, KernelMap]]:
    y = _greatest(x, maps)
    return y, (x, y, maps)


def _greatest_bwd(
    residuals: tuple[jax.Array, jax.Array, KernelMap], dy: jax.Array
) -> tuple[jax.Array, None]:
    x, y, maps = residuals

    def tie(count: jax.Array, rows: jax.Array) -> tuple[jax.Array, None]:
        return count + ((rows[:, None] >= 0) & (take(x, rows) == y)), None

    zeros = jnp.zeros(y.shape, accumulation_dtype(y.dtype))
    ties, _ = lax.scan(tie, vary_like((x, maps), zeros), maps.table)
    share = dy / jnp.maximum(ties, 1)

    def step(dx: jax.Array, rows: jax.Array) -> tuple[jax.Array, None]:
        chosen = (rows[:, None] >= 0) & (take(y, rows) == x)
        return dx + jnp.where(chosen, take(share, rows), 0), None

    zeros = jnp.zeros(x.shape, share.dtype)
    dx, _ = lax.scan(step, vary_like((x, maps), zeros), maps.reverse)
    return dx.astype(x.dtype), None


_greatest.defvjp(_greatest_fwd, _greatest_bwd)


@jax.custom_vjp
def _moved(x: jax.Array, from_row: jax.Array, to_row: jax.Array) -> jax.Array:
    """The rows of x that stand in `from_row`, one row of a result each; `to_row` is the inverse."""
    return take(x, from_row)


_moved.defvjp(
    lambda x, from_row, to_row: (_moved(x, from_row, to_row), (from_row, to_row)),
    lambda rows, dy: (_moved(dy, *rows[::-1]), None, None),
)
