"""Sparse convolutions as functions: validate, choose, call.

`pallas_kernels.oracle.sparse_conv` is the definition.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pallas_kernels.common.integers import checked_integer
from pallas_kernels.dispatch import Choice
from pallas_kernels.sparse.checks import (
    POOL_REDUCTIONS,
    STRIDE_MODES,
    check_map,
    check_name,
    check_pools,
    checked_depthwise,
    checked_weight,
    checked_window,
)
from pallas_kernels.sparse.problem import Window
from torch_bridge.runtime import calls
from torch_bridge.sparse import maps, ops
from torch_bridge.sparse.operators import Implementation
from torch_bridge.sparse.pooling import pool
from torch_bridge.sparse.voxels import FLOATING, Voxels, floating

__all__ = ["Implementation", "spatially_sparse_conv", "spatially_sparse_depthwise_conv"]

_PRECISIONS = {"highest": "ieee", "high": "tf32x3", "default": "tf32"}
"""Triton's names for precisions of float32 products, by JAX's."""


def spatially_sparse_conv(
    voxels: Voxels,
    weight: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    bias: Tensor | None = None,
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
    compute_dtype: torch.dtype | None = None,
    precision: str | None = None,
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
        fwd_algo: Filter on the implementations of the forward pass, "triton" and "eager": a name,
            a sequence of names, or "auto" for all. What it names is measured once with all its
            parameters, and remembered. None takes the environment's
            (`FLASH_WTCONV_TORCH_SPARSE_CONV_FWD`), or the device's rule, and measures nothing.
        bwd_algo: The same for the backward pass (`FLASH_WTCONV_TORCH_SPARSE_CONV_BWD`).
        kernel_map: The map that `kernel_map` returned for these voxels and this kernel; where
            the output's voxels are not the input's, with the `output_voxels` beside it.
        out_capacity: Rows of the output, see `kernel_map`.
        compute_dtype: The dtype to compute in; None is that of the features, which the output has.
            In `torch.autocast` None is autocast's dtype, which the output then has too.
        precision: The precision of Triton's float32 products: None or "highest" is full float32,
            "high" three products of 10 bits, "default" one. Plain PyTorch asks
            `torch.set_float32_matmul_precision`.

    Returns:
        The voxels of the output.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> from torch_bridge.sparse import from_coords
        >>> voxels = from_coords([[0, 1], [0, 2], [0, 6]], [[1.0], [10.0], [100.0]])
        >>> weight = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
        >>> spatially_sparse_conv(voxels, weight, 3).features[:3, 0].tolist()
        [32.0, 21.0, 200.0]
    """
    if not isinstance(voxels, Voxels):
        raise ValueError(f"voxels: expected torch_bridge.Voxels, got {type(voxels).__name__}")
    x, w = floating(voxels.features, "voxels.features"), floating(weight, "weight")
    check_name(stride_mode, "stride_mode", STRIDE_MODES)
    check_name(stride_reduce, "stride_reduce", POOL_REDUCTIONS)
    precision = "highest" if precision is None else precision
    check_name(precision, "precision", tuple(_PRECISIONS))
    window = checked_window(kernel_size, stride, kernel_dilation, voxels.ndim)
    window = window._replace(
        groups=checked_integer(groups, "groups", least=1), transposed=bool(transposed)
    )
    shape = checked_weight(w.shape, window, x.shape[1])
    features = window.groups * shape[3]
    if bias is not None:
        bias = floating(bias, "bias")
        if bias.shape != (features,):
            raise ValueError(f"bias: expected shape {(features,)}, got {tuple(bias.shape)}")
    x, w, dtype = _operands(x, w.reshape(shape), compute_dtype)
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
    rest = features, window, voxels.batch_size, _PRECISIONS[precision]
    y = _convolved(x, w, kernel_map, fwd_algo, bwd_algo, *rest).to(dtype)
    if bias is not None:
        y = (y + bias.to(y.dtype)).masked_fill(~out.valid[:, None], 0)
    return out.with_features(y)


