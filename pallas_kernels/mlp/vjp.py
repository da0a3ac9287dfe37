"""The operator's derivatives: any forward implementation pairs with any backward one.

GELU stands between two products. Forward it ends the first, which writes what comes before it too
if the call is differentiated. Backward its slope ends the product of the second layer's gradient,
which sums up the first bias's gradient as well. So the hidden rows are written and read once each
way but for the kernels' gradients. Saved are x, the kernels, and the hidden rows before and after
GELU. Both products are linear but for GELU, and bring their transposes along (`multilinear`).

An implementation is a module with

    widened(x, kernel, bias, *, kept, precision) -> (gelu(z),), or (gelu(z), z) if it is kept
    narrowed_grad(dy, kernel, before, *, precision) -> (dz, its sum over the rows)

for `z = x kernel + bias` of `x [rows, C]`, `kernel [C, hidden]`, `bias [hidden]`; and `dz = (dy
kernel^T) gelu'(before)` of `dy [rows, features]`, `kernel [hidden, features]`, `before [rows,
hidden]`, whose sum is in float32 or better. All arrays but the bias are of one dtype. The functions
take the parameters that `search_space` offers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import sharding
from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement, moved_here
from pallas_kernels.common.multilinear import multilinear
from pallas_kernels.common.types import Tree
from pallas_kernels.common.vmap import vmap_folding, vmap_sequential
from pallas_kernels.dispatch import Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.mlp.problem import Problem
from pallas_kernels.mlp.xla import sloped

Pair = tuple[jax.Array, jax.Array]

RULE = sharding.Rule(("n c", "_ h", "h"), ("n h",), frozenset("n"))
"""The axes of x, the first kernel and bias, and of the hidden rows, of which shards split rows."""


class Kernels(Protocol):
    """The functions of an implementation, which the docstring of this module describes."""

    widened: Callable[..., tuple[jax.Array, ...]]
    narrowed_grad: Callable[..., Pair]


class Plan(NamedTuple):
    """The static choices of one call: what computes it, and what is asked of its backward pass.

    Attributes:
        module: The implementation.
        config: Its parameters.
        precision: The precision of products on matrix units.
        backward: The request by which the backward rule chooses an implementation; None in a
            plan that is timed, which nobody differentiates.
        request: The request by which `module` was chosen, None in a plan that is timed.
        stated: How the caller has stated that the output is split over a mesh.
    """

    module: Implementation
    config: TuningParams
    precision: lax.Precision | None
    backward: Request | None
    request: Request | None = None
    stated: sharding.Stated | None = None

    def by(self, module: Implementation) -> "Plan":
        """The plan with another implementation, which takes its own parameters."""
        return self._replace(module=module, config=())

    def for_backward(self, x: jax.Array, hidden: int, features: int) -> "Plan":
        """The plan of the backward pass, whose implementation is chosen here, where it is called.

        Args:
            x: The rows that the call was given, or others that are split as they are.
            hidden: Channels between the layers.
            features: Channels of the output.

        Raises:
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        assert self.backward is not None
        shard = sharding.spread(RULE, [x], self.stated).shard
        problem = Problem(shard.local(x.shape, RULE.operands[0]), x.dtype, hidden, features)
        asked = moved_here(self.backward)
        operator = asked.operator
        chosen = asked.choose(problem, measurement, operator, "bwd", problem, self.precision)
        module = operator.module(chosen.implementation)
        return self._replace(module=module, config=chosen.config, request=asked)


@partial(jax.jit, static_argnums=0)
def mlp(
    plan: Plan, x: jax.Array, kernels: Pair, biases: Pair, residual: jax.Array | None
) -> jax.Array:
    """The operator for rows `[*batch, C]`."""

    def rows(x: jax.Array) -> jax.Array:
        arrays = x, kernels, biases[0]
        return _apply(plan, *vary_like(arrays, arrays))

    y = sharding.on_rows(rows, x)
    y = y + jnp.expand_dims(biases[1].astype(y.dtype), range(y.ndim - 1))
    # Last, as it is the largest: a sum is rounded at its size.
    return y if residual is None else y + residual


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply(plan: Plan, x: jax.Array, kernels: Pair, bias: jax.Array) -> jax.Array:
    """The operator without its last bias."""
    # Scopes are what profiles call the parts of a network.
    with jax.named_scope("fc1"):
        (after,) = _widened(plan, False, x, kernels[0], bias)
    with jax.named_scope("fc2"):
        return _product(plan, after, kernels[1])


