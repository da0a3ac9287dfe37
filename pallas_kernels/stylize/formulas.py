"""The norm, its derivative and the transpose of that, in plain JAX on `[N, H, W, C]`.

Statistics are `[N, 3, C]` in the dtype of accumulation: a centre near the mean, which the inputs'
digits allow to be subtracted exactly, what the mean exceeds it by, and the inverse of the standard
deviation. So a mean of 10,000 deviations costs no digits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.conv2d.moments import Moments, combined


class Known(NamedTuple):
    """The arrays that both passes of a derivative are taken at.

    The residual is there where an activation's slope depends on it.
    """

    x: jax.Array
    statistics: jax.Array
    scale: jax.Array
    bias: jax.Array
    residual: jax.Array | None


class Gradients(NamedTuple):
    """The tangents, or gradients, of x, scale, bias and the residual; None is zero."""

    x: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None
    residual: jax.Array | None


def statistics(x: jax.Array, eps: float) -> jax.Array:
    """The statistics of each channel of each image, by two passes over x.

    A one-pass formula would read x once less, and lose the digits that a mean of many deviations
    takes.

    Args:
        x: Images `[N, H, W, C]`.
        eps: Is added to the variance.

    Returns:
        `[N, 3, C]`.

    Example:
        >>> x = jnp.asarray([[[[1e6], [1e6 + 2]]]])
        >>> statistics(x, 0.0)[0, :, 0].tolist()
        [1000001.0, 0.0, 1.0]
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    first = wide[:, 0, 0]
    mean = (wide - on_images(first)).mean((1, 2))
    centre = first + mean
    offset = mean - (centre - first)
    centred = (wide - on_images(centre)) - on_images(offset)
    deviation = jnp.sqrt((centred**2).mean((1, 2)) + eps)
    return jnp.stack([centre, offset, 1 / deviation], 1)


def statistics_of_tiles(tiles: Moments, eps: float) -> jax.Array:
    """The statistics of images whose tiles' moments are known; the images are not read.

    Args:
        tiles: The moments of each tile of each image.
        eps: Is added to the variance.

    Returns:
        `[N, 3, C]`.

    Example:
        >>> two = jnp.full((1, 2, 1), 1e6).at[0, 1].add(2.0)
        >>> statistics_of_tiles(Moments(jnp.ones((1, 2)), two, 0 * two), 0.0)[0, :, 0].tolist()
        [1000001.0, 0.0, 1.0]
    """
    near, (count, offset, squares) = combined(tiles)
    centre = near + offset
    deviation = jnp.sqrt(squares / count[:, None] + eps)
    return jnp.stack([centre, offset - (centre - near), 1 / deviation], 1)


def normed(x: jax.Array, statistics: jax.Array) -> jax.Array:
    """The images less their mean over their deviation, in the statistics' dtype."""
    centre, offset, inverse = (on_images(statistics[:, i]) for i in range(3))
    return ((x.astype(statistics.dtype) - centre) - offset) * inverse


def preactivation(known: Known) -> jax.Array:
    """The scaled and moved norm with its residual, which an activation takes."""
    z = normed(known.x, known.statistics) * on_images(known.scale) + on_images(known.bias)
    return z if known.residual is None else z + known.residual.astype(z.dtype)


def pushed(activation: str | None, known: Known, tangents: Gradients) -> jax.Array:
    """The tangent of the output, linear in those of the arguments, in x's dtype."""
    n = normed(known.x, known.statistics)
    dz = jnp.zeros_like(n)
    if tangents.x is not None:
        dz = _about_mean(known, n, tangents.x.astype(n.dtype))
    if tangents.scale is not None:
        dz = dz + n * on_images(tangents.scale)
    if tangents.bias is not None:
        dz = dz + on_images(tangents.bias)
    if tangents.residual is not None:
        dz = dz + tangents.residual.astype(n.dtype)
    return _sloped(activation, known, dz).astype(known.x.dtype)


def pulled(activation: str | None, residual: bool, known: Known, dy: jax.Array) -> Gradients:
    """The transpose of `pushed` in the tangents: the formulas of `oracle.instance_norm_vjp`."""
    g = _sloped(activation, known, dy.astype(known.statistics.dtype))
    n = normed(known.x, known.statistics)
    dx, dtype = _about_mean(known, n, g), known.x.dtype
    last = g.astype(dtype) if residual else None
    return Gradients(dx.astype(dtype), (n * g).sum((1, 2)), g.sum((1, 2)), last)


def statistics_tangent(known: Known, dx: jax.Array | None) -> jax.Array:
    """The tangent of the statistics; the centre stands for a number, and has none."""
    if dx is None:
        return jnp.zeros_like(known.statistics)
    dx = dx.astype(known.statistics.dtype)
    mean = dx.mean((1, 2))
    covariance = (normed(known.x, known.statistics) * dx).mean((1, 2))
    inverse = known.statistics[:, 2]
    return jnp.stack([jnp.zeros_like(mean), mean, -(inverse**2) * covariance], 1)


def on_images(value: jax.Array) -> jax.Array:
    """Values `[N, C]` as images of one pixel."""
    return value[:, None, None, :]


def _about_mean(known: Known, n: jax.Array, g: jax.Array) -> jax.Array:
    """The derivative of the scaled norm by x, applied to g; it is its own transpose."""
    mean, covariance = (v.mean((1, 2), keepdims=True) for v in (g, n * g))
    return on_images(known.scale * known.statistics[:, 2]) * (g - mean - n * covariance)


def _sloped(activation: str | None, known: Known, g: jax.Array) -> jax.Array:
    """The gradient behind an activation whose slope is 0 or 1, and 0 at 0; linear in g."""
    return g if activation is None else jnp.where(preactivation(known) > 0, g, 0)
