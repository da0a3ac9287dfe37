"""Depthwise convolution as PyTorch operators, and the choice of what computes them.

`flash_wtconv::depthwise` and `flash_wtconv::depthwise_weight_grad` are custom operators with fake
kernels and registered derivatives, so `torch.compile` and `torch.export` keep them whole. The
convolution is linear in x and linear in the weight, so the derivatives of both operators are these
two again, of every order. Where plain PyTorch computes both directions there is no custom operator.

An implementation is a module of `torch_bridge.depthwise` with `unavailable(platform)` and
`check(direction, problem)`, as `pallas_kernels.dispatch.Operator` asks for them, and

    forward(x, weight, bias, *, transpose) -> y
    weight_grad(x, dy, *, kernel_size, biased) -> gradients of the weight, and if biased of the bias

for x `[N, C, H, W]` of any strides and at least one pixel, weight `[C, 1, k, k]`, bias `[C]` or
None, stride 1 and padding that keeps the size. It need not care for the strides of images that it
returns: a copy mends those that are not `torch.empty_like(x)`'s.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pallas_kernels.common.types import Pair, Tree
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.depthwise.problem import Problem
from pallas_kernels.dispatch import Choice, Operator, backend
from pallas_kernels.dispatch.tuner import TuningParams
from torch_bridge.runtime import calls, measuring


class Implementation(StrEnum):
    """Implementations of the depthwise convolution."""

    CUDA = "cuda"
    EAGER = "eager"


class _Backend(backend.Implementation, Protocol):
    """An implementation of both operators; the module's docstring says what they take."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, transpose: bool) -> Tensor:
        """The convolution or its transpose."""

    def weight_grad(
        self, x: Tensor, dy: Tensor, *, kernel_size: int, biased: bool
    ) -> Sequence[Tensor]:
        """The gradient of the weight, and if it is `biased` that of the bias."""


OPERATOR = Operator(
    name="torch_depthwise",
    package="torch_bridge.depthwise",
    implementations=Implementation,
    rule={"cuda": ("eager",), "mps": ("eager",), "cpu": ("eager",)},
    directions={"fwd": ("forward",), "bwd": ("forward", "weight_grad")},
)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: str | int | Pair = "same",
    dilation: int | Pair = 1,
    *,
    implementation: Choice = None,
) -> Tensor:
    """Depthwise convolution of images: `torch.nn.functional.conv2d` with C groups.

    Args:
        x: `[N, C, H, W]` or `[C, H, W]` of any strides; kernels of ours read channels last.
        weight: `[C, 1, KH, KW]`.
        bias: `[C]` or None.
        stride: As PyTorch's function takes it.
        padding: Likewise.
        dilation: Likewise.
        implementation: Filter on the implementations, "cuda" and "eager": a name, a sequence of
            names or "auto" for the fastest of them, which is measured once and remembered, or None
            for the environment's (`FLASH_WTCONV_TORCH_DEPTHWISE_FWD`, `..._BWD`) or the rule.

    Returns:
        `[N, C, H_out, W_out]` in x's dtype.

    Raises:
        ValueError: An unknown implementation, or a weight of other than a row a channel.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> x = torch.ones(1, 2, 4, 4)
        >>> depthwise_conv2d(x, torch.ones(2, 1, 3, 3))[0, 0, 0].tolist()
        [4.0, 6.0, 6.0, 4.0]
    """
    channels = x.shape[-3]
    if weight.ndim != 4 or tuple(weight.shape[:2]) != (channels, 1):
        raise ValueError(
            f"weight: expected [C, 1, KH, KW] for x with C = {channels} channels, got shape "
            f"{tuple(weight.shape)}"
        )
    kind = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    images = x.unsqueeze(0) if x.ndim == 3 else x
    samples = window(tuple(weight.shape[2:]), stride, padding, dilation)
    tensors = [value for value in (x, weight, bias) if value is not None]
    shape, strides = calls.known(images)
    fwd, bwd = pick(
        *(calls.static(implementation), x.device, shape, x.dtype, tuple(weight.shape[2:]), samples),
        *(bias is not None, strides),
        differentiated=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
    )
    if calls.names((fwd, bwd)) == ["eager"]:
        return F.conv2d(x, weight, bias, stride, padding, dilation, channels)
    y = apply(images, weight, bias, False, fwd, bwd)
    return y.squeeze(0) if x.ndim == 3 else y


