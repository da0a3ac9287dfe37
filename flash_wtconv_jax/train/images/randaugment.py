"""RandAugment: a few random operations on a picture, all of one magnitude.

Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search
space", NeurIPS 2020; operations, ranges and noise as in timm's `rand-m9-mstd0.5-inc1`, in which a
greater magnitude never means a weaker change.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

_MOST = 10.0
_NOISE = 0.5
"""Standard deviation of the magnitude."""
_CHANCE = 0.5
"""Probability that a chosen operation is done."""
_ROTATION, _SHEAR, _SHIFT, _ENHANCEMENT = 30.0, 0.3, 0.45, 0.9

Operation = Callable[[Image.Image, float, float], Image.Image]
"""Takes a picture, a level from 0 to 1, and a sign."""


def randaugment(
    image: Image.Image, magnitude: float, count: int, rng: np.random.Generator
) -> Image.Image:
    """The picture after random operations.

    Args:
        image: In RGB or grey of 8 bits.
        magnitude: Of ten.
        count: Operations that are chosen; each is done with a probability of one half.
        rng: What chooses.

    Example:
        >>> grey = Image.new("L", (4, 4), 9)
        >>> randaugment(grey, 9.0, 2, np.random.default_rng(0)).size
        (4, 4)
    """
    for choice in rng.integers(len(OPERATIONS), size=count):
        level = min(max(rng.normal(magnitude, _NOISE), 0.0), _MOST) / _MOST
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if rng.random() < _CHANCE:
            image = list(OPERATIONS.values())[choice](image, level, sign)
    return image


def _sheared(image: Image.Image, slope: float, *, down: bool) -> Image.Image:
    """The picture with its rows moved across, or its columns down, the more the later they are.

    A pixel is interpolated between the two that are nearest. Pillow fetches both in a fifth of the
    time that it takes to interpolate.
    """

    def fetched(later: int) -> Image.Image:
        place = later - 0.5
        return _moved(image, (1, 0, 0, slope, 1, place) if down else (1, slope, place, 0, 1, 0))

    # The later pixel's share is the fraction of a coordinate of 16.16 bits, in which Pillow finds
    # the earlier one. Whole pixels, which overflow, are of no interest.
    lines = np.arange(image.size[0 if down else 1])
    first, step = (math.floor(value * 65536 + 0.5) for value in (slope / 2, slope))
    shares = ((first + step * lines).astype(np.uint16) >> 8).astype(np.uint8)
    shares = np.broadcast_to(shares if down else shares[:, None], image.size[::-1])
    sheared = fetched(0)
    sheared.paste(fetched(1), mask=Image.fromarray(shares))
    return sheared


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """The picture under an affine map of coordinates, each pixel the one that is nearest."""
    how = Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
    return image.transform(image.size, *how, fillcolor=_grey(image))


def _rotated(image: Image.Image, level: float, sign: float) -> Image.Image:
    """The picture turned about its middle, to the left where the sign is positive."""
    angle = sign * level * _ROTATION
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=_grey(image))


def _grey(image: Image.Image) -> int | tuple[int, int, int]:
    """The colour of what comes from outside."""
    return 128 if image.mode == "L" else (128, 128, 128)


def _sharpened(image: Image.Image, level: float, sign: float) -> Image.Image:
    """The picture mixed with itself smoothed, as Pillow's `ImageEnhance.Sharpness` has it.

    Its `SMOOTH` is 4/13 of a pixel and 9/13 of the mean of 3 x 3, which takes Pillow less time;
    `SMOOTH` alone leaves the outermost pixels as they are.
    """
    means = image.filter(ImageFilter.BoxBlur(1))
    return Image.blend(means, image, 1.0 - 9 / 13 * (1.0 - _factor(level, sign)))


def _factor(level: float, sign: float) -> float:
    """The factor of an enhancement; 1 changes nothing."""
    return max(0.1, 1.0 + sign * level * _ENHANCEMENT)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level, sign: kind(image).enhance(_factor(level, sign))


def _solarised_dark(image: Image.Image, level: float, sign: float) -> Image.Image:
    """Brightens what is darker than the middle."""
    added = round(level * 110)
    table = [min(255, grey + added) if grey < 128 else grey for grey in range(256)]
    return image.point(table * len(image.getbands()))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    # In a tenth of the time of ImageOps'.
    "invert": lambda image, level, sign: ImageChops.invert(image),
    "rotate": _rotated,
    # At the full level no bit is left; timm draws it so, and one bit is what can be seen.
    "posterize": lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - round(level * 4))),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - round(level * 256)),
    "solarize_dark": _solarised_dark,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _sharpened,
    "shear_x": lambda image, level, sign: _sheared(image, sign * level * _SHEAR, down=False),
    "shear_y": lambda image, level, sign: _sheared(image, sign * level * _SHEAR, down=True),
    # By whole pixels, which need no interpolation.
    "translate_x": lambda image, level, sign: _moved(
        image, (1, 0, round(sign * level * _SHIFT * image.size[0]), 0, 1, 0)
    ),
    "translate_y": lambda image, level, sign: _moved(
        image, (1, 0, 0, 0, 1, round(sign * level * _SHIFT * image.size[1]))
    ),
}
"""The operations by name."""
