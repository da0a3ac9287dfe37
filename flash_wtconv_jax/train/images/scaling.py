"""Crops scaled on the device, as Pillow does it: bicubic, over more pixels where they shrink.

The filter is Keys', "Cubic convolution interpolation for digital image processing", IEEE Trans.
ASSP 1981, with a = -1/2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def scaled(crops: ArrayLike, extents: ArrayLike, size: int) -> jax.Array:
    """Crops as squares of one size, scaled across, then down.

    They are within one level of what Pillow's `resize` makes of each crop, taken one axis after the
    other in the same order; within two where products are TF32, as on GPUs. A crop that has this
    size already stays as it is.

    Args:
        crops: `[N, B, B, C]` of uint8, each in its upper left corner; the rest may be anything.
        extents: Height and width of each, `[N, 2]`.
        size: Pixels a side.

    Returns:
        Whole numbers from 0 to 255 `[N, size, size, C]`, float32.

    Example:
        >>> crops = jnp.arange(16, dtype=jnp.uint8).reshape(1, 4, 4, 1)
        >>> scaled(crops, jnp.asarray([[2, 4]]), 2)[0, :, :, 0].tolist()
        [[1.0, 2.0], [5.0, 6.0]]
    """
    crops, extents = jnp.asarray(crops), jnp.asarray(extents)
    count, side, _, channels = crops.shape
    across, down = (_weights(extents[:, axis], size, side) for axis in (1, 0))
    # Either product is of plain matrices where the channels lie between rows and columns: bytes
    # are put so, and the result back, each in passing. A GPU rounds the weights to TF32, by a share
    # of 2^-11, by which a level is off by 0.16 at most before it is rounded; a TPU takes three
    # products of bfloat16, since one would move whole areas by a level.
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGH)
    planes = crops.swapaxes(2, 3).astype(jnp.float32).reshape(count, side * channels, side)
    narrow = _levels(product(planes, across.swapaxes(1, 2))).reshape(count, side, channels * size)
    return _levels(product(down, narrow)).reshape(count, size, channels, size).swapaxes(2, 3)


def _weights(extents: jax.Array, size: int, length: int) -> jax.Array:
    """The shares `[N, size, length]` that the pixels of an axis have in those that it is scaled to.

    Args:
        extents: Pixels that are there `[N]`.
        size: Pixels that it is scaled to.
        length: Pixels that there could be.
    """
    extents = extents[:, None, None]
    # Distances between middles, in whole numbers as long as can be.
    middles = (2 * jnp.arange(size)[:, None] + 1) * extents
    distances = (2 * jnp.arange(length) + 1) * size - middles
    weights = _cubic(jnp.abs(distances) / (2 * jnp.maximum(extents, size)))
    weights = jnp.where(jnp.arange(length) < extents, weights, 0)
    return weights / weights.sum(-1, keepdims=True)


def _cubic(distance: jax.Array) -> jax.Array:
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0))


def _levels(values: jax.Array) -> jax.Array:
    return jnp.clip(jnp.floor(values + 0.5), 0, 255)
