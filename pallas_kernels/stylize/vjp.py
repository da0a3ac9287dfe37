"""The operator's derivatives: any forward implementation pairs with any backward one.

The norm is not linear in x, but its derivative is linear in the tangents, and the transpose of that
is what the backward kernels compute. Both are functions of what is saved: x, its statistics, scale,
bias and, where an activation's slope depends on it, the residual. Plain JAX differentiates them for
derivatives of higher order, in reverse and in forward mode.

An implementation is a module with

    forward(x, scale, bias, residual, *, eps, activation) -> y, statistics
    backward(x, statistics, scale, bias, residual, dy, *, activation)
        -> dx, dscale, dbias, and the gradient of the residual or None

for `x [N, H, W, C]`, statistics `[N, 3, C]` as `formulas` has them, scale and bias `[N, C]`, all in
the dtype of accumulation, and a residual of x's shape and dtype or None; the backward pass gets it
where there is an activation alone. Modules that JAX can look into, and so map with `vmap`, say so
with `DIFFERENTIABLE = True`. Those that normalise what a convolution has left the moments of have

    normalise(x, tiles, scale, bias, residual, *, eps, activation) -> y, statistics

for `tiles`, the moments of its tiles, see `conv2d.moments`; `convolution` is made of it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement, moved_here
from pallas_kernels.common.multilinear import multilinear
from pallas_kernels.common.types import Keywords, Tree
from pallas_kernels.common.vmap import vmap_folding
from pallas_kernels.dispatch import Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.stylize.formulas import (
    Gradients,
    Known,
    pulled,
    pushed,
    statistics_tangent,
)
from pallas_kernels.stylize.problem import Problem

Residual = jax.Array | None
Primals = tuple[jax.Array, jax.Array, jax.Array, Residual]
Output = tuple[jax.Array, jax.Array]
"""The norm and the statistics."""
Tangent = jax.Array | SymbolicZero | None


class Kernels(Protocol):
    """The functions of an implementation, which the docstring of this module describes."""

    forward: Callable[..., Output]
    backward: Callable[..., Tree]


class Plan(NamedTuple):
    """The static choices of one call: what computes it, and what is asked of its backward pass.

    Attributes:
        module: The implementation that computes the operator.
        config: The parameters of its search space.
        eps: Is added to the variance.
        activation: None or "relu".
        backward: The request by which the backward rule chooses an implementation; None in a
            plan that is timed, which nobody differentiates.
    """

    module: Implementation
    config: TuningParams
    eps: float
    activation: str | None
    backward: Request | None

    def for_backward(self, known: Known) -> "Plan":
        """The plan of the backward pass, whose implementation is chosen here, where it is called.

        Args:
            known: The arrays that the derivative is taken at.

        Raises:
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        assert self.backward is not None
        backward = moved_here(self.backward)
        x, operator = known.x, backward.operator
        problem = Problem(x.shape, x.dtype, self.activation, known.residual is not None)
        chosen = backward.choose(problem, measurement, operator, "bwd", problem)
        return self._replace(module=operator.module(chosen.implementation), config=chosen.config)


@partial(jax.jit, static_argnums=0)
def instance_norm(
    plan: Plan, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, residual: Residual
) -> jax.Array:
    """The norm of images `[*batch, H, W, C]` by a plan's implementation."""
    batch = x.shape[:-3]
    images = math.prod(batch), *x.shape[-3:]
    parameters = of_images(batch, images[-1], x.dtype, scale, bias)
    added = None if residual is None else residual.reshape(images)
    arrays = x.reshape(images), *parameters, added
    y, _ = _apply(plan, *vary_like(arrays, arrays))
    return y.reshape(x.shape)


