"""A convolution with its norm as a PyTorch operator, and the choice of what computes it.

`flash_wtconv::conv2d_instance_norm` is a custom operator with a fake kernel and a registered
derivative, so `torch.compile` and `torch.export` keep it whole. Saved are x, w, the convolution's
output and its statistics, scale and bias, and with an activation the residual. The backward pass is
`flash_wtconv::instance_norm_gradients`, then PyTorch's of a convolution, and second derivatives are
theirs. Where PyTorch's own convolution computes there is no custom operator of it.

An implementation is a module of `torch_bridge.stylize.convolution` with `unavailable(platform)` and
`check(direction, problem)`, as `pallas_kernels.dispatch.Operator` asks for them, and

    forward(x, w, scale, bias, residual, *, window, eps, relu) -> y, z, statistics

with the parameters, integers, that its `search_space(direction, problem)` offers, where it has one,
for `x [N, C, H, W]` of any strides, `w [NF, C, HF, WF]` of x's dtype, `window`, see `eager.Padded`,
and the others as `stylize.ops` has them; z is the convolution's output.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from pallas_kernels.common.types import Keywords, Tree
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.dispatch import Operator, backend
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.stylize.convolution.problem import Problem
from torch_bridge.runtime import calls, measuring
from torch_bridge.runtime.device import kind
from torch_bridge.stylize import ops as norm
from torch_bridge.stylize.convolution import eager
from torch_bridge.stylize.convolution.eager import Padded
from torch_bridge.stylize.eager import statistics_backward


class Implementation(StrEnum):
    """Implementations of a convolution with its norm."""

    TRITON = "triton"
    EAGER = "eager"


class _Backend(backend.Implementation, Protocol):
    """An implementation; the module's docstring says what it takes."""

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        scale: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        *,
        window: Padded,
        eps: float,
        relu: bool,
        **config: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The norm, the convolution's output, and its statistics."""


OPERATOR = Operator(
    name="torch_conv2d_instance_norm",
    package="torch_bridge.stylize.convolution",
    implementations=Implementation,
    # PyTorch's convolution is cuDNN's, and the norm behind it picks for itself; where Triton's was
    # measured to be faster, the table of that kind of GPU goes before this.
    rule={"cuda": ("eager", "triton"), "mps": ("eager",), "cpu": ("eager",)},
    directions={"fwd": ("forward",)},
)


# What it returns is a constant of a traced program: it asks the environment, imports, and measures.
@calls.constant
def pick(
    implementation: str | tuple[str, ...] | None,
    device: torch.device,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    filters: tuple[int, ...],
    dtype: torch.dtype,
    window: tuple[tuple[int, int], tuple[int, int, int, int], bool],
    relu: bool,
    residual: bool,
) -> str:
    """Picks what computes a call: an implementation's name and parameters.

    Args:
        implementation: Filter on the implementations, see `pallas_kernels.dispatch`.
        device: Of x.
        shape: Of x, `[N, C, H, W]`.
        strides: Of x; None where they are not known, and nothing is measured.
        filters: Shape of the filters.
        dtype: Of x and the filters.
        window: What `eager.Padded` holds.
        relu: Whether there is an activation.
        residual: Whether there is a residual.

    Raises:
        ValueError: An unknown name in the environment's variable.
        NotImplementedError: No allowed implementation can run here; says why for each. Or
            `torch.func` differentiates, and what would run is a custom operator.

    Example:
        >>> window = (1, 1), (0, 0, 0, 0), False
        >>> sizes = (2, 4, 8, 8), None, (6, 4, 3, 3)
        >>> pick("eager", torch.device("cpu"), *sizes, torch.float32, window, True, False)
        'eager'
    """
    request = OPERATOR.request("fwd", implementation, device.type, kind(device))
    own = Padded(*window)
    problem = _problem(shape, filters, dtype, own, relu, residual)
    last = strides is not None and calls.channels_last(strides)
    rest = dtype, own, last, strides is not None
    text = calls.chosen(request, device, problem, _measurement, *rest)
    calls.check_func([text])
    return text


def _problem(
    shape: Sequence[int],
    filters: Sequence[int],
    dtype: torch.dtype,
    window: Padded,
    relu: bool,
    residual: bool,
) -> Problem:
    """The call as the kernels compute it."""
    n, c, h, w = shape
    left, right, top, bottom = window.pads
    return Problem(
        # An empty batch is nobody's problem: nothing is launched.
        (max(n, 1), h, w, c),
        calls.dtype_name(dtype),
        *(filters[2], filters[3], filters[0]),
        Window(window.stride, ((top, bottom), (left, right)), reflect=window.reflect),
        "relu" if relu else None,
        residual,
    )


def _measurement(
    direction: str,
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    window: Padded,
    last: bool,
    measurable: bool,
) -> measuring.TorchMeasurement:
    """Runs and times an implementation on tensors like those of a call."""
    n, h, w, c = problem.shape
    nf = problem.features
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def image(draw: measuring.Draw, shape: Sequence[int]) -> Tensor:
        x = draw(tuple(shape), dtype).movedim(-1, 1)
        return x if last else x.contiguous()

    def inputs(draw: measuring.Draw) -> tuple[Tree, ...]:
        filters = draw((nf, c, problem.kernel_height, problem.kernel_width), dtype)
        residual = image(draw, problem.norm.shape) if problem.residual else None
        return image(draw, (n, h, w, c)), filters, draw((n, nf), acc), draw((n, nf), acc), residual

    def run(
        module: backend.Implementation, config: TuningParams, *tensors: Tensor | None
    ) -> list[Tensor]:
        relu = problem.activation == "relu"
        timed: Any = module
        return [timed.forward(*tensors, window=window, eps=1e-5, relu=relu, **dict(config))[0]]

    return measuring.TorchMeasurement(
        run,
        inputs,
        device,
        OPERATOR.module("eager"),
        {"channels_last": last},
        measurable,
    )


