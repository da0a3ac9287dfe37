"""Depthwise sparse convolution as a function: validate, choose, call.

`pallas_kernels.oracle.sparse_conv` of as many groups as channels is the definition.
"""

import jax
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels.common.arguments import checked_array
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.sparse.calls import operands, planned
from pallas_kernels.sparse.checks import checked_depthwise
from pallas_kernels.sparse.depthwise import vjp
from pallas_kernels.sparse.depthwise.problem import Problem
from pallas_kernels.sparse.maps import KernelMap
from pallas_kernels.sparse.operators import ALIASES, Implementation

__all__ = ["OPERATOR", "Implementation", "spatially_sparse_depthwise_conv"]

OPERATOR = Operator(
    name="sparse_depthwise_conv",
    package="pallas_kernels.sparse.depthwise",
    implementations=Implementation,
    rule={"tpu": ("xla",), "gpu": ("triton", "xla"), "cpu": ("xla",)},
    directions={"fwd": ("forward",), "bwd": ("input_grad", "weight_grad")},
    argument="{direction}_algo",
    aliases=ALIASES,
    measures_names=True,
)


def spatially_sparse_depthwise_conv(
    in_features: ArrayLike,
    weight: ArrayLike,
    kernel_map: KernelMap,
    num_out_coords: int,
    fwd_algo: Choice = None,
    bwd_algo: Choice = None,
    compute_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Depthwise sparse convolution: `y[u, c] = sum over i of x[stride u + dilation i, c] w[i, c]`.

    Args:
        in_features: x, `[in_capacity, C]`, in the order of the map's input.
        weight: `[K, C]`.
        kernel_map: The map of the convolution, see `pallas_kernels.sparse.kernel_map`.
        num_out_coords: Rows of the output, at most the map's `out_capacity`.
        fwd_algo: Filter on the implementations of the forward pass, as `spatially_sparse_conv`
            takes it; None asks `FLASH_WTCONV_SPARSE_DEPTHWISE_CONV_FWD`.
        bwd_algo: The same for the backward pass.
        compute_dtype: The dtype to compute in; None is that of the features, which the output has.

    Returns:
        `[num_out_coords, C]`, zeros in rows that read nothing.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.sparse import from_coords, kernel_map
        >>> voxels = from_coords([[0, 1], [0, 2]], [[1.0], [10.0]])
        >>> weight = jnp.array([[1.0], [2.0], [3.0]])
        >>> found, out = kernel_map(voxels, 3)
        >>> y = spatially_sparse_depthwise_conv(voxels.features, weight, found, out.capacity)
        >>> y.tolist()
        [[32.0], [21.0]]
    """
    x, w = checked_array(in_features, "in_features"), checked_array(weight, "weight")
    rows = checked_depthwise(x.shape, w.shape, kernel_map, num_out_coords)
    channels = x.shape[1]
    dtype = x.dtype
    x, w = operands(x, w, compute_dtype)
    window = kernel_map.window._replace(groups=channels)
    problem = Problem((1, *x.shape), x.dtype, channels, window)
    plan = planned(OPERATOR, problem, (x, w), fwd_algo, bwd_algo, None)
    return vjp.convolution(plan, x, w, kernel_map)[:rows].astype(dtype)
