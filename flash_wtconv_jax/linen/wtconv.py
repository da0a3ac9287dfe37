"""Wavelet convolutions for flax.linen; `flash_wtconv_jax.nnx` has their twins."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import arguments, wtconv
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.wtconv import default_kernel_init, default_scale_init
from flash_wtconv_jax.linen.parameters import parameters
from pallas_kernels.common.sharding import OutSharding, placed, without_channels

__all__ = ["SeparableWTConv2d", "WTConv1d", "WTConv2d", "WTConv3d"]


class _WTConv(nn.Module):
    """The layer of any number of spatial axes; `WTConv2d` documents the attributes."""

    channels: int
    kernel_size: int = 5
    depth: int = 1
    stride: int = 1
    use_bias: bool = True
    wavelet: str = "haar"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer | None = None
    scale_init: Initializer = default_scale_init
    implementation: ImplementationLike = None
    ndim: ClassVar[int]

    def __post_init__(self) -> None:
        wtconv.check_layer(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: ArrayLike, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the wavelet convolution.

        Args:
            x: Input `[*batch, *spatial, channels]` with any number of batch axes, none included.
            out_sharding: How the output is split over a mesh, a `jax.P` or a `NamedSharding`; None
                takes x's sharding. See `docs/sharding.md`.

        Returns:
            `[*batch, *spatial, channels]` for `stride=1`.

        Raises:
            ValueError: If `x` is not floating point or its shape does not fit.
            NotImplementedError: If a named `implementation` cannot run here; it says why.
        """
        table = wtconv.parameter_table(
            ndim=self.ndim,
            channels=self.channels,
            kernel_size=self.kernel_size,
            depth=self.depth,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            scale_init=self.scale_init,
        )
        return wtconv.apply(self, self.ndim, x, parameters(self, table), out_sharding)


class WTConv1d(_WTConv):
    """Wavelet convolution of sequences `[*batch, L, channels]`; attributes as of `WTConv2d`.

    The parameters are `base_kernel [k, 1, C]`, `base_bias [C]`, `base_scale [C]`, and for each
    level i from 0 `wavelet_kernel_{i} [k, 2, C]` and `wavelet_scale_{i} [2, C]`. A stride averages
    each group of `stride` samples and drops an incomplete last one, as the published layer does.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax import WTConv1d
        >>> x = jax.numpy.ones((2, 20, 4))
        >>> y, variables = WTConv1d(channels=4, depth=2, stride=2).init_with_output(
        ...     jax.random.key(0), x
        ... )
        >>> y.shape
        (2, 10, 4)
    """

    ndim: ClassVar[int] = 1


class WTConv2d(_WTConv):
    """Wavelet convolution of images `[*batch, H, W, channels]`: a huge kernel, few parameters.

    The input runs through `depth` levels of wavelet analysis, a small depthwise convolution filters
    the subbands of each level, and synthesis adds them to an ordinary depthwise convolution: each
    level doubles the receptive field, which ends at `2**depth * kernel_size`. Channels never mix.

    The parameters, with k = `kernel_size` and C = `channels`, are `base_kernel [k, k, 1, C]`,
    `base_bias [C]`, `base_scale [C]`, and for each level i from 0 `wavelet_kernel_{i} [k, k, 4, C]`
    and `wavelet_scale_{i} [4, C]`: subbands low-low, high along H, high along W, high along both.

    Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
    ECCV 2024.

    Attributes:
        channels: Channels of input and output.
        kernel_size: Taps along each axis; an int, the kernel is square.
        depth: Number of wavelet levels; 0 is the base convolution alone. See `deepest_level`.
        stride: Keeps every stride-th sample of each axis of the output.
        use_bias: Whether the base convolution has a bias.
        wavelet: Any discrete PyWavelets name, such as "haar" or "db2".
        dtype: Dtype of the computation and the output. None promotes the input with the parameters:
            a bfloat16 input and float32 parameters compute in float32. The parameters themselves
            are never rounded: scales are folded into the taps in their own dtype.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`, for implementations on matrix units; None multiplies in
            full float32 on every device.
        kernel_init: Initialiser of the base kernel and the wavelet kernels, called with the shape
            of a depthwise kernel: `[k, k, 1, C]`, and `[k, k, 1, 4 * C]` for the subbands of a
            level together, so that the fan-in is k^2.
        bias_init: Initialiser of the bias; None is U(-1/k, 1/k), PyTorch's default.
        scale_init: Initialiser of the wavelet scales, 0.1 by default; with zeros the layer starts
            as its base convolution. The base scale starts at one, always.
        implementation: Name of an implementation of `pallas_kernels.wtconv`; names, or "auto" for
            all, of which the fastest is taken, measured once and remembered; None leaves the
            choice to its rule for the device.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax import WTConv2d
        >>> model = WTConv2d(channels=8, kernel_size=5, depth=2)
        >>> x = jax.random.normal(jax.random.key(1), (2, 28, 28, 8))
        >>> variables = model.init(jax.random.key(0), x)
        >>> model.apply(variables, x).shape
        (2, 28, 28, 8)
        >>> jax.tree.map(jax.numpy.shape, variables)["params"]["wavelet_kernel_1"]
        (5, 5, 4, 8)
    """

    ndim: ClassVar[int] = 2


