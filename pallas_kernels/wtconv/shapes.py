"""Named real-world shapes, shared by tests, benchmarks and the tuner. Imports NumPy alone."""

from collections.abc import Mapping
from typing import NamedTuple


class Shape(NamedTuple):
    """One 2-D layer of a known network: x is `[batch, height, width, channels]`."""

    batch: int
    height: int
    width: int
    channels: int
    levels: int
    kernel_size: int = 5

    @property
    def x(self) -> tuple[int, int, int, int]:
        """The shape of x.

        Example:
            >>> SHAPES["convnext_t_stage3"].x
            (8, 14, 14, 384)
        """
        return self.batch, self.height, self.width, self.channels


class Line(NamedTuple):
    """One 1-D layer: x is `[batch, length, channels]`."""

    batch: int
    length: int
    channels: int
    levels: int
    kernel_size: int = 5

    @property
    def x(self) -> tuple[int, int, int]:
        """The shape of x.

        Example:
            >>> GPU_LINES["audio"].x
            (32, 16384, 256)
        """
        return self.batch, self.length, self.channels


Layer = Shape | Line
"""A layer of any of the shapes."""

SHAPES: dict[str, Shape] = {
    "convnext_t_stage1": Shape(8, 56, 56, 96, 5),
    "convnext_t_stage2": Shape(8, 28, 28, 192, 4),
    "convnext_t_stage3": Shape(8, 14, 14, 384, 3),
    "convnext_t_stage4": Shape(8, 7, 7, 768, 2),
    "image_112": Shape(8, 112, 112, 64, 3),
}
"""The four stages of WTConvNeXt-T at 224² and one larger image, at a batch for a CPU."""

GPU_SHAPES: dict[str, Shape] = {
    "convnext_t_stage1": Shape(128, 56, 56, 96, 5),
    "convnext_t_stage2": Shape(128, 28, 28, 192, 4),
    "convnext_t_stage3": Shape(128, 14, 14, 384, 3),
    "convnext_t_stage4": Shape(128, 7, 7, 768, 2),
    "image_224": Shape(16, 224, 224, 64, 3),
    "image_512": Shape(8, 512, 512, 64, 2),
}
"""The stages at a batch for a GPU, and two larger images."""

GPU_LINES: dict[str, Line] = {"audio": Line(32, 16384, 256, 5)}
"""Seconds of audio at 16 kHz in the channels of a network, at a batch for a GPU."""

TPU_SHAPES: dict[str, Shape] = {
    "image_56": Shape(8, 56, 56, 128, 3),
    "convnext_t_stage1": Shape(32, 56, 56, 96, 5),
    "convnext_t_stage2": Shape(32, 28, 28, 192, 4),
    "convnext_t_stage3": Shape(32, 14, 14, 384, 3),
    "convnext_t_stage4": Shape(32, 7, 7, 768, 2),
    "image_2048": Shape(1, 2048, 2048, 128, 3),
}
"""One image that fills a TPU's lanes, the stages at a batch for a TPU, one larger than its VMEM."""

IMAGES: dict[str, dict[str, Shape]] = {"cpu": SHAPES, "gpu": GPU_SHAPES, "tpu": TPU_SHAPES}
"""The images that each platform is measured with."""

FOR_PLATFORM: dict[str, Mapping[str, Layer]] = {**IMAGES, "gpu": {**GPU_SHAPES, **GPU_LINES}}
"""The shapes that each platform is measured with: the images, and signals."""
