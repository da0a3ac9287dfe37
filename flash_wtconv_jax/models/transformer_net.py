"""TransformerNet: the image transformation network of fast style transfer.

Sources: Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and
Super-Resolution", ECCV 2016; Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing
Ingredient for Fast Stylization", 2016. Layers, sizes and names are those of PyTorch's example
`fast_neural_style`, with Flax's `kernel` and `scale` for PyTorch's `weight`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import stylize
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike, checked_rngs
from flash_wtconv_jax.functional.wtconv import default_kernel_init
from flash_wtconv_jax.nnx import Conv2d, InstanceNorm
from pallas_kernels.common.arguments import checked_array
from pallas_kernels.common.types import Keywords
from pallas_kernels.conv2d.api import OPERATOR as CONV2D
from pallas_kernels.stylize.api import OPERATOR as INSTANCE_NORM

# Four pixels mirrored on each side of the 9x9 convolutions need a fifth; the residual blocks then
# have two, enough for their one.
LEAST = 5
"""Rows and columns of the smallest images."""


class TransformerNet(nnx.Module):
    """Image transformation network: 1,679,235 parameters, one style.

    A 9x9 convolution, two of stride 2, five residual blocks, two upsamplings to the nearest, each
    with a convolution behind, and a 9x9 convolution to the image. Every convolution is a `Conv2d`
    that mirrors `k // 2` pixels on each side, and all but the last are followed by instance
    normalisation. Kernels start as PyTorch's do, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), biases at 0.
    A bias before a norm cancels: it is a parameter, as in the published weights, but it is not
    added, and its gradient is 0.

    Weights of the published network are loaded with
    `checkpoints.load_into(model, checkpoints.load("mosaic.pth"))` and given back by
    `checkpoints.to_torch(checkpoints.variables_of(model))`.

    Args:
        dtype: Dtype of the computation; None promotes the input with the parameters. Statistics
            of the instance normalisation are computed in float32 or better.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`. None is full float32.
        conv_implementation: Implementations of all convolutions, see
            `flash_wtconv_jax.nnx.Conv2d`. Each layer takes the fastest of several names.
        norm_implementation: Implementations of all instance normalisations, likewise.
        crop: Whether images have the input's size, where that is no multiple of 4, too.
        rngs: Source of the keys.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> model = nnx.eval_shape(lambda: TransformerNet(rngs=nnx.Rngs(0)))
        >>> images = jax.ShapeDtypeStruct((2, 256, 255, 3), "float32")
        >>> nnx.eval_shape(lambda model, x: model(x), model, images).shape
        (2, 256, 256, 3)
    """

    def __init__(
        self,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        conv_implementation: ImplementationLike = None,
        norm_implementation: ImplementationLike = None,
        crop: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        CONV2D.check_names(conv_implementation, "conv_implementation")
        INSTANCE_NORM.check_names(norm_implementation, "norm_implementation")
        checked_rngs(rngs)
        self.crop = crop
        conv = partial(
            Conv2d,
            padding="REFLECT",
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=default_kernel_init,
            implementation=conv_implementation,
            rngs=rngs,
        )
        norm = partial(
            InstanceNorm,
            epsilon=1e-5,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=norm_implementation,
            rngs=rngs,
        )
        self.conv1, self.in1 = conv(3, 32, 9), norm(32)
        self.conv2, self.in2 = conv(32, 64, 3, strides=2), norm(64)
        self.conv3, self.in3 = conv(64, 128, 3, strides=2), norm(128)
        self.res1 = ResidualBlock(128, conv, norm)
        self.res2 = ResidualBlock(128, conv, norm)
        self.res3 = ResidualBlock(128, conv, norm)
        self.res4 = ResidualBlock(128, conv, norm)
        self.res5 = ResidualBlock(128, conv, norm)
        self.deconv1, self.in4 = conv(128, 64, 3), norm(64)
        self.deconv2, self.in5 = conv(64, 32, 3), norm(32)
        self.deconv3 = conv(32, 3, 9)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Transform images.

        Args:
            x: Images `[N, H, W, 3]`, H and W at least 5, in the range that the weights were
                trained for: 0 to 255 for the published ones.

        Returns:
            Images `[N, 4 * ceil(H / 4), 4 * ceil(W / 4), 3]` of the same range, not clipped; with
            `crop` the first H rows and W columns of them.

        Raises:
            ValueError: If `x` is not floating point or its shape does not fit.
            NotImplementedError: If a named implementation cannot run here; it says why.
        """
        x = checked_array(x, "x")
        if x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(f"x must have shape (N, H, W, 3), got {x.shape}")
        if min(x.shape[1:3]) < LEAST:
            raise ValueError(
                f"x must be at least {LEAST} pixels high and wide, so that there are pixels to "
                f"mirror, got {x.shape}"
            )
        _, height, width, _ = x.shape
        x = _conv_norm(self.conv1, self.in1, x)
        x = _conv_norm(self.conv2, self.in2, x)
        x = _conv_norm(self.conv3, self.in3, x)
        for block in (self.res1, self.res2, self.res3, self.res4, self.res5):
            x = block(x)
        x = _conv_norm(self.deconv1, self.in4, x, upsample=2)
        x = _conv_norm(self.deconv2, self.in5, x, upsample=2)
        y = self.deconv3(x)
        return y[:, :height, :width] if self.crop else y


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions with instance normalisation, a ReLU between them and none at the end.

    Args:
        dim: Channels.
        conv: Makes a convolution from input channels, output channels and size.
        norm: Makes a normalisation from channels.
    """

    def __init__(
        self, dim: int, conv: Callable[..., Conv2d], norm: Callable[..., InstanceNorm]
    ) -> None:
        self.conv1, self.in1 = conv(dim, dim, 3), norm(dim)
        self.conv2, self.in2 = conv(dim, dim, 3), norm(dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, dim]` to the same shape."""
        first, second = _branch(self.conv1, self.in1), _branch(self.conv2, self.in2)
        return stylize.residual_block(x, first, second, **_options(self.conv1, self.in1))


def _conv_norm(conv: Conv2d, norm: InstanceNorm, x: jax.Array, upsample: int = 1) -> jax.Array:
    """A convolution of images, perhaps upsampled to the nearest, its norm and a ReLU."""
    return stylize.conv_norm(
        x,
        _branch(conv, norm),
        strides=conv.strides or 1,
        upsample=upsample,
        activation="relu",
        **_options(conv, norm),
    )


def _branch(conv: Conv2d, norm: InstanceNorm) -> stylize.Branch:
    """The arrays of a convolution and its norm, without the bias that would cancel."""
    assert norm.scale is not None and norm.bias is not None
    return conv.kernel[...], norm.scale[...], norm.bias[...]


def _options(conv: Conv2d, norm: InstanceNorm) -> Keywords:
    """How both compute."""
    return {
        "padding": conv.padding,
        "epsilon": norm.epsilon,
        "dtype": conv.dtype,
        "precision": conv.precision,
        "conv_implementation": conv.implementation,
        "norm_implementation": norm.implementation,
    }
