"""Instance norm, alone and behind convolutions, for flax.linen; `nnx` has the twins."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import arguments, stylize
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import Padding, PerAxis, kernel_shape
from flash_wtconv_jax.linen.parameters import parameter
from pallas_kernels.common.sharding import OutSharding


class InstanceNorm(nn.Module):
    """Instance norm of images `[*batch, H, W, C]`: `flax.linen.InstanceNorm` on kernels of ours.

    Parameters, initial values and results are those of `flax.linen.InstanceNorm`, but that a mean
    of many deviations costs no digits. Statistics are in float32 or better.

    Attributes:
        epsilon: Is added to the variance; PyTorch's is 1e-5.
        dtype: Dtype of the output; None promotes input and parameters.
        param_dtype: Dtype of the parameters.
        use_bias: Whether there is `bias [C]`.
        use_scale: Whether there is `scale [C]`.
        bias_init: Initialiser of the bias.
        scale_init: Initialiser of the scale.
        activation: None or "relu", in the same kernel.
        implementation: Name or names of the implementations of `pallas_kernels.stylize` to choose
            from; None leaves the choice to what was measured on the device, or its rule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax import InstanceNorm
        >>> layer = InstanceNorm(epsilon=1e-5, activation="relu")
        >>> y, variables = layer.init_with_output(jax.random.key(0), jax.numpy.ones((2, 9, 8, 4)))
        >>> y.shape, sorted(variables["params"])
        ((2, 9, 8, 4), ['bias', 'scale'])
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    activation: str | None = None
    implementation: ImplementationLike = None

    def __post_init__(self) -> None:
        arguments.check_initializers(bias_init=self.bias_init, scale_init=self.scale_init)
        stylize.check_norm(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        out_sharding: OutSharding = None,
    ) -> jax.Array:
        """Normalise each channel of each image.

        Args:
            x: Input `[*batch, H, W, C]` with any number of batch axes, none included.
            residual: Is added before the activation, of x's shape.
            out_sharding: How the output is split over a mesh, a `jax.P` or a `NamedSharding`; None
                takes x's sharding. See `docs/sharding.md`.

        Returns:
            An array of x's shape.

        Raises:
            ValueError: If `x` is not floating point or a shape does not fit.
            NotImplementedError: If a named `implementation` cannot run here; it says why.
        """
        shape = jnp.shape(x)[-1:]
        scale = bias = None
        if self.use_scale:
            scale = parameter(self, "scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = parameter(self, "bias", self.bias_init, shape, self.param_dtype)
        return stylize.instance_norm(self, x, scale, bias, residual, out_sharding)


class ConvNormAct(nn.Module):
    """A convolution of images, its instance norm, and an activation.

    A bias of the convolution would cancel, so there is none: the parameters are `kernel
    [*kernel_size, C, features]`, and the norm's `scale [features]` and `bias [features]`.

    Attributes:
        features: Channels of the output.
        kernel_size: Taps along both axes, or along each.
        strides: Strides of the convolution, likewise.
        padding: "SAME", "VALID", "REFLECT", an int, one for each axis, `((top, bottom), (left,
            right))`, or `("reflect", any of these numbers)`.
        upsample: 2 repeats each pixel of the input as four before it is padded and convolved.
        epsilon: Is added to the variance.
        activation: None or "relu".
        dtype: Dtype of the computation and the output; None promotes input and parameters.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`; None multiplies in full float32 on every device.
        kernel_init: Initialiser of the kernel.
        scale_init: Initialiser of the scale.
        bias_init: Initialiser of the bias.
        conv_implementation: Name or names of the implementations of `pallas_kernels.conv2d`.
        norm_implementation: Name or names of those of `pallas_kernels.stylize`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax import ConvNormAct
        >>> layer = ConvNormAct(features=16, kernel_size=3, upsample=2, padding="REFLECT")
        >>> y, variables = layer.init_with_output(jax.random.key(0), jax.numpy.ones((2, 5, 4, 4)))
        >>> y.shape, variables["params"]["kernel"].shape
        ((2, 10, 8, 16), (3, 3, 4, 16))
    """

    features: int
    kernel_size: PerAxis
    strides: PerAxis = 1
    padding: Padding = "SAME"
    upsample: int = 1
    epsilon: float = 1e-5
    activation: str | None = "relu"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros
    conv_implementation: ImplementationLike = None
    norm_implementation: ImplementationLike = None

    def __post_init__(self) -> None:
        arguments.check_constructor(features=self.features)
        _check_initializers(self)
        stylize.check_conv_block(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        out_sharding: OutSharding = None,
    ) -> jax.Array:
        """Convolve, normalise, activate.

        Args:
            x: Input `[*batch, H, W, C]` with any number of batch axes, none included.
            residual: Is added before the activation, of the output's shape.
            out_sharding: How the output is split over a mesh, a `jax.P` or a `NamedSharding`; None
                takes x's sharding. See `docs/sharding.md`.

        Returns:
            `[*batch, H_out, W_out, features]`.

        Raises:
            ValueError: If `x` is not floating point or a shape does not fit.
            NotImplementedError: If a named implementation cannot run here; it says why.
        """
        return stylize.conv_norm(
            x,
            _branch(self, jnp.shape(x)[-1], self.features),
            residual,
            strides=self.strides,
            upsample=self.upsample,
            activation=self.activation,
            out_sharding=out_sharding,
            **stylize.options(self),
        )


class ResidualBlock(nn.Module):
    """Convolution, instance norm, ReLU, convolution, instance norm, and the input added.

    The parameters are `conv1` and `conv2`, of each `kernel`, `scale` and `bias`, see `ConvNormAct`;
    all have the input's channels.

    Attributes:
        kernel_size: Taps along both axes, or along each, of both convolutions.
        padding: As `ConvNormAct` takes it; it must keep the size.
        epsilon: Is added to both variances.
        dtype: Dtype of the computation and the output; None promotes input and parameters.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`; None multiplies in full float32 on every device.
        kernel_init: Initialiser of the kernels.
        scale_init: Initialiser of the scales.
        bias_init: Initialiser of the biases.
        conv_implementation: Name or names of the implementations of `pallas_kernels.conv2d`.
        norm_implementation: Name or names of those of `pallas_kernels.stylize`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax import ResidualBlock
        >>> block = ResidualBlock()
        >>> y, variables = block.init_with_output(jax.random.key(0), jax.numpy.ones((2, 5, 4, 4)))
        >>> y.shape, sorted(variables["params"])
        ((2, 5, 4, 4), ['conv1', 'conv2'])
    """

    kernel_size: PerAxis = 3
    padding: Padding = "REFLECT"
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros
    conv_implementation: ImplementationLike = None
    norm_implementation: ImplementationLike = None

    def __post_init__(self) -> None:
        _check_initializers(self)
        stylize.check_block(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: ArrayLike, out_sharding: OutSharding = None) -> jax.Array:
        """Map `[*batch, H, W, C]` to the same shape; errors as of `ConvNormAct`."""
        channels = jnp.shape(x)[-1]
        inits = self.kernel_init, self.scale_init, self.bias_init
        first, second = (
            _Branch(self.kernel_size, self.param_dtype, *inits, name=name)(channels)
            for name in ("conv1", "conv2")
        )
        return stylize.residual_block(
            x, first, second, out_sharding=out_sharding, **stylize.options(self)
        )


class _Branch(nn.Module):
    """The parameters of one convolution of a block, and of the norm behind."""

    kernel_size: PerAxis
    param_dtype: DTypeLike
    kernel_init: Initializer
    scale_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, channels: int) -> stylize.Branch:
        """The parameters for an input of so many channels."""
        return _branch(self, channels, channels)


def _check_initializers(layer: ConvNormAct | ResidualBlock) -> None:
    arguments.check_initializers(
        kernel_init=layer.kernel_init, scale_init=layer.scale_init, bias_init=layer.bias_init
    )


def _branch(module: ConvNormAct | _Branch, channels: int, features: int) -> stylize.Branch:
    """The parameters of a convolution and its norm."""
    taps = kernel_shape(channels, features, module.kernel_size, 1)
    dtype = module.param_dtype
    return (
        parameter(module, "kernel", module.kernel_init, taps, dtype),
        parameter(module, "scale", module.scale_init, (features,), dtype),
        parameter(module, "bias", module.bias_init, (features,), dtype),
    )
