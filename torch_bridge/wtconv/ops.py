"""The wavelet convolution as PyTorch operators, and the choice of what computes them.

`flash_wtconv::wtconv`, `wtconv_weight_grad` and `wtconv_scaled_grad` are custom operators with fake
kernels and registered derivatives, so `torch.compile` and `torch.export` keep them whole. Haar is
orthonormal, so the input gradient is the operator itself, transposed; the weight gradient
correlates the coefficients of x with those of dy. The scales are folded into the taps before, where
PyTorch differentiates that, or left to kernels that multiply by them when they read the taps, and
that end the gradients of both: x and the taps, or the parameters, are all that a backward pass
keeps. Everything is linear in x, in the kernels and in the scales, so second derivatives are the
same operators again.

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

One that multiplies by scales has also

    multiplies(shape, strides, dtype, kernel_size, device) -> whether it does for such an x
    gradients(x, dy, taps, bias, scales, *, wavelet) -> those of all taps, of all scales, and of the
        bias if there is one, in their shapes and dtypes, contiguous; with the parameters as well

and its `forward` takes `scales=` there, one a tap in any shape; taps, scales and bias are then a
layer's own parameters, of any dtypes.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pallas_kernels.common.types import Keywords, Tree
from pallas_kernels.dispatch import Operator, backend
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.wtconv.problem import Problem
from torch_bridge.runtime import calls, measuring
from torch_bridge.wtconv import scaling


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


_Asked = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, int, torch.device]
"""The arguments of an implementation's `multiplies`: x's shape, strides, dtype; k; the device."""


class _Multiplying(_Backend, Protocol):
    """An implementation that multiplies by the scales itself."""

    def gradients(
        self,
        x: Tensor,
        dy: Tensor,
        taps: Sequence[Tensor],
        bias: Tensor | None,
        scales: Sequence[Tensor],
        *,
        wavelet: str,
        **config: int,
    ) -> Sequence[Tensor]:
        """The gradients of kernels, scales and bias."""


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
            return [_forward(timed, x, taps, bias, [], wavelet, False, params)]
        return [
            _forward(timed, dy, taps, None, [], wavelet, True, params),
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
    taps, scales = [base_weight, *wavelet_weights], [base_scale, *wavelet_scales]
    shape, strides = calls.known(x)
    if not _left_to_kernels(fwd, x.device, shape, strides, x.dtype, base_weight.shape[-1]):
        dtype = calls.accumulation_dtype(x)
        (taps, base_bias), scales = scaling.folded(taps, base_bias, scales, dtype), []
    return apply(x, taps, base_bias, scales, wavelet, False, fwd, bwd)


# See `pick`. Programs of either kind compute any x.
@calls.constant
def _left_to_kernels(
    fwd: str,
    device: torch.device,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: torch.dtype,
    kernel_size: int,
) -> bool:
    """Whether scales are not folded into taps before the operator."""
    name, *_ = calls.parsed(fwd)
    if strides is None:
        return False
    return _multiplies(OPERATOR.module(name), (shape, strides, dtype, kernel_size, device))


def _multiplies(module: backend.Implementation, asked: _Asked) -> bool:
    """The answer of an implementation's `multiplies`, False where it has none."""
    answer = getattr(module, "multiplies", None)
    return answer is not None and answer(*asked)


@torch.library.custom_op("flash_wtconv::wtconv", mutates_args=())
def apply(
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    scales: Sequence[Tensor],
    wavelet: str,
    transpose: bool,
    fwd: str,
    bwd: str,
) -> Tensor:
    """The operator or its transpose; the arguments as the module has them.

    Without scales they are in the taps and the bias. With scales a transpose has no bias.
    """
    assert bias is None or not (scales and transpose), "a transpose with scales has no bias"
    if x.numel() == 0:
        return torch.empty_like(x)
    problem = _problem(x.shape, x.dtype, taps[0].shape[-1], len(taps) - 1, wavelet)
    return calls.computed(
        *(OPERATOR, "fwd", fwd, x.device, problem),
        lambda module, config: _forward(module, x, taps, bias, scales, wavelet, transpose, config),
    )


def _forward(
    module: _Backend,
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    scales: Sequence[Tensor],
    wavelet: str,
    transpose: bool,
    config: Mapping[str, int],
) -> Tensor:
    about: Keywords = {"wavelet": wavelet, "transpose": transpose, **config}
    if scales and _multiplies(module, _asked(x, taps)):
        about["scales"] = scales
    elif scales:
        taps, bias = scaling.folded(taps, bias, scales, calls.accumulation_dtype(x))
    return calls.formatted(module.forward(x, taps, bias, **about), x)


