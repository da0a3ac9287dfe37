"""The operator's derivatives: any forward implementation pairs with any backward one.

A call that nothing differentiates is `whole`, whose hidden rows need not be in memory. Derivatives
need them: GELU stands between two products. Forward it ends the first, which writes what comes
before it too. Backward its slope ends the product of the second layer's gradient, which sums up the
first bias's gradient as well. So the hidden rows are written and read once each way but for the
kernels' gradients. Saved are x, the kernels, and the hidden rows before and after GELU. Both
products are linear but for GELU, and bring their transposes along (`multilinear`).

An implementation is a module with

    whole(x, kernels, biases, residual, *, epsilon, precision) -> y
    widened(x, kernel, bias, *, kept, precision) -> (gelu(z),), or (gelu(z), z) if it is kept
    narrowed_grad(dy, kernel, before, *, precision) -> (dz, its sum over the rows)

for `y = gelu(z) kernels[1] + biases[1] + residual`, of `residual [rows, features]` or None, and of
x as `norm.normalized` makes it with this epsilon, or of x itself if that is None; `z = x
kernel + bias` of `x [rows, C]`, `kernel [C, hidden]`, `bias [hidden]`, which are the first of
`kernels` and `biases`; and `dz = (dy kernel^T) gelu'(before)` of `dy [rows, features]`, `kernel
[hidden, features]`, `before [rows, hidden]`, whose sum is in float32 or better. All arrays but the
biases are of one dtype. The functions take the parameters that `search_space` offers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import sharding
from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.border import border
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement, moved_here
from pallas_kernels.common.multilinear import multilinear
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.common.vmap import vmap_folding, vmap_sequential
from pallas_kernels.dispatch import Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.mlp.norm import normalized
from pallas_kernels.mlp.problem import Problem
from pallas_kernels.mlp.xla import composed, sloped

Pair = tuple[jax.Array, jax.Array]

RULE = sharding.Rule(("n c", "_ h", "h"), ("n h", "n h"), frozenset("n"))
"""The axes of x, the first kernel and bias, and of the hidden rows, of which shards split rows."""
_WHOLE = sharding.Rule(("n c", "n f", "_ h", "h f", "h", "f"), ("n f",), frozenset("n"))
"""Those of x, the residual, both kernels and both biases, and of the output."""


class Kernels(Protocol):
    """The functions of an implementation, which the docstring of this module describes."""

    whole: Callable[..., jax.Array]
    widened: Callable[..., tuple[jax.Array, ...]]
    narrowed_grad: Callable[..., Pair]


class Plan(NamedTuple):
    """The static choices of one call: what computes it, and what is asked of its backward pass.

    Attributes:
        module: The implementation.
        config: Its parameters.
        precision: The precision of products on matrix units.
        epsilon: What LayerNorm adds to the variance, None without a norm.
        forward: The request by which derivatives choose an implementation of what they need of the
            forward pass; None in a plan that is timed, which nobody differentiates.
        backward: Likewise for the backward pass.
        request: The request by which `module` was chosen, None in a plan that is timed.
        stated: How the caller has stated that the output is split over a mesh.
    """

    module: Implementation
    config: TuningParams
    precision: lax.Precision | None
    epsilon: float | None
    forward: Request | None
    backward: Request | None
    request: Request | None = None
    stated: sharding.Stated | None = None

    def by(self, module: Implementation) -> "Plan":
        """The plan with another implementation, which takes its own parameters."""
        return self._replace(module=module, config=())

    def chosen(self, asked: Request | None, x: jax.Array, hidden: int, features: int) -> "Plan":
        """The plan of a pass, whose implementation is chosen here, where it is called.

        Args:
            asked: `forward` or `backward`.
            x: The rows that the call was given, or others that are split as they are.
            hidden: Channels between the layers.
            features: Channels of the output.

        Raises:
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        assert asked is not None
        shard = sharding.spread(RULE, [x], self.stated).shard
        problem = Problem(shard.local(x.shape, RULE.operands[0]), x.dtype, hidden, features)
        asked = moved_here(asked)
        operator, direction = asked.operator, asked.direction
        chosen = asked.choose(problem, measurement, operator, direction, problem, self.precision)
        module = operator.module(chosen.implementation)
        return self._replace(module=module, config=chosen.config, request=asked)


