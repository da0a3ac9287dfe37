"""Sparse convolutions as PyTorch operators, and the choice of what computes them.

`flash_wtconv::sparse_conv` and `flash_wtconv::sparse_conv_weight_grad` are custom operators with
fake kernels and registered derivatives, so `torch.compile` and `torch.export` keep them whole. A
convolution is linear in x and linear in w. Its transpose in x is the convolution by the reverse
table with transposed weights, so the derivatives of both operators, of every order, are the two
again. Saved are x and w.

Both operators, regular and depthwise, are these two: weights tell which, by their rank. An
implementation is a module of `torch_bridge.sparse`, or of `torch_bridge.sparse.depthwise`, with
`unavailable(platform)` and `check(direction, problem)`, as `pallas_kernels.dispatch.Operator` asks
for them, and

    forward(x, w, rows, *, precision) -> y [M, F]
    weight_grad(x, dy, rows, *, shape, precision) -> dw [*shape]

both with the parameters, integers, that its `search_space(direction, problem)` offers, where it has
one, for `x [N, C]` and `w [K, G, C / G, F / G]` of one dtype (depthwise: `w [K, C]`), and the
`maps.RowTable` of what is gathered. `precision` is Triton's name for that of float32 products.
Where a table holds -1 nothing is read; a row that reads nothing may hold anything in dy, and is
zero in y.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pallas_kernels.common.types import Keywords, Tree
from pallas_kernels.dispatch import Choice, Operator, backend
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.sparse.depthwise.problem import Problem as DepthwiseProblem
from pallas_kernels.sparse.problem import Problem, Window
from pallas_kernels.sparse.shapes import room
from torch_bridge.runtime import calls, measuring
from torch_bridge.sparse.maps import KernelMap, RowTable, kernel_map
from torch_bridge.sparse.operators import DEPTHWISE, OPERATOR
from torch_bridge.sparse.voxels import from_coords


class _Backend(backend.Implementation, Protocol):
    """An implementation of both operators; the module's docstring says what they take."""

    def forward(
        self, x: Tensor, w: Tensor, rows: RowTable, *, precision: str, **config: int
    ) -> Tensor:
        """The convolution."""

    def weight_grad(
        self,
        x: Tensor,
        dy: Tensor,
        rows: RowTable,
        *,
        shape: tuple[int, ...],
        precision: str,
        **config: int,
    ) -> Tensor:
        """The gradient of the weights."""


# What it returns is a constant of a traced program: it asks the environment, imports, and measures.
@calls.constant
def pick(
    fwd_algo: Choice,
    bwd_algo: Choice,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    features: int,
    window: tuple[Any, ...],
    depthwise: bool = False,
    precision: str = "ieee",
    measurable: bool = True,
    differentiated: bool = True,
) -> tuple[str, str]:
    """Picks what computes a call, forward and backward: an implementation's name and parameters.

    Args:
        fwd_algo: Filter on the implementations of the forward pass, see `pallas_kernels.dispatch`.
        bwd_algo: The same for the backward pass.
        device: Of x.
        shape: `(batch, capacity, C)`.
        dtype: Of x.
        features: Channels of the output.
        window: The fields of a `pallas_kernels.sparse.problem.Window`.
        depthwise: Whether the operator is the depthwise one.
        precision: Triton's name for the precision of float32 products.
        measurable: Whether the shape is that of a call, so that times of it mean something.
        differentiated: Whether there is a backward pass. Where there is none nothing is asked for
            it, and the forward pass's choice is told twice.

    Raises:
        ValueError: An unknown or empty filter.
        NotImplementedError: No allowed implementation can run here; says why for each. Or
            `torch.func` differentiates.

    Example:
        >>> window = (3,), (1,), (1,), 1, False
        >>> pick(None, None, torch.device("cpu"), (1, 8, 4), torch.float32, 2, window)
        ('eager else', 'eager else')
    """
    if calls.differentiated_by_func():
        raise NotImplementedError(
            "torch.func differentiates a sparse convolution, and PyTorch has no way yet to tell it "
            "of custom operators: use torch.autograd.grad"
        )
    kind = DepthwiseProblem if depthwise else Problem
    problem = kind(shape, calls.dtype_name(dtype), features, Window(*window))
    return calls.picked(
        *(_operator(problem), (fwd_algo, bwd_algo), device, problem, _measurement),
        *(dtype, precision, measurable),
        differentiated=differentiated,
    )


