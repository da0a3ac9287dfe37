"""The dense convolution for flax.nnx; `flash_wtconv_jax.linen` has its twin."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import arguments, conv2d
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import Padding, PerAxis
from pallas_kernels.common.arguments import hashable
from pallas_kernels.common.sharding import OutSharding


class Conv2d(nnx.Module):
    """Dense convolution of images: `flax.nnx.Conv` on kernels of ours.

    The arguments are those of `flash_wtconv_jax.Conv2d`, `in_features`, `out_features`,
    `kernel_size` and `strides` in this order or by name, the others by name. Parameters, initial
    values and results are those of `flax.nnx.Conv`.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import Conv2d
        >>> layer = Conv2d(4, 16, 3, strides=2, activation="relu", rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 9, 8, 4))).shape
        (2, 5, 4, 16)
    """

    kernel: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: PerAxis,
        strides: PerAxis | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: PerAxis | None = 1,
        kernel_dilation: PerAxis | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 - immutable
        bias_init: Initializer = nnx.initializers.zeros,
        activation: str | None = None,
        implementation: ImplementationLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = hashable(kernel_size)
        self.strides = hashable(strides)
        self.padding = hashable(padding)
        self.input_dilation = hashable(input_dilation)
        self.kernel_dilation = hashable(kernel_dilation)
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.mask = nnx.data(mask)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.activation = activation
        self.implementation = hashable(implementation)
        conv2d.check_layer(self)
        arguments.check_initializers(kernel_init=kernel_init, bias_init=bias_init)
        shape = conv2d.kernel_shape(in_features, out_features, kernel_size, feature_group_count)
        rngs = arguments.checked_rngs(rngs)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))

    def __call__(self, x: ArrayLike, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the convolution.

        Args:
            x: Input `[*batch, H, W, in_features]` with any number of batch axes, none included.
            out_sharding: How the output is split over a mesh, a `jax.P` or a `NamedSharding`; None
                takes x's sharding. See `docs/sharding.md`.

        Returns:
            `[*batch, H_out, W_out, out_features]`.

        Raises:
            ValueError: If `x` is not floating point or its shape does not fit.
            NotImplementedError: If a named `implementation` cannot run here; it says why.
        """
        bias = None if self.bias is None else self.bias[...]
        return conv2d.apply(self, x, self.kernel[...], bias, out_sharding)
