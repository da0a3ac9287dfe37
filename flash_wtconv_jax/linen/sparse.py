"""Sparse layers for flax.linen; `flash_wtconv_jax.nnx` has their twins, with the same parameters.

They map `pallas_kernels.sparse.Voxels` to such.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flash_wtconv_jax.functional import sparse
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike
from flash_wtconv_jax.functional.conv2d import PerAxis
from flash_wtconv_jax.functional.wtconv import Parameter
from flash_wtconv_jax.linen.parameters import parameters
from pallas_kernels.sparse import KernelMap, Voxels, global_pool, pool, unpool
from pallas_kernels.sparse.api import OPERATOR
from pallas_kernels.sparse.depthwise.api import OPERATOR as DEPTHWISE


class SpatiallySparseConv(nn.Module):
    """Sparse convolution of voxels.

    The parameters, with K offsets in all, are `kernel [K, in_channels, out_channels]`, or with
    groups `[K, G, in_channels / G, out_channels / G]`, and `bias [out_channels]`. The offsets are
    row-major, the first axis slowest.

    Attributes:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Offsets along each axis, an int or one for each.
        stride: The stride, likewise. At stride 1 the output has the input's voxels.
        kernel_dilation: Distance of the voxels that neighbouring offsets read, likewise.
        groups: Groups that channels of input and output fall into, each convolved apart.
        bias: Whether there is a bias.
        generative: Whether the output has every voxel that reads one of the input.
        transposed: Whether inputs and outputs change places.
        stride_mode: "stride_only", or "reduce_and_stride", which pools onto cells of `stride`,
            then convolves at stride 1.
        fwd_algo: Algorithms of the forward pass to choose from: a name, names or "auto", see
            `pallas_kernels.sparse.spatially_sparse_conv`; None leaves the choice to a rule.
        bwd_algo: Those of the backward pass.
        stride_reduce: What "reduce_and_stride" makes of a cell: "max", "mean" or "sum".
        output_rule: "floor", or "full", by which a strided output has every voxel that a dense
            convolution has.
        padding: With "full", and transposed: the first offset is minus this; None centres odd
            sizes.
        out_capacity: Rows of the output; see `pallas_kernels.sparse.kernel_map`.
        num_spatial_dims: Axes of the voxels, 1, 2 or 3.
        dtype: Dtype of the computation and the output; None promotes input and parameters.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`; None multiplies in full float32 on every device.
        kernel_init: Initialiser of the kernel, called with `[K, in_channels / groups,
            out_channels]`.
        bias_init: Initialiser of the bias.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax.linen import SparseConv2d
        >>> from pallas_kernels.sparse import from_coords
        >>> voxels = from_coords([[0, 1, 1], [0, 4, 2]], jax.numpy.ones((2, 4)))
        >>> layer = SparseConv2d(4, 8, kernel_size=3, stride=2)
        >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), voxels)
        >>> y.features.shape, y.tensor_stride, variables["params"]["kernel"].shape
        ((2, 8), (2, 2), (9, 4, 8))
    """

    in_channels: int
    out_channels: int
    kernel_size: PerAxis
    stride: PerAxis = 1
    kernel_dilation: PerAxis = 1
    groups: int = 1
    bias: bool = True
    generative: bool = False
    transposed: bool = False
    stride_mode: str = "stride_only"
    fwd_algo: ImplementationLike = None
    bwd_algo: ImplementationLike = None
    stride_reduce: str = "max"
    output_rule: str = "floor"
    padding: PerAxis | None = None
    out_capacity: int | None = None
    num_spatial_dims: int = 3
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("in_channels", "out_channels", "groups")}
        sparse.check_layer(OPERATOR, self, **counts)
        self._table()
        super().__post_init__()

    def _table(self) -> dict[str, Parameter]:
        return sparse.parameter_table(
            self, bias=self.bias, kernel_init=self.kernel_init, bias_init=self.bias_init
        )

    @nn.compact
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
        params = parameters(self, self._table())
        return sparse.apply(self, voxels, params, output_voxels, kernel_map)


class SparseConv1d(SpatiallySparseConv):
    """Sparse convolution of voxels on a line; attributes as of `SpatiallySparseConv`."""

    num_spatial_dims: int = 1


class SparseConv2d(SpatiallySparseConv):
    """Sparse convolution of voxels in a plane; attributes as of `SpatiallySparseConv`."""

    num_spatial_dims: int = 2


class SparseConv3d(SpatiallySparseConv):
    """Sparse convolution of voxels in space; attributes as of `SpatiallySparseConv`."""


class SparseDepthwiseConv(nn.Module):
    """Depthwise sparse convolution of voxels: channels never mix.

    The parameters are `kernel [K, channels]` and `bias [channels]`. The other attributes are those
    of `SpatiallySparseConv`, whose `groups` and `precision` it has not.

    Attributes:
        channels: Channels of input and output.
        kernel_size: Offsets along each axis, an int or one for each.
        kernel_init: Initialiser of the kernel, called with `[K, 1, channels]`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> from flash_wtconv_jax.linen import SparseDepthwiseConv
        >>> from pallas_kernels.sparse import from_coords
        >>> voxels = from_coords([[0, 1, 1], [0, 4, 2]], jax.numpy.ones((2, 4)))
        >>> layer = SparseDepthwiseConv(4, kernel_size=3, num_spatial_dims=2)
        >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), voxels)
        >>> y.features.shape, variables["params"]["kernel"].shape
        ((2, 4), (9, 4))
    """

    channels: int
    kernel_size: PerAxis
    stride: PerAxis = 1
    kernel_dilation: PerAxis = 1
    bias: bool = True
    generative: bool = False
    transposed: bool = False
    stride_mode: str = "stride_only"
    fwd_algo: ImplementationLike = None
    bwd_algo: ImplementationLike = None
    stride_reduce: str = "max"
    output_rule: str = "floor"
    padding: PerAxis | None = None
    out_capacity: int | None = None
    num_spatial_dims: int = 3
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    def __post_init__(self) -> None:
        sparse.check_layer(DEPTHWISE, self, channels=self.channels)
        self._table()
        super().__post_init__()

    def _table(self) -> dict[str, Parameter]:
        return sparse.depthwise_parameter_table(
            self,
            self.channels,
            bias=self.bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )

    @nn.compact
    def __call__(
        self,
        voxels: Voxels,
        output_voxels: Voxels | None = None,
        kernel_map: KernelMap | None = None,
    ) -> Voxels:
        """Apply the convolution; see `SpatiallySparseConv` for arguments and errors."""
        params = parameters(self, self._table())
        return sparse.apply_depthwise(self, voxels, params, output_voxels, kernel_map)


class SparseBatchNorm(nn.Module):
    """Batch norm over the voxels that count: `flax.linen.BatchNorm` of voxels.

    Parameters are `scale` and `bias`, running statistics `mean` and `var` of the collection
    `batch_stats`. A batch without voxels leaves the statistics as they are.

    Attributes:
        num_features: Channels of the input.
        use_running_average: Whether the running statistics are applied, and not updated; where it
            is None the call says so.
        momentum: What stays of the running statistics at each update.
        epsilon: Is added to the variance.
        use_bias: Whether there is a bias.
        use_scale: Whether there is a scale.
        axis_name: Axis of a mesh: statistics are of the voxels of all devices along it, each as
            much as any other.
        dtype: Dtype of the output; None promotes input and parameters.
        param_dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_features: int
    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    axis_name: str | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        sparse.norm_parameter_table(self, scale=self.use_scale, bias=self.use_bias)
        super().__post_init__()

    @nn.compact
    def __call__(self, voxels: Voxels, use_running_average: bool | None = None) -> Voxels:
        """Normalise each channel.

        Args:
            voxels: The input.
            use_running_average: As the attribute; one of the two must be given.

        Raises:
            ValueError: If the voxels do not fit.
        """
        running = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape = (self.num_features,)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        table = sparse.norm_parameter_table(self, scale=self.use_scale, bias=self.use_bias)
        y, stats = sparse.batch_norm(
            self,
            voxels,
            parameters(self, table),
            sparse.Stats(mean.value, var.value),
            running=running,
            # Outside of the axis, where layers are initialised, it has no name.
            axis_name=None if self.is_initializing() else self.axis_name,
        )
        if not running and not self.is_initializing():
            mean.value, var.value = stats
        return y


class _Norm(nn.Module):
    """A norm without running statistics."""

    num_features: int
    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        self._table()
        super().__post_init__()

    def _table(self) -> dict[str, Parameter]:
        return sparse.norm_parameter_table(self, scale=self.use_scale, bias=self.use_bias)


class SparseLayerNorm(_Norm):
    """Layer norm of each voxel over its channels; attributes as of `SparseBatchNorm`."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, voxels: Voxels) -> Voxels:
        """Normalise each voxel."""
        return sparse.layer_norm(self, voxels, parameters(self, self._table()))


class SparseInstanceNorm(_Norm):
    """Batch norm of each sample by itself; attributes as of `SparseBatchNorm`."""

    @nn.compact
    def __call__(self, voxels: Voxels) -> Voxels:
        """Normalise each channel of each sample."""
        return sparse.instance_norm(self, voxels, parameters(self, self._table()))


class SparsePool(nn.Module):
    """Pooling of voxels; attributes as `pallas_kernels.sparse.pool` takes them."""

    kernel_size: PerAxis
    stride: PerAxis | None = None
    padding: PerAxis = 0
    reduce: str = "max"
    out_capacity: int | None = None

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


class SparseUnpool(nn.Module):
    """The inverse of `SparsePool`, by the same windows."""

    kernel_size: PerAxis
    stride: PerAxis | None = None
    padding: PerAxis = 0

    def __call__(self, voxels: Voxels, output_voxels: Voxels) -> Voxels:
        """Give each of `output_voxels` the sum of the windows that it is in."""
        return unpool(voxels, output_voxels, self.kernel_size, self.stride, padding=self.padding)


class SparseGlobalPool(nn.Module):
    """The "mean", "max" or "sum" of each sample."""

    reduce: str = "mean"

    def __call__(self, voxels: Voxels) -> jax.Array:
        """Reduce voxels to `[batch_size, C]`."""
        return global_pool(voxels, reduce=self.reduce)
