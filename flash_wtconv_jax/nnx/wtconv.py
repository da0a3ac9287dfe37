"""Wavelet convolutions for flax.nnx; `flash_wtconv_jax.linen` has their twins."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import arguments, wtconv
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.wtconv import default_kernel_init, default_scale_init
from flash_wtconv_jax.nnx.parameters import Parameterised
from pallas_kernels.common.arguments import hashable
from pallas_kernels.common.sharding import OutSharding, placed, without_channels

__all__ = ["SeparableWTConv2d", "WTConv1d", "WTConv2d", "WTConv3d"]


class _WTConv(Parameterised):
    """The layer of any number of spatial axes; `WTConv2d` documents the arguments."""

    ndim: ClassVar[int]
    base_kernel: nnx.Param[jax.Array]
    base_bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        channels: int,
        kernel_size: int = 5,
        depth: int = 1,
        stride: int = 1,
        *,
        use_bias: bool = True,
        wavelet: str = "haar",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer | None = None,
        scale_init: Initializer = default_scale_init,
        implementation: ImplementationLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.channels = channels
        self.kernel_size = kernel_size
        self.depth = depth
        self.stride = stride
        self.use_bias = use_bias
        self.wavelet = wavelet
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.implementation = hashable(implementation)
        wtconv.check_layer(self)
        table = wtconv.parameter_table(
            ndim=self.ndim,
            channels=channels,
            kernel_size=kernel_size,
            depth=depth,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            scale_init=scale_init,
        )
        if not use_bias:
            self.base_bias = nnx.data(None)
        self._make(table, rngs)

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
        return wtconv.apply(self, self.ndim, x, self._params(), out_sharding)


class WTConv1d(_WTConv):
    """Wavelet convolution of sequences `[*batch, L, channels]`; arguments as of `WTConv2d`.

    The parameters are `base_kernel [k, 1, C]`, `base_bias [C]`, `base_scale [C]`, and for each
    level i from 0 `wavelet_kernel_{i} [k, 2, C]` and `wavelet_scale_{i} [2, C]`. A stride averages
    each group of `stride` samples and drops an incomplete last one, as the published layer does.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import WTConv1d
        >>> layer = WTConv1d(channels=4, depth=2, stride=2, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 20, 4))).shape
        (2, 10, 4)
    """

    ndim: ClassVar[int] = 1


class WTConv2d(_WTConv):
    """Wavelet convolution of images `[*batch, H, W, channels]`: a huge kernel, few parameters.

    The computation, the parameters and the arguments are those of `flash_wtconv_jax.WTConv2d`, in
    the order `channels, kernel_size, depth, stride`, the others by name.

    Args:
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import WTConv2d
        >>> layer = WTConv2d(channels=8, kernel_size=5, depth=2, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 28, 28, 8))).shape
        (2, 28, 28, 8)
        >>> layer.wavelet_kernel_1.shape
        (5, 5, 4, 8)
    """

    ndim: ClassVar[int] = 2


class WTConv3d(_WTConv):
    """Wavelet convolution of volumes `[*batch, D, H, W, channels]`; arguments as of `WTConv2d`.

    The parameters are `base_kernel [k, k, k, 1, C]`, `base_bias [C]`, `base_scale [C]`, and for
    each level i from 0 `wavelet_kernel_{i} [k, k, k, 8, C]` and `wavelet_scale_{i} [8, C]`;
    subband `b_D + 2 * b_H + 4 * b_W`, b = 1 for the high band along an axis.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import WTConv3d
        >>> layer = WTConv3d(channels=2, kernel_size=3, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((1, 4, 6, 6, 2))).shape
        (1, 4, 6, 6, 2)
    """

    ndim: ClassVar[int] = 3


class SeparableWTConv2d(nnx.Module):
    """WTConv and a pointwise projection, for `features` other than `channels`.

    The computation, the parameters (`depthwise`, `pointwise`) and the arguments are those of
    `flash_wtconv_jax.SeparableWTConv2d`, in the order `channels, features, kernel_size, depth,
    stride`, the others by name.

    Args:
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import SeparableWTConv2d
        >>> layer = SeparableWTConv2d(4, 6, kernel_size=3, stride=2, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((1, 8, 8, 4))).shape
        (1, 4, 4, 6)
    """

    def __init__(
        self,
        channels: int,
        features: int,
        kernel_size: int = 5,
        depth: int = 1,
        stride: int = 1,
        *,
        use_bias: bool = True,
        wavelet: str = "haar",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer | None = None,
        scale_init: Initializer = default_scale_init,
        pointwise_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 - immutable
        implementation: ImplementationLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        arguments.check_constructor(features=features)
        arguments.check_initializers(pointwise_init=pointwise_init)
        self.depthwise = WTConv2d(
            channels,
            kernel_size,
            depth,
            stride,
            use_bias=use_bias,
            wavelet=wavelet,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            scale_init=scale_init,
            implementation=implementation,
            rngs=rngs,
        )
        self.pointwise = nnx.Conv(
            channels,
            features,
            (1, 1),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=pointwise_init,
            rngs=rngs,
        )

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
        y = self.depthwise(x, without_channels(out_sharding, jnp.ndim(x)))
        return placed(self.pointwise(y), out_sharding)