@partial(jax.jit, static_argnums=0)
def mlp(
    plan: Plan, x: jax.Array, kernels: Pair, biases: Pair, residual: jax.Array | None
) -> jax.Array:
    """The operator for rows `[*batch, C]`."""
    if plan.epsilon is not None and plan.module.DIFFERENTIABLE:
        # Scopes are what profiles call the parts of a network.
        with jax.named_scope("norm"):
            x = sharding.by_pixel(partial(normalized, epsilon=plan.epsilon), x)
        plan = plan._replace(epsilon=None)

    def rows(x: jax.Array, *residual: jax.Array) -> jax.Array:
        arrays = (border(x), *residual), kernels, biases
        return border(_apply(plan, *vary_like(arrays, arrays)))

    if residual is None:
        return sharding.on_rows(rows, x)
    if plan.module.DIFFERENTIABLE:
        # Plain JAX gains nothing by rows of it, which are gathered where it is not split as x.
        return sharding.on_rows(rows, x) + residual
    return sharding.on_rows(rows, x, residual)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply(plan: Plan, rows: tuple[jax.Array, ...], kernels: Pair, biases: Pair) -> jax.Array:
    """The operator for x, and the residual if there is one."""
    if plan.module.DIFFERENTIABLE:
        # The features of plain JAX may be split, as the second layer is.
        first = partial(_widened, plan)
        return composed(first, rows[0], kernels, biases, None, None, plan.precision)

    def shard(
        plan: Plan, _: sharding.Shard, rows: tuple[jax.Array, ...], kernels: Pair, biases: Pair
    ) -> jax.Array:
        x, residual = rows if len(rows) > 1 else (*rows, None)
        run = cast(Kernels, plan.module).whole
        keys = {"epsilon": plan.epsilon, "precision": plan.precision, **dict(plan.config)}
        return run(x, kernels, biases, residual, **keys)

    def problem(_: sharding.Shard, rows: tuple[jax.Array, ...], kernels: Pair, __: Pair) -> Problem:
        return Problem(rows[0].shape, rows[0].dtype, *kernels[1].shape)

    read = _WHOLE.operands
    rule = _WHOLE._replace(operands=read if len(rows) > 1 else (read[0], *read[2:]))
    return cast(
        jax.Array,
        sharding.split(shard, rule, plan, problem, rows, kernels, biases, mapped=vmap_folding),
    )


