"""The wavelet convolution as PyTorch operators, and the choice of what computes them.

`flash_wtconv::wtconv` and `flash_wtconv::wtconv_weight_grad` are custom operators with fake kernels
and registered derivatives, so `torch.compile` and `torch.export` keep them whole. Haar is
orthonormal, so the input gradient is the operator itself, transposed; the weight gradient
correlates the coefficients of x with those of dy. The scales are folded into the taps before, where
PyTorch differentiates that: x and the taps are all that a backward pass keeps. Everything is linear
in x and linear in the taps, so second derivatives are the same two operators again.

An implementation is a module of `torch_bridge.wtconv` with `unavailable(platform)` and
`check(direction, problem)`, as `pallas_kernels.dispatch.Operator` asks for them, and

    forward(x, taps, bias, *, wavelet, transpose) -> y
    weight_grad(x, dy, *, kernel_size, levels, wavelet) -> gradients of the taps, and of the bias
        where dy is summed on the way

both with the parameters, integers, that its `search_space(direction, problem)` offers, where it has
one, for x `[N, C, *spatial]` of any strides and at least one image,
`taps = [base [C, 1, *k], level_0 [2**ndim * C, 1, *k], ...]` with the scales folded in, and
`bias [C]` or None, these in float32, or in float64 for an x in float64, as the gradients are. It
need not care for the strides of what it returns: a copy mends those of y that are not
`torch.empty_like(x)`'s, and of gradients that are not contiguous.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pallas_kernels.common.types import Tree
from pallas_kernels.dispatch import Operator, backend
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.wtconv.problem import Problem
from torch_bridge.runtime import calls, measuring


class Implementation(StrEnum):
    """Implementations of the wavelet convolution."""

    CUDA = "cuda"
    TRITON = "triton"
    METAL = "metal"
    EAGER = "eager"


class _Backend(backend.Implementation, Protocol):
    """An implementation of both operators; the module's docstring says what they take."""

    def forward(
        self,
        x: Tensor,
        taps: Sequence[Tensor],
        bias: Tensor | None,
        *,
        wavelet: str,
        transpose: bool,
        **config: int,
    ) -> Tensor:
        """The operator or its transpose."""

    def weight_grad(
        self, x: Tensor, dy: Tensor, *, kernel_size: int, levels: int, wavelet: str, **config: int
    ) -> Sequence[Tensor]:
        """The gradients of the taps, and of the bias where dy is summed on the way."""


OPERATOR = Operator(
    name="torch_wtconv",
    package="torch_bridge.wtconv",
    implementations=Implementation,
    rule={
        "cuda": ("cuda", "triton", "eager"),
        "mps": ("metal", "eager"),
        "cpu": ("eager",),
    },
    directions={"fwd": ("forward",), "bwd": ("forward", "weight_grad")},
)


# What it returns is a constant of a traced program: it asks the environment, imports, and measures.
@calls.constant
def pick(
    implementation: str | tuple[str, ...] | None,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kernel_size: int,
    levels: int,
    wavelet: str,
    bias: bool = False,
    strides: tuple[int, ...] | None = None,
    differentiated: bool = True,
) -> tuple[str, str]:
    """Picks what computes a call, forward and backward: an implementation's name and parameters.

    Args:
        implementation: Filter on the implementations, see `pallas_kernels.dispatch`.
        device: Of x.
        shape: Of x, `[N, C, *spatial]`. An empty batch is nobody's problem: nothing is launched.
        dtype: Of x.
        kernel_size: k.
        levels: Number of wavelet levels.
        wavelet: PyWavelets' name of the wavelet.
        bias: Whether there is one.
        strides: Of x; None where they are not known, and nothing is measured.
        differentiated: Whether there is a backward pass, see `calls.picked`.

    Raises:
        ValueError: As `calls.picked`.
        NotImplementedError: As `calls.picked`.

    Example:
        >>> pick("eager", torch.device("cpu"), (2, 4, 8, 8), torch.float32, 5, 1, "haar")
        ('eager', 'eager')
    """
    return calls.picked(
        *(OPERATOR, (implementation, implementation), device),
        *(_problem(shape, dtype, kernel_size, levels, wavelet), _measurement),
        *(dtype, bias, strides),
        differentiated=differentiated,
    )


