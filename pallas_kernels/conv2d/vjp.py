"""The operator's custom VJP: any forward implementation pairs with any backward one.

The convolution is linear in x and linear in w, so it has two transposes, and the derivatives of
all three are the other two, of every order. Saved are x and w, and for the activation its output
(ReLU) or its input (GELU), in the output's dtype.

An implementation is a module with

    forward(x, w, bias, *, window, activation, out_dtype, precision, config) -> y
    input_grad(dy, w, *, shape, dtype, window, precision, config) -> dx [N, *shape]
    weight_grad(x, dy, *, shape, dtype, window, precision, config) -> dw [*shape]

for `x [N, H, W, C]`, `w [HF, WF, C / groups, NF]` of one dtype and `bias [NF]` or None, or the
layout "nchw_fchw" of `problem.Window`. Modules whose functions JAX can differentiate say so with
`DIFFERENTIABLE = True`; where sums are of x's dtype they are called bare in the backward pass, and
altogether if they compute both directions, so that `jvp` and `hessian` work.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.common.vmap import vmap_folding, vmap_sequential
from pallas_kernels.conv2d.activations import activate
from pallas_kernels.conv2d.problem import Problem, TileConfig, Window
from pallas_kernels.dispatch import Candidate, Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams

Residuals = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


class Kernels(Protocol):
    """The functions of an implementation, which the docstring of this module describes."""

    forward: Callable[..., jax.Array]
    input_grad: Callable[..., jax.Array]
    weight_grad: Callable[..., jax.Array]


class Plan(NamedTuple):
    """The static choices of one call: what computes it, and what is asked of its backward pass.

    Attributes:
        module: The implementation that computes the operator.
        config: Its tiles, None for those that it takes unasked.
        window: Which samples a tap reads.
        precision: The precision of products on matrix units.
        given: The tiles that the caller gave, for the backward pass too.
        backward: The request by which the backward rule chooses an implementation; None in a
            plan that is timed, which nobody differentiates.
    """

    module: Implementation
    config: TileConfig | None
    window: Window
    precision: jax.lax.Precision | None
    given: TileConfig | None
    backward: Request | None

    def problem(self, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype) -> Problem:
        """The description of a convolution of these arrays."""
        height, width, _, features = self.window.filters(w.shape)
        images = self.window.images(x.shape)
        return Problem(images, x.dtype, height, width, features, self.window, out_dtype)

    def for_backward(self, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype) -> "Plan":
        """The plan of the backward pass, whose implementation is chosen here.

        Args:
            x: Images.
            w: Filters.
            out_dtype: The dtype of the output.

        Raises:
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        assert self.backward is not None
        operator, problem = self.backward.operator, self.problem(x, w, out_dtype)
        static = problem, False, None, self.precision, self.given
        chosen = self.backward.choose(problem, measurement, operator, "bwd", *static)
        return self._replace(
            module=operator.module(chosen.implementation), config=tiles(self.given, chosen)
        )

    def static_kwargs(self) -> dict[str, object]:
        """The keyword arguments of every function of an implementation."""
        return {"window": self.window, "precision": self.precision, "config": self.config}


def tiles(given: TileConfig | None, chosen: Candidate) -> TileConfig | None:
    """The tiles that the caller gave, else those that were measured; None where neither is."""
    return given or (TileConfig(**dict(chosen.config)) if chosen.config else None)


