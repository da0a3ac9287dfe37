"""Named real-world shapes, shared by tests, benchmarks and the tuner. Imports nothing."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One layer of a known network: x is `[batch, height, width, channels]`, padded as "SAME"."""

    batch: int
    height: int
    width: int
    channels: int
    kernel_height: int
    kernel_width: int
    features: int

    @property
    def x(self) -> tuple[int, int, int, int]:
        """The shape of x.

        Example:
            >>> SHAPES["sd_unet_128_3x3"].x
            (2, 128, 128, 320)
        """
        return self[:4]

    @property
    def w(self) -> tuple[int, int, int, int]:
        """The shape of the filters.

        Example:
            >>> SHAPES["sd_unet_64_1x1"].w
            (1, 1, 640, 1920)
        """
        return self.kernel_height, self.kernel_width, self.channels, self.features

    @property
    def operations(self) -> int:
        """Multiplications and additions of the layer.

        Example:
            >>> SHAPES["sd_unet_64_1x1"].operations
            20132659200
        """
        pixels = self.batch * self.height * self.width
        taps = self.kernel_height * self.kernel_width * self.channels
        return 2 * pixels * taps * self.features


SHAPES: dict[str, Shape] = {
    "sd_unet_128_3x3": Shape(2, 128, 128, 320, 3, 3, 320),
    "sd_unet_64_3x3": Shape(2, 64, 64, 640, 3, 3, 640),
    "sd_unet_32_3x3": Shape(2, 32, 32, 1280, 3, 3, 1280),
    "sd_unet_64_1x1": Shape(2, 64, 64, 640, 1, 1, 1920),
    "sd_unet_128_narrow": Shape(2, 128, 128, 16, 3, 3, 320),
}
"""Layers of a Stable-Diffusion U-Net."""