def spatially_sparse_depthwise_conv(
    in_features: Tensor,
    weight: Tensor,
    kernel_map: maps.KernelMap,
    num_out_coords: int,
    fwd_algo: Choice = None,
    bwd_algo: Choice = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Depthwise sparse convolution: `y[u, c] = sum over i of x[stride u + dilation i, c] w[i, c]`.

    Args:
        in_features: x, `[in_capacity, C]`, in the order of the map's input.
        weight: `[K, C]`.
        kernel_map: The map of the convolution, see `torch_bridge.kernel_map`.
        num_out_coords: Rows of the output, at most the map's `out_capacity`.
        fwd_algo: Filter on the implementations of the forward pass, as `spatially_sparse_conv`
            takes it; None asks `FLASH_WTCONV_TORCH_SPARSE_DEPTHWISE_CONV_FWD`.
        bwd_algo: The same for the backward pass.
        compute_dtype: The dtype to compute in; None is that of the features, which the output has,
            or `torch.autocast`'s.

    Returns:
        `[num_out_coords, C]`, zeros in rows that read nothing.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> from torch_bridge.sparse import from_coords, kernel_map
        >>> voxels = from_coords([[0, 1], [0, 2]], [[1.0], [10.0]])
        >>> weight = torch.tensor([[1.0], [2.0], [3.0]])
        >>> found, out = kernel_map(voxels, 3)
        >>> spatially_sparse_depthwise_conv(voxels.features, weight, found, out.capacity).tolist()
        [[32.0], [21.0]]
    """
    x, w = floating(in_features, "in_features"), floating(weight, "weight")
    if not isinstance(kernel_map, maps.KernelMap):
        raise ValueError(
            f"kernel_map: expected a torch_bridge.KernelMap, got {type(kernel_map).__name__}"
        )
    rows = checked_depthwise(x.shape, w.shape, kernel_map, num_out_coords)
    channels = x.shape[1]
    x, w, dtype = _operands(x, w, compute_dtype)
    window = kernel_map.window._replace(groups=channels)
    y = _convolved(x, w, kernel_map, fwd_algo, bwd_algo, channels, window, 1, "ieee")
    return y[:rows].to(dtype)


def _operands(
    x: Tensor, w: Tensor, compute_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Features and weights in the dtype that a call computes in, and the dtype of its output.

    Raises:
        ValueError: No such dtype, or none is given and the two differ; or they are apart.
    """
    if x.device != w.device:
        raise ValueError(f"weight: is on {w.device}, expected {x.device}, where the features are")
    dtype = x.dtype
    if compute_dtype is None:
        casts = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if casts and torch.float64 not in (dtype, w.dtype):
            dtype = torch.get_autocast_dtype(x.device.type)
            return x.to(dtype), w.to(dtype), dtype
        if dtype != w.dtype:
            raise ValueError(
                f"weight: expected the features' dtype, {dtype}, got {w.dtype}; cast one of them, "
                "or give compute_dtype="
            )
        return x, w, dtype
    if compute_dtype not in FLOATING:
        raise ValueError(
            f"compute_dtype={compute_dtype!r}: expected one of {', '.join(map(str, FLOATING))}"
        )
    return x.to(compute_dtype), w.to(compute_dtype), dtype


def _convolved(
    x: Tensor,
    w: Tensor,
    found: maps.KernelMap,
    fwd_algo: Choice,
    bwd_algo: Choice,
    features: int,
    window: Window,
    batch_size: int,
    precision: str,
) -> Tensor:
    """The convolution by what is picked for it."""
    (capacity, channels), told = calls.known(x)
    picked = ops.pick(
        fwd_algo,
        bwd_algo,
        x.device,
        (calls.number(batch_size), capacity, channels),
        x.dtype,
        calls.number(features),
        tuple(window._replace(groups=calls.number(window.groups))),
        w.ndim == 2,
        precision,
        told is not None,
        torch.is_grad_enabled() and (x.requires_grad or w.requires_grad),
    )
    return ops.convolution(x, w, found, precision, picked)
