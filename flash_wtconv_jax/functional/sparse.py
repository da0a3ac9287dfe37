"""Sparse layers for any layer library: parameters, checks and the one call of each.

The layers of linen and nnx hold exactly these parameters, so a checkpoint of one is a checkpoint
of the other. This module knows JAX and `pallas_kernels`, but no layer library.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flash_wtconv_jax.functional import arguments
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import PerAxis
from flash_wtconv_jax.functional.wtconv import Parameter, rearranged
from pallas_kernels.common.arguments import checked_dtype, checked_integer, checked_precision
from pallas_kernels.dispatch import Operator
from pallas_kernels.sparse import (
    KernelMap,
    Voxels,
    norm,
    spatially_sparse_conv,
    spatially_sparse_depthwise_conv,
)
from pallas_kernels.sparse import kernel_map as make_kernel_map
from pallas_kernels.sparse.checks import STRIDE_MODES, checked_window, per_axis
from pallas_kernels.sparse.pooling import pool


class DepthwiseLayer(Protocol):
    """The arguments that a sparse convolution of any library keeps as attributes."""

    kernel_size: PerAxis
    stride: PerAxis
    kernel_dilation: PerAxis
    generative: bool
    transposed: bool
    stride_mode: str
    fwd_algo: ImplementationLike
    bwd_algo: ImplementationLike
    stride_reduce: str
    output_rule: str
    padding: PerAxis | None
    out_capacity: int | None
    num_spatial_dims: int
    dtype: DTypeLike | None
    param_dtype: DTypeLike


class Layer(DepthwiseLayer, Protocol):
    """Those of one that is not depthwise."""

    in_channels: int
    out_channels: int
    groups: int
    precision: PrecisionLike


class Norm(Protocol):
    """The arguments that a norm of any library keeps as attributes."""

    num_features: int
    epsilon: float
    dtype: DTypeLike | None
    param_dtype: DTypeLike


class BatchNorm(Norm, Protocol):
    """Those of a batch norm."""

    momentum: float
    axis_name: str | None


class Stats(NamedTuple):
    """Running statistics of a batch norm.

    Attributes:
        mean: `[C]`.
        var: `[C]`, of the population.
    """

    mean: jax.Array
    var: jax.Array


def check_layer(operator: Operator, layer: DepthwiseLayer, **channels: int) -> None:
    """Check the arguments of a sparse convolution that do not depend on its input.

    Args:
        operator: The operator that computes it.
        layer: `num_spatial_dims` must be 1, 2 or 3; `kernel_size`, `stride` and `kernel_dilation`
            an int >= 1 or so many of them; `fwd_algo` and `bwd_algo` None or names of algorithms.
            The operator checks the others.
        **channels: Numbers of channels and groups, ints >= 1.

    Raises:
        ValueError: naming the first argument that is out of range.

    Example:
        >>> from flash_wtconv_jax.linen import SparseConv3d
        >>> from pallas_kernels.sparse.api import OPERATOR
        >>> check_layer(OPERATOR, SparseConv3d(4, 8, kernel_size=3), in_channels=4)
    """
    arguments.check_constructor(**channels)
    ndim = checked_integer(layer.num_spatial_dims, "num_spatial_dims", least=1, most=3)
    checked_window(layer.kernel_size, layer.stride, layer.kernel_dilation, ndim)
    _check_dtypes(layer)
    for name in ("fwd_algo", "bwd_algo"):
        operator.check_names(getattr(layer, name), name)


def parameter_table(
    layer: Layer, *, bias: bool, kernel_init: Initializer, bias_init: Initializer
) -> dict[str, Parameter]:
    """The name, shape and initialiser of every parameter of a sparse convolution, in order.

    Args:
        layer: The layer; see `check_layer`. `groups` must divide both numbers of channels.
        bias: Whether there is a bias.
        kernel_init: Initialiser, called with `[K, in_channels / groups, out_channels]`, so that
            the fan-in is that of a feature.
        bias_init: Initialiser of `[out_channels]`.

    Returns:
        `kernel [K, in_channels, out_channels]`, or with groups `[K, G, in_channels / G,
        out_channels / G]`, and perhaps `bias`.

    Raises:
        ValueError: Groups that divide one of the numbers unevenly, an unknown precision, or an
            initialiser that is none.

    Example:
        >>> from flash_wtconv_jax.linen import SparseConv2d
        >>> zeros = jax.nn.initializers.zeros
        >>> table = parameter_table(
        ...     SparseConv2d(4, 6, 3, groups=2), bias=True, kernel_init=zeros, bias_init=zeros
        ... )
        >>> {name: parameter.shape for name, parameter in table.items()}
        {'kernel': (9, 2, 2, 3), 'bias': (6,)}
    """
    arguments.check_initializers(kernel_init=kernel_init, bias_init=bias_init)
    checked_precision(layer.precision)
    inside, outside, groups = layer.in_channels, layer.out_channels, layer.groups
    if inside % groups or outside % groups:
        raise ValueError(
            f"groups={groups}: expected a divisor of in_channels={inside} and "
            f"out_channels={outside}"
        )
    whole = (_taps(layer), inside // groups, outside)
    shape = (*whole[:1], groups, whole[1], outside // groups) if groups > 1 else whole

    def grouped(key: jax.Array, shape: Sequence[int], *args: Any, **kwargs: Any) -> jax.Array:
        def apart(kernel: jax.Array) -> jax.Array:
            return jnp.moveaxis(kernel.reshape(*whole[:2], groups, -1), 2, 1)

        return rearranged(kernel_init(key, whole, *args, **kwargs), apart)

    init: Initializer = grouped if groups > 1 else kernel_init
    table = {"kernel": Parameter(shape, init)}
    return table | ({"bias": Parameter((outside,), bias_init)} if bias else {})


def depthwise_parameter_table(
    layer: DepthwiseLayer,
    channels: int,
    *,
    bias: bool,
    kernel_init: Initializer,
    bias_init: Initializer,
) -> dict[str, Parameter]:
    """The parameters of a depthwise sparse convolution: `kernel [K, C]` and perhaps `bias [C]`.

    Args:
        layer: The layer; see `check_layer`.
        channels: Channels C.
        bias: Whether there is a bias.
        kernel_init: Initialiser, called with `[K, 1, C]`.
        bias_init: Initialiser of the bias.

    Raises:
        ValueError: An initialiser that is none.
    """
    arguments.check_initializers(kernel_init=kernel_init, bias_init=bias_init)
    taps = _taps(layer)

    def init(key: jax.Array, shape: Sequence[int], *args: Any, **kwargs: Any) -> jax.Array:
        drawn = kernel_init(key, (taps, 1, channels), *args, **kwargs)
        return rearranged(drawn, lambda kernel: kernel.reshape(tuple(shape)))

    table = {"kernel": Parameter((taps, channels), init)}
    return table | ({"bias": Parameter((channels,), bias_init)} if bias else {})


def apply(
    layer: Layer,
    voxels: Voxels,
    params: Mapping[str, jax.Array],
    output_voxels: Voxels | None = None,
    kernel_map: KernelMap | None = None,
) -> Voxels:
    """Cast features and kernel as a Flax layer does, then call the operator.

    Args:
        layer: The layer, of which the arguments are read.
        voxels: The input.
        params: The parameters of `parameter_table`.
        output_voxels: The voxels of the output, as of a transposed convolution.
        kernel_map: A map that is ready, see `spatially_sparse_conv`.

    Returns:
        The voxels of the output, in the dtype of the computation.

    Raises:
        ValueError: If the voxels do not fit the layer, or the operator refuses.
    """
    voxels, kernel = _ready(layer, voxels, layer.in_channels, params)
    return spatially_sparse_conv(
        voxels,
        kernel,
        layer.kernel_size,
        layer.stride,
        layer.kernel_dilation,
        bias=params.get("bias"),
        groups=layer.groups,
        generative=layer.generative,
        transposed=layer.transposed,
        output_voxels=output_voxels,
        stride_mode=layer.stride_mode,
        stride_reduce=layer.stride_reduce,
        output_rule=layer.output_rule,
        padding=layer.padding,
        fwd_algo=layer.fwd_algo,
        bwd_algo=layer.bwd_algo,
        kernel_map=kernel_map,
        out_capacity=layer.out_capacity,
        precision=layer.precision,
    )


def apply_depthwise(
    layer: DepthwiseLayer,
    voxels: Voxels,
    params: Mapping[str, jax.Array],
    output_voxels: Voxels | None = None,
    kernel_map: KernelMap | None = None,
) -> Voxels:
    """The same for a depthwise convolution.

    Args:
        layer: The layer, of which the arguments are read.
        voxels: The input.
        params: The parameters of `depthwise_parameter_table`.
        output_voxels: The voxels of the output, as of a transposed convolution.
        kernel_map: A map that is ready; where the output's voxels are not the input's, with
            `output_voxels`.

    Returns:
        The voxels of the output, in the dtype of the computation.

    Raises:
        ValueError: If the voxels do not fit the layer, or the operator refuses.
    """
    voxels, kernel = _ready(layer, voxels, params["kernel"].shape[1], params)
    stride = per_axis(layer.stride, "stride", voxels.ndim)
    if layer.stride_mode not in STRIDE_MODES:
        raise ValueError(
            f"stride_mode={layer.stride_mode!r}: expected one of {', '.join(STRIDE_MODES)}"
        )
    if layer.stride_mode == "reduce_and_stride" and set(stride) != {1}:
        if layer.transposed or output_voxels is not None:
            given = "transposed=True" if layer.transposed else "output_voxels"
            raise ValueError(
                f"{given}: stride_mode='reduce_and_stride' pools onto voxels of its own"
            )
        voxels, stride = pool(voxels, stride, reduce=layer.stride_reduce), (1,) * voxels.ndim
    if kernel_map is None:
        kernel_map, out = make_kernel_map(
            voxels,
            layer.kernel_size,
            stride,
            layer.kernel_dilation,
            transposed=layer.transposed,
            generative=layer.generative,
            output_voxels=output_voxels,
            output_rule=layer.output_rule,
            padding=layer.padding,
            out_capacity=layer.out_capacity,
        )
    else:
        window = checked_window(layer.kernel_size, stride, layer.kernel_dilation, voxels.ndim)
        asked = window._replace(transposed=layer.transposed)
        if kernel_map.window != asked:
            raise ValueError(f"kernel_map: is that of {kernel_map.window}, expected {asked}")
        own = layer.generative or layer.transposed or layer.output_rule == "full"
        if (own or set(stride) != {1}) and output_voxels is None:
            raise ValueError(
                "output_voxels=None: with kernel_map= give the voxels too that kernel_map() "
                "returned beside it, for the output has other voxels than the input"
            )
        out = voxels if output_voxels is None else output_voxels
    y = spatially_sparse_depthwise_conv(
        voxels.features,
        kernel,
        kernel_map,
        out.capacity,
        fwd_algo=layer.fwd_algo,
        bwd_algo=layer.bwd_algo,
    )
    if "bias" in params:
        y = jnp.where(out.valid[:, None], y + params["bias"].astype(y.dtype), 0)
    return out.with_features(y)


def norm_parameter_table(layer: Norm, *, scale: bool, bias: bool) -> dict[str, Parameter]:
    """The parameters of a norm: perhaps `scale [C]`, ones, and `bias [C]`, zeros.

    Args:
        layer: `num_features`, C, must be an int >= 1, `dtype` None or a floating-point dtype,
            `param_dtype` one.
        scale: Whether there is a scale.
        bias: Whether there is a bias.

    Raises:
        ValueError: naming the first argument that is out of range.
    """
    arguments.check_constructor(num_features=layer.num_features)
    _check_dtypes(layer)
    inits = {"scale": jax.nn.initializers.ones} if scale else {}
    inits |= {"bias": jax.nn.initializers.zeros} if bias else {}
    return {name: Parameter((layer.num_features,), init) for name, init in inits.items()}


def batch_norm(
    layer: BatchNorm,
    voxels: Voxels,
    params: Mapping[str, jax.Array],
    stats: Stats,
    *,
    running: bool,
    axis_name: str | None = None,
) -> tuple[Voxels, Stats]:
    """Batch norm over the voxels that count, and the running statistics after it.

    Args:
        layer: The layer, of which the arguments are read.
        voxels: The input.
        params: The parameters of `norm_parameter_table`.
        stats: The running statistics before it.
        running: Whether they are applied, and not updated.
        axis_name: Axis of a mesh, along which devices count by their voxels.

    Returns:
        The voxels and the running statistics, which voxels that are none at all leave as they are.

    Raises:
        ValueError: If the voxels do not fit the layer.
    """
    voxels = _normable(layer, voxels, params)
    scale, bias = params.get("scale"), params.get("bias")
    if running:
        y, _, _ = norm.batch_norm(
            voxels, scale, bias, mean=stats.mean, var=stats.var, epsilon=layer.epsilon
        )
        return y, stats
    y, *found = norm.batch_norm(voxels, scale, bias, epsilon=layer.epsilon, axis_name=axis_name)
    count = voxels.num_valid if axis_name is None else lax.psum(voxels.num_valid, axis_name)
    kept = jnp.where(count > 0, layer.momentum, 1)
    moved = [
        (kept * old + (1 - kept) * lax.stop_gradient(new)).astype(old.dtype)
        for old, new in zip(stats, found, strict=True)
    ]
    return y, Stats(*moved)


def layer_norm(layer: Norm, voxels: Voxels, params: Mapping[str, jax.Array]) -> Voxels:
    """Layer norm of each voxel; see `batch_norm` for the arguments."""
    voxels = _normable(layer, voxels, params)
    return norm.layer_norm(voxels, **params, epsilon=layer.epsilon)


def instance_norm(layer: Norm, voxels: Voxels, params: Mapping[str, jax.Array]) -> Voxels:
    """Instance norm of each sample; see `batch_norm` for the arguments."""
    voxels = _normable(layer, voxels, params)
    return norm.instance_norm(voxels, **params, epsilon=layer.epsilon)


def _taps(layer: DepthwiseLayer) -> int:
    """The number of offsets, K."""
    return math.prod(per_axis(layer.kernel_size, "kernel_size", layer.num_spatial_dims))


def _check_dtypes(layer: DepthwiseLayer | Norm) -> None:
    if layer.dtype is not None:
        checked_dtype(layer.dtype, "dtype")
    checked_dtype(layer.param_dtype, "param_dtype")


def _ready(
    layer: DepthwiseLayer, voxels: Voxels, channels: int, params: Mapping[str, jax.Array]
) -> tuple[Voxels, jax.Array]:
    """Voxels and kernel in the dtype of the computation."""
    _check_voxels(voxels, channels)
    if voxels.ndim != layer.num_spatial_dims:
        raise ValueError(
            f"voxels: expected {layer.num_spatial_dims} axes, num_spatial_dims of the layer, got "
            f"{voxels.ndim}"
        )
    voxels = _promoted(layer, voxels, params)
    return voxels, params["kernel"].astype(voxels.features.dtype)


def _normable(layer: Norm, voxels: Voxels, params: Mapping[str, jax.Array]) -> Voxels:
    """Voxels that fit a norm, in the dtype of the computation."""
    _check_voxels(voxels, layer.num_features)
    return _promoted(layer, voxels, params)


def _promoted(
    layer: DepthwiseLayer | Norm, voxels: Voxels, params: Mapping[str, jax.Array]
) -> Voxels:
    """The voxels with features in the dtype of the computation."""
    dtype = layer.dtype
    if dtype is None:
        dtype = jnp.result_type(voxels.features, *params.values())
    return voxels.with_features(voxels.features.astype(dtype))


def _check_voxels(voxels: Voxels, channels: int) -> None:
    if not isinstance(voxels, Voxels):
        raise ValueError(
            f"voxels: expected pallas_kernels.sparse.Voxels, got {type(voxels).__name__}; "
            "from_points, from_coords, from_list and from_dense make them"
        )
    if voxels.features.ndim != 2 or voxels.features.shape[1] != channels:
        raise ValueError(
            f"voxels: expected features [capacity, {channels}], got {voxels.features.shape}"
        )
