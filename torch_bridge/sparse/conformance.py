"""PyTorch computes the cases of both sparse convolutions, for the tests and `check`."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flash_wtconv_jax.checkpoints.tensors import to_array, to_tensors
from pallas_kernels.dispatch import Choice
from pallas_kernels.sparse.cases import Case, PerAxis
from pallas_kernels.sparse.checks import checked_window, per_axis
from pallas_kernels.sparse.depthwise.cases import Case as DepthwiseCase
from torch_bridge.runtime.conformance import CPU
from torch_bridge.runtime.conformance import refusal as refused
from torch_bridge.sparse import ops
from torch_bridge.sparse.api import spatially_sparse_conv, spatially_sparse_depthwise_conv
from torch_bridge.sparse.maps import kernel_map
from torch_bridge.sparse.voxels import Voxels

Layer = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""A function of coordinates, x, w and the bias: y and its coordinates."""


def refusal(case: Case, implementation: str, device: torch.device) -> str | None:
    """The reason why an implementation does not take a case on a device, None if it does.

    Example:
        >>> refusal(Case((5,), 6, 2, 3, ndim=1), "eager", CPU)
    """
    window = checked_window(case.kernel_size, case.stride, case.dilation, case.ndim)
    window = window._replace(groups=case.groups, transposed=case.transposed)
    shape, dtype = (len(case.voxels), case.capacity(), case.channels), getattr(torch, case.dtype)
    call = shape, dtype, case.features, tuple(window), isinstance(case, DepthwiseCase)
    return refused(case, implementation, device, partial(ops.pick, implementation), *call)


def computed(
    case: Case, implementation: Choice, device: torch.device = CPU
) -> dict[str, np.ndarray]:
    """Output, its coordinates, and gradients of a case by one implementation.

    Args:
        case: What is computed, regular or depthwise.
        implementation: The filter on implementations, of both directions.
        device: Where it is computed.

    Returns:
        Arrays by the names of `pallas_kernels.common.conformance`.

    Example:
        >>> sorted(computed(Case((5,), 6, 2, 3, ndim=1), "eager"))
        ['coords', 'dw', 'dx', 'y']
    """
    algorithms = implementation, implementation

    def regular(coords: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        given, onto = voxels(case, coords, x)
        out = spatially_sparse_conv(
            given,
            w,
            bias=bias,
            output_voxels=onto,
            fwd_algo=implementation,
            bwd_algo=implementation,
            **case.arguments,
        )
        return out.features, out.coords

    def depthwise(
        coords: Tensor, x: Tensor, w: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given, onto = voxels(case, coords, x)
        sizes = case.kernel_size, case.stride, case.dilation
        found, out = kernel_map(given, *sizes, transposed=case.transposed, output_voxels=onto)
        return spatially_sparse_depthwise_conv(x, w, found, out.capacity, *algorithms), out.coords

    layer = depthwise if isinstance(case, DepthwiseCase) else regular
    return _with_gradients(case, layer, device)


def baseline(case: Case, device: torch.device = CPU) -> dict[str, np.ndarray]:
    """The same in plain PyTorch, every array in the case's dtype: gather, multiply, add up.

    Args:
        case: What is computed.
        device: Where it is computed.
    """
    pairs, outputs = case.pairs(), case.outputs()

    def layer(coords: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        w = w.reshape(case.weight_shape)
        if case.pools:
            x = _pooled(x, torch.tensor(case.cells(), device=device), case.stride_reduce)
        y = x.new_zeros((len(outputs), case.features))
        for (read, wanted), taps in zip(pairs, w, strict=True):
            index = torch.tensor(read, dtype=torch.int64, device=device)
            gathered = x[index].unflatten(1, taps.shape[:2])
            added = torch.einsum("lgc,gcf->lgf", gathered, taps).flatten(1)
            y = y.index_add(0, torch.tensor(wanted, dtype=torch.int64, device=device), added)
        y = y if bias is None else y + bias.to(y.dtype)
        return y, torch.tensor(outputs, dtype=torch.int32, device=device)

    return _with_gradients(case, layer, device)


def voxels(
    case: Case, coords: Tensor | np.ndarray, x: Tensor | np.ndarray
) -> tuple[Voxels, Voxels | None]:
    """The voxels of a case's arrays, and those that its output is given, if it is.

    Example:
        >>> case = Case((5,), 6, 2, 3, ndim=1)
        >>> given, onto = voxels(case, *case.drawn()[:2])
        >>> given.num_valid.item(), onto
        (5, None)
    """
    coords, x = (
        value if isinstance(value, Tensor) else to_tensors({"": value})[""] for value in (coords, x)
    )
    given = _of_first(case, coords, x, len(case.inputs()), case.tensor_stride)
    if not case.onto:
        return given, None
    drawn = case.sites()
    places = torch.full_like(coords, -1)
    places[: len(drawn)] = torch.tensor(drawn, device=coords.device)
    return given, _of_first(case, places, x[:, :0], len(drawn), 1)


def _of_first(case: Case, coords: Tensor, x: Tensor, count: int, tensor_stride: PerAxis) -> Voxels:
    """Voxels of tensors whose first `count` rows count."""
    numbers = torch.tensor([count, 0], dtype=torch.int32, device=coords.device)
    stride = per_axis(tensor_stride, "tensor_stride", case.ndim)
    return Voxels(coords, x, numbers[0], numbers[1], len(case.voxels), stride)


def _pooled(x: Tensor, cells: Tensor, reduce: str) -> Tensor:
    """The "max", "mean" or "sum" of the rows of each cell."""
    rows = [x[: len(cells)][cells == cell] for cell in range(int(cells.max()) + 1)]
    if reduce == "max":
        return torch.stack([own.amax(0) for own in rows])
    return torch.stack([own.sum(0) if reduce == "sum" else own.mean(0) for own in rows])


def _with_gradients(case: Case, layer: Layer, device: torch.device) -> dict[str, np.ndarray]:
    """The output, its coordinates, and the gradients of a function of a case's tensors."""
    names = "coords", "x", "w", "bias", "dy"
    drawn = dict(zip(names, case.drawn(), strict=True))
    given = {name: value for name, value in drawn.items() if value is not None}
    tensors = {name: value.to(device) for name, value in to_tensors(given).items()}
    coords, dy = tensors.pop("coords"), tensors.pop("dy")
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    y, places = layer(coords, leaves["x"], leaves["w"], leaves.get("bias"))
    count = len(dy)
    y[:count].backward(dy)
    found = {"y": y[:count], "coords": places[:count]}
    found |= {f"d{name}": _gradient(value) for name, value in leaves.items()}
    return {name: to_array(value.detach()) for name, value in found.items()}


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