def _asked(x: Tensor, taps: Sequence[Tensor]) -> _Asked:
    """The arguments of an implementation's `multiplies`."""
    return tuple(x.shape), x.stride(), x.dtype, taps[0].shape[-1], x.device


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


@torch.library.custom_op("flash_wtconv::wtconv_scaled_grad", mutates_args=())
def scaled_grad(
    x: Tensor,
    dy: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    scales: Sequence[Tensor],
    wavelet: str,
    bwd: str,
) -> list[Tensor]:
    """Gradients of kernels, of scales, and of a bias if there is one, in their dtypes.

    They are those of folded taps and the scaled bias, times what these are made of.
    """
    if x.numel() == 0:
        return [one.new_zeros(one.shape) for one in _parameters(taps, bias, scales)]
    kernel_size, levels = taps[0].shape[-1], len(taps) - 1
    problem = _problem(x.shape, x.dtype, kernel_size, levels, wavelet)

    def compute(module: _Backend, config: Mapping[str, int]) -> list[Tensor]:
        if _multiplies(module, _asked(x, taps)):
            kernels = cast(_Multiplying, module)
            return list(kernels.gradients(x, dy, taps, bias, scales, wavelet=wavelet, **config))
        about = kernel_size, levels, wavelet, bias is not None
        found = _weight_grad(module, x, dy, *about, config)
        own, _, offset = _parts(found, levels + 1, False)
        return scaling.gradients(own, offset, taps, bias, scales)

    return calls.computed(OPERATOR, "bwd", bwd, x.device, problem, compute)


@scaled_grad.register_fake
def _(
    x: Tensor,
    dy: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    scales: Sequence[Tensor],
    *_: object,
) -> list[Tensor]:
    return [one.new_empty(one.shape) for one in _parameters(taps, bias, scales)]


def _parameters(
    taps: Sequence[Tensor], bias: Tensor | None, scales: Sequence[Tensor]
) -> list[Tensor]:
    """The parameters in the order of their gradients."""
    return [*taps, *scales, *([] if bias is None else [bias])]


def _parts(
    found: Sequence[Tensor], count: int, scaled: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
    """The gradients of some taps, of as many scales if there are, and of a bias if there is one."""
    end = count * (1 + scaled)
    return found[:count], found[count:end], next(iter(found[end:]), None)


def _keep(ctx: Any, inputs: tuple[Tree, ...], output: Tensor) -> None:
    x, taps, bias, scales, ctx.wavelet, ctx.transpose, _, ctx.bwd = inputs
    ctx.count = len(taps)
    # Scales alone have a gradient that depends on the bias.
    ctx.save_for_backward(x, bias if scales else None, *taps, *scales)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tree, ...]:
    x, bias, *rest = ctx.saved_tensors
    taps, scales = rest[: ctx.count], rest[ctx.count :]
    needs_x, needs_taps, needs_bias, needs_scales, *_ = ctx.needs_input_grad
    dx = dbias = None
    dtaps: Sequence[Tensor | None] = [None] * len(taps)
    dscales: Sequence[Tensor | None] = [None] * len(scales)
    # First, so that what it needs of memory is free again before there is a dx.
    if any(needs_taps) or any(needs_scales):
        pair = (dy, x) if ctx.transpose else (x, dy)
        if scales:
            found = scaled_grad(*pair, taps, bias, scales, ctx.wavelet, ctx.bwd)
        else:
            # Transposed, the sum on the way is that of x.
            biased = needs_bias and not ctx.transpose
            about = taps[0].shape[-1], len(taps) - 1, ctx.wavelet, biased, ctx.bwd
            found = weight_grad(*pair, *about)
        dtaps, dscales, dbias = _parts(found, len(taps), bool(scales))
    if needs_x:
        dx = apply(dy, taps, None, scales, ctx.wavelet, not ctx.transpose, ctx.bwd, ctx.bwd)
    if needs_bias and dbias is None:
        dbias = calls.summed(dy)
        if scales:
            dbias = (dbias * scales[0].to(dbias.dtype).flatten()).to(bias.dtype)
    return dx, dtaps, dbias, dscales, None, None, None, None


apply.register_autograd(_backward, setup_context=_keep)


def _keep_pair(ctx: Any, inputs: tuple[Tree, ...], output: list[Tensor]) -> None:
    x, dy, _, ctx.levels, ctx.wavelet, _, ctx.bwd = inputs
    ctx.save_for_backward(x, dy)


