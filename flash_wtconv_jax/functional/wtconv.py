"""WTConv layers for any layer library: parameters, initial values, checks and the one call.

The layers of linen and nnx hold exactly these parameters, so a checkpoint of one is a checkpoint
of the other. This module knows JAX and `pallas_kernels`, but no layer library.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import arguments
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from pallas_kernels.common.arguments import checked_array, checked_dtype
from pallas_kernels.common.sharding import OutSharding
from pallas_kernels.dispatch import Operator
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.wtconv.api import OPERATOR, wtconv1d, wtconv2d, wtconv3d

_FUNCTIONS = {1: wtconv1d, 2: wtconv2d, 3: wtconv3d}

default_kernel_init: Initializer = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(k^d), 1/sqrt(k^d)), PyTorch's default for a convolution of fan-in k^d."""

default_scale_init: Initializer = initializers.constant(0.1)
"""The published initial value of the wavelet scales."""


class Parameter(NamedTuple):
    """A parameter's shape and initialiser."""

    shape: tuple[int, ...]
    init: Initializer


def parameter_table(
    *,
    ndim: int,
    channels: int,
    kernel_size: int,
    depth: int,
    use_bias: bool,
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer | None = None,
    scale_init: Initializer = default_scale_init,
) -> dict[str, Parameter]:
    """The name, shape and initialiser of every parameter of a WTConv layer, in order.

    Args:
        ndim: Number of spatial axes d, 1 to 3.
        channels: Channels C.
        kernel_size: Taps k along each axis.
        depth: Number of wavelet levels.
        use_bias: Whether there is a `base_bias`.
        kernel_init: For `base_kernel [*k, 1, C]` and each `wavelet_kernel_{i} [*k, 2**d, C]`.
        bias_init: For `base_bias [C]`; None draws PyTorch's U(-1/sqrt(k^d), 1/sqrt(k^d)).
        scale_init: For each `wavelet_scale_{i} [2**d, C]`. `base_scale [C]` is always ones.

    Returns:
        The parameters by name.

    Raises:
        ValueError: If an initialiser is none.

    Example:
        >>> table = parameter_table(ndim=2, channels=8, kernel_size=5, depth=1, use_bias=False)
        >>> {name: parameter.shape for name, parameter in table.items()}
        {'base_kernel': (5, 5, 1, 8), 'base_scale': (8,), 'wavelet_kernel_0': (5, 5, 4, 8), \
'wavelet_scale_0': (4, 8)}
    """
    arguments.check_initializers(
        kernel_init=kernel_init, bias_init=bias_init, scale_init=scale_init
    )
    window, subbands = (kernel_size,) * ndim, 2**ndim
    kernel_init = _depthwise(kernel_init)
    table = {"base_kernel": Parameter((*window, 1, channels), kernel_init)}
    if use_bias:
        init = _symmetric_uniform(kernel_size ** (-ndim / 2)) if bias_init is None else bias_init
        table["base_bias"] = Parameter((channels,), init)
    table["base_scale"] = Parameter((channels,), initializers.ones)
    for i in range(depth):
        table[f"wavelet_kernel_{i}"] = Parameter((*window, subbands, channels), kernel_init)
        table[f"wavelet_scale_{i}"] = Parameter((subbands, channels), scale_init)
    return table


class Computation(Protocol):
    """The arguments of a layer or a model that say how its WTConv is computed."""

    wavelet: str
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    precision: PrecisionLike
    implementation: ImplementationLike


class Layer(Computation, Protocol):
    """The arguments that a WTConv layer of any library keeps as attributes."""

    channels: int
    kernel_size: int
    depth: int
    stride: int


def check_computation(model: Computation, operator: Operator = OPERATOR) -> None:
    """Check how a layer or a model computes its WTConv, or what it has in its place.

    Args:
        model: `wavelet` must be a discrete wavelet of PyWavelets, `implementation` None or names
            of implementations of the operator; see `arguments.check_computation` for the others.
        operator: The operator that the implementations are of.

    Raises:
        ValueError: naming the first argument that is out of range.
    """
    filter_bank(model.wavelet)
    arguments.check_computation(operator, model)


def check_layer(layer: Layer) -> None:
    """Check the arguments of a WTConv layer.

    Args:
        layer: `channels`, `kernel_size` and `stride` must be an int >= 1 and `depth` one >= 0; see
            `check_computation` for the others.

    Raises:
        ValueError: naming the first argument that is out of range.

    Example:
        >>> from flash_wtconv_jax import WTConv2d
        >>> check_layer(WTConv2d(channels=8, wavelet="db2", param_dtype="bfloat16"))
    """
    arguments.check_constructor(
        channels=layer.channels,
        kernel_size=layer.kernel_size,
        depth=layer.depth,
        stride=layer.stride,
    )
    check_computation(layer)


