"""Sparse layers for flax.nnx; `flash_wtconv_jax.linen` has their twins, with the same parameters.

They map `pallas_kernels.sparse.Voxels` to such.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flash_wtconv_jax.functional import sparse
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import PerAxis
from flash_wtconv_jax.nnx.parameters import Parameterised
from pallas_kernels.common.arguments import hashable
from pallas_kernels.sparse import KernelMap, Voxels, global_pool, pool, unpool
from pallas_kernels.sparse.api import OPERATOR
from pallas_kernels.sparse.depthwise.api import OPERATOR as DEPTHWISE


class SpatiallySparseConv(Parameterised):
    """Sparse convolution of voxels.

    The computation, the parameters (`kernel`, `bias`) and the arguments are those of
    `flash_wtconv_jax.linen.SpatiallySparseConv`, `in_channels`, `out_channels`, `kernel_size`,
    `stride` and `kernel_dilation` in this order or by name, the others by name.

    Args:
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import SparseConv2d
        >>> from pallas_kernels.sparse import from_coords
        >>> voxels = from_coords([[0, 1, 1], [0, 4, 2]], jax.numpy.ones((2, 4)))
        >>> layer = nnx.eval_shape(lambda: SparseConv2d(4, 8, 3, stride=2, rngs=nnx.Rngs(0)))
        >>> y = nnx.eval_shape(lambda layer, voxels: layer(voxels), layer, voxels)
        >>> y.features.shape, y.tensor_stride, layer.kernel.shape
        ((2, 8), (2, 2), (9, 4, 8))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        kernel_dilation: PerAxis = 1,
        *,
        groups: int = 1,
        bias: bool = True,
        generative: bool = False,
        transposed: bool = False,
        stride_mode: str = "stride_only",
        fwd_algo: ImplementationLike = None,
        bwd_algo: ImplementationLike = None,
        stride_reduce: str = "max",
        output_rule: str = "floor",
        padding: PerAxis | None = None,
        out_capacity: int | None = None,
        num_spatial_dims: int = 3,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 - immutable
        bias_init: Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = hashable(kernel_size)
        self.stride = hashable(stride)
        self.kernel_dilation = hashable(kernel_dilation)
        self.groups = groups
        self.generative = generative
        self.transposed = transposed
        self.stride_mode = stride_mode
        self.fwd_algo = hashable(fwd_algo)
        self.bwd_algo = hashable(bwd_algo)
        self.stride_reduce = stride_reduce
        self.output_rule = output_rule
        self.padding = hashable(padding)
        self.out_capacity = out_capacity
        self.num_spatial_dims = num_spatial_dims
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        counts = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
        sparse.check_layer(OPERATOR, self, **counts)
        table = sparse.parameter_table(
            self, bias=bias, kernel_init=kernel_init, bias_init=bias_init
        )
        self._make(table, rngs)

    def __call__(
        self,
        voxels: Voxels,
        output_voxels: Voxels | None = None,
        kernel_map: KernelMap | None = None,
    ) -> Voxels:
        """Apply the convolution.

        Args:
            voxels: The input.
            output_voxels: The voxels of the output, whose features do not count; a transposed
                convolution that is not generative needs them.
            kernel_map: The map that `pallas_kernels.sparse.kernel_map` returned for these voxels
                and this kernel; where the output's voxels are not the input's, with the
                `output_voxels` beside it. None makes it, or finds it within `sparse_maps()`.

        Returns:
            The voxels of the output, with `out_channels` features.

        Raises:
            ValueError: If the voxels do not fit, naming what.
            NotImplementedError: If a named algorithm cannot run here; it says why.
        """
        return sparse.apply(self, voxels, self._params(), output_voxels, kernel_map)


class SparseConv1d(SpatiallySparseConv):
    """Sparse convolution of voxels on a line; arguments as of `SpatiallySparseConv`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, num_spatial_dims=1, **options)


class SparseConv2d(SpatiallySparseConv):
    """Sparse convolution of voxels in a plane; arguments as of `SpatiallySparseConv`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, num_spatial_dims=2, **options)


class SparseConv3d(SpatiallySparseConv):
    """Sparse convolution of voxels in space; arguments as of `SpatiallySparseConv`."""


class SparseDepthwiseConv(Parameterised):
    """Depthwise sparse convolution of voxels: channels never mix.

    The computation, the parameters (`kernel`, `bias`) and the arguments are those of
    `flash_wtconv_jax.linen.SparseDepthwiseConv`, `channels`, `kernel_size`, `stride` and
    `kernel_dilation` in this order or by name, the others by name.

    Args:
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import SparseDepthwiseConv
        >>> layer = nnx.eval_shape(lambda: SparseDepthwiseConv(4, kernel_size=3, rngs=nnx.Rngs(0)))
        >>> layer.kernel.shape
        (27, 4)
    """

    def __init__(
        self,
        channels: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        kernel_dilation: PerAxis = 1,
        *,
        bias: bool = True,
        generative: bool = False,
        transposed: bool = False,
        stride_mode: str = "stride_only",
        fwd_algo: ImplementationLike = None,
        bwd_algo: ImplementationLike = None,
        stride_reduce: str = "max",
        output_rule: str = "floor",
        padding: PerAxis | None = None,
        out_capacity: int | None = None,
        num_spatial_dims: int = 3,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 - immutable
        bias_init: Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ) -> None:
        self.channels = channels
        self.kernel_size = hashable(kernel_size)
        self.stride = hashable(stride)
        self.kernel_dilation = hashable(kernel_dilation)
        self.generative = generative
        self.transposed = transposed
        self.stride_mode = stride_mode
        self.fwd_algo = hashable(fwd_algo)
        self.bwd_algo = hashable(bwd_algo)
        self.stride_reduce = stride_reduce
        self.output_rule = output_rule
        self.padding = hashable(padding)
        self.out_capacity = out_capacity
        self.num_spatial_dims = num_spatial_dims
        self.dtype = dtype
        self.param_dtype = param_dtype
        sparse.check_layer(DEPTHWISE, self, channels=channels)
        table = sparse.depthwise_parameter_table(
            self, channels, bias=bias, kernel_init=kernel_init, bias_init=bias_init
        )
        self._make(table, rngs)

    def __call__(
        self,
        voxels: Voxels,
        output_voxels: Voxels | None = None,
        kernel_map: KernelMap | None = None,
    ) -> Voxels:
        """Apply the convolution; see `SpatiallySparseConv` for arguments and errors."""
        return sparse.apply_depthwise(self, voxels, self._params(), output_voxels, kernel_map)