def stays_whole(x: Tensor) -> bool:
    """Whether plain PyTorch is an operator of a program, rather than a dozen of PyTorch's own.

    On a CPU, PyTorch's compiler fails to lay out views of convolutions whose sizes it does not know
    ("cannot determine truth value of Relational", seen in 2.13). What is exported stays plain.

    Example:
        >>> stays_whole(torch.zeros(2, 3, 4))
        False
    """
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    if torch.compiler.is_exporting() or not calls.tells_sizes() or calls.differentiated_by_func():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(n) for n in x.shape)


def _problem(
    shape: Sequence[int], dtype: torch.dtype, kernel_size: int, levels: int, wavelet: str
) -> Problem:
    n, c, *spatial = shape
    sizes = max(n, 1), *spatial, c
    return Problem(sizes, calls.dtype_name(dtype), kernel_size, levels, wavelet)


def _measurement(
    direction: str,
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    bias: bool,
    strides: tuple[int, ...] | None,
) -> measuring.TorchMeasurement:
    """Runs and times an implementation on tensors like those of a call."""
    problem = problem.measured_as()
    n, *spatial, channels = problem.shape
    channels_last = strides is not None and calls.channels_last(strides)
    kernel_size, wavelet = problem.kernel_size, problem.wavelet
    rows = [channels] + [2 ** len(spatial) * channels] * problem.levels

    def signal(draw: measuring.Draw) -> Tensor:
        if channels_last:
            return draw(problem.shape, dtype).movedim(-1, 1)
        return draw((n, channels, *spatial), dtype)

    def inputs(draw: measuring.Draw) -> tuple[Tree, ...]:
        x = signal(draw)
        dy = signal(draw) if direction == "bwd" else x
        acc = calls.accumulation_dtype(x)
        taps = [draw((row, 1, *(kernel_size,) * len(spatial)), acc) for row in rows]
        return x, dy, taps, draw((channels,), acc) if bias else None

    def run(
        module: backend.Implementation,
        config: TuningParams,
        x: Tensor,
        dy: Tensor,
        taps: Sequence[Tensor],
        bias: Tensor | None,
    ) -> list[Tensor]:
        timed, params = cast(_Backend, module), dict(config)
        if direction == "fwd":
            return [_forward(timed, x, taps, bias, wavelet, False, params)]
        return [
            _forward(timed, dy, taps, None, wavelet, True, params),
            *_weight_grad(
                timed, x, dy, kernel_size, problem.levels, wavelet, bias is not None, params
            ),
        ]

    return measuring.TorchMeasurement(
        run,
        inputs,
        device,
        OPERATOR.module("eager"),
        {"bias": bias, "channels_last": channels_last},
        strides is not None,
    )


