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

    normalise(x, tiles, scale, bias, residual, *, eps, activation, in_place) -> y, statistics

for `tiles`, the moments of its tiles, see `conv2d.moments`; `convolution` is made of it. `in_place`
says that nobody reads x again, so that y may be written over it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.common import sharding
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


_IMAGES = "n _ _ c"
_FREE = frozenset("nc")
RULE = sharding.Rule((_IMAGES,), (_IMAGES,), _FREE)
"""The axes of x and the output: neither images nor channels mix."""


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
        request: The request by which `module` was chosen, None in a plan that is timed.
        stated: How the caller has stated that arrays are split over a mesh.
    """

    module: Implementation
    config: TuningParams
    eps: float
    activation: str | None
    backward: Request | None
    request: Request | None = None
    stated: sharding.Stated | None = None

    def by(self, module: Implementation) -> "Plan":
        """The plan with another implementation, which takes its own parameters."""
        return self._replace(module=module, config=())

    def problem(self, x: jax.Array, residual: Residual) -> Problem:
        """The description of a norm of these arrays."""
        return Problem(x.shape, x.dtype, self.activation, residual is not None)

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
        spread = sharding.spread(RULE, [x], self.stated)
        problem = of_shard(self.problem(x, known.residual), spread.shard)
        chosen = backward.choose(problem, measurement, operator, "bwd", problem)
        module = operator.module(chosen.implementation)
        return self._replace(module=module, config=chosen.config, request=backward)


@partial(jax.jit, static_argnums=0)
def instance_norm(
    plan: Plan, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, residual: Residual
) -> jax.Array:
    """The norm of images `[*batch, H, W, C]` by a plan's implementation."""
    batch = x.shape[:-3]
    parameters = of_images(batch, x.dtype, scale, bias, x, x)
    added = None if residual is None else sharding.flat(residual, len(batch))
    arrays = sharding.flat(x, len(batch)), *parameters, added
    y, _ = _apply(plan, *vary_like(arrays, arrays))
    return sharding.unflat(y, batch)


def of_images(
    batch: tuple[int, ...],
    dtype: jnp.dtype,
    scale: jax.Array | None,
    bias: jax.Array | None,
    images: jax.Array,
    channels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scale and bias of each image, `[N, C]`; JAX sums the gradients of what images share.

    Args:
        batch: The batch axes of the images.
        dtype: Their dtype, whose dtype of accumulation the parameters get.
        scale: `[C]` or `[*batch, C]`; None is 1.
        bias: The same; None is 0.
        images: Images, as whose batch the parameters are split over a mesh.
        channels: An array whose last axis is the channels, as which they are split.
    """
    acc = accumulation_dtype(dtype)

    def each(value: jax.Array | None, default: float) -> jax.Array:
        count = channels.shape[-1]
        value = jnp.full(count, default, acc) if value is None else value.astype(acc)
        placed = [*((images, axis) for axis in range(len(batch))), (channels, channels.ndim - 1)]
        return sharding.flat(sharding.broadcast_to(value, (*batch, count), placed), len(batch))

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
    dy, moved_statistics = output_tangent(plan, known, moved), statistics_tangent(known, moved.x)
    # Tangents lie as those of the arguments do, of which y is whole along rows that were split.
    return (y, statistics), (
        sharding.placed_like(dy, jax.typeof(y)),
        sharding.placed_like(moved_statistics, jax.typeof(statistics)),
    )


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


def of_shard(problem: Problem, shard: sharding.Shard) -> Problem:
    """The norm that a shard computes."""
    if not shard.counts:
        return problem
    return problem._replace(shape=shard.local(problem.shape, _IMAGES))


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
    def shard(plan: Plan, _: sharding.Shard, *arrays: Residual) -> Output:
        static: Keywords = {"eps": plan.eps, "activation": plan.activation, **dict(plan.config)}
        return cast(Kernels, plan.module).forward(*arrays, **static)

    operands = _IMAGES, "n c", "n c", *[_IMAGES] * (residual is not None)
    rule = sharding.Rule(operands, (_IMAGES, "n _ c"), _FREE)
    return sharding.split(
        shard,
        rule,
        plan,
        lambda _, x, *rest: plan.problem(x, rest[2]),
        *(x, scale, bias, residual),
        mapped=partial(vmap_folding, own=4),
    )


def _backward(plan: Plan, known: Known, dy: jax.Array) -> Gradients:
    def shard(plan: Plan, _: sharding.Shard, *arrays: Residual) -> Gradients:
        static: Keywords = {"activation": plan.activation, **dict(plan.config)}
        return Gradients(*cast(Kernels, plan.module).backward(*arrays, **static))

    added = [_IMAGES] * (known.residual is not None)
    rule = sharding.Rule(
        (_IMAGES, "n _ c", "n c", "n c", *added, _IMAGES),
        (_IMAGES, "n c", "n c", *added),
        _FREE,
    )
    found = sharding.split(
        shard,
        rule,
        plan,
        lambda _, x, *rest: plan.problem(x, rest[3]),
        *known,
        dy,
        mapped=partial(vmap_folding, own=6),
    )
    return cast(Gradients, found)