def _backward_of_pair(ctx: Any, gradients: list[Tensor]) -> tuple[Tree, ...]:
    x, dy = ctx.saved_tensors
    needs_x, needs_dy, *_ = ctx.needs_input_grad
    dtaps, _, bias = _parts(gradients, ctx.levels + 1, False)
    return *_second(ctx, x, dy, dtaps, bias, needs_x, needs_dy), None, None, None, None, None


def _second(
    ctx: Any,
    x: Tensor,
    dy: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    needs_x: bool,
    needs_dy: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and dy from those of the gradients of folded taps and bias."""
    names = ctx.bwd, ctx.bwd
    dx = apply(dy, taps, None, [], ctx.wavelet, True, *names) if needs_x else None
    return dx, apply(x, taps, bias, [], ctx.wavelet, False, *names) if needs_dy else None


weight_grad.register_autograd(_backward_of_pair, setup_context=_keep_pair)


def _keep_scaled(ctx: Any, inputs: tuple[Tree, ...], output: list[Tensor]) -> None:
    x, dy, taps, bias, scales, ctx.wavelet, ctx.bwd = inputs
    ctx.save_for_backward(x, dy, bias, *taps, *scales)


def _backward_of_scaled(ctx: Any, gradients: list[Tensor]) -> tuple[Tree, ...]:
    x, dy, bias, *rest = ctx.saved_tensors
    count = len(rest) // 2
    taps, scales = rest[:count], rest[count:]
    of_taps, of_scales, of_bias = _parts(gradients, count, True)
    needs_x, needs_dy, *needs = ctx.needs_input_grad[:5]
    dx = ddy = dbias = None
    dtaps: Sequence[Tensor | None] = [None] * count
    dscales: Sequence[Tensor | None] = [None] * count
    if needs_x or needs_dy:
        # Gradients are products with kernels and with scales, and so are their own two terms.
        dtype = calls.accumulation_dtype(x)
        first, offset = scaling.folded(of_taps, of_bias, scales, dtype)
        more, moved = scaling.folded(taps, bias, of_scales, dtype)
        whole = [a + b for a, b in zip(first, more, strict=True)]
        total = None if offset is None or moved is None else offset + moved
        dx, ddy = _second(ctx, x, dy, whole, total, needs_x, needs_dy)
    if any(needs[0]) or needs[1] or any(needs[2]):
        about = taps[0].shape[-1], count - 1, ctx.wavelet, bias is not None, ctx.bwd
        own, _, offset = _parts(weight_grad(x, dy, *about), count, False)
        found = scaling.gradients(own, offset, of_taps, of_bias, of_scales)
        dtaps, dscales, dbias = _parts(found, count, True)
    return dx, ddy, dtaps, dbias, dscales, None, None


scaled_grad.register_autograd(_backward_of_scaled, setup_context=_keep_scaled)


@apply.register_vmap
def _(
    info: Any,
    in_dims: tuple[Tree, ...],
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    scales: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, int]:
    """A batch of x alone folds into x's own, so that it stays one call."""
    of_x, of_taps, of_bias, of_scales, *_ = in_dims
    if of_x is not None and all(dim is None for dim in (*of_taps, of_bias, *of_scales)):
        x = x.movedim(of_x, 0)
        return apply(x.flatten(0, 1), taps, bias, scales, *rest).reshape(x.shape), 0
    found = [
        apply(
            calls.example(x, of_x, i),
            calls.examples(taps, of_taps, i),
            calls.example(bias, of_bias, i),
            calls.examples(scales, of_scales, i),
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
    return _stacked(
        [
            weight_grad(*calls.examples((x, dy), in_dims[:2], i), *rest)
            for i in range(info.batch_size)
        ]
    )


@scaled_grad.register_vmap
def _(
    info: Any,
    in_dims: tuple[Tree, ...],
    x: Tensor,
    dy: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    scales: Sequence[Tensor],
    *rest: Any,
) -> tuple[list[Tensor], list[int]]:
    """One call after the other, as above."""
    of_x, of_dy, of_taps, of_bias, of_scales, *_ = in_dims
    return _stacked(
        [
            scaled_grad(
                *calls.examples((x, dy), (of_x, of_dy), i),
                calls.examples(taps, of_taps, i),
                calls.example(bias, of_bias, i),
                calls.examples(scales, of_scales, i),
                *rest,
            )
            for i in range(info.batch_size)
        ]
    )


def _stacked(found: list[list[Tensor]]) -> tuple[list[Tensor], list[int]]:
    """The results of some calls as `vmap` takes them."""
    stacked = [torch.stack(examples) for examples in zip(*found, strict=True)]
    return stacked, [0] * len(stacked)
