"""Changes of a batch on the device, from the step's key: mirroring, erasing, mixup and cutmix.

Sources: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020; Zhang et al., "mixup", ICLR
2018; Yun et al., "CutMix", ICCV 2019. Shares and ranges are timm's.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.special import betaincinv

from flash_wtconv_jax.train.images.settings import Augment, Data

_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
_QUANTILES = 4096
"""Intervals between the quantiles of a distribution that are in a table."""


def normalised(images: ArrayLike, data: Data) -> jax.Array:
    """Images `[N, H, W, C]` of levels from 0 to 255 as float32 with mean 0 and deviation 1.

    Example:
        >>> grey = Data(channels=1, mean=(0.5,), std=(0.5,))
        >>> float(normalised(jnp.zeros((1, 1, 1, 1), jnp.uint8), grey).sum())
        -1.0
    """
    scale = jnp.asarray([1 / (255 * std) for std in data.std])
    shift = jnp.asarray([mean / std for mean, std in zip(data.mean, data.std, strict=True)])
    return jnp.asarray(images).astype(jnp.float32) * scale - shift


def augmented(
    key: jax.Array, images: jax.Array, targets: jax.Array, settings: Augment
) -> tuple[jax.Array, jax.Array]:
    """A batch that was changed at random.

    Args:
        key: The step's.
        images: `[N, H, W, C]`, normalised.
        targets: Shares of the classes `[N, K]`, or of each pixel's `[N, H, W, K]`, which are not
            mixed; a row of zeros is no image, and takes part in nothing but the mixing, which
            leaves it as light as it is.
        settings: What is done.

    Returns:
        Images and targets.
    """
    flip_key, mix_key, erase_key = jax.random.split(key, 3)
    if settings.flip:
        mirrored = jax.random.bernoulli(flip_key, settings.flip, (len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
        if targets.ndim == images.ndim:
            targets = jnp.where(mirrored, targets[:, :, ::-1], targets)
    if settings.erasing:
        images = _erased(erase_key, images, settings.erasing)
    if settings.mixup or settings.cutmix:
        images, targets = _mixed(mix_key, images, targets, settings)
    return images, targets


def _erased(key: jax.Array, images: jax.Array, chance: float) -> jax.Array:
    """Puts noise in place of a rectangle of some images."""
    count, height, width, channels = images.shape
    chosen, area, ratio, place, noise = jax.random.split(key, 5)
    share = jax.random.uniform(area, (count,), minval=_ERASED_AREA[0], maxval=_ERASED_AREA[1])
    logs = [math.log(one) for one in _ERASED_RATIO]
    shape = jnp.exp(jax.random.uniform(ratio, (count,), minval=logs[0], maxval=logs[1]))
    high = jnp.minimum(height, jnp.sqrt(share * height * width * shape))
    wide = jnp.minimum(width, jnp.sqrt(share * height * width / shape))
    corner = jax.random.uniform(place, (2, count))
    inside = _inside(corner[0] * (height - high), high, height)[:, :, None]
    inside &= _inside(corner[1] * (width - wide), wide, width)[:, None, :]
    inside &= jax.random.bernoulli(chosen, chance, (count, 1, 1))
    # All rectangles show the same noise, each another part of it: to draw some for every image
    # takes longer than all else here, and most of it would be hidden.
    drawn = jax.random.normal(noise, (height, width, channels))
    return jnp.where(inside[..., None], drawn, images)


def _mixed(
    key: jax.Array, images: jax.Array, targets: jax.Array, settings: Augment
) -> tuple[jax.Array, jax.Array]:
    """Each image with that at the other end of the batch, all in one proportion."""
    which, mixup_key, cutmix_key, place = jax.random.split(key, 4)
    other_images, other_targets = images[::-1], targets[::-1]
    if settings.mixup:
        share = _beta(mixup_key, settings.mixup)
        blend = share * images + (1 - share) * other_images
    if settings.cutmix:
        kept = _beta(cutmix_key, settings.cutmix)
        inside = _rectangle(place, (images.shape[1], images.shape[2]), jnp.sqrt(1 - kept))
        pasted = jnp.where(inside[None, :, :, None], other_images, images)
        kept = 1 - inside.mean()
    if settings.mixup and settings.cutmix:
        by_mixup = jax.random.bernoulli(which)
        images = jnp.where(by_mixup, blend, pasted)
        share = jnp.where(by_mixup, share, kept)
    elif settings.mixup:
        images = blend
    else:
        images, share = pasted, kept
    return images, share * targets + (1 - share) * other_targets


def _beta(key: jax.Array, parameter: float) -> jax.Array:
    """A number between 0 and 1 of the distribution Beta(parameter, parameter).

    It is looked up: `jax.random.beta` draws until it may keep a number, and after each draw a GPU
    waits for the host.
    """
    # The ends are the quantiles in the middle of the outer intervals: 0 and 1 may be far off.
    shares = np.linspace(0, 1, _QUANTILES + 1).clip(0.5 / _QUANTILES, 1 - 0.5 / _QUANTILES)
    table = jnp.asarray(betaincinv(parameter, parameter, shares), jnp.float32)
    at = jax.random.uniform(key) * _QUANTILES
    below = jnp.minimum(at.astype(jnp.int32), _QUANTILES - 1)
    lower, upper = table[below], table[below + 1]
    return lower + (at - below) * (upper - lower)


def _rectangle(key: jax.Array, shape: tuple[int, int], side: jax.Array) -> jax.Array:
    """A mask `[H, W]`: about a point anywhere, so much of each side as lies inside."""
    centre = jax.random.uniform(key, (2,))
    rows, columns = (
        _inside(centre[axis : axis + 1] * extent - side * extent / 2, side * extent, extent)[0]
        for axis, extent in enumerate(shape)
    )
    return rows[:, None] & columns[None, :]


def _inside(start: jax.Array, length: jax.Array, extent: int) -> jax.Array:
    """The mask `[N, extent]` of the pixels whose middles lie in intervals from these starts on."""
    middles = jnp.arange(extent) + 0.5
    start = start[:, None]
    length = jnp.reshape(length, (-1, 1))
    return (middles >= start) & (middles < start + length)