def _measurement(
    direction: str,
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    measurable: bool,
) -> measuring.TorchMeasurement:
    """Runs and times an implementation on a scene of a call's size."""
    asked = problem.measured_as()
    batch, capacity, channels = asked.shape
    shape = asked.weight_shape

    def inputs(draw: measuring.Draw) -> tuple[Tree, ...]:
        x, w = draw((capacity, channels), dtype), draw(shape, dtype)
        # A strided map has as many rows as the input at most.
        dy = draw((capacity, asked.features), dtype) if direction == "bwd" else x
        return x, w, dy, scene_map(asked, device)

    def run(
        module: backend.Implementation,
        config: TuningParams,
        x: Tensor,
        w: Tensor,
        dy: Tensor,
        maps: KernelMap,
    ) -> list[Tensor]:
        timed, rest = cast(_Backend, module), {"precision": precision, **dict(config)}
        if direction == "fwd":
            return [timed.forward(x, w, maps.forward, **rest)]
        turned, rows, _ = _transposed(w, maps.forward, maps.backward or ())
        return [
            timed.forward(dy, turned, RowTable(*rows), **rest),
            timed.weight_grad(x, dy, maps.forward, shape=shape, **rest),
        ]

    return measuring.TorchMeasurement(
        run,
        inputs,
        device,
        _operator(problem).module("eager"),
        {"precision": precision},
        measurable,
    )


def scene_map(problem: Problem, device: torch.device) -> KernelMap:
    """The map of a call like this one over the voxels of a room.

    Example:
        >>> window = Window((3, 3, 3), (1, 1, 1), (1, 1, 1))
        >>> scene_map(Problem((1, 64, 4), "float32", 8, window), torch.device("cpu")).table.shape
        torch.Size([27, 64])
    """
    batch, capacity, _ = problem.shape
    window = problem.window
    coords = room(capacity, batch=batch, ndim=len(window.kernel_size))
    empty = torch.zeros((capacity, 0), device=device)
    voxels = from_coords(coords, empty, batch_size=batch, capacity=capacity)
    maps, _ = kernel_map(voxels, *window[:3])
    return maps.swapped() if window.transposed else maps


def convolution(
    x: Tensor, w: Tensor, maps: KernelMap, precision: str, picked: tuple[str, str]
) -> Tensor:
    """The convolution of `x [N, C]`, by what `pick` picked: `[M, F]`."""
    reverse = [] if maps.backward is None else list(maps.backward)
    return apply(x, w, list(maps.forward), reverse, "fwd", precision, *picked)


@torch.library.custom_op("flash_wtconv::sparse_conv", mutates_args=())
def apply(
    x: Tensor,
    w: Tensor,
    rows: Sequence[Tensor],
    reverse: Sequence[Tensor],
    direction: str,
    precision: str,
    fwd: str,
    bwd: str,
) -> Tensor:
    """The convolution by what is picked for a direction.

    Args:
        x: `[N, C]`.
        w: Weights, as the module has them.
        rows: A `RowTable` of the rows of x.
        reverse: That of the rows of y, or none where it is `rows` with its offsets in the opposite
            order.
        direction: "fwd"; "bwd" where it is part of a backward pass.
        precision: Triton's name for the precision of float32 products.
        fwd: What computes the forward pass, as `pick` tells it.
        bwd: What computes the backward pass.
    """

    def compute(module: _Backend, config: Mapping[str, int]) -> Tensor:
        return module.forward(x, w, RowTable(*rows), precision=precision, **config)

    text = fwd if direction == "fwd" else bwd
    return _computed(direction, text, x, w.shape, compute)


@apply.register_fake
def _(x: Tensor, w: Tensor, rows: Sequence[Tensor], *_: object) -> Tensor:
    features = w.shape[1] * w.shape[3] if w.ndim == 4 else w.shape[1]
    return x.new_empty((rows[0].shape[1], features))


@torch.library.custom_op("flash_wtconv::sparse_conv_weight_grad", mutates_args=())
def weight_grad(
    x: Tensor,
    dy: Tensor,
    rows: Sequence[Tensor],
    reverse: Sequence[Tensor],
    shape: Sequence[int],
    precision: str,
    bwd: str,
) -> Tensor:
    """The gradient of weights of a shape, bilinear in x and dy; other arguments as `apply`'s."""

    def compute(module: _Backend, config: Mapping[str, int]) -> Tensor:
        keywords: Keywords = {"shape": tuple(shape), "precision": precision, **config}
        return module.weight_grad(x, dy, RowTable(*rows), **keywords)

    return _computed("bwd", bwd, x, shape, compute)