class WTConv3d(_WTConv):
    """Wavelet convolution of volumes `[*batch, D, H, W, channels]`; attributes as of `WTConv2d`.

    The parameters are `base_kernel [k, k, k, 1, C]`, `base_bias [C]`, `base_scale [C]`, and for
    each level i from 0 `wavelet_kernel_{i} [k, k, k, 8, C]` and `wavelet_scale_{i} [8, C]`;
    subband `b_D + 2 * b_H + 4 * b_W`, b = 1 for the high band along an axis.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax import WTConv3d
        >>> x = jax.numpy.ones((1, 4, 6, 6, 2))
        >>> y, variables = WTConv3d(channels=2, kernel_size=3).init_with_output(
        ...     jax.random.key(0), x
        ... )
        >>> y.shape
        (1, 4, 6, 6, 2)
    """

    ndim: ClassVar[int] = 3


class SeparableWTConv2d(nn.Module):
    """WTConv and a pointwise projection, for `features` other than `channels`.

    WTConv is depthwise; the 1x1 convolution after it mixes channels, as in a depthwise-separable
    convolution. The parameters are those of `WTConv2d` under `depthwise` and a `flax.linen.Conv`
    (`kernel [1, 1, C, features]`, `bias [features]`) under `pointwise`.

    Attributes:
        channels: Channels of the input.
        features: Channels of the output.
        kernel_size: See `WTConv2d`, like every attribute not named here.
        depth: See `WTConv2d`.
        stride: See `WTConv2d`.
        use_bias: Whether the base convolution and the projection have a bias.
        wavelet: See `WTConv2d`.
        dtype: See `WTConv2d`; the projection is cast like `flax.linen.Conv`.
        param_dtype: See `WTConv2d`.
        precision: See `WTConv2d`; for the projection None is JAX's default.
        kernel_init: Initialiser of the kernels of the WTConv.
        bias_init: Initialiser of the bias of the WTConv; that of the projection starts at zero.
        scale_init: Initialiser of the wavelet scales.
        pointwise_init: Initialiser of the kernel of the projection.
        implementation: See `WTConv2d`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax import SeparableWTConv2d
        >>> x = jax.numpy.ones((1, 8, 8, 4))
        >>> layer = SeparableWTConv2d(channels=4, features=6, kernel_size=3, stride=2)
        >>> y, variables = layer.init_with_output(jax.random.key(0), x)
        >>> y.shape
        (1, 4, 4, 6)
    """

    channels: int
    features: int
    kernel_size: int = 5
    depth: int = 1
    stride: int = 1
    use_bias: bool = True
    wavelet: str = "haar"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer | None = None
    scale_init: Initializer = default_scale_init
    pointwise_init: Initializer = nn.initializers.lecun_normal()
    implementation: ImplementationLike = None

    def __post_init__(self) -> None:
        arguments.check_constructor(features=self.features)
        arguments.check_initializers(pointwise_init=self.pointwise_init)
        wtconv.check_layer(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: ArrayLike, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the wavelet convolution, then the projection.

        Args:
            x: Input `[*batch, H, W, channels]`.
            out_sharding: How the output is split over a mesh, as `WTConv2d` takes it.

        Returns:
            `[*batch, H, W, features]` for `stride=1`.

        Raises:
            ValueError: As `WTConv2d`.
        """
        x = WTConv2d(
            channels=self.channels,
            kernel_size=self.kernel_size,
            depth=self.depth,
            stride=self.stride,
            use_bias=self.use_bias,
            wavelet=self.wavelet,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            scale_init=self.scale_init,
            implementation=self.implementation,
            name="depthwise",
        )(x, without_channels(out_sharding, jnp.ndim(x)))
        y = nn.Conv(
            self.features,
            (1, 1),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.pointwise_init,
            name="pointwise",
        )(x)
        return placed(y, out_sharding)
