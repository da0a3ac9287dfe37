"""Named real-world shapes, shared by tests, benchmarks and the tuner. Imports nothing."""

from typing import NamedTuple


class Shape(NamedTuple):
    """An MLP of `rows` pixels of `channels`, four times as wide inside."""

    rows: int
    channels: int

    @property
    def hidden(self) -> int:
        """Channels between the layers.

        Example:
            >>> SHAPES["convnext_t_stage1"].hidden
            384
        """
        return 4 * self.channels

    def of(self, images: int) -> "Shape":
        """The same MLP for as many images, where this one is of 128.

        Example:
            >>> SHAPES["convnext_t_stage4"].of(1).rows
            49
        """
        return self._replace(rows=self.rows // 128 * images)


SHAPES: dict[str, Shape] = {
    "convnext_t_stage1": Shape(128 * 56 * 56, 96),
    "convnext_t_stage2": Shape(128 * 28 * 28, 192),
    "convnext_t_stage3": Shape(128 * 14 * 14, 384),
    "convnext_t_stage4": Shape(128 * 7 * 7, 768),
}
"""The blocks of ConvNeXt-T and WTConvNeXt-T, 128 images of 224 x 224."""
