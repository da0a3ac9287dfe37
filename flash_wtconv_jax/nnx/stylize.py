"""Instance norm, alone and behind convolutions, for flax.nnx; `linen` has the twins."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import arguments, stylize
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import Padding, PerAxis, kernel_shape
from pallas_kernels.common.arguments import hashable
from pallas_kernels.common.sharding import OutSharding


class InstanceNorm(nnx.Module):
    """Instance norm of images: `flax.nnx.InstanceNorm` on kernels of ours.

    The arguments are those of `flash_wtconv_jax.InstanceNorm`, by name. Parameters, initial values
    and results are those of `flax.nnx.InstanceNorm`, but that a mean of many deviations costs no
    digits.

    Args:
        num_features: Channels.
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import InstanceNorm
        >>> layer = InstanceNorm(4, epsilon=1e-5, activation="relu", rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 9, 8, 4))).shape
        (2, 9, 8, 4)
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        activation: str | None = None,
        implementation: ImplementationLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.activation = activation
        self.implementation = hashable(implementation)
        arguments.check_constructor(num_features=num_features)
        arguments.check_initializers(bias_init=bias_init, scale_init=scale_init)
        stylize.check_norm(self)
        rngs, shape = arguments.checked_rngs(rngs), (num_features,)
        self.scale = self.bias = nnx.data(None)
        if use_scale:
            self.scale = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype))

    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        out_sharding: OutSharding = None,
    ) -> jax.Array:
        """Normalise each channel of each image.

        Args:
            x: Input `[*batch, H, W, num_features]` with any number of batch axes, none included.
            residual: Is added before the activation, of x's shape.
            out_sharding: How the output is split over a mesh, a `jax.P` or a `NamedSharding`; None
                takes x's sharding. See `docs/sharding.md`.

        Returns:
            An array of x's shape.

        Raises:
            ValueError: If `x` is not floating point or a shape does not fit.
            NotImplementedError: If a named `implementation` cannot run here; it says why.
        """
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        return stylize.instance_norm(self, x, scale, bias, residual, out_sharding)


class ConvNormAct(nnx.Module):
    """A convolution of images, its instance norm, and an activation.

    The arguments are those of `flash_wtconv_jax.ConvNormAct`, `in_features`, `out_features`,
    `kernel_size` and `strides` in this order or by name, the others by name. The parameters are
    `kernel [*kernel_size, in_features, out_features]`, and the norm's `scale` and `bias`.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import ConvNormAct
        >>> layer = ConvNormAct(4, 16, 3, upsample=2, padding="REFLECT", rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 5, 4, 4))).shape
        (2, 10, 8, 16)
    """

    kernel: nnx.Param[jax.Array]
    scale: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: PerAxis,
        strides: PerAxis = 1,
        *,
        padding: Padding = "SAME",
        upsample: int = 1,
        epsilon: float = 1e-5,
        activation: str | None = "relu",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 - immutable
        scale_init: Initializer = nnx.initializers.ones,
        bias_init: Initializer = nnx.initializers.zeros,
        conv_implementation: ImplementationLike = None,
        norm_implementation: ImplementationLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = hashable(kernel_size)
        self.strides = hashable(strides)
        self.padding = hashable(padding)
        self.upsample = upsample
        self.epsilon = epsilon
        self.activation = activation
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.conv_implementation = hashable(conv_implementation)
        self.norm_implementation = hashable(norm_implementation)
        shape = kernel_shape(in_features, out_features, kernel_size, 1)
        inits = {"kernel_init": kernel_init, "scale_init": scale_init, "bias_init": bias_init}
        arguments.check_initializers(**inits)
        stylize.check_conv_block(self)
        rngs = arguments.checked_rngs(rngs)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.scale = nnx.Param(scale_init(rngs.params(), shape[-1:], param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), shape[-1:], param_dtype))

    def __call__(
        self,
        x: ArrayLike,
        residual: ArrayLike | None = None,
        out_sharding: OutSharding = None,
    ) -> jax.Array:
        """Convolve, normalise, activate.

        Args:
            x: Input `[*batch, H, W, in_features]` with any number of batch axes, none included.
            residual: Is added before the activation, of the output's shape.
            out_sharding: How the output is split over a mesh, a `jax.P` or a `NamedSharding`; None
                takes x's sharding. See `docs/sharding.md`.

        Returns:
            `[*batch, H_out, W_out, out_features]`.

        Raises:
            ValueError: If `x` is not floating point or a shape does not fit.
            NotImplementedError: If a named implementation cannot run here; it says why.
        """
        return stylize.conv_norm(
            x,
            self.branch(),
            residual,
            strides=self.strides,
            upsample=self.upsample,
            activation=self.activation,
            out_sharding=out_sharding,
            **stylize.options(self),
        )

    def branch(self) -> stylize.Branch:
        """The kernel, the scale and the bias, as arrays."""
        return self.kernel[...], self.scale[...], self.bias[...]


class ResidualBlock(nnx.Module):
    """Convolution, instance norm, ReLU, convolution, instance norm, and the input added.

    The arguments are those of `flash_wtconv_jax.ResidualBlock`, by name. `conv1` and `conv2` are
    each a `ConvNormAct`, which has the parameters.

    Args:
        features: Channels of the input and the output.
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import ResidualBlock
        >>> block = ResidualBlock(4, rngs=nnx.Rngs(0))
        >>> block(jax.numpy.ones((2, 5, 4, 4))).shape
        (2, 5, 4, 4)
    """

    def __init__(
        self,
        features: int,
        *,
        kernel_size: PerAxis = 3,
        padding: Padding = "REFLECT",
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 - immutable
        scale_init: Initializer = nnx.initializers.ones,
        bias_init: Initializer = nnx.initializers.zeros,
        conv_implementation: ImplementationLike = None,
        norm_implementation: ImplementationLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.features = features
        self.conv1, self.conv2 = (
            ConvNormAct(
                features,
                features,
                kernel_size,
                padding=padding,
                epsilon=epsilon,
                activation=activation,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                scale_init=scale_init,
                bias_init=bias_init,
                conv_implementation=conv_implementation,
                norm_implementation=norm_implementation,
                rngs=rngs,
            )
            for activation in ("relu", None)
        )

    def __call__(self, x: ArrayLike, out_sharding: OutSharding = None) -> jax.Array:
        """Map `[*batch, H, W, features]` to the same shape; errors as of `ConvNormAct`."""
        first, second = self.conv1, self.conv2
        return stylize.residual_block(
            x, first.branch(), second.branch(), out_sharding=out_sharding, **stylize.options(first)
        )
