"""Instance normalisation as PyTorch operators, and the choice of what computes them.

`flash_wtconv::instance_norm` and `flash_wtconv::instance_norm_gradients` are custom operators with
fake kernels and registered derivatives, so `torch.compile` and `torch.export` keep them whole.
Saved are x, its statistics, scale and bias, and with an activation the residual. Second derivatives
are those of the formulas in plain PyTorch. Where plain PyTorch computes both passes there is no
custom operator, and every transformation of PyTorch works.

An implementation is a module of `torch_bridge.stylize` with `unavailable(platform)` and
`check(direction, problem)`, as `pallas_kernels.dispatch.Operator` asks for them, and

    forward(x, scale, bias, residual, *, eps, relu) -> y, statistics
    backward(known, dy, *, relu) -> gradients of x, scale, bias and, if it is given, the residual

both with the parameters, integers, that its `search_space(direction, problem)` offers, where it has
one, for `x [N, C, H, W]` of any strides, scale and bias `[N, C]`, statistics `[N, 3, C]`, see
`pallas_kernels.stylize.formulas`, these in float32, or in float64 for an x in float64, and a
residual of x's shape and dtype or None. The backward pass gets it where there is an activation
alone. It need not care for the strides of images that it returns: a copy mends those that are not
`torch.empty_like(x)`'s.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pallas_kernels.common.types import Tree
from pallas_kernels.dispatch import Choice, Operator, backend
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.stylize.problem import Problem
from torch_bridge.runtime import calls, measuring
from torch_bridge.stylize import eager
from torch_bridge.stylize.eager import Known


class Implementation(StrEnum):
    """Implementations of the instance normalisation."""

    TRITON = "triton"
    EAGER = "eager"


class _Backend(backend.Implementation, Protocol):
    """An implementation of both passes; the module's docstring says what they take."""

    def forward(
        self,
        x: Tensor,
        scale: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        *,
        eps: float,
        relu: bool,
        **config: int,
    ) -> tuple[Tensor, Tensor]:
        """The norm and the statistics."""

    def backward(self, known: Known, dy: Tensor, *, relu: bool, **config: int) -> list[Tensor]:
        """The gradients."""


OPERATOR = Operator(
    name="torch_instance_norm",
    package="torch_bridge.stylize",
    implementations=Implementation,
    rule={"cuda": ("triton", "eager"), "mps": ("eager",), "cpu": ("eager",)},
    directions={"fwd": ("forward",), "bwd": ("backward",)},
)


def instance_norm(
    x: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    implementation: Choice = None,
) -> Tensor:
    """Instance norm of images, with activation and residual in the same pass.

    Args:
        x: `[N, C, H, W]` of any strides; float16, bfloat16, float32 or float64.
        scale: `[C]`, or of each image its own, `[N, C]`; None is 1.
        bias: The same; None is 0.
        eps: Is added to the variance.
        activation: None or "relu".
        residual: Is added before the activation, of x's shape and dtype, or None.
        implementation: Filter on the implementations.

    Returns:
        A tensor of x's shape and dtype and, where x is dense, its memory format.

    Raises:
        ValueError: An unknown activation, or an unknown name in the environment's variable.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0]]]])
        >>> instance_norm(x, torch.full((1,), 2.0), activation="relu").round(decimals=2)
        tensor([[[[0., 2.]]]])
    """
    if activation not in (None, "relu"):
        raise ValueError(f"activation={activation!r}: expected None or 'relu'")
    n, c, *_ = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    relu = activation == "relu"
    own = [x.new_full((c,), v, dtype=dtype) for v in (1.0, 0.0)]
    factor, shift = (
        (default if value is None else value.to(dtype)).expand(n, c)
        for value, default in zip((scale, bias), own, strict=True)
    )
    tensors = [value for value in (x, scale, bias, residual) if value is not None]
    shape, strides = calls.known(x)
    fwd, bwd = pick(
        *(
            calls.static(implementation),
            x.device,
            shape,
            x.dtype,
            strides,
            relu,
            residual is not None,
        ),
        differentiated=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
    )
    if calls.names((fwd, bwd)) == ["eager"]:
        # None of its operations is one that `autocast` casts to less.
        y, _ = eager.forward(x, factor, shift, residual, eps=eps, relu=relu)
        return y
    y, _ = apply(x, factor, shift, residual, eps, relu, fwd, bwd)
    return y


