"""RandAugment: a few random operations on a picture, all of one magnitude.

Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search
space", NeurIPS 2020; operations, ranges and noise as in timm's `rand-m9-mstd0.5-inc1`, in which a
greater magnitude never means a weaker change.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

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


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """The picture under an affine map of coordinates; what comes from outside is grey.

    A pixel is interpolated between the four that are nearest. Pillow fetches each of the four in a
    tenth of the time that it takes to interpolate.
    """
    of_x, of_y = matrix[:3], matrix[3:]
    right, below = _shares(image.size, *of_x), _shares(image.size, *of_y)

    def fetched(across: int, down: int) -> Image.Image:
        moved = (*of_x[:2], of_x[2] + across - 0.5, *of_y[:2], of_y[2] + down - 0.5)
        grey = 128 if image.mode == "L" else (128, 128, 128)
        how = Image.Transform.AFFINE, moved, Image.Resampling.NEAREST
        return image.transform(image.size, *how, fillcolor=grey)

    def row(down: int) -> Image.Image:
        return _between(right, lambda: fetched(0, down), lambda: fetched(1, down))

    return _between(below, lambda: row(0), lambda: row(1))


def _shares(size: tuple[int, int], by_x: float, by_y: float, start: float) -> NDArray[np.uint8]:
    """The shares `[H, W]`, of 255, that pixels have of the later one of two between which they lie.

    They are the fractions of coordinates of 16.16 bits, in which Pillow finds the earlier one.
    """
    first, across, down = (
        math.floor(value * 65536 + 0.5) for value in (start - 0.5 + (by_x + by_y) / 2, by_x, by_y)
    )
    # Whole pixels, which overflow, are of no interest.
    columns = (first + across * np.arange(size[0])).astype(np.uint16)
    rows = (down * np.arange(size[1])).astype(np.uint16)
    return ((rows[:, None] + columns) >> 8).astype(np.uint8)


def _between(
    shares: NDArray[np.uint8], one: Callable[[], Image.Image], other: Callable[[], Image.Image]
) -> Image.Image:
    """Two pictures mixed; `shares` are the second one's."""
    image = one()
    if shares.any():
        image.paste(other(), mask=Image.fromarray(shares))
    return image


def _rotated(image: Image.Image, level: float, sign: float) -> Image.Image:
    """The picture turned about its middle, to the left where the sign is positive."""
    angle = math.radians(sign * level * _ROTATION)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.size[0] / 2, image.size[1] / 2
    return _moved(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level, sign: kind(image).enhance(
        max(0.1, 1.0 + sign * level * _ENHANCEMENT)
    )


def _solarised_dark(image: Image.Image, level: float, sign: float) -> Image.Image:
    """Brightens what is darker than the middle."""
    added = round(level * 110)
    table = [min(255, grey + added) if grey < 128 else grey for grey in range(256)]
    return image.point(table * len(image.getbands()))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": _rotated,
    # At the full level no bit is left; timm draws it so, and one bit is what can be seen.
    "posterize": lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - round(level * 4))),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - round(level * 256)),
    "solarize_dark": _solarised_dark,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: _moved(image, (1, sign * level * _SHEAR, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: _moved(image, (1, 0, 0, sign * level * _SHEAR, 1, 0)),
    "translate_x": lambda image, level, sign: _moved(
        image, (1, 0, sign * level * _SHIFT * image.size[0], 0, 1, 0)
    ),
    "translate_y": lambda image, level, sign: _moved(
        image, (1, 0, 0, 0, 1, sign * level * _SHIFT * image.size[1])
    ),
}
"""The operations by name."""