def apply(
    layer: Layer,
    ndim: int,
    x: ArrayLike,
    params: Mapping[str, jax.Array],
    out_sharding: OutSharding = None,
) -> jax.Array:
    """Check and cast the input as a Flax layer does, then call the operator.

    Only `x` is cast. The parameters stay as they are stored: the operator folds the scales into
    the taps before it rounds to the dtype of the computation, and folding float32 values once is
    more accurate than multiplying two rounded ones.

    Args:
        layer: The layer, of which the arguments are read.
        ndim: Number of spatial axes.
        x: Input `[*batch, *spatial, channels]`.
        params: Parameters as `parameter_table` names them.
        out_sharding: As the operator takes it.

    Returns:
        Output `[*batch, *spatial, channels]`, for `stride=1`.

    Raises:
        ValueError: If `x` is not floating point, has another number of channels, or is refused by
            the operator.
    """
    x = checked_array(x, "x")
    if x.ndim and x.shape[-1] != layer.channels:
        raise ValueError(
            f"x: expected an array of channels={layer.channels}, got shape {x.shape}; channels "
            "come last: move them there, or change the layer's channels"
        )
    dtype = _compute_dtype(x, params, layer.dtype)
    return _FUNCTIONS[ndim](
        x if x.dtype == dtype else x.astype(dtype),
        params,
        wavelet=layer.wavelet,
        stride=layer.stride,
        implementation=layer.implementation,
        precision=layer.precision,
        out_sharding=out_sharding,
    )


def deepest_level(size: int | Sequence[int], kernel_size: int = 5) -> int:
    """The deepest level whose receptive field still fits into the image.

    A WTConv layer with L levels and k taps sees windows of `2**L * k` samples. This is the largest
    L >= 0 with `2**L * k <= size`, on the shortest axis; 0 where not even the base kernel fits.
    Deeper levels filter more padding than image at their lowest band.

    The published WTConvNeXt goes deeper on purpose: its levels 5, 4, 3, 2 at sizes 56, 28, 14, 7
    (k = 5) are two more than these, and exactly the smallest L with `2**L * k >= 2 * size - 1`,
    where each output position, corners included, sees the whole map.

    Args:
        size: Spatial size of the layer's input, one int or one a spatial axis.
        kernel_size: Taps along each axis.

    Returns:
        The number of levels, to be given as `depth`.

    Raises:
        ValueError: If a size or `kernel_size` is not an int >= 1.

    Example:
        >>> [deepest_level(size, 5) for size in (224, 56, 28, 14, 7)]
        [5, 3, 2, 1, 0]
        >>> deepest_level((128, 40), kernel_size=3)
        3
    """
    sizes = tuple(size) if isinstance(size, Sequence) else (size,)
    if not sizes:
        raise ValueError("size must hold at least one int, got an empty sequence")
    for n in sizes:
        arguments.check_constructor(size=n)
    arguments.check_constructor(kernel_size=kernel_size)
    return max(0, int(min(sizes) // kernel_size).bit_length() - 1)


def _compute_dtype(
    x: ArrayLike, params: Mapping[str, jax.Array], dtype: DTypeLike | None
) -> np.dtype:
    if dtype is not None:
        return checked_dtype(dtype, "dtype")
    return jnp.result_type(x, *params.values())


def _depthwise(init: Initializer) -> Initializer:
    """Draw a kernel `[*k, S, C]` as the depthwise kernel `[*k, 1, S * C]` that it is.

    Initialisers that scale by fan-in then count k^d inputs; the subbands are outputs.
    """

    def draw(key: jax.Array, shape: Sequence[int], *args: Any, **kwargs: Any) -> jax.Array:
        *window, subbands, channels = shape
        drawn = init(key, (*window, 1, subbands * channels), *args, **kwargs)
        return drawn if subbands == 1 else rearranged(drawn, lambda a: a.reshape(tuple(shape)))

    return draw


def rearranged(drawn: jax.Array, change: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The array, or the box of one with its metadata, that an initialiser returned, changed."""
    # nnx.with_partitioning returns the array in a dataclass that is no pytree; linen's box is one.
    if dataclasses.is_dataclass(drawn) and hasattr(drawn, "raw_value"):
        return dataclasses.replace(drawn, raw_value=change(drawn.raw_value))
    return jax.tree.map(change, drawn)


def _symmetric_uniform(bound: float) -> Callable[..., jax.Array]:
    def draw(
        key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32, **_: object
    ) -> jax.Array:
        return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

    return draw
