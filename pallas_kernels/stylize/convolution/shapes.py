"""Named real-world shapes, shared by tests, benchmarks and the tuner."""

from typing import NamedTuple

from pallas_kernels.oracle.conv2d import Padding


class Shape(NamedTuple):
    """One convolution with its norm: `[batch, height, width, channels]`, `kernel` x `kernel`."""

    batch: int
    height: int
    width: int
    channels: int
    kernel: int
    features: int
    stride: int = 1
    upsample: int = 1
    residual: bool = False

    @property
    def padding(self) -> Padding:
        """The pixels that are mirrored on each side, as the network does."""
        return "reflect", self.kernel // 2


SHAPES: dict[str, Shape] = {
    "style_512_in": Shape(8, 512, 512, 3, 9, 32),
    "style_512_down1": Shape(8, 512, 512, 32, 3, 64, 2),
    "style_512_down2": Shape(8, 256, 256, 64, 3, 128, 2),
    "style_512_trunk": Shape(8, 128, 128, 128, 3, 128),
    "style_512_trunk_end": Shape(8, 128, 128, 128, 3, 128, residual=True),
    "style_512_up1": Shape(8, 128, 128, 128, 3, 64, upsample=2),
    "style_512_up2": Shape(8, 256, 256, 64, 3, 32, upsample=2),
}
"""The layers of the style transfer network for pictures of 512, in their order."""
