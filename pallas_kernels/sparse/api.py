"""Sparse convolution as functions: validate, choose, call.

`pallas_kernels.oracle.sparse_conv` is the definition.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels.common.arguments import (
    Precision,
    checked_array,
    checked_integer,
    checked_precision,
)
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.dispatch import Choice
from pallas_kernels.sparse import maps, vjp
from pallas_kernels.sparse.calls import operands, planned
from pallas_kernels.sparse.checks import (
    POOL_REDUCTIONS,
    STRIDE_MODES,
    check_map,
    check_name,
    check_pools,
    checked_weight,
    checked_window,
)
from pallas_kernels.sparse.depthwise.api import spatially_sparse_depthwise_conv
from pallas_kernels.sparse.operators import OPERATOR, Implementation
from pallas_kernels.sparse.pooling import pool
from pallas_kernels.sparse.problem import Problem
from pallas_kernels.sparse.voxels import Voxels

__all__ = ["OPERATOR", "Implementation", "spatially_sparse_conv", "spatially_sparse_depthwise_conv"]


def spatially_sparse_conv(
    voxels: Voxels,
    weight: ArrayLike,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    bias: ArrayLike | None = None,
    groups: int = 1,
    generative: bool = False,
    transposed: bool = False,
    output_voxels: Voxels | None = None,
    stride_mode: str = "stride_only",
    stride_reduce: str = "max",
    output_rule: str = "floor",
    padding: int | Sequence[int] | None = None,
    fwd_algo: Choice = None,
    bwd_algo: Choice = None,
    kernel_map: maps.KernelMap | None = None,
    out_capacity: int | None = None,
    compute_dtype: DTypeLike | None = None,
    precision: Precision = None,
) -> Voxels:
    """Sparse convolution (cross-correlation): `y[u] = sum over i of x[stride u + dilation i] w[i]`.

    Offsets i are row-major, the first axis slowest; those of an odd size are centred, those of an
    even one begin with 0. A voxel that is not there is zero. Sums run in float32 or better, in an
    order that is the same every time. Gradients can be differentiated again in reverse mode.

    Args:
        voxels: The input.
        weight: `[K, C_in, C_out]`, with groups `[K, G, C_in / G, C_out / G]`.
        kernel_size: Offsets along each axis, an int or one for each; K in all.
        stride: The stride, likewise. At stride 1 the output has the input's voxels, in the same
            order; else it has `floor(in / stride)`, sorted, see `output_rule`.
        kernel_dilation: Distance of the voxels that neighbouring offsets read, likewise.
        bias: `[C_out]`, any floating dtype.
        groups: Channels and features fall into so many groups, each convolved apart.
        generative: The output has every voxel that reads one of the input; transposed: every voxel
            `stride in + dilation i`.
        transposed: Inputs and outputs change places: voxel p is read by output
            `stride p + dilation i`. It needs `output_voxels`, or `generative`.
        output_voxels: The voxels of the output, whose features do not count.
        stride_mode: "stride_only", or "reduce_and_stride", which makes one voxel of those of each
            cell of `stride`, then convolves at stride 1.
        stride_reduce: What it makes of them: "max", "mean" or "sum".
        output_rule: "floor", or "full": the output has every voxel that reads one of the input, as
            a dense convolution has.
        padding: With "full" output u reads `stride u - padding + dilation i`, i from 0 on, as a
            dense convolution does; None centres odd sizes.
        fwd_algo: Filter on the implementations of the forward pass: a name, a sequence of names,
            or "auto" for all. What it names is measured once with all its parameters, and
            remembered. None takes the environment's (`FLASH_WTCONV_SPARSE_CONV_FWD`), or the
            device's rule, and measures nothing.
        bwd_algo: The same for the backward pass (`FLASH_WTCONV_SPARSE_CONV_BWD`).
        kernel_map: The map that `kernel_map` returned for these voxels and this kernel; where
            the output's voxels are not the input's, with the `output_voxels` beside it.
        out_capacity: Rows of the output, see `kernel_map`.
        compute_dtype: The dtype to compute in; None is that of the features, which the output has.
        precision: The precision of float32 products on matrix units; None is full float32.

    Returns:
        The voxels of the output.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.sparse import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2], [0, 6]], [[1.0], [10.0], [100.0]])
        >>> weight = jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1)
        >>> spatially_sparse_conv(voxels, weight, 3).features[:3, 0].tolist()
        [32.0, 21.0, 200.0]
    """
    x, w = checked_array(voxels.features, "voxels.features"), checked_array(weight, "weight")
    dtype = x.dtype
    check_name(stride_mode, "stride_mode", STRIDE_MODES)
    check_name(stride_reduce, "stride_reduce", POOL_REDUCTIONS)
    window = checked_window(kernel_size, stride, kernel_dilation, voxels.ndim)
    window = window._replace(
        groups=checked_integer(groups, "groups", least=1), transposed=transposed
    )
    shape = checked_weight(w.shape, window, x.shape[1])
    w = w if w.ndim == 4 else w[:, None]
    features = window.groups * shape[3]
    if bias is not None:
        bias = checked_array(bias, "bias")
        if bias.shape != (features,):
            raise ValueError(f"bias: expected shape {(features,)}, got {bias.shape}")
    checked = checked_precision(precision)
    x, w = operands(x, w, compute_dtype)
    if stride_mode == "reduce_and_stride" and set(window.stride) != {1}:
        check_pools(transposed, output_voxels)
        voxels = pool(voxels.with_features(x), window.stride, reduce=stride_reduce)
        x, window = voxels.features, window._replace(stride=(1,) * voxels.ndim)
    if kernel_map is None:
        kernel_map, out = maps.kernel_map(
            voxels,
            window.kernel_size,
            window.stride,
            window.dilation,
            transposed=transposed,
            generative=generative,
            output_voxels=output_voxels,
            output_rule=output_rule,
            padding=padding,
            out_capacity=out_capacity,
        )
    else:
        expands = generative or output_rule == "full"
        check_map(kernel_map, window, voxels, output_voxels, expands)
        out = output_voxels or voxels
    problem = Problem((voxels.batch_size, *x.shape), x.dtype, features, window)
    plan = planned(OPERATOR, problem, (x, w), fwd_algo, bwd_algo, checked)
    y = vjp.convolution(plan, x, w, kernel_map).astype(dtype)
    if bias is not None:
        # The bias' gradient is a sum over all rows, which 16 bits are too few for.
        wide = accumulation_dtype(y.dtype)
        biased = (y.astype(wide) + bias.astype(wide)).astype(y.dtype)
        y = jnp.where(out.valid[:, None], biased, 0)
    return out.with_features(y)