def wtconv(
    x: Tensor,
    base_weight: Tensor,
    base_bias: Tensor | None,
    base_scale: Tensor,
    wavelet_weights: Sequence[Tensor],
    wavelet_scales: Sequence[Tensor],
    *,
    wavelet: str,
    fwd: str,
    bwd: str,
) -> Tensor:
    """Wavelet convolution of 1-D, 2-D or 3-D signals by named implementations.

    Args:
        x: Signal `[N, C, *spatial]`, of any strides.
        base_weight: `[C, 1, *k]`.
        base_bias: `[C]` or None.
        base_scale: `[1, C, 1, ...]`.
        wavelet_weights: One `[2**d * C, 1, *k]` a level, finest first.
        wavelet_scales: One `[1, 2**d * C, 1, ...]` a level.
        wavelet: PyWavelets' name of the wavelet.
        fwd: What computes the output, as `pick` tells it.
        bwd: What computes the gradients.

    Returns:
        `[N, C, *spatial]` in x's dtype and, where x is dense, its memory format.

    Example:
        >>> weight, scale = torch.ones(3, 1, 1, 1), torch.full((1, 3, 1, 1), 2.0)
        >>> keys = {"wavelet": "haar", "fwd": "eager", "bwd": "eager"}
        >>> float(wtconv(torch.ones(1, 3, 4, 4), weight, None, scale, [], [], **keys).mean())
        2.0
    """
    dtype = calls.accumulation_dtype(x)
    # All at once, here and in the backward pass: a small operation takes the host longer than a
    # large kernel the GPU.
    weights, scales = [base_weight, *wavelet_weights], [base_scale, *wavelet_scales]
    folded = torch.cat([weight.flatten(1) for weight in weights]).to(dtype)
    folded = folded * torch.cat([scale.flatten() for scale in scales]).to(dtype)[:, None]
    rows = [weight.shape[0] for weight in weights]
    taps = [tap.unflatten(1, base_weight.shape[1:]) for tap in folded.split(rows)]
    bias = None if base_bias is None else base_bias.to(dtype) * base_scale.to(dtype).flatten()
    return apply(x, taps, bias, wavelet, False, fwd, bwd)


@torch.library.custom_op("flash_wtconv::wtconv", mutates_args=())
def apply(
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    wavelet: str,
    transpose: bool,
    fwd: str,
    bwd: str,
) -> Tensor:
    """The operator or its transpose, on folded taps; the arguments as the module has them."""
    if x.numel() == 0:
        return torch.empty_like(x)
    problem = _problem(x.shape, x.dtype, taps[0].shape[-1], len(taps) - 1, wavelet)
    return calls.computed(
        *(OPERATOR, "fwd", fwd, x.device, problem),
        lambda module, config: _forward(module, x, taps, bias, wavelet, transpose, config),
    )


def _forward(
    module: _Backend,
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    wavelet: str,
    transpose: bool,
    config: Mapping[str, int],
) -> Tensor:
    y = module.forward(x, taps, bias, wavelet=wavelet, transpose=transpose, **config)
    return calls.formatted(y, x)


@apply.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("flash_wtconv::wtconv_weight_grad", mutates_args=())
def weight_grad(
    x: Tensor, dy: Tensor, kernel_size: int, levels: int, wavelet: str, biased: bool, bwd: str
) -> list[Tensor]:
    """Gradients of the folded taps, and of a bias if there is one, in float32 or better.

    Bilinear in x and dy, but for the bias's, which is linear in dy.
    """
    if x.numel() == 0:
        return [taps.zero_() for taps in _empty_gradients(x, kernel_size, levels, biased)]
    problem = _problem(x.shape, x.dtype, kernel_size, levels, wavelet)
    about = kernel_size, levels, wavelet, biased
    return calls.computed(
        *(OPERATOR, "bwd", bwd, x.device, problem),
        lambda module, config: _weight_grad(module, x, dy, *about, config),
    )


def _weight_grad(
    module: _Backend,
    x: Tensor,
    dy: Tensor,
    kernel_size: int,
    levels: int,
    wavelet: str,
    biased: bool,
    config: Mapping[str, int],
) -> list[Tensor]:
    sizes = {"kernel_size": kernel_size, "levels": levels}
    found = module.weight_grad(x, dy, **sizes, wavelet=wavelet, **config)
    gradients = [gradient.contiguous() for gradient in found[: levels + 1 + biased]]
    if len(gradients) < levels + 1 + biased:
        gradients.append(calls.summed(dy))
    return gradients


@weight_grad.register_fake
def _(
    x: Tensor, dy: Tensor, kernel_size: int, levels: int, wavelet: str, biased: bool, bwd: str
) -> list[Tensor]:
    return _empty_gradients(x, kernel_size, levels, biased)


