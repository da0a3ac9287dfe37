"""TransformerNet layer by layer, with statistics that come from elsewhere than the image at hand.

Frames of a film share statistics so that they do not flicker, and tiles those of the whole picture
so that no seams show.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flash_wtconv_jax.functional.conv2d import prepared
from flash_wtconv_jax.models.transformer_net import TransformerNet
from flash_wtconv_jax.nnx import Conv2d, InstanceNorm
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.conv2d import conv2d


class Moments(NamedTuple):
    """Mean and biased variance of each channel of each image, float32 `[N, 1, 1, C]`."""

    mean: jax.Array
    var: jax.Array


class Stage(NamedTuple):
    """A convolution, and the normalisation behind it.

    Attributes:
        conv: The convolution.
        norm: The normalisation, None for the last stage.
        stride: The convolution's stride.
        doubled: Whether the convolution sees each pixel of the input as four.
    """

    conv: Conv2d
    norm: InstanceNorm | None
    stride: int = 1
    doubled: bool = False

    def raw(self, x: jax.Array) -> jax.Array:
        """The convolution's output, not normalised, without the bias that a norm would cancel."""
        if self.norm is None:
            return self.conv(x)
        x, kernel, window = prepared(self.conv, x, self.conv.kernel[...], None)
        return conv2d(x, kernel, upsample=2 if self.doubled else 1, **window)

    def normalised(
        self, y: jax.Array, moments: Moments, residual: jax.Array | None = None
    ) -> jax.Array:
        """An output of `raw` by the given statistics: a ReLU behind, or a residual added.

        It is rounded once, to y's dtype, as the operators round theirs.
        """
        norm = self.norm
        assert norm is not None and norm.scale is not None and norm.bias is not None
        wide = accumulation_dtype(y.dtype)
        factor = jax.lax.rsqrt(moments.var + norm.epsilon) * norm.scale[...]
        z = (y.astype(wide) - moments.mean) * factor + norm.bias[...]
        z = nnx.relu(z) if residual is None else z + residual.astype(wide)
        return z.astype(y.dtype)


def head(model: TransformerNet) -> list[Stage]:
    """The stages that reduce an image to a quarter of its height and width."""
    return [
        Stage(model.conv1, model.in1),
        Stage(model.conv2, model.in2, stride=2),
        Stage(model.conv3, model.in3, stride=2),
    ]


def trunk(model: TransformerNet) -> list[tuple[Stage, Stage]]:
    """The two stages of each residual block."""
    blocks = (model.res1, model.res2, model.res3, model.res4, model.res5)
    return [(Stage(block.conv1, block.in1), Stage(block.conv2, block.in2)) for block in blocks]


def tail(model: TransformerNet) -> list[Stage]:
    """The stages that bring back the image's size; the last has no normalisation."""
    return [
        Stage(model.deconv1, model.in4, doubled=True),
        Stage(model.deconv2, model.in5, doubled=True),
        Stage(model.deconv3, None),
    ]


def in_range(pixels: jax.Array) -> jax.Array:
    """Pixels of uint8 or uint16 as float32 from 0 to 255, which the weights were trained for."""
    return jnp.asarray(pixels, jnp.float32) * (255 / jnp.iinfo(pixels.dtype).max)


def moments_of(y: jax.Array) -> Moments:
    """The statistics of images `[N, H, W, C]`."""
    y = y.astype(jnp.float32)
    mean = y.mean((1, 2), keepdims=True)
    return Moments(mean, jnp.square(y - mean).mean((1, 2), keepdims=True))


def with_average(
    model: TransformerNet, x: jax.Array, before: Sequence[Moments] | None, weight: float
) -> tuple[jax.Array, list[Moments]]:
    """The network's output, every layer normalised by a running average of statistics.

    Args:
        model: The network.
        x: A frame `[1, H, W, 3]` in the network's range.
        before: What the frame before has left, None for the first.
        weight: The weight of this frame's own statistics in the average.

    Returns:
        The image, as `model(x)` has it, and the statistics for the next frame.
    """
    averages = iter(before or ())
    kept: list[Moments] = []

    def normalised(stage: Stage, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        y = stage.raw(x)
        own = moments_of(y)
        if before is not None:
            old = next(averages)
            own = Moments(*(a + weight * (b - a) for a, b in zip(old, own, strict=True)))
        kept.append(own)
        return stage.normalised(y, own, residual)

    for stage in head(model):
        x = normalised(stage, x)
    for first, second in trunk(model):
        x = normalised(second, normalised(first, x), x)
    *stages, last = tail(model)
    for stage in stages:
        x = normalised(stage, x)
    return last.raw(x), kept
