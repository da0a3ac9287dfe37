"""The dense convolution for flax.linen; `flash_wtconv_jax.nnx` has its twin."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import arguments, conv2d
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import Padding, PerAxis
from flash_wtconv_jax.linen.parameters import parameter
from pallas_kernels.common.sharding import OutSharding


class Conv2d(nn.Module):
    """Dense convolution of images `[*batch, H, W, C]`: `flax.linen.Conv` on kernels of ours.

    Parameters, initial values and results are those of `flax.linen.Conv` in two dimensions:
    `kernel [*kernel_size, C / feature_group_count, features]` and `bias [features]`. Sums run in
    float32 or better, and the bias and the activation are applied before they are rounded.

    Attributes:
        features: Channels of the output.
        kernel_size: Taps along both axes, or along each.
        strides: Strides of the output, likewise; None is 1, as for the dilations.
        padding: "SAME", "VALID", "REFLECT", "CIRCULAR" (periodic), an int, one for each axis, or
            `((top, bottom), (left, right))`. `("reflect", any of these numbers)` mirrors so many
            samples about the edges; "REFLECT" mirrors as many as keep the size.
        input_dilation: Distance that neighbouring samples are brought to, zeros between them.
        kernel_dilation: Distance of the samples that neighbouring taps read.
        feature_group_count: Groups that channels and features fall into, each convolved apart.
        use_bias: Whether there is a bias.
        mask: Array of the kernel's shape that is multiplied with it, or None.
        dtype: Dtype of the computation and the output; None promotes input and parameters.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`; None multiplies in full float32 on every device.
        kernel_init: Initialiser of the kernel.
        bias_init: Initialiser of the bias.
        activation: None, "relu" or "gelu", in the same kernel.
        implementation: Name or names of the implementations of `pallas_kernels.conv2d` to choose
            from; None leaves the choice to what was measured on the device, or its rule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax import Conv2d
        >>> layer = Conv2d(features=16, kernel_size=3, strides=2, padding="REFLECT")
        >>> y, variables = layer.init_with_output(jax.random.key(0), jax.numpy.ones((2, 9, 8, 4)))
        >>> y.shape
        (2, 5, 4, 16)
    """

    features: int
    kernel_size: PerAxis
    strides: PerAxis | None = 1
    padding: Padding = "SAME"
    input_dilation: PerAxis | None = 1
    kernel_dilation: PerAxis | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    mask: ArrayLike | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    activation: str | None = None
    implementation: ImplementationLike = None

    def __post_init__(self) -> None:
        arguments.check_constructor(features=self.features)
        arguments.check_initializers(kernel_init=self.kernel_init, bias_init=self.bias_init)
        conv2d.check_layer(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: ArrayLike, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the convolution.

        Args:
            x: Input `[*batch, H, W, C]` with any number of batch axes, none included.
            out_sharding: How the output is split over a mesh, a `jax.P` or a `NamedSharding`; None
                takes x's sharding. See `docs/sharding.md`.

        Returns:
            `[*batch, H_out, W_out, features]`.

        Raises:
            ValueError: If `x` is not floating point or its shape does not fit.
            NotImplementedError: If a named `implementation` cannot run here; it says why.
        """
        shape = conv2d.kernel_shape(
            jnp.shape(x)[-1], self.features, self.kernel_size, self.feature_group_count
        )
        kernel = parameter(self, "kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = parameter(self, "bias", self.bias_init, (self.features,), self.param_dtype)
        return conv2d.apply(self, x, kernel, bias, out_sharding)


class Conv2D(Conv2d):
    """`Conv2d` under its old name, which linen gives to parameters of unnamed layers."""
