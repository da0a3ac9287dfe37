"""The depthwise convolution for flax.linen; `flash_wtconv_jax.nnx` has its twin."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import arguments, depthwise
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import Padding, PerAxis
from flash_wtconv_jax.linen.parameters import parameter
from pallas_kernels.common.sharding import OutSharding


class DepthwiseConv2d(nn.Module):
    """Depthwise convolution of images `[*batch, H, W, features]`, each channel by its own kernel.

    It is `flax.linen.Conv` with `feature_group_count=features` on kernels of ours: the parameters
    `kernel [*kernel_size, 1, features]` and `bias [features]`, their initial values and the results
    are the same. Sums run in float32 or better, and the bias is added before they are rounded.

    Attributes:
        features: Channels of input and output.
        kernel_size: Taps along both axes, or along each. Kernels of ours take square ones of up to
            9, with strides of 1 and "SAME" padding; all else is XLA's.
        strides: Strides of the output, likewise; None is 1, as for the dilations.
        padding: As of `flash_wtconv_jax.Conv2d`.
        input_dilation: Distance that neighbouring samples are brought to, zeros between them.
        kernel_dilation: Distance of the samples that neighbouring taps read.
        use_bias: Whether there is a bias.
        mask: Array of the kernel's shape that is multiplied with it, or None.
        dtype: Dtype of the computation and the output; None promotes input and parameters.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`; None multiplies in full float32 on every device.
        kernel_init: Initialiser of the kernel.
        bias_init: Initialiser of the bias.
        implementation: Name or names of the implementations of `pallas_kernels.depthwise` to choose
            from; None leaves the choice to what was measured on the device, or its rule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax import DepthwiseConv2d
        >>> layer = DepthwiseConv2d(features=4, kernel_size=7)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jax.numpy.ones((2, 9, 8, 4)))
        >>> y.shape, variables["params"]["kernel"].shape
        ((2, 9, 8, 4), (7, 7, 1, 4))
    """

    features: int
    kernel_size: PerAxis
    strides: PerAxis | None = 1
    padding: Padding = "SAME"
    input_dilation: PerAxis | None = 1
    kernel_dilation: PerAxis | None = 1
    use_bias: bool = True
    mask: ArrayLike | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    implementation: ImplementationLike = None

    def __post_init__(self) -> None:
        depthwise.kernel_shape(self.features, self.kernel_size)
        arguments.check_initializers(kernel_init=self.kernel_init, bias_init=self.bias_init)
        depthwise.check_layer(self)
        super().__post_init__()

    @nn.compact
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
        shape = depthwise.kernel_shape(self.features, self.kernel_size)
        kernel = parameter(self, "kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = parameter(self, "bias", self.bias_init, (self.features,), self.param_dtype)
        return depthwise.apply(self, x, kernel, bias, out_sharding)