class _Norm(Parameterised):
    """A norm, whose parameters are `scale [C]` and `bias [C]`."""

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-5,
        use_bias: bool = True,
        use_scale: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self._make(sparse.norm_parameter_table(self, scale=use_scale, bias=use_bias), rngs)


class SparseBatchNorm(_Norm):
    """Batch norm over the voxels that count: `flax.nnx.BatchNorm` of voxels.

    The arguments are those of `flash_wtconv_jax.linen.SparseBatchNorm`, `num_features` first, the
    others by name; the running statistics are `mean` and `var`. `model.eval()` and `model.train()`
    set `use_running_average`.

    Args:
        rngs: Source of the keys for the initialisers, as for any nnx layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from flax import nnx
        >>> from flash_wtconv_jax.nnx import SparseBatchNorm
        >>> layer = nnx.eval_shape(lambda: SparseBatchNorm(4, rngs=nnx.Rngs(0)))
        >>> layer.scale.shape, layer.mean.shape
        ((4,), (4,))
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        use_bias: bool = True,
        use_scale: bool = True,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            num_features,
            epsilon=epsilon,
            use_bias=use_bias,
            use_scale=use_scale,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.axis_name = axis_name
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((num_features,), jnp.float32))

    def __call__(self, voxels: Voxels, use_running_average: bool | None = None) -> Voxels:
        """Normalise each channel.

        Args:
            voxels: The input.
            use_running_average: Whether the running statistics are applied, and not updated; None
                takes the layer's.

        Raises:
            ValueError: If the voxels do not fit.
        """
        running = self.use_running_average if use_running_average is None else use_running_average
        stats = sparse.Stats(self.mean[...], self.var[...])
        y, stats = sparse.batch_norm(
            self, voxels, self._params(), stats, running=running, axis_name=self.axis_name
        )
        if not running:
            self.mean[...], self.var[...] = stats
        return y


class SparseLayerNorm(_Norm):
    """Layer norm of each voxel over its channels; arguments as of `SparseBatchNorm`."""

    def __init__(self, num_features: int, *, epsilon: float = 1e-6, **options: Any) -> None:
        super().__init__(num_features, epsilon=epsilon, **options)

    def __call__(self, voxels: Voxels) -> Voxels:
        """Normalise each voxel."""
        return sparse.layer_norm(self, voxels, self._params())


class SparseInstanceNorm(_Norm):
    """Batch norm of each sample by itself; arguments as of `SparseBatchNorm`."""

    def __call__(self, voxels: Voxels) -> Voxels:
        """Normalise each channel of each sample."""
        return sparse.instance_norm(self, voxels, self._params())


class SparsePool(nnx.Module):
    """Pooling of voxels; arguments as `pallas_kernels.sparse.pool` takes them."""

    def __init__(
        self,
        kernel_size: PerAxis,
        stride: PerAxis | None = None,
        *,
        padding: PerAxis = 0,
        reduce: str = "max",
        out_capacity: int | None = None,
    ) -> None:
        self.kernel_size = hashable(kernel_size)
        self.stride = hashable(stride)
        self.padding = hashable(padding)
        self.reduce = reduce
        self.out_capacity = out_capacity

    def __call__(self, voxels: Voxels) -> Voxels:
        """Pool each window that holds a voxel."""
        return pool(
            voxels,
            self.kernel_size,
            self.stride,
            padding=self.padding,
            reduce=self.reduce,
            out_capacity=self.out_capacity,
        )


class SparseUnpool(nnx.Module):
    """The inverse of `SparsePool`, by the same windows."""

    def __init__(
        self, kernel_size: PerAxis, stride: PerAxis | None = None, *, padding: PerAxis = 0
    ) -> None:
        self.kernel_size = hashable(kernel_size)
        self.stride = hashable(stride)
        self.padding = hashable(padding)

    def __call__(self, voxels: Voxels, output_voxels: Voxels) -> Voxels:
        """Give each of `output_voxels` the sum of the windows that it is in."""
        return unpool(voxels, output_voxels, self.kernel_size, self.stride, padding=self.padding)


class SparseGlobalPool(nnx.Module):
    """The "mean", "max" or "sum" of each sample."""

    def __init__(self, reduce: str = "mean") -> None:
        self.reduce = reduce

    def __call__(self, voxels: Voxels) -> jax.Array:
        """Reduce voxels to `[batch_size, C]`."""
        return global_pool(voxels, reduce=self.reduce)