@_apply.defjvp
def _apply_jvp(
    plan: Plan,
    primals: tuple[jax.Array, Pair, jax.Array],
    tangents: tuple[jax.Array, Pair, jax.Array],
) -> Pair:
    (x, (first, second), bias), (dx, dkernels, dbias) = primals, tangents
    with jax.named_scope("fc1"):
        after, before = _widened(plan, True, x, first, bias)
        moved = _product(plan, dx, first) + _product(plan, x, dkernels[0]), dbias
    with jax.named_scope("slope"):
        narrow = _narrow(plan, x, before, moved, second)
    with jax.named_scope("fc2"):
        return _product(plan, after, second), narrow + _product(plan, after, dkernels[1])


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _widened(
    plan: Plan, kept: bool, x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, ...]:
    """The implementation's `widened`, which JAX differentiates by plain JAX."""

    def shard(plan: Plan, _: sharding.Shard, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        run = cast(Kernels, plan.module).widened
        return run(*arrays, kept=kept, precision=plan.precision, **dict(plan.config))

    def problem(_: sharding.Shard, x: jax.Array, kernel: jax.Array, __: jax.Array) -> Problem:
        return Problem(x.shape, x.dtype, kernel.shape[1], x.shape[1])

    rule = RULE._replace(results=RULE.results * (1 + kept))
    return cast(
        tuple[jax.Array, ...],
        sharding.split(shard, rule, plan, problem, x, kernel, bias, mapped=vmap_folding),
    )


@_widened.defjvp
def _widened_jvp(
    plan: Plan,
    kept: bool,
    primals: tuple[jax.Array, jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    (x, kernel, _), (dx, dkernel, dbias) = primals, tangents
    after, before = _widened(plan, True, *primals)
    moved = _product(plan, dx, kernel) + _product(plan, x, dkernel) + dbias.astype(x.dtype)[None]
    both = (after, before), (sloped(moved, before), moved)
    return both if kept else (both[0][:1], both[1][:1])


def _narrow(
    plan: Plan, x: jax.Array, before: jax.Array, moved: Pair, kernel: jax.Array
) -> jax.Array:
    """The second layer of what moves the first one's rows and bias, linear in both arguments."""
    dtypes, features = (moved[0].dtype, moved[1].dtype), kernel.shape[1]

    def run(before: jax.Array, moved: Pair, kernel: jax.Array) -> jax.Array:
        hidden, bias = moved
        return _product(plan, sloped(hidden + bias.astype(hidden.dtype)[None], before), kernel)

    def in_moved(dy: jax.Array, before: jax.Array, kernel: jax.Array) -> Pair:
        backward = plan.for_backward(x, kernel.shape[0], features)
        found, total = _narrowed_grad(backward, dy, before, kernel)
        return found, total.astype(dtypes[1])

    def in_kernel(dy: jax.Array, before: jax.Array, moved: Pair) -> jax.Array:
        hidden, bias = moved
        return _product(plan, sloped(hidden + bias.astype(hidden.dtype)[None], before).T, dy)

    return cast(
        jax.Array,
        multilinear(run, (in_moved, in_kernel), moved, kernel, known=(before,), plain=run),
    )


def _narrowed_grad(plan: Plan, dy: jax.Array, before: jax.Array, kernel: jax.Array) -> Pair:
    """The implementation's `narrowed_grad`, linear in dy and linear in the kernel."""
    axes = sharding.Rule(("n f", "h _", "n h"), ("n h", "h"), frozenset("n"))

    def shard(
        plan: Plan, place: sharding.Shard, dy: jax.Array, kernel: jax.Array, before: jax.Array
    ) -> Pair:
        run = cast(Kernels, plan.module).narrowed_grad
        found, total = run(dy, kernel, before, precision=plan.precision, **dict(plan.config))
        return found, place.sum(total, "n")

    def problem(_: sharding.Shard, dy: jax.Array, kernel: jax.Array, __: jax.Array) -> Problem:
        return Problem((dy.shape[0], dy.shape[1]), dy.dtype, kernel.shape[0], dy.shape[1])

    def run(before: jax.Array, dy: jax.Array, kernel: jax.Array) -> Pair:
        arrays = dy, kernel, before
        return cast(
            Pair, sharding.split(shard, axes, plan, problem, *arrays, mapped=vmap_sequential)
        )

    def plain(before: jax.Array, dy: jax.Array, kernel: jax.Array) -> Pair:
        found = sloped(_product(plan, dy, kernel.T), before)
        return found, jnp.sum(found.astype(accumulation_dtype(dy.dtype)), axis=0)

    def moved(cotangent: Pair, before: jax.Array) -> jax.Array:
        hidden, bias = cotangent
        return sloped(hidden + bias.astype(hidden.dtype)[None], before)

    def in_dy(cotangent: Pair, before: jax.Array, kernel: jax.Array) -> jax.Array:
        return _product(plan, moved(cotangent, before), kernel)

    def in_kernel(cotangent: Pair, before: jax.Array, dy: jax.Array) -> jax.Array:
        return _product(plan, moved(cotangent, before).T, dy)

    return cast(
        Pair, multilinear(run, (in_dy, in_kernel), dy, kernel, known=(before,), plain=plain)
    )


def _product(plan: Plan, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, precision=plan.precision)


def measurement(
    operator: Operator, direction: str, problem: Problem, precision: lax.Precision | None
) -> JaxMeasurement:
    """The measurement that runs and times an implementation on arrays like those of a call.

    Args:
        operator: The operator, in JAX.
        direction: "fwd" or "bwd".
        problem: The call.
        precision: The precision of products on matrix units.

    Returns:
        A measurement of the problem.
    """
    rows, channels = problem.shape
    hidden, features, dtype = problem.hidden, problem.features, problem.dtype
    shapes = [(rows, channels), (channels, hidden), (hidden,)]
    if direction == "bwd":
        shapes = [(rows, features), (hidden, features), (rows, hidden)]
    arrays = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def run(module: Implementation, config: TuningParams) -> Callable[..., Tree]:
        kernels, keys = cast(Kernels, module), {"precision": precision, **dict(config)}
        if direction == "fwd":
            return partial(kernels.widened, kept=False, **keys)
        return partial(kernels.narrowed_grad, **keys)

    static = {"precision": precision and precision.name}
    return JaxMeasurement(run, arrays, operator.module("xla"), static)