@weight_grad.register_fake
def _(
    x: Tensor,
    dy: Tensor,
    rows: Sequence[Tensor],
    reverse: Sequence[Tensor],
    shape: Sequence[int],
    *_: object,
) -> Tensor:
    return x.new_empty(shape)


def _computed(direction: str, text: str, x: Tensor, weights: Sequence[int], compute: Any) -> Tensor:
    """The result of what was picked for weights of a shape."""
    taps, *sizes = weights
    groups = sizes[0]
    features = groups * sizes[2] if len(sizes) == 3 else groups
    window = Window((taps,), (1,), (1,), groups)
    kind = Problem if len(sizes) == 3 else DepthwiseProblem
    problem = kind((1, *x.shape), calls.dtype_name(x.dtype), features, window)
    return calls.computed(_operator(problem), direction, text, x.device, problem, compute)


def _operator(problem: Problem) -> Operator:
    return DEPTHWISE if isinstance(problem, DepthwiseProblem) else OPERATOR


def _transposed(
    w: Tensor, rows: Sequence[Tensor], reverse: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """The weights and the tables of the transpose in x."""
    turned = w.transpose(2, 3) if w.ndim == 4 else w
    # The table whose offsets run the other way, without a copy of it.
    return (turned, reverse, rows) if len(reverse) else (turned.flip(0), rows, reverse)


def _keep(ctx: Any, inputs: tuple[Tree, ...], output: Tensor) -> None:
    x, w, rows, reverse, _, ctx.precision, _, ctx.bwd = inputs
    ctx.save_for_backward(x, w, *rows, *reverse)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tree, ...]:
    x, w, *tables = ctx.saved_tensors
    rows, reverse, by = tables[:3], tables[3:], ctx.bwd
    needs_x, needs_w, *_ = ctx.needs_input_grad
    dx = dw = None
    # First, so that what it needs of memory is free again before there is a dx.
    if needs_w:
        dw = weight_grad(x, dy, rows, reverse, list(w.shape), ctx.precision, by)
    if needs_x:
        dx = apply(dy, *_transposed(w, rows, reverse), "bwd", ctx.precision, by, by)
    return dx, dw, *_no_gradients(rows, reverse), None, None, None, None


def _no_gradients(*lists: Sequence[Tensor]) -> list[list[None]]:
    """The gradients of lists of integers."""
    return [[None] * len(each) for each in lists]


apply.register_autograd(_backward, setup_context=_keep)


def _keep_pair(ctx: Any, inputs: tuple[Tree, ...], output: Tensor) -> None:
    x, dy, rows, reverse, _, ctx.precision, ctx.bwd = inputs
    ctx.save_for_backward(x, dy, *rows, *reverse)


def _backward_of_pair(ctx: Any, dw: Tensor) -> tuple[Tree, ...]:
    x, dy, *tables = ctx.saved_tensors
    rows, reverse = tables[:3], tables[3:]
    needs_x, needs_dy, *_ = ctx.needs_input_grad
    rest = "bwd", ctx.precision, ctx.bwd, ctx.bwd
    dx = apply(dy, *_transposed(dw, rows, reverse), *rest) if needs_x else None
    ddy = apply(x, dw, rows, reverse, *rest) if needs_dy else None
    return dx, ddy, *_no_gradients(rows, reverse), None, None, None


weight_grad.register_autograd(_backward_of_pair, setup_context=_keep_pair)


def _one_after_the_other(
    function: Any, info: Any, in_dims: tuple[Tree, ...], *arguments: Any
) -> tuple[Tensor, int]:
    """The rule of an operator for `torch.vmap`: a call for each example."""
    first, second, rows, reverse, *rest = arguments
    found = [
        function(
            calls.example(first, in_dims[0], i),
            calls.example(second, in_dims[1], i),
            calls.examples(rows, in_dims[2], i),
            calls.examples(reverse, in_dims[3], i),
            *rest,
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(found), 0


apply.register_vmap(partial(_one_after_the_other, apply))
weight_grad.register_vmap(partial(_one_after_the_other, weight_grad))