@torch.library.custom_op("flash_wtconv::conv2d_instance_norm", mutates_args=())
def apply(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
    reflect: bool,
    eps: float,
    relu: bool,
    fwd: str,
    bwd: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the convolution's output and its statistics; the arguments as the module has them.

    `bwd` says what computes the norm's backward pass.
    """
    window = _padded(stride, pads, reflect)
    made = _empty(x, w, scale, window)
    if x.numel() == 0:
        return made
    problem = _problem(x.shape, w.shape, x.dtype, window, relu, residual is not None)

    def compute(module: _Backend, config: Mapping[str, int]) -> tuple[Tensor, Tensor, Tensor]:
        keywords: Keywords = {"window": window, "eps": eps, "relu": relu, **config}
        return module.forward(x, w, scale, bias, residual, **keywords)

    found = calls.computed(OPERATOR, "fwd", fwd, x.device, problem, compute)
    y, z, statistics = (_formatted(one, like) for one, like in zip(found, made, strict=True))
    return y, z, statistics


@apply.register_fake
def _(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
    reflect: bool,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, w, scale, _padded(stride, pads, reflect))


def _padded(stride: Sequence[int], pads: Sequence[int], reflect: bool) -> Padded:
    left, right, top, bottom = pads
    return Padded((stride[0], stride[1]), (left, right, top, bottom), reflect)


def output_size(
    shape: Sequence[int], filters: Sequence[int], window: Padded
) -> tuple[int, int, int, int]:
    """The shape `[N, NF, H, W]` of a convolution's output.

    Args:
        shape: Of x.
        filters: Of w.
        window: Which samples are read.

    Example:
        >>> output_size((2, 4, 9, 8), (16, 4, 3, 3), Padded((2, 1), (0, 0, 1, 1), False))
        (2, 16, 5, 6)
    """
    left, right, top, bottom = window.pads
    height, width = (
        (n + around - k) // step + 1
        for n, around, k, step in zip(
            shape[2:], (top + bottom, left + right), filters[2:], window.stride, strict=True
        )
    )
    return shape[0], filters[0], height, width


def _empty(x: Tensor, w: Tensor, scale: Tensor, window: Padded) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, not computed: images in x's memory format, and statistics."""
    last = calls.channels_last(x.stride())
    form = torch.channels_last if last else torch.contiguous_format
    size = output_size(x.shape, w.shape, window)
    y, z = (torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form) for _ in "yz")
    return y, z, scale.new_empty((x.shape[0], 3, w.shape[0]))


def _formatted(found: Tensor, like: Tensor) -> Tensor:
    """The outputs that were computed, in the strides that were told."""
    return found if found.stride() == like.stride() else like.copy_(found)


def _keep(ctx: Any, inputs: tuple[Tree, ...], output: tuple[Tensor, ...]) -> None:
    x, w, scale, bias, residual, stride, pads, reflect, _, ctx.relu, _, ctx.bwd = inputs
    ctx.window = _padded(stride, pads, reflect)
    ctx.set_materialize_grads(False)
    _, z, statistics = output
    kept = residual if ctx.relu else None
    ctx.save_for_backward(x, w, z, statistics, scale, bias, kept)


def _backward(
    ctx: Any, dy: Tensor | None, dz: Tensor | None, dstatistics: Tensor | None
) -> tuple[Tree, ...]:
    x, w, z, statistics, scale, bias, residual = ctx.saved_tensors
    others: list[Tensor | None] = [None] * 3
    terms = [] if dz is None else [dz]
    if dy is not None:
        known = z, statistics, scale, bias, residual
        # Without an activation the residual's gradient is the output's, which nobody copies.
        through, *others = [*norm.gradients(*known, dy, ctx.relu, ctx.bwd), dy][:4]
        terms.append(through)
    if dstatistics is not None:
        terms.append(statistics_backward(z, statistics, dstatistics))
    needs = ctx.needs_input_grad[:5]
    slopes: Sequence[Tensor | None] = (None, None)
    if terms and any(needs[:2]):
        total = sum(terms[1:], terms[0])
        with calls.without_autocast(x.device):
            slopes = eager.backward(x, w, total, ctx.window, needs[:2])
    each = zip([*slopes, *others], needs, strict=True)
    return *(value if need else None for value, need in each), *[None] * 7


apply.register_autograd(_backward, setup_context=_keep)


@apply.register_vmap
def _(
    info: Any, in_dims: tuple[Tree, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    """A batch folds into x's own, where the filters are shared; else it is a call for each."""
    size, tensors, rest = info.batch_size, arguments[:5], arguments[5:]
    if in_dims[1] is None:
        x, w, *own = tensors
        folded_x, *folded = norm.folded(size, (in_dims[0], *in_dims[2:5]), (x, *own))
        found = apply(folded_x, w, *folded, *rest)
        return tuple(value.unflatten(0, (size, -1)) for value in found), (0, 0, 0)
    each = [apply(*calls.examples(tensors, in_dims[:5], i), *rest) for i in range(size)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0)
