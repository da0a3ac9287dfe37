"""Effective receptive field: how much each input pixel moves the centre of a feature map.

Source: Luo, Li, Urtasun, Zemel, "Understanding the Effective Receptive Field in Deep Convolutional
Neural Networks", NeurIPS 2016.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pallas_kernels.common.arguments import checked_seed

if TYPE_CHECKING:
    from flash_wtconv_jax.models import ConvNeXt

SHARES = (0.5, 0.95)
"""Shares of the field whose squares are drawn and reported."""

LEAST = 1e-4
"""The least share of a field's greatest value that counts, and that pictures show."""

_BATCH = 8


def effective_receptive_field(
    features: Callable[[jax.Array], jax.Array],
    shape: Sequence[int],
    *,
    samples: int = 64,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Mean absolute gradient of the central features with respect to the input.

    Each sample is an input of white noise and one draw of signs for the central features, whose
    signed sum is differentiated: features that see a pixel with opposite gradients do not cancel.
    Along an even side the centre is the middle pair of units, so that the result is centred.

    Args:
        features: Maps images `[N, H, W, C]` to features `[N, h, w, F]`; h and w may differ from
            H and W. It is differentiated and compiled once.
        shape: `(H, W, C)` of the input.
        samples: Number of samples to average over, rounded up to a multiple of eight.
        seed: Seed of the inputs and the signs.

    Returns:
        The field `[H, W]`, float64, summed over the input's channels.

    Raises:
        ValueError: If `shape` has not three sizes >= 1, `samples` is below 1, the seed has more
            than 64 bits, or the features are not of rank 4.

    Example:
        >>> neighbours = lambda x: jnp.roll(x, 1, axis=2) + x + jnp.roll(x, -1, axis=2)
        >>> field = effective_receptive_field(neighbours, (7, 7, 1), samples=1)
        >>> (field > 0).sum(axis=0).tolist()
        [0, 0, 1, 1, 1, 0, 0]
    """
    height, width, channels = _check(shape, samples)

    @jax.jit
    def batch_gradient(key: jax.Array) -> jax.Array:
        input_key, sign_key = jax.random.split(key)
        x = jax.random.normal(input_key, (_BATCH, height, width, channels))
        y, pull_back = jax.vjp(features, x)
        if y.ndim != 4:
            raise ValueError(f"features must return an array [N, h, w, F], got shape {y.shape}")
        signs = jax.random.rademacher(sign_key, y.shape, y.dtype)
        (gradient,) = pull_back(signs * _centre_mask(y.shape[1], y.shape[2])[..., None])
        return jnp.abs(gradient).sum(axis=(0, 3))

    keys = jax.random.split(jax.random.key(checked_seed(seed)), -(-samples // _BATCH))
    total = sum(np.asarray(batch_gradient(key), np.float64) for key in keys)
    return np.asarray(total) / (len(keys) * _BATCH)


def network_field(model: "ConvNeXt", shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Effective receptive field of the centre of a model's last feature map.

    Args:
        model: Any `models.ConvNeXt`.
        shape: `(H, W, C)` of the input.

    Returns:
        The field `[H, W]`, see `effective_receptive_field`.

    Raises:
        ValueError: If the model cannot take that shape.
    """
    return effective_receptive_field(lambda x: model.features(x, deterministic=True)[-1], shape)


def contribution_side(field: ArrayLike, share: float) -> int:
    """Side of the smallest centred square of pixels that holds a share of the field.

    Args:
        field: Field `[H, W]`, not negative.
        share: Share of the sum, in (0, 1].

    Returns:
        The side in pixels; odd if H is odd, else even, and at most the longer side of the field.

    Raises:
        ValueError: If `field` is not a matrix with a positive sum, or `share` is out of range.

    Example:
        >>> contribution_side(np.ones((10, 10)), 0.5)
        8
    """
    values = np.asarray(field, np.float64)
    if values.ndim != 2 or not values.sum() > 0:
        raise ValueError(
            f"field must be a matrix with a positive sum, got shape {values.shape} "
            f"and sum {values.sum()}"
        )
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}")
    rows, columns = (np.abs(np.arange(n) - (n - 1) / 2) for n in values.shape)
    distance = np.maximum(rows[:, None], columns[None, :]).ravel()
    order = np.argsort(distance, kind="stable")
    reached = np.cumsum(values.ravel()[order])
    # A sum over another order of the same numbers: share 1 must not miss its last digit.
    enough = int(np.searchsorted(reached, share * reached[-1] * (1 - 1e-12)))
    return int(2 * distance[order][enough]) + 1


def reaches_border(field: ArrayLike) -> bool:
    """Whether a field goes on where its picture ends, so that its sides are lower bounds.

    Args:
        field: Field `[H, W]`, not negative.

    Returns:
        Whether a pixel of the border has `LEAST` of the greatest value or more.

    Example:
        >>> reaches_border(np.ones((4, 4))), reaches_border(np.pad([[1.0]], 2))
        (True, False)
    """
    values = np.asarray(field, np.float64)
    inside = np.zeros(values.shape, bool)
    inside[1:-1, 1:-1] = True
    return bool(np.any(values[~inside] >= LEAST * values.max()))


def _check(shape: Sequence[int], samples: int) -> tuple[int, int, int]:
    sizes = tuple(shape)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"shape must be (H, W, C), each at least 1, got {sizes}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    return sizes


def _centre_mask(height: int, width: int) -> NDArray[np.float32]:
    """One at the central units `[height, width]`, zero elsewhere."""
    rows, columns = (np.abs(np.arange(n) - (n - 1) / 2) < 1 for n in (height, width))
    return (rows[:, None] & columns[None, :]).astype(np.float32)
