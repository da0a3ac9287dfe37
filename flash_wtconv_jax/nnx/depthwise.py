"""The depthwise convolution for flax.nnx; `flash_wtconv_jax.linen` has its twin."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PaddingLike
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import arguments, depthwise
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import Padding, PerAxis, Windowed
from pallas_kernels.common.arguments import checked_dtype, hashable
from pallas_kernels.common.sharding import OutSharding


class DepthwiseConv2d(nnx.Conv):
    """Depthwise convolution of images: `flax.nnx.Conv` of one group a channel, on kernels of ours.

    The arguments are those of `flash_wtconv_jax.DepthwiseConv2d`, `features`, `kernel_size` and
    `strides` in this order or by name, the others by name. Parameters, initial values and results
    are those of `flax.nnx.Conv`, whose attributes it has.

    Args:
        features: Channels of input and output.
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import DepthwiseConv2d
        >>> layer = DepthwiseConv2d(4, 7, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 9, 8, 4))).shape
        (2, 9, 8, 4)
    """

    def __init__(
        self,
        features: int,
        kernel_size: PerAxis,
        strides: PerAxis | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: PerAxis | None = 1,
        kernel_dilation: PerAxis | None = 1,
        use_bias: bool = True,
        mask: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 - immutable
        bias_init: Initializer = nnx.initializers.zeros,
        implementation: ImplementationLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        *taps, _, features = depthwise.kernel_shape(features, kernel_size)
        arguments.check_initializers(kernel_init=kernel_init, bias_init=bias_init)
        super().__init__(
            features,
            features,
            tuple(taps),
            hashable(strides),
            padding=cast(PaddingLike, hashable(padding)),
            input_dilation=hashable(input_dilation),
            kernel_dilation=hashable(kernel_dilation),
            feature_group_count=features,
            use_bias=use_bias,
            mask=cast("jax.Array | None", mask),
            dtype=dtype,
            param_dtype=checked_dtype(param_dtype, "param_dtype"),
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=arguments.checked_rngs(rngs),
        )
        self.implementation = hashable(implementation)
        depthwise.check_layer(cast(Windowed, self))

    def __call__(self, x: ArrayLike, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the convolution.

        Args:
            x: Input `[*batch, H, W, features]` with any number of batch axes, none included.
            out_sharding: How the output is split over a mesh, a `jax.P` or a `NamedSharding`; None
                takes x's sharding. See `docs/sharding.md`.

        Returns:
            `[*batch, H_out, W_out, features]`.

        Raises:
            ValueError: If `x` is not floating point or its shape does not fit.
            NotImplementedError: If a named `implementation` cannot run here; it says why.
        """
        bias = None if self.bias is None else self.bias[...]
        return depthwise.apply(cast(Windowed, self), x, self.kernel[...], bias, out_sharding)