# What it returns is a constant of a traced program: it asks the environment, imports, and measures.
@calls.constant
def pick(
    implementation: str | tuple[str, ...] | None,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    strides: tuple[int, ...] | None = None,
    relu: bool = False,
    residual: bool = False,
    differentiated: bool = True,
) -> tuple[str, str]:
    """Picks what computes a call, forward and backward: an implementation's name and parameters.

    Args:
        implementation: Filter on the implementations, see `pallas_kernels.dispatch`.
        device: Of x.
        shape: Of x, `[N, C, H, W]`. An empty batch is nobody's problem: nothing is launched.
        dtype: Of x.
        strides: Of x; None where they are not known, and nothing is measured.
        relu: Whether there is an activation.
        residual: Whether there is a residual.
        differentiated: Whether there is a backward pass, see `calls.picked`.

    Raises:
        ValueError: As `calls.picked`.
        NotImplementedError: As `calls.picked`.

    Example:
        >>> pick("eager", torch.device("cpu"), (2, 4, 8, 8), torch.float32)
        ('eager', 'eager')
    """
    last = strides is not None and calls.channels_last(strides)
    return calls.picked(
        *(OPERATOR, (implementation, implementation), device),
        *(_problem(shape, dtype, last, relu, residual), _measurement),
        *(dtype, last, strides is not None),
        differentiated=differentiated,
    )


def _problem(
    shape: Sequence[int], dtype: torch.dtype, last: bool, relu: bool, residual: bool
) -> Problem:
    """The call as the kernels compute it; channels first, channels are images."""
    n, c, h, w = shape
    size = (max(n, 1), h, w, c) if last else (max(n, 1) * c, h, w, 1)
    return Problem(size, calls.dtype_name(dtype), "relu" if relu else None, residual)


def _measurement(
    direction: str,
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    last: bool,
    measurable: bool,
) -> measuring.TorchMeasurement:
    """Runs and times an implementation on tensors like those of a call."""
    n, h, w, c = problem.shape
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    relu = problem.activation == "relu"

    def image(draw: measuring.Draw) -> Tensor:
        x = draw((n, h, w, c), dtype).movedim(-1, 1)
        return x if last else x.contiguous()

    def inputs(draw: measuring.Draw) -> tuple[Tree, ...]:
        residual = image(draw) if problem.residual else None
        parameters = draw((n, c), acc), draw((n, c), acc)
        return image(draw), *parameters, residual, draw((n, 3, c), acc), image(draw)

    def run(
        module: backend.Implementation,
        config: TuningParams,
        x: Tensor,
        scale: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        statistics: Tensor,
        dy: Tensor,
    ) -> list[Tensor]:
        timed, rest = cast(_Backend, module), dict(config)
        if direction == "fwd":
            return [*timed.forward(x, scale, bias, residual, eps=1e-5, relu=relu, **rest)]
        known = Known(x, statistics, scale, bias, residual if relu else None)
        return timed.backward(known, dy, relu=relu, **rest)

    return measuring.TorchMeasurement(
        run,
        inputs,
        device,
        OPERATOR.module("eager"),
        {"channels_last": last},
        measurable,
    )


