"""Named real-world shapes, the sizes that the kernels are tested to take."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One cascade of images: x is `[batch, height, width, channels]`."""

    batch: int
    height: int
    width: int
    channels: int
    levels: int

    @property
    def x(self) -> tuple[int, int, int, int]:
        """The shape of x.

        Example:
            >>> GPU_SHAPES["convnext_t_stage3"].x
            (128, 14, 14, 384)
        """
        return self.batch, self.height, self.width, self.channels


GPU_SHAPES: dict[str, Shape] = {
    "convnext_t_stage1": Shape(128, 56, 56, 96, 5),
    "convnext_t_stage2": Shape(128, 28, 28, 192, 4),
    "convnext_t_stage3": Shape(128, 14, 14, 384, 3),
    "convnext_t_stage4": Shape(128, 7, 7, 768, 2),
    "image_224": Shape(16, 224, 224, 64, 3),
    "image_512": Shape(8, 512, 512, 64, 2),
    "photographs_4096": Shape(2, 4096, 4096, 3, 5),
    "beyond_32_bits": Shape(1, 4096, 4096, 144, 5),
}
"""The images of WTConvNeXt-T at 224², larger ones, and one of more than 2**31 elements."""

TPU_SHAPES: dict[str, Shape] = {
    "image_56": Shape(8, 56, 56, 128, 3),
    "convnext_t_stage1": Shape(32, 56, 56, 96, 5),
    "convnext_t_stage2": Shape(32, 28, 28, 192, 4),
    "convnext_t_stage3": Shape(32, 14, 14, 384, 3),
    "convnext_t_stage4": Shape(32, 7, 7, 768, 2),
    "image_2048": Shape(1, 2048, 2048, 128, 3),
}
"""One image that fills a TPU's lanes, the stages at a batch for a TPU, and one beyond its VMEM."""

FOR_PLATFORM: dict[str, dict[str, Shape]] = {"gpu": GPU_SHAPES, "tpu": TPU_SHAPES}
"""The shapes that each platform's kernels are made for."""