def window(
    taps: tuple[int, ...],
    stride: int | Pair,
    padding: str | int | Pair,
    dilation: int | Pair,
) -> Window:
    """The samples that taps read.

    Args:
        taps: Height and width of the kernel.
        stride: As PyTorch's function takes it.
        padding: Likewise.
        dilation: Likewise.

    Example:
        >>> window((3, 4), 1, "same", 1).pads
        ((1, 1), (1, 2))
    """
    steps, gaps = _pair(stride), _pair(dilation)
    if padding == "same":
        spans = [gap * (k - 1) for k, gap in zip(taps, gaps, strict=True)]
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(n, n) for n in _pair(0 if isinstance(padding, str) else padding)]
    return Window(stride=steps, pads=(sides[0], sides[1]), dilation=gaps)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


# What it returns is a constant of a traced program: it asks the environment, imports, and measures.
@calls.constant
def pick(
    implementation: str | tuple[str, ...] | None,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    taps: tuple[int, ...],
    window: Window,
    bias: bool = False,
    strides: tuple[int, ...] | None = None,
    differentiated: bool = True,
) -> tuple[str, str]:
    """Picks what computes a call, forward and backward: the implementations' names.

    Args:
        implementation: Filter on the implementations, see `pallas_kernels.dispatch`.
        device: Of x.
        shape: Of x, `[N, C, H, W]`. An empty batch is nobody's problem: nothing is launched.
        dtype: Of x.
        taps: Height and width of the kernel.
        window: The samples that they read.
        bias: Whether there is one.
        strides: Of x; None where they are not known, and nothing is measured.
        differentiated: Whether there is a backward pass, see `calls.picked`.

    Raises:
        ValueError: As `calls.picked`.
        NotImplementedError: As `calls.picked`.

    Example:
        >>> window = Window(pads=((1, 1), (1, 1)))
        >>> pick("eager", torch.device("cpu"), (2, 4, 8, 8), torch.float32, (3, 3), window)
        ('eager', 'eager')
    """
    n, c, h, w = shape
    sizes = max(n, 1), h, w, c
    problem = Problem(sizes, calls.dtype_name(dtype), (taps[0], taps[1]), window)
    last = strides is not None and calls.channels_last(strides)
    return calls.picked(
        *(OPERATOR, (implementation, implementation), device, problem, _measurement),
        *(dtype, bias, last, strides is not None),
        differentiated=differentiated,
    )


def _measurement(
    direction: str,
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    bias: bool,
    last: bool,
    measurable: bool,
) -> measuring.TorchMeasurement:
    """Runs and times an implementation on tensors like those of a call."""
    n, h, w, c = problem.shape
    k = problem.kernel_size[0]

    def image(draw: measuring.Draw) -> Tensor:
        x = draw((n, h, w, c), dtype).movedim(-1, 1)
        return x if last else x.contiguous()

    def inputs(draw: measuring.Draw) -> tuple[Tree, ...]:
        weight = draw((c, 1, *problem.kernel_size), dtype)
        return image(draw), image(draw), weight, draw((c,), dtype) if bias else None

    def run(
        module: backend.Implementation,
        config: TuningParams,
        x: Tensor,
        dy: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> list[Tensor]:
        timed = cast(_Backend, module)
        if direction == "fwd":
            return [timed.forward(x, weight, bias, transpose=False)]
        dx = timed.forward(dy, weight, None, transpose=True)
        return [dx, *timed.weight_grad(x, dy, kernel_size=k, biased=bias is not None)]

    return measuring.TorchMeasurement(
        run,
        inputs,
        device,
        OPERATOR.module("eager"),
        {"bias": bias, "channels_last": last},
        measurable,
    )


@torch.library.custom_op("flash_wtconv::depthwise", mutates_args=())
def apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, transpose: bool, fwd: str, bwd: str
) -> Tensor:
    """The convolution or its transpose; the arguments as the module has them."""
    if x.numel() == 0:
        return torch.empty_like(x)
    y = calls.computed(
        *(OPERATOR, "fwd", fwd, x.device, _problem(x, weight.shape[-1])),
        lambda module, config: module.forward(x, weight, bias, transpose=transpose),
    )
    return calls.formatted(y, x)