def _empty_gradients(x: Tensor, kernel_size: int, levels: int, biased: bool) -> list[Tensor]:
    ndim, channels = x.ndim - 2, x.shape[1]
    rows = [channels] + [2**ndim * channels] * levels
    shapes: list[tuple[int, ...]] = [(n, 1, *(kernel_size,) * ndim) for n in rows]
    shapes += [(channels,)] * biased
    return [x.new_empty(shape, dtype=calls.accumulation_dtype(x)) for shape in shapes]


def _keep(ctx: Any, inputs: tuple[Tree, ...], output: Tensor) -> None:
    x, taps, _, ctx.wavelet, ctx.transpose, _, ctx.bwd = inputs
    ctx.save_for_backward(x, *taps)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tree, ...]:
    x, *taps = ctx.saved_tensors
    needs_x, needs_taps, needs_bias, *_ = ctx.needs_input_grad
    dx = dbias = None
    dtaps: list[Tensor] | list[None] = [None] * len(taps)
    # First, so that what it needs of memory is free again before there is a dx.
    if any(needs_taps):
        pair = (dy, x) if ctx.transpose else (x, dy)
        # Transposed, the sum on the way is that of x.
        biased = needs_bias and not ctx.transpose
        about = taps[0].shape[-1], len(taps) - 1, ctx.wavelet, biased, ctx.bwd
        dtaps = weight_grad(*pair, *about)
        dbias = dtaps.pop() if biased else None
    if needs_x:
        dx = apply(dy, taps, None, ctx.wavelet, not ctx.transpose, ctx.bwd, ctx.bwd)
    if needs_bias and dbias is None:
        dbias = calls.summed(dy)
    return dx, dtaps, dbias, None, None, None, None


apply.register_autograd(_backward, setup_context=_keep)


def _keep_pair(ctx: Any, inputs: tuple[Tree, ...], output: list[Tensor]) -> None:
    x, dy, _, ctx.levels, ctx.wavelet, _, ctx.bwd = inputs
    ctx.save_for_backward(x, dy)


def _backward_of_pair(ctx: Any, gradients: list[Tensor]) -> tuple[Tree, ...]:
    x, dy = ctx.saved_tensors
    needs_x, needs_dy, *_ = ctx.needs_input_grad
    names = ctx.wavelet, ctx.bwd, ctx.bwd
    dtaps, bias = gradients[: ctx.levels + 1], next(iter(gradients[ctx.levels + 1 :]), None)
    dx = apply(dy, dtaps, None, names[0], True, *names[1:]) if needs_x else None
    ddy = apply(x, dtaps, bias, names[0], False, *names[1:]) if needs_dy else None
    return dx, ddy, None, None, None, None, None


weight_grad.register_autograd(_backward_of_pair, setup_context=_keep_pair)


@apply.register_vmap
def _(
    info: Any,
    in_dims: tuple[Tree, ...],
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, int]:
    """A batch of x alone folds into x's own, so that it stays one call."""
    of_x, of_taps, of_bias, *_ = in_dims
    if of_x is not None and of_bias is None and all(dim is None for dim in of_taps):
        x = x.movedim(of_x, 0)
        return apply(x.flatten(0, 1), taps, bias, *rest).reshape(x.shape), 0
    found = [
        apply(
            calls.example(x, of_x, i),
            calls.examples(taps, of_taps, i),
            calls.example(bias, of_bias, i),
            *rest,
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(found), 0


@weight_grad.register_vmap
def _(
    info: Any, in_dims: tuple[Tree, ...], x: Tensor, dy: Tensor, *rest: Any
) -> tuple[list[Tensor], list[int]]:
    """It sums over its batch: one call after the other."""
    found = [
        weight_grad(*calls.examples((x, dy), in_dims[:2], i), *rest) for i in range(info.batch_size)
    ]
    stacked = [torch.stack(examples) for examples in zip(*found, strict=True)]
    return stacked, [0] * len(stacked)
