"""Named real-world shapes, shared by tests, benchmarks and the tuner. Imports nothing."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One normalisation of a known network: x is `[batch, height, width, channels]`."""

    batch: int
    height: int
    width: int
    channels: int


SHAPES: dict[str, Shape] = {
    "style_512_trunk": Shape(8, 128, 128, 128),
    "style_512_half": Shape(8, 256, 256, 64),
    "style_512_full": Shape(8, 512, 512, 32),
    "style_256_trunk": Shape(8, 64, 64, 128),
    "style_1024_full": Shape(1, 1024, 1024, 32),
    "unet_32": Shape(2, 32, 32, 512),
}
"""The layers of the style transfer network for pictures of 512, 256 and 1024, and a deep one."""