def of_images(
    batch: tuple[int, ...],
    channels: int,
    dtype: jnp.dtype,
    scale: jax.Array | None,
    bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Scale and bias of each image, `[N, C]`; JAX sums the gradients of what images share.

    Args:
        batch: The batch axes of the images.
        channels: Their channels.
        dtype: Their dtype, whose dtype of accumulation the parameters get.
        scale: `[C]` or `[*batch, C]`; None is 1.
        bias: The same; None is 0.
    """
    acc = accumulation_dtype(dtype)

    def each(value: jax.Array | None, default: float) -> jax.Array:
        value = jnp.full(channels, default, acc) if value is None else value.astype(acc)
        return jnp.broadcast_to(value, (*batch, channels)).reshape(math.prod(batch), channels)

    return each(scale, 1.0), each(bias, 0.0)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply(
    plan: Plan, x: jax.Array, scale: jax.Array, bias: jax.Array, residual: Residual
) -> Output:
    return _forward(plan, x, scale, bias, residual)


def _apply_jvp(
    plan: Plan, primals: Primals, tangents: tuple[Tangent, Tangent, Tangent, Tangent]
) -> tuple[Output, Output]:
    y, statistics = _apply(plan, *primals)
    x, scale, bias, residual = primals
    known = Known(x, statistics, scale, bias, residual if plan.activation else None)
    moved = Gradients(*(None if isinstance(t, SymbolicZero) else t for t in tangents))
    return (y, statistics), (output_tangent(plan, known, moved), statistics_tangent(known, moved.x))


_apply.defjvp(_apply_jvp, symbolic_zeros=True)


def output_tangent(plan: Plan, known: Known, tangents: Gradients) -> jax.Array:
    """The tangent of the output, linear in those of the arguments.

    Args:
        plan: The plan of the call.
        known: The arrays that the derivative is taken at.
        tangents: The tangents of the arguments.
    """
    run = partial(pushed, plan.activation)

    def pull(dy: jax.Array, known: Known) -> Gradients:
        found = _pulled(plan, tangents.residual is not None, dy, known)
        wanted = zip(found, tangents, strict=True)
        return Gradients(*(None if tangent is None else one for one, tangent in wanted))

    return multilinear(run, (pull,), tangents, known=(known,), plain=run)


def _pulled(plan: Plan, residual: bool, dy: jax.Array, known: Known) -> Gradients:
    """The gradients of the arguments, linear in that of the output."""

    def run(known: Known, dy: jax.Array) -> Gradients:
        found = _backward(plan.for_backward(known), known, dy)
        if residual and plan.activation:
            return found
        # Without an activation the residual's gradient is the output's, which no kernel copies.
        return found._replace(residual=dy if residual else None)

    def push(tangents: Gradients, known: Known) -> jax.Array:
        return output_tangent(plan, known, tangents)

    plain = partial(pulled, plan.activation, residual)
    return multilinear(run, (push,), dy, known=(known,), plain=plain)


def measurement(operator: Operator, direction: str, problem: Problem) -> JaxMeasurement:
    """The measurement that runs and times an implementation on arrays like those of a call.

    Args:
        operator: The operator, in JAX.
        direction: "fwd" or "bwd".
        problem: The call.

    Returns:
        A measurement of the problem.
    """
    n, _, _, channels = problem.shape
    acc = accumulation_dtype(problem.dtype)
    x = jax.ShapeDtypeStruct(problem.shape, problem.dtype)
    of_images = jax.ShapeDtypeStruct((n, channels), acc)
    last = of_images, of_images, x if problem.residual else None

    def run(module: Implementation, config: TuningParams) -> Callable[..., Tree]:
        plan = Plan(module, config, 1e-5, problem.activation, backward=None)
        return timed_function(plan, direction)

    inputs: tuple[Tree, ...] = x, *last
    if direction == "bwd":
        inputs = x, jax.ShapeDtypeStruct((n, 3, channels), acc), *last, x
    return JaxMeasurement(run, inputs, operator.module("xla"), {})


def timed_function(plan: Plan, direction: str) -> Callable[..., Tree]:
    """The function of arrays that a plan's implementation computes in one direction.

    Args:
        plan: The plan of the call.
        direction: "fwd", a function of x, scale, bias and the residual, or "bwd", of what an
            implementation's `backward` takes.

    Returns:
        The function.
    """

    def backward(*arrays: jax.Array) -> Gradients:
        *known, dy = arrays
        return _backward(plan, Known(*known), dy)

    return partial(_forward, plan) if direction == "fwd" else backward


def _forward(
    plan: Plan, x: jax.Array, scale: jax.Array, bias: jax.Array, residual: Residual
) -> Output:
    static: Keywords = {"eps": plan.eps, "activation": plan.activation, **dict(plan.config)}
    run: Callable[..., Tree] = partial(cast(Kernels, plan.module).forward, **static)
    run = run if plan.module.DIFFERENTIABLE else vmap_folding(run, own=4)
    return run(x, scale, bias, residual)


def _backward(plan: Plan, known: Known, dy: jax.Array) -> Gradients:
    static: Keywords = {"activation": plan.activation, **dict(plan.config)}
    run: Callable[..., Tree] = partial(cast(Kernels, plan.module).backward, **static)
    run = run if plan.module.DIFFERENTIABLE else vmap_folding(run, own=6)
    return Gradients(*run(*known, dy))
