"""Normalisation over the voxels that count: batch, layer and instance norm.

Statistics are in float32 or better. Rows that do not count are zero afterwards.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.arguments import checked_array
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.sparse.pooling import global_pool
from pallas_kernels.sparse.voxels import Voxels, spread


def batch_norm(
    voxels: Voxels,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mean: jax.Array | None = None,
    var: jax.Array | None = None,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> tuple[Voxels, jax.Array, jax.Array]:
    """Batch norm: each channel less its mean, over its standard deviation.

    Args:
        voxels: The input.
        scale: `[C]`, or None for 1.
        bias: `[C]`, or None for 0.
        mean: Running mean `[C]`, with `var`; None takes that of these voxels.
        var: Running variance `[C]`.
        epsilon: Is added to the variance.
        axis_name: Axis of a mesh: statistics are of the voxels of all devices along it, each as
            much as any other.

    Returns:
        The voxels, and the mean and the variance (of the population) that were taken.

    Raises:
        ValueError: One of `mean` and `var` without the other.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2], [0, 3]], [[1.0], [2.0], [3.0]])
        >>> normed, mean, var = batch_norm(voxels)
        >>> mean.tolist(), [round(x, 3) for x in normed.features[:, 0].tolist()]
        ([2.0], [-1.225, 0.0, 1.225, 0.0])
    """
    if (mean is None) != (var is None):
        raise ValueError("mean, var: expected both or none")
    valid, wide = _counted(voxels)
    if mean is None or var is None:
        count = valid.sum(dtype=wide.dtype)
        mean = _over(wide.sum(0), axis_name) / jnp.maximum(_over(count, axis_name), 1)
        squares = jnp.where(valid, (wide - mean) ** 2, 0).sum(0)
        var = _over(squares, axis_name) / jnp.maximum(_over(count, axis_name), 1)
    normed = (wide - mean) * lax.rsqrt(var + epsilon)
    return _scaled(voxels, normed, scale, bias), mean, var


def layer_norm(
    voxels: Voxels,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-6,
) -> Voxels:
    """Layer norm: each voxel less the mean of its channels, over their standard deviation.

    Args:
        voxels: The input.
        scale: `[C]`, or None for 1.
        bias: `[C]`, or None for 0.
        epsilon: Is added to the variance.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> layer_norm(from_coords([[0, 1]], [[2.0, 4.0]])).features.round(3).tolist()
        [[-1.0, 1.0]]
    """
    _, wide = _counted(voxels)
    centred = wide - wide.mean(1, keepdims=True)
    var = (centred**2).mean(1, keepdims=True)
    return _scaled(voxels, centred * lax.rsqrt(var + epsilon), scale, bias)


def instance_norm(
    voxels: Voxels,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-5,
) -> Voxels:
    """Instance norm: batch norm of each sample by itself.

    Args:
        voxels: The input.
        scale: `[C]`, or None for 1.
        bias: `[C]`, or None for 0.
        epsilon: Is added to the variance.

    Example:
        >>> from pallas_kernels.sparse.voxels import from_coords
        >>> voxels = from_coords([[0, 1], [1, 2], [0, 3]], [[1.0], [2.0], [3.0]])
        >>> instance_norm(voxels).features[:3, 0].round(3).tolist()
        [-1.0, 0.0, 1.0]
    """
    _, wide = _counted(voxels)
    samples = jnp.where(voxels.valid, voxels.coords[:, 0], -1)

    def of_own(values: jax.Array) -> jax.Array:
        return spread(global_pool(voxels.with_features(values)), samples)

    centred = wide - of_own(wide)
    return _scaled(voxels, centred * lax.rsqrt(of_own(centred**2) + epsilon), scale, bias)


def _counted(voxels: Voxels) -> tuple[jax.Array, jax.Array]:
    """Which rows count, `[capacity, 1]`, and the features, wide, zero where one does not."""
    x = checked_array(voxels.features, "voxels.features")
    valid = voxels.valid[:, None]
    return valid, jnp.where(valid, x.astype(accumulation_dtype(x.dtype)), 0)


def _over(value: jax.Array, axis_name: str | None) -> jax.Array:
    """The sum over the devices of an axis."""
    return value if axis_name is None else lax.psum(value, axis_name)


def _scaled(
    voxels: Voxels, normed: jax.Array, scale: jax.Array | None, bias: jax.Array | None
) -> Voxels:
    """The voxels with normed features, scaled and moved."""
    if scale is not None:
        normed = normed * scale.astype(normed.dtype)
    if bias is not None:
        normed = normed + bias.astype(normed.dtype)
    dtype = voxels.features.dtype
    return voxels.with_features(jnp.where(voxels.valid[:, None], normed, 0).astype(dtype))