@apply.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("flash_wtconv::depthwise_weight_grad", mutates_args=())
def weight_grad(x: Tensor, dy: Tensor, kernel_size: int, biased: bool, bwd: str) -> list[Tensor]:
    """Gradients of the weight, and of a bias if there is one, in float32 or better.

    Bilinear in x and dy, but for the bias's, which is linear in dy.
    """
    if x.numel() == 0:
        return [each.zero_() for each in _empty_gradients(x, kernel_size, biased)]
    found = calls.computed(
        *(OPERATOR, "bwd", bwd, x.device, _problem(x, kernel_size)),
        lambda module, config: module.weight_grad(x, dy, kernel_size=kernel_size, biased=biased),
    )
    return [each.to(calls.accumulation_dtype(x)).contiguous() for each in found]


@weight_grad.register_fake
def _(x: Tensor, dy: Tensor, kernel_size: int, biased: bool, bwd: str) -> list[Tensor]:
    return _empty_gradients(x, kernel_size, biased)


def _empty_gradients(x: Tensor, kernel_size: int, biased: bool) -> list[Tensor]:
    shapes = [(x.shape[1], 1, kernel_size, kernel_size), (x.shape[1],)][: 1 + biased]
    return [x.new_empty(shape, dtype=calls.accumulation_dtype(x)) for shape in shapes]


def _problem(x: Tensor, kernel_size: int) -> Problem:
    """The call of a custom operator, whose padding keeps the size."""
    n, c, h, w = x.shape
    sides = (kernel_size - 1) // 2, kernel_size // 2
    taps, window = (kernel_size, kernel_size), Window(pads=(sides, sides))
    return Problem((n, h, w, c), calls.dtype_name(x.dtype), taps, window)


def _keep(ctx: Any, inputs: tuple[Tree, ...], output: Tensor) -> None:
    x, weight, bias, ctx.transpose, _, ctx.bwd = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tree, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dx = dweight = dbias = None
    if needs_weight:
        pair = (dy, x) if ctx.transpose else (x, dy)
        # Transposed, the sum on the way is that of x.
        biased = needs_bias and not ctx.transpose
        dweight, *sums = weight_grad(*pair, weight.shape[-1], biased, ctx.bwd)
        dweight, dbias = dweight.to(weight.dtype), next(iter(sums), None)
    if needs_x:
        dx = apply(dy, weight, None, not ctx.transpose, ctx.bwd, ctx.bwd)
    if needs_bias:
        dbias = (calls.summed(dy) if dbias is None else dbias).to(ctx.bias)
    return dx, dweight, dbias, None, None, None


apply.register_autograd(_backward, setup_context=_keep)


def _keep_pair(ctx: Any, inputs: tuple[Tree, ...], output: Tensor) -> None:
    x, dy, _, _, ctx.bwd = inputs
    ctx.save_for_backward(x, dy)


def _backward_of_weight(ctx: Any, gradients: list[Tensor]) -> tuple[Tree, ...]:
    x, dy = ctx.saved_tensors
    needs_x, needs_dy, *_ = ctx.needs_input_grad
    dweight, *biases = gradients
    dx = apply(dy, dweight, None, True, ctx.bwd, ctx.bwd) if needs_x else None
    bias = next(iter(biases), None)
    ddy = apply(x, dweight, bias, False, ctx.bwd, ctx.bwd) if needs_dy else None
    return dx, ddy, None, None, None


weight_grad.register_autograd(_backward_of_weight, setup_context=_keep_pair)


@apply.register_vmap
def _(info: Any, in_dims: tuple[Tree, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Examples of x alone fold into its batch; of the weight they are calls of their own."""
    of_x, *others = in_dims
    if of_x is not None and others[:2] == [None, None]:
        x = arguments[0].movedim(of_x, 0)
        return apply(x.flatten(0, 1), *arguments[1:]).unflatten(0, x.shape[:2]), 0
    found = [apply(*calls.examples(arguments, in_dims, i)) for i in range(info.batch_size)]
    return torch.stack(found), 0


@weight_grad.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[list[Tensor], list[int]]:
    found = [weight_grad(*calls.examples(arguments, in_dims, i)) for i in range(info.batch_size)]
    stacked = [torch.stack(examples) for examples in zip(*found, strict=True)]
    return stacked, [0] * len(stacked)
