"""The moments of a convolution's output by tile, for operators that normalise it.

Every implementation's `forward` returns them where it is asked to. They are those of the output in
float32, after the activation, before it is rounded. A tile is what the implementation makes one:
some pixels of one image. Sums have a fixed order, so results are bitwise reproducible.

Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979, for the sum of tiles.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.conv2d.problem import Window


class Moments(NamedTuple):
    """The moments of each tile of each image, or of each image.

    Attributes:
        counts: `[N, tiles]`, or `[N]`: the numbers of pixels, in the dtype of the mean.
        mean: `[N, tiles, NF]`, or `[N, NF]`, float32 (float64 of float64).
        squares: Likewise: the sum of the squared deviations from that mean.
    """

    counts: jax.Array
    mean: jax.Array
    squares: jax.Array


WithMoments = tuple[jax.Array, Moments]
"""The output of a convolution, and its moments."""


def of_rows(y: jax.Array, window: Window) -> Moments:
    """The moments of images, whose tiles are rows of pixels.

    Args:
        y: Images in the window's layout, in float32 or better.
        window: The window.

    Example:
        >>> of_rows(jnp.array([[[[1.0], [3.0]], [[4.0], [4.0]]]]), Window()).squares[0, :, 0]
        Array([2., 0.], dtype=float32)
    """
    axis = 2 if window.layout == "nhwc_hwcf" else 3
    pixels = y.shape[axis]
    # The mean of large numbers is inexact by some of their last bits; that of what is left is not.
    mean = y.mean(axis, keepdims=True)
    rest = y - mean
    off = rest.mean(axis, keepdims=True)
    squares = jnp.maximum((rest * rest).sum(axis, keepdims=True) - pixels * off * off, 0)
    found = (jnp.squeeze(one, axis) for one in (mean + off, squares))
    if window.layout != "nhwc_hwcf":
        found = (one.transpose(0, 2, 1) for one in found)
    mean, squares = found
    return Moments(jnp.full(mean.shape[:2], pixels, mean.dtype), mean, squares)


def of_tiles(counts: Sequence[int], mean: jax.Array, squares: jax.Array) -> Moments:
    """The moments that a kernel has written, of tiles that have so many pixels in every image."""
    known = jnp.asarray(counts, mean.dtype)
    return Moments(jnp.broadcast_to(known, mean.shape[:2]), mean, squares)


def together(parts: Sequence[Moments]) -> Moments:
    """The moments of all tiles of several outputs."""
    return jax.tree.map(lambda *same: jnp.concatenate(same, 1), *parts)


def each_apart(tiles: Moments, pixels: int) -> Moments:
    """The moments of tiles whose features are those of several neighbouring pixels.

    Args:
        tiles: The moments of tiles of `pixels NF` features, those of one pixel after the other.
        pixels: The number of pixels.

    Example:
        >>> mean = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
        >>> each_apart(Moments(jnp.ones((1, 1)), mean, 0 * mean), 2).mean.tolist()
        [[[1.0, 2.0], [3.0, 4.0]]]
    """
    n, count, features = tiles.mean.shape
    shape = n, count * pixels, features // pixels
    counts = jnp.repeat(tiles.counts, pixels, 1)
    return Moments(counts, tiles.mean.reshape(shape), tiles.squares.reshape(shape))


def combined(tiles: Moments) -> tuple[jax.Array, Moments]:
    """The moments of each image, from those of its tiles, in two passes over the tiles.

    Args:
        tiles: The moments of its tiles; those of a tile without pixels must be 0.

    Returns:
        A value near the mean of each image, `[N, NF]`, and the moments of the image less that
        value: so the digits that a mean of many deviations takes are not lost.

    Example:
        >>> rows = of_rows(jnp.array([[[[1.0], [3.0]], [[4.0], [4.0]]]]), Window())
        >>> near, (count, mean, squares) = combined(rows)
        >>> count, near + mean, squares
        (Array([4.], dtype=float32), Array([[3.]], dtype=float32), Array([[6.]], dtype=float32))
    """
    counts, means, squares = tiles
    near = means[:, 0]
    # Of numbers that are near each other the difference is exact.
    apart = jnp.where(counts[..., None] > 0, means - near[:, None], 0)
    total = counts.sum(1)
    mean = (counts[..., None] * apart).sum(1) / jnp.maximum(total, 1)[:, None]
    between = counts[..., None] * (apart - mean[:, None]) ** 2
    return near, Moments(total, mean, (squares + between).sum(1))