@partial(jax.jit, static_argnums=(0, 1, 2))
def conv2d(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """The convolution with its epilogue."""
    arrays = x, w, bias
    # JAX knows every derivative of its own operations, forward mode too.
    apply = _forward if _bare(plan.module, x) and _bare_backward(plan, x, w, out_dtype) else _apply
    return apply(plan, activation, out_dtype, *vary_like(arrays, arrays))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _apply(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    return _forward(plan, activation, out_dtype, x, w, bias)


def _apply_fwd(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> tuple[jax.Array, Residuals]:
    # Reverse mode over reverse mode differentiates this: a kernel has only the custom rule.
    apply = _forward if _bare(plan.module, x) else _apply
    kept = None
    if activation == "gelu":
        kept = apply(plan, None, out_dtype, x, w, bias)
        y = activate(kept.astype(accumulation_dtype(out_dtype)), activation).astype(out_dtype)
    else:
        y = apply(plan, activation, out_dtype, x, w, bias)
        if activation is not None:
            kept = y
    # The backward pass needs to know the dtype of the bias, and nothing else of it.
    return y, (x, w, None if bias is None else bias[:0], kept)


def _apply_bwd(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    residuals: Residuals,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, w, bias, kept = residuals
    if kept is not None:
        acc = accumulation_dtype(out_dtype)
        _, pullback = jax.vjp(partial(activate, activation=activation), kept.astype(acc))
        dy = pullback(dy.astype(acc))[0].astype(out_dtype)
    plan = plan.for_backward(x, w, out_dtype)
    bare = _bare(plan.module, x)
    input_grad, weight_grad = (_dx, _dw) if bare else (_input_grad, _weight_grad)
    dx = input_grad(plan, x.shape[1:], x.dtype, dy, w)
    dw = weight_grad(plan, w.shape, w.dtype, x, dy)
    if bias is None:
        return dx, dw, None
    *pixels, _ = plan.window.images(range(4))
    dbias = dy.sum(tuple(pixels), dtype=accumulation_dtype(dy.dtype))
    return dx, dw, dbias.astype(bias.dtype)


_apply.defvjp(_apply_fwd, _apply_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _input_grad(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, dy: jax.Array, w: jax.Array
) -> jax.Array:
    return _dx(plan, shape, dtype, dy, w)


def _input_grad_fwd(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, dy: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _input_grad(plan, shape, dtype, dy, w), (dy, w)


def _input_grad_bwd(
    plan: Plan,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    residuals: tuple[jax.Array, jax.Array],
    x: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    dy, w = residuals
    ddy = _apply(plan, None, dy.dtype, x, w, None)
    return ddy, _weight_grad(plan, w.shape, w.dtype, x, dy)


_input_grad.defvjp(_input_grad_fwd, _input_grad_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weight_grad(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, x: jax.Array, dy: jax.Array
) -> jax.Array:
    return _dw(plan, shape, dtype, x, dy)


def _weight_grad_fwd(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, x: jax.Array, dy: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _weight_grad(plan, shape, dtype, x, dy), (x, dy)


def _weight_grad_bwd(
    plan: Plan,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    residuals: tuple[jax.Array, jax.Array],
    w: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, dy = residuals
    ddy = _apply(plan, None, dy.dtype, x, w, None)
    return _input_grad(plan, x.shape[1:], x.dtype, dy, w), ddy


_weight_grad.defvjp(_weight_grad_fwd, _weight_grad_bwd)


def measurement(
    operator: Operator,
    direction: str,
    problem: Problem,
    bias: bool,
    activation: str | None,
    precision: jax.lax.Precision | None,
    config: TileConfig | None,
) -> JaxMeasurement:
    """The measurement that runs and times an implementation on arrays like those of a call.

    Args:
        operator: The operator, in JAX.
        direction: "fwd", or "bwd", for which neither bias nor activation counts.
        problem: The call.
        bias: Whether it has a bias.
        activation: Its activation.
        precision: The precision of products on matrix units.
        config: The tiles that the caller gave.

    Returns:
        A measurement of the problem.
    """
    window = problem.window
    n, *size, channels = problem.shape
    taps = problem.kernel_height, problem.kernel_width
    output = window.laid_out(n, *window.output(size, taps), problem.features)
    filters = window.filters_laid_out(*taps, channels // window.groups, problem.features)
    x = jax.ShapeDtypeStruct(window.laid_out(*problem.shape), problem.dtype)
    w = jax.ShapeDtypeStruct(filters, problem.dtype)
    last: jax.ShapeDtypeStruct | None = jax.ShapeDtypeStruct(output, problem.out_dtype)
    if direction == "fwd":
        acc = accumulation_dtype(problem.dtype)
        last = jax.ShapeDtypeStruct((problem.features,), acc) if bias else None

    def run(module: Implementation, found: TuningParams) -> Callable[..., Tree]:
        chosen = tiles(config, Candidate("", found))
        plan = Plan(module, chosen, window, precision, config, backward=None)
        return timed_function(plan, direction, activation, jnp.dtype(problem.out_dtype))

    static: Json = {"precision": precision and precision.name, "config": config and list(config)}
    if direction == "fwd":
        static |= {"bias": bias, "activation": activation}
    return JaxMeasurement(run, (x, w, last), operator.module("xla"), static)


def timed_function(
    plan: Plan, direction: str, activation: str | None, out_dtype: jnp.dtype
) -> Callable[..., Tree]:
    """The function of arrays that a plan's implementation computes in one direction.

    Args:
        plan: The plan of the call.
        direction: "fwd", a function of x, w and the bias, or "bwd", of x, w and dy.
        activation: The activation of the forward pass.
        out_dtype: The dtype of its output.

    Returns:
        The function: of the output, or of the gradients of x and w.
    """
    if direction == "fwd":
        return partial(_forward, plan, activation, out_dtype)

    def backward(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        dx = _dx(plan, x.shape[1:], x.dtype, dy, w)
        return dx, _dw(plan, w.shape, w.dtype, x, dy)

    return backward


def _forward(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    run = partial(
        cast(Kernels, plan.module).forward,
        activation=activation,
        out_dtype=out_dtype,
        **plan.static_kwargs(),
    )
    return run(x, w, bias) if plan.module.DIFFERENTIABLE else vmap_folding(run)(x, w, bias)


def _dx(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, dy: jax.Array, w: jax.Array
) -> jax.Array:
    run = partial(
        cast(Kernels, plan.module).input_grad, shape=shape, dtype=dtype, **plan.static_kwargs()
    )
    return run(dy, w) if plan.module.DIFFERENTIABLE else vmap_folding(run)(dy, w)


def _dw(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, x: jax.Array, dy: jax.Array
) -> jax.Array:
    run = partial(
        cast(Kernels, plan.module).weight_grad, shape=shape, dtype=dtype, **plan.static_kwargs()
    )
    return run(x, dy) if plan.module.DIFFERENTIABLE else vmap_sequential(run)(x, dy)


def _bare(module: Implementation, x: jax.Array) -> bool:
    """Whether JAX itself differentiates; it cannot transpose sums of a wider dtype than x's."""
    return module.DIFFERENTIABLE and x.dtype == accumulation_dtype(x.dtype)


def _bare_backward(plan: Plan, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype) -> bool:
    """Whether the backward pass would choose what computes the output, without measuring."""
    if plan.backward is None:
        return False
    decided = plan.backward.decided(plan.problem(x, w, out_dtype))
    return decided is not None and plan.backward.operator.module(decided) is plan.module
