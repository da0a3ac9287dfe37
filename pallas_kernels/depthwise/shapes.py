"""Named real-world shapes, shared by tests, benchmarks and the tuner. Imports nothing."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One layer of a known network: x is `[batch, height, width, channels]`, padded as "SAME"."""

    batch: int
    height: int
    width: int
    channels: int
    kernel_size: int
    stride: int = 1

    @property
    def x(self) -> tuple[int, int, int, int]:
        """The shape of x.

        Example:
            >>> SHAPES["convnext_t_stage1"].x
            (8, 56, 56, 96)
        """
        return self.batch, self.height, self.width, self.channels

    @property
    def y(self) -> tuple[int, int, int, int]:
        """The shape of the output.

        Example:
            >>> GPU_SHAPES["efficientnet_b0_112"].y
            (128, 56, 56, 96)
        """
        height, width = (-(-size // self.stride) for size in (self.height, self.width))
        return self.batch, height, width, self.channels


SHAPES: dict[str, Shape] = {
    "image_56_5x5": Shape(8, 56, 56, 96, 5),
    "convnext_t_stage1": Shape(8, 56, 56, 96, 7),
    "convnext_t_stage3": Shape(8, 14, 14, 384, 7),
    "efficientnet_b0_112": Shape(8, 112, 112, 96, 3, 2),
}
"""A kernel of 5x5, ConvNeXt's of 7x7, and a stride of 2, at a batch for a CPU."""

GPU_SHAPES: dict[str, Shape] = {
    "image_56_5x5": Shape(128, 56, 56, 96, 5),
    "image_224_5x5": Shape(16, 224, 224, 64, 5),
    "convnext_t_stage1": Shape(128, 56, 56, 96, 7),
    "convnext_t_stage2": Shape(128, 28, 28, 192, 7),
    "convnext_t_stage3": Shape(128, 14, 14, 384, 7),
    "convnext_t_stage4": Shape(128, 7, 7, 768, 7),
    "image_224_7x7": Shape(16, 224, 224, 64, 7),
    "efficientnet_b0_112": Shape(128, 112, 112, 96, 3, 2),
    "efficientnet_b0_14": Shape(128, 14, 14, 672, 5),
}
"""The same at a batch for a GPU, with larger images."""

TPU_SHAPES: dict[str, Shape] = {
    "image_56": Shape(8, 56, 56, 128, 5),
    "convnext_t_stage1": Shape(32, 56, 56, 96, 7),
    "convnext_t_stage2": Shape(32, 28, 28, 192, 7),
    "convnext_t_stage3": Shape(32, 14, 14, 384, 7),
    "convnext_t_stage4": Shape(32, 7, 7, 768, 7),
}
"""One image that fills a TPU's lanes, by 5x5 taps, and ConvNeXt's at a batch for a TPU."""

FOR_PLATFORM: dict[str, dict[str, Shape]] = {
    "cpu": SHAPES,
    "gpu": GPU_SHAPES,
    "tpu": TPU_SHAPES,
}
"""The shapes that each platform is measured with."""
