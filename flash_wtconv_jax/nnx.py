"""WTConv layers for flax.nnx. Their linen twins, with the same parameters, are in `.linen`."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from . import parameters
from .parameters import (
    ImplementationLike,
    PrecisionLike,
    default_kernel_init,
    default_scale_init,
)

__all__ = ["SeparableWTConv2d", "WTConv1d", "WTConv2d", "WTConv3d"]


class _WTConv(nnx.Module):
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
        parameters.check_constructor(
            channels=channels, kernel_size=kernel_size, depth=depth, stride=stride
        )
        parameters.check_layer(
            wavelet=wavelet,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            implementation=implementation,
        )
        self.channels = channels
        self.kernel_size = kernel_size
        self.depth = depth
        self.stride = stride
        self.use_bias = use_bias
        self.wavelet = wavelet
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.implementation = _hashable(implementation)
        table = parameters.parameter_table(
            ndim=self.ndim,
            channels=channels,
            kernel_size=kernel_size,
            depth=depth,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            scale_init=scale_init,
        )
        self.parameter_names = tuple(table)
        if not use_bias:
            self.base_bias = nnx.data(None)
        # One key from the stream for the layer: a stream's count is slow to advance under tracing.
        keys = jax.random.split(rngs.params(), len(table))
        for key, (name, parameter) in zip(keys, table.items(), strict=True):
            setattr(self, name, nnx.Param(parameter.init(key, parameter.shape, param_dtype)))

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Apply the wavelet convolution.

        Args:
            x: Input `[*batch, *spatial, channels]` with any number of batch axes, none included.

        Returns:
            `[*batch, *spatial, channels]` for `stride=1`.

        Raises:
            ValueError: If the shape of `x` does not fit, or an argument of the layer is not one
                that the operator knows (`wavelet`, `implementation`).
            NotImplementedError: If a named `implementation` cannot run here; it says why.
        """
        return parameters.apply(
            x,
            {name: getattr(self, name)[...] for name in self.parameter_names},
            ndim=self.ndim,
            channels=self.channels,
            dtype=self.dtype,
            stride=self.stride,
            wavelet=self.wavelet,
            precision=self.precision,
            implementation=self.implementation,
        )


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

    The input runs through `depth` levels of wavelet analysis, a small depthwise convolution filters
    the subbands of each level, and synthesis adds them to an ordinary depthwise convolution: each
    level doubles the receptive field, which ends at `2**depth * kernel_size`. Channels never mix.

    The parameters, with k = `kernel_size` and C = `channels`, are `base_kernel [k, k, 1, C]`,
    `base_bias [C]`, `base_scale [C]`, and for each level i from 0 `wavelet_kernel_{i} [k, k, 4, C]`
    and `wavelet_scale_{i} [4, C]`: subbands low-low, high along H, high along W, high along both.

    Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
    ECCV 2024.

    Args:
        channels: Channels of input and output.
        kernel_size: Taps along each axis; an int, the kernel is square.
        depth: Number of wavelet levels; 0 is the base convolution alone. See `deepest_level`.
        stride: Keeps every stride-th sample of each axis of the output.
        use_bias: Whether the base convolution has a bias.
        wavelet: Any discrete PyWavelets name, such as "haar" or "db2".
        dtype: Dtype of the computation and the output. None promotes the input with the parameters:
            a bfloat16 input and float32 parameters compute in float32; integers are cast, as Flax's
            layers do. The parameters themselves are never rounded: scales are folded into the taps
            in their own dtype.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`, for implementations on matrix units; None multiplies in
            full float32 on every device.
        kernel_init: Initialiser of the base kernel and the wavelet kernels, called with the shape
            of a depthwise kernel: `[k, k, 1, C]`, and `[k, k, 1, 4 * C]` for the subbands of a
            level together, so that the fan-in is k^2.
        bias_init: Initialiser of the bias; None is U(-1/k, 1/k), PyTorch's default.
        scale_init: Initialiser of the wavelet scales, 0.1 by default; with zeros the layer starts
            as its base convolution. The base scale starts at one, always.
        implementation: Name or names of the implementations of `pallas_kernels.wtconv` to choose
            from; None leaves the choice to its rule for the device.
        rngs: Source of the keys for the initialisers.

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

    WTConv is depthwise; the 1x1 convolution after it mixes channels, as in a depthwise-separable
    convolution. The parameters are those of `WTConv2d` under `depthwise` and an `nnx.Conv`
    (`kernel [1, 1, C, features]`, `bias [features]`) under `pointwise`.

    Args:
        channels: Channels of the input.
        features: Channels of the output.
        kernel_size: See `WTConv2d`, like every argument not named here.
        depth: See `WTConv2d`.
        stride: See `WTConv2d`.
        use_bias: Whether the base convolution and the projection have a bias.
        wavelet: See `WTConv2d`.
        dtype: See `WTConv2d`; the projection is cast like `nnx.Conv`.
        param_dtype: See `WTConv2d`.
        precision: See `WTConv2d`.
        kernel_init: For the kernels of the WTConv.
        bias_init: For the bias of the WTConv; the bias of the projection starts at zero.
        scale_init: For the wavelet scales.
        pointwise_init: For the kernel of the projection.
        implementation: See `WTConv2d`.
        rngs: Source of the keys for the initialisers.

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
        parameters.check_constructor(channels=channels, features=features)
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

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Apply the wavelet convolution, then the projection.

        Args:
            x: Input `[*batch, H, W, channels]`.

        Returns:
            `[*batch, H, W, features]` for `stride=1`.

        Raises:
            ValueError: As `WTConv2d`.
        """
        return self.pointwise(self.depthwise(x))


def _hashable(implementation: ImplementationLike) -> ImplementationLike:
    # nnx compares and hashes static attributes (nnx.jit, nnx.split): a list would not do.
    return tuple(implementation) if isinstance(implementation, list) else implementation
