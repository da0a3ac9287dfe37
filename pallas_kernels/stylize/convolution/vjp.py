"""The operator's derivatives: those of the convolution and of the norm, each by its own operator.

Saved are x, w, the convolution's output as it was rounded, its statistics, scale and bias, and with
an activation the residual. The backward pass is the norm's, then the convolution's, and each is
chosen as that of a convolution or a norm alone; derivatives of higher order are theirs. Where
nothing is differentiated nothing is saved, and the norm is written over the convolution's output.

An implementation is a module with `convolution`, a room of `pallas_kernels.conv2d`, which leaves
the moments of its tiles, and

    normalise(x, tiles, scale, bias, residual, *, eps, activation, in_place) -> y, statistics

for its output `x [N, H, W, C]`, `tiles`, the `conv2d.moments.Moments` of that, scale and bias
`[N, C]` in the dtype of accumulation, and a residual of x's shape and dtype or None; statistics are
`[N, 3, C]` as `stylize.formulas` has them. The parameters of its search space are those of the
convolution.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.common import sharding
from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement
from pallas_kernels.common.types import Tree
from pallas_kernels.common.vmap import vmap_folding
from pallas_kernels.conv2d import vjp as conv2d
from pallas_kernels.dispatch import Candidate, Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.stylize import vjp as norm
from pallas_kernels.stylize.convolution.problem import Problem
from pallas_kernels.stylize.formulas import Gradients, Known, statistics_tangent

Residual = jax.Array | None
Primals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Residual]
Output = tuple[jax.Array, jax.Array, jax.Array]
"""The norm, the convolution's output, and the statistics of that."""
Tangent = jax.Array | SymbolicZero | None

_OUTPUT = "n _ _ f"
RULE = sharding.Rule(("n _ _ _", "_ _ _ f"), (_OUTPUT,), frozenset("nf"))
"""The axes of x, w and the output: an image's features are normalised one by one."""


class Kernels(Protocol):
    """The parts of an implementation, which the docstring of this module describes."""

    convolution: Any
    normalise: Callable[..., Tree]


class Plan(NamedTuple):
    """The static choices of one call.

    Attributes:
        module: The implementation that computes the operator.
        convolution: The convolution's plan, by the room that leaves the moments.
        norm: The norm's plan, of which epsilon, activation and backward pass count.
        request: The request by which `module` was chosen, None in a plan that is timed.
        stated: How the caller has stated that the output is split over a mesh.
    """

    module: Implementation
    convolution: conv2d.Plan
    norm: norm.Plan
    request: Request | None = None
    stated: sharding.Stated | None = None

    def by(self, module: Implementation, config: TuningParams = ()) -> "Plan":
        """The same call by an implementation and its parameters."""
        chosen = Candidate("", config)
        convolution = self.convolution._replace(
            module=cast(Kernels, module).convolution,
            config=conv2d.tiles(None, chosen),
            whole_rows=conv2d.takes_whole_rows(chosen),
        )
        return self._replace(module=module, convolution=convolution)

    def problem(self, x: jax.Array, w: jax.Array, residual: Residual) -> Problem:
        """The description of a call of these arrays."""
        found = conv2d.problem_of(self.convolution.window, x.shape, w.shape, x.dtype, x.dtype)
        return Problem(*found[:6], self.norm.activation, residual is not None)


@partial(jax.jit, static_argnums=0)
def conv2d_instance_norm(
    plan: Plan,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: Residual,
) -> jax.Array:
    """The norm of a convolution of images `[*batch, H, W, C]` by a plan's implementation."""
    batch = x.shape[:-3]
    parameters = norm.of_images(batch, x.dtype, scale, bias, x, w)
    added = None if residual is None else sharding.flat(residual, len(batch))
    arrays = sharding.flat(x, len(batch)), w, *parameters, added
    return sharding.unflat(_apply(plan, *vary_like(arrays, arrays)), batch)


def of_shard(problem: Problem, shard: sharding.Shard) -> Problem:
    """The convolution and the norm that a shard computes."""
    if not shard.counts:
        return problem
    (features,) = shard.local((problem.features,), "f")
    return problem._replace(shape=shard.local(problem.shape, "n _ _ _"), features=features)