@torch.library.custom_op("flash_wtconv::instance_norm", mutates_args=())
def apply(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    fwd: str,
    bwd: str,
) -> tuple[Tensor, Tensor]:
    """The norm and the statistics; the arguments as the module has them."""
    if x.numel() == 0:
        return torch.empty_like(x), _empty_statistics(x, scale)

    def compute(module: _Backend, config: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        return module.forward(x, scale, bias, residual, eps=eps, relu=relu, **config)

    y, statistics = _computed("fwd", fwd, x, relu, residual is not None, compute)
    return calls.formatted(y, x), statistics.contiguous()


@apply.register_fake
def _(x: Tensor, scale: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _empty_statistics(x, scale)


@torch.library.custom_op("flash_wtconv::instance_norm_gradients", mutates_args=())
def gradients(
    x: Tensor,
    statistics: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    dy: Tensor,
    relu: bool,
    bwd: str,
) -> list[Tensor]:
    """The gradients of x, scale, bias and, where it is given, the residual."""
    if x.numel() == 0:
        return [empty.zero_() for empty in _empty_gradients(x, scale, residual)]
    known = Known(x, statistics, scale, bias, residual)

    def compute(module: _Backend, config: Mapping[str, int]) -> list[Tensor]:
        return module.backward(known, dy, relu=relu, **config)

    dx, dscale, dbias, *rest = _computed("bwd", bwd, x, relu, residual is not None, compute)
    found = [calls.formatted(dx, x), dscale.contiguous(), dbias.contiguous()]
    return [*found, *(calls.formatted(value, x) for value in rest)]


@gradients.register_fake
def _(
    x: Tensor,
    statistics: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    *_: object,
) -> list[Tensor]:
    return _empty_gradients(x, scale, residual)


def _empty_statistics(x: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((x.shape[0], 3, x.shape[1]))


def _empty_gradients(x: Tensor, scale: Tensor, residual: Tensor | None) -> list[Tensor]:
    parameters = [scale.new_empty(scale.shape) for _ in range(2)]
    found = [torch.empty_like(x), *parameters]
    return found if residual is None else [*found, torch.empty_like(x)]


def _computed(
    direction: str, text: str, x: Tensor, relu: bool, residual: bool, compute: Any
) -> Any:
    """The result of what was picked."""
    problem = _problem(x.shape, x.dtype, calls.channels_last(x.stride()), relu, residual)
    return calls.computed(OPERATOR, direction, text, x.device, problem, compute)


def _keep(ctx: Any, inputs: tuple[Tree, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, bias, residual, _, ctx.relu, _, ctx.bwd = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], scale, bias, residual if ctx.relu else None)


def _backward(ctx: Any, dy: Tensor | None, dstatistics: Tensor | None) -> tuple[Tree, ...]:
    x, statistics, scale, bias, residual = ctx.saved_tensors
    found: list[Tensor | None] = [None] * 4
    if dy is not None:
        known = x, statistics, scale, bias, residual
        # Without an activation the residual's gradient is the output's, which nobody copies.
        found = [*gradients(*known, dy, ctx.relu, ctx.bwd), dy][:4]
    if dstatistics is not None:
        through = eager.statistics_backward(x, statistics, dstatistics)
        found[0] = through if found[0] is None else found[0] + through
    needs = ctx.needs_input_grad[:4]
    wanted = (value if need else None for value, need in zip(found, needs, strict=True))
    return *wanted, None, None, None, None


apply.register_autograd(_backward, setup_context=_keep)


def _keep_gradients(ctx: Any, inputs: tuple[Tree, ...], output: list[Tensor]) -> None:
    *known, ctx.relu, _ = inputs
    ctx.save_for_backward(*known)


def _backward_of_gradients(ctx: Any, found: Sequence[Tensor]) -> tuple[Tree, ...]:
    """The derivative of the formulas, which plain PyTorch finds."""
    given = ctx.saved_tensors
    with torch.enable_grad():
        # Copies of no memory: statistics come from x, but here both stand for themselves.
        leaves = [
            value
            if value is None
            else value.view_as(value)
            if value.requires_grad
            else value.detach().requires_grad_()
            for value in given
        ]
        *known, dy = cast(list[Tensor], leaves)
        outputs = eager.backward(Known(*known), dy, relu=ctx.relu)
        inputs = [value for value in leaves if value is not None]
        slopes = iter(
            torch.autograd.grad(
                outputs, inputs, list(found), create_graph=True, materialize_grads=True
            )
        )
    wanted = [None if value is None else next(slopes) for value in leaves]
    return *wanted, None, None


gradients.register_autograd(_backward_of_gradients, setup_context=_keep_gradients)


@apply.register_vmap
def _(
    info: Any, in_dims: tuple[Tree, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """A batch folds into x's own, so that it stays one call."""
    y, statistics = apply(*folded(info.batch_size, in_dims, arguments))
    size = info.batch_size
    return (y.unflatten(0, (size, -1)), statistics.unflatten(0, (size, -1))), (0, 0)


@gradients.register_vmap
def _(info: Any, in_dims: tuple[Tree, ...], *arguments: Any) -> tuple[list[Tensor], list[int]]:
    found = gradients(*folded(info.batch_size, in_dims, arguments))
    unfolded = [value.unflatten(0, (info.batch_size, -1)) for value in found]
    return unfolded, [0] * len(unfolded)


def folded(size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> list[Any]:
    """The arguments, each image of each example one of a batch.

    Args:
        size: The number of examples.
        in_dims: For each argument the axis of the examples, as `torch.vmap` has it.
        arguments: Tensors of images, and what is none.
    """
    return [
        value
        if not isinstance(value, Tensor)
        else (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(
            0, 1
        )
        for value, dim in zip(arguments, in_dims, strict=True)
    ]