@_apply.defjvp
def _apply_jvp(
    plan: Plan,
    primals: tuple[tuple[jax.Array, ...], Pair, Pair],
    tangents: tuple[tuple[jax.Array, ...], Pair, Pair],
) -> Pair:
    (x, *residual), (first, second), (inner, outer) = primals
    (dx, *dresidual), dkernels, (dinner, douter) = tangents
    if not plan.module.DIFFERENTIABLE:
        # On Explicit axes the launches of shards have all features.
        second, outer, dkernels, dinner, douter = jax.tree.map(
            sharding.gathered, (second, outer, dkernels, dinner, douter)
        )
    if plan.epsilon is not None:
        with jax.named_scope("norm"):
            x, dx = jax.jvp(partial(normalized, epsilon=plan.epsilon), (x,), (dx,))
    with jax.named_scope("fc1"):
        after, before = _widened(plan.chosen(plan.forward, x, *second.shape), x, first, inner)
        moved = _product(plan, dx, first) + _product(plan, x, dkernels[0]), dinner
    with jax.named_scope("slope"):
        narrow = _narrow(plan, x, before, moved, second)
    with jax.named_scope("fc2"):
        y, dy = _product(plan, after, second), narrow + _product(plan, after, dkernels[1])
    y, dy = y + outer.astype(y.dtype)[None], dy + douter.astype(dy.dtype)[None]
    # The residual is last, as it is the largest: a sum is rounded at its size.
    for value, tangent in zip(residual, dresidual, strict=True):
        # The caller's may be split in another way than x.
        own, moved_by = (sharding.placed_like(one, jax.typeof(y)) for one in (value, tangent))
        y, dy = y + own, dy + moved_by
    return y, dy


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _widened(plan: Plan, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Pair:
    """The implementation's `widened`, which JAX differentiates by plain JAX."""

    def shard(plan: Plan, _: sharding.Shard, *arrays: jax.Array) -> Pair:
        run = cast(Kernels, plan.module).widened
        return cast(Pair, run(*arrays, kept=True, precision=plan.precision, **dict(plan.config)))

    def problem(_: sharding.Shard, x: jax.Array, kernel: jax.Array, __: jax.Array) -> Problem:
        return Problem(x.shape, x.dtype, kernel.shape[1], x.shape[1])

    return cast(
        Pair, sharding.split(shard, RULE, plan, problem, x, kernel, bias, mapped=vmap_folding)
    )


@_widened.defjvp
def _widened_jvp(
    plan: Plan,
    primals: tuple[jax.Array, jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[Pair, Pair]:
    (x, kernel, _), (dx, dkernel, dbias) = primals, tangents
    after, before = _widened(plan, *primals)
    moved = _product(plan, dx, kernel) + _product(plan, x, dkernel) + dbias.astype(x.dtype)[None]
    return (after, before), (sloped(moved, before), moved)


def _narrow(
    plan: Plan, x: jax.Array, before: jax.Array, moved: Pair, kernel: jax.Array
) -> jax.Array:
    """The second layer of what moves the first one's rows and bias, linear in both arguments."""
    dtypes, features = (moved[0].dtype, moved[1].dtype), kernel.shape[1]

    def run(before: jax.Array, moved: Pair, kernel: jax.Array) -> jax.Array:
        hidden, bias = moved
        return _product(plan, sloped(hidden + bias.astype(hidden.dtype)[None], before), kernel)

    def in_moved(dy: jax.Array, before: jax.Array, kernel: jax.Array) -> Pair:
        backward = plan.chosen(plan.backward, x, kernel.shape[0], features)
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
    operator: Operator,
    direction: str,
    problem: Problem,
    precision: lax.Precision | None,
    epsilon: float | None = None,
) -> JaxMeasurement:
    """The measurement that runs and times an implementation on arrays like those of a call.

    Args:
        operator: The operator, in JAX.
        direction: "fwd", "bwd" or "whole".
        problem: The call.
        precision: The precision of products on matrix units.
        epsilon: What the norm of "whole" adds to the variance, None without a norm.

    Returns:
        A measurement of the problem.
    """
    rows, channels = problem.shape
    hidden, features, dtype = problem.hidden, problem.features, problem.dtype
    first, second = (channels, hidden), (hidden, features)
    shapes: dict[str, Tree] = {
        "fwd": ((rows, channels), first, (hidden,)),
        "bwd": ((rows, features), second, (rows, hidden)),
        "whole": ((rows, channels), (first, second), ((hidden,), (features,)), (rows, features)),
    }
    arrays = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes[direction],
        is_leaf=lambda leaf: isinstance(leaf[0], int),
    )

    def run(module: Implementation, config: TuningParams) -> Callable[..., Tree]:
        kernels, keys = cast(Kernels, module), {"precision": precision, **dict(config)}
        if direction == "fwd":
            return partial(kernels.widened, kept=True, **keys)
        if direction == "bwd":
            return partial(kernels.narrowed_grad, **keys)
        return partial(kernels.whole, epsilon=epsilon, **keys)

    static: Json = {"precision": precision and precision.name}
    if epsilon is not None:
        static["norm"] = True
    return JaxMeasurement(run, arrays, operator.module("xla"), static)