def of_norm(stated: sharding.Stated | None) -> sharding.Stated | None:
    """The sharding that is stated, of the norm, whose channels are the features."""
    if stated is None:
        return None
    return stated._replace(axes=tuple(("c" if n == "f" else n, axes) for n, axes in stated.axes))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply(plan: Plan, *arrays: Any) -> jax.Array:
    """The norm, of x, w, scale, bias and a residual."""
    return cast(jax.Array, _forward(plan, *arrays, in_place=True))


def _apply_jvp(
    plan: Plan, primals: Primals, tangents: tuple[Tangent, ...]
) -> tuple[jax.Array, jax.Array]:
    (y, _, _), (dy, _, _) = _with_saved_jvp(plan, primals, tangents)
    return y, dy


_apply.defjvp(_apply_jvp, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_saved(plan: Plan, *arrays: Any) -> Output:
    """The norm with all that its derivatives read."""
    return cast(Output, _forward(plan, *arrays, in_place=False))


def _with_saved_jvp(
    plan: Plan, primals: Primals, tangents: tuple[Tangent, ...]
) -> tuple[Output, Output]:
    y, z, statistics = _with_saved(plan, *primals)
    x, w, scale, bias, residual = primals
    dx, dw, *others = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    # The room leaves no moments of tangents, so nothing but the convolution is asked of it.
    terms = [] if dx is None else [conv2d.linear(plan.convolution, z.dtype, dx, w)]
    terms += [] if dw is None else [conv2d.linear(plan.convolution, z.dtype, x, dw)]
    dz = sum(terms[1:], terms[0]) if terms else None
    known = Known(z, statistics, scale, bias, residual if plan.norm.activation else None)
    dy = norm.output_tangent(plan.norm, known, Gradients(dz, *others))
    moved = statistics_tangent(known, dz)
    return (y, z, statistics), (dy, jnp.zeros_like(z) if dz is None else dz, moved)


_with_saved.defjvp(_with_saved_jvp, symbolic_zeros=True)


def _forward(
    plan: Plan,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: Residual,
    *,
    in_place: bool,
) -> jax.Array | Output:
    """The norm, which with `in_place` is written over what the others would be, or all three."""

    def shard(
        plan: Plan,
        _: sharding.Shard,
        x: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        residual: Residual,
        w: jax.Array,
    ) -> jax.Array | Output:
        z, tiles = conv2d.conv2d_with_moments(plan.convolution, None, x.dtype, x, w, None)
        y, statistics = cast(Kernels, plan.module).normalise(
            *(z, tiles, scale, bias, residual),
            eps=plan.norm.eps,
            activation=plan.norm.activation,
            in_place=in_place,
        )
        return y if in_place else (y, z, statistics)

    (images, filters), _, free, _ = RULE
    operands = images, "n f", "n f", *[_OUTPUT] * (residual is not None), filters
    # The filters come last: they are what images that are mapped share.
    outputs = (_OUTPUT,) if in_place else (_OUTPUT, _OUTPUT, "n _ f")
    found = sharding.split(
        shard,
        sharding.Rule(operands, outputs, free),
        plan,
        lambda _, x, *rest: plan.problem(x, rest[3], rest[2]),
        *(x, scale, bias, residual, w),
        mapped=partial(vmap_folding, own=4),
    )
    return cast(jax.Array | Output, found)


def measurement(operator: Operator, direction: str, problem: Problem, plan: Plan) -> JaxMeasurement:
    """The measurement that runs and times an implementation on arrays like those of a call.

    Args:
        operator: The operator, in JAX.
        direction: "fwd".
        problem: The call.
        plan: Its plan, by any implementation.

    Returns:
        A measurement of the problem.
    """
    n, _, _, channels = problem.shape
    taps = problem.kernel_height, problem.kernel_width
    parameters = jax.ShapeDtypeStruct((n, problem.features), accumulation_dtype(problem.dtype))
    x = jax.ShapeDtypeStruct(problem.shape, problem.dtype)
    w = jax.ShapeDtypeStruct((*taps, channels, problem.features), problem.dtype)
    y = jax.ShapeDtypeStruct(problem.norm.shape, problem.dtype)

    def run(module: Implementation, config: TuningParams) -> Callable[..., Tree]:
        return partial(conv2d_instance_norm, plan.by(module, config))

    inputs = x, w, parameters, parameters, y if problem.residual else None
    precision = plan.convolution.precision
    static = {"precision": precision and precision.name}
    return JaxMeasurement(run, inputs, operator.module("xla"), static)
