"""The operator's derivatives: any forward implementation pairs with any backward one.

The backward one is chosen in the backward rule, so that a call that nobody differentiates asks no
implementation for gradients, and times none.

Two facts make the backward pass (Haar is orthonormal, and padding and cropping are each other's
transpose). The input gradient is the operator itself, transposed: taps flipped, padding swapped,
analysis and synthesis filters swapped. The weight gradient correlates the coefficients of x with
those of dy. So the residuals are x and the folded taps, and nothing else. Everything here is
linear in x and linear in the taps, so derivatives of every order, forward mode too, are the same
three functions again.

An implementation is a module with

    forward(x, taps, bias, *, wavelet, transpose, precision) -> y
    weight_grad(x, dy, *, kernel_shapes, wavelet, precision) -> gradients of the taps

for x `[N, *spatial, C]`, `taps = (base [*k, 1, C], level_0 [*k, 2**ndim, C], ...)` with the
scales folded in, and `bias [C]` or None. Modules that JAX can look into, and so map with `vmap`,
say so with `DIFFERENTIABLE = True`. Of modules that say `BIAS_GRADIENT = True` the gradient of the
bias is asked too: `kernel_shapes` ends with the bias's, and the gradients with its own. Both
functions take the parameters that `search_space` offers. Where `in_turns(problem)` of the module
that computes y is True dx comes after the gradients of taps, for whose memory XLA then finds room
in that of dx. `scaling` says what a module may have for the products with scales.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import jax

from pallas_kernels.common import sharding
from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.biased import Source, in_one, scaled, summed, with_one
from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement, moved_here
from pallas_kernels.common.multilinear import multilinear
from pallas_kernels.common.types import Taps, Tree
from pallas_kernels.common.vmap import vmap_folding, vmap_sequential
from pallas_kernels.dispatch import Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.wtconv import scaling, shards
from pallas_kernels.wtconv.problem import Problem
from pallas_kernels.wtconv.scaling import Weights
from pallas_kernels.wtconv.shards import Shapes


class Kernels(Protocol):
    """The functions of an implementation, which the docstring of this module describes.

    Attributes:
        BIAS_GRADIENT: Whether `weight_grad` sums dy on its way, for the gradient of the bias.
    """

    BIAS_GRADIENT: bool

    def forward(
        self,
        x: jax.Array,
        taps: Taps,
        bias: jax.Array | None,
        /,
        *,
        wavelet: str,
        transpose: bool,
        precision: jax.lax.Precision | None,
        **config: object,
    ) -> jax.Array:
        """The operator or its transpose."""

    def weight_grad(
        self,
        x: jax.Array,
        dy: jax.Array,
        /,
        *,
        kernel_shapes: Shapes,
        wavelet: str,
        precision: jax.lax.Precision | None,
        **config: object,
    ) -> Taps:
        """The gradients of the taps."""


class Plan(NamedTuple):
    """The static choices of one call: what computes it, and what is asked of its backward pass.

    Attributes:
        module: The implementation that computes the operator.
        config: Its parameters.
        wavelet: PyWavelets' name of the wavelet.
        precision: The precision of products on matrix units.
        backward: The request by which the backward rule chooses an implementation; None in a
            plan that is timed, which nobody differentiates.
        request: The request by which `module` was chosen, None in a plan that is timed.
        stated: How the caller has stated that the output is split over a mesh.
    """

    module: Implementation
    config: TuningParams
    wavelet: str
    precision: jax.lax.Precision | None
    backward: Request | None
    request: Request | None = None
    stated: sharding.Stated | None = None

    def by(self, module: Implementation) -> "Plan":
        """The plan with another implementation, which takes its own parameters."""
        return self._replace(module=module, config=())

    def problem(self, x: jax.Array, shapes: Shapes) -> Problem:
        """The description of a call of these arrays."""
        return Problem(x.shape, x.dtype, shapes[0][0], len(shapes) - 1, self.wavelet)

    def static_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of both functions of an implementation."""
        return {"wavelet": self.wavelet, "precision": self.precision, **dict(self.config)}

    def for_low_band(self, direction: str, low: jax.Array, shapes: Shapes) -> "Plan":
        """The plan for a shard's low band: by plain JAX, where the implementation refuses it."""
        module = self.module
        try:
            module.check(direction, self.problem(low, shapes))
        except NotImplementedError:
            assert self.request is not None
            module = self.request.operator.module("xla")
        return self.by(module)

    def for_backward(self, x: jax.Array, shapes: Shapes, bias: bool) -> "Plan":
        """The plan of the backward pass, whose implementation is chosen here, where it is called.

        Args:
            x: `[N, *spatial, C]`.
            shapes: The kernels' shapes.
            bias: Whether the operator has a bias.

        Raises:
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        assert self.backward is not None
        backward = moved_here(self.backward)
        spread = sharding.spread(shards.rule(x.ndim - 2, wavelet=self.wavelet), [x], self.stated)
        problem = shards.of_shard(self.problem(x, shapes), spread.shard)
        operator = backward.operator
        static = problem, bias, self.precision
        chosen = backward.choose(problem, measurement, operator, "bwd", *static)
        module = operator.module(chosen.implementation)
        return self._replace(module=module, config=chosen.config, request=backward)


@partial(jax.jit, static_argnums=(0, 1))
def wtconv(plan: Plan, stride: int, x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    """Folds the scales into the kernels, where JAX differentiates it, convolves, and strides.

    Args:
        plan: The plan of the call.
        stride: The stride of the output.
        x: `[*batch, *spatial, C]`.
        params: The parameters by name.

    Returns:
        `[*batch, *strided, C]`.
    """
    levels = range(sum(name.startswith("wavelet_kernel_") for name in params))
    taps, scales = (
        (params[f"base_{kind}"], *(params[f"wavelet_{kind}_{i}"] for i in levels))
        for kind in ("kernel", "scale")
    )
    # Here, since an eager reshape takes the host longer than all checks of the arguments.
    batch = x.shape[: 1 - taps[0].ndim]
    x = sharding.flat(x, len(batch))
    problem = plan.problem(x, tuple(tap.shape for tap in taps))
    arrays = x, *scaling.scaled(plan, problem, (taps, params.get("base_bias")), scales)
    y = _strided(_apply(plan, False, *vary_like(arrays, arrays)), stride)
    return sharding.unflat(y, batch)


def _strided(y: jax.Array, stride: int) -> jax.Array:
    """The published layers' strides: the mean of a group in 1-D, subsampling otherwise."""
    if stride == 1:
        return y
    if y.ndim == 3:
        y = sharding.whole(y, 1)
        n, length, c = y.shape
        groups = y[:, : length // stride * stride].reshape(n, length // stride, stride, c)
        return groups.mean(axis=2, dtype=accumulation_dtype(y.dtype)).astype(y.dtype)
    steps = [stride] * (y.ndim - 2)
    for axis in range(1, y.ndim - 1):
        if sharding.is_split(y, axis):
            y, steps[axis - 1] = sharding.stepped(y, axis, stride), 1
    return y[(slice(None), *(slice(None, None, step) for step in steps))]


def _apply(
    plan: Plan, transpose: bool, x: jax.Array, taps: Taps, bias: jax.Array | None
) -> jax.Array:
    """The operator or its transpose, linear in its source and linear in its weights."""
    dtypes = jax.tree.map(lambda weight: weight.dtype, (taps, bias))
    shapes, biased = tuple(tap.shape for tap in taps), bias is not None

    def run(source: Source, weights: Weights) -> jax.Array:
        (x, one), (taps, bias) = source, weights
        return _forward(plan, transpose, x, taps, scaled(bias, one))

    def in_source(dy: jax.Array, weights: Weights) -> Source:
        taps, bias = weights
        backward = plan.for_backward(dy, shapes, biased)
        return _apply(backward, not transpose, dy, taps, None), in_one(bias, dy)

    def in_weights(dy: jax.Array, source: Source) -> Weights:
        x, one = source
        backward = plan.for_backward(x, shapes, biased)
        # Only the operator itself has a bias, its transpose has none.
        pair = (dy, x) if transpose else (x, dy)
        found = _weight_grad(backward, shapes, biased, *pair)
        dtaps, dbias = jax.tree.map(lambda gradient, dtype: gradient.astype(dtype), found, dtypes)
        return dtaps, scaled(dbias, one)

    in_turns = getattr(plan.module, "in_turns", None)
    turns = in_turns is not None and in_turns(plan.problem(x, shapes))
    return multilinear(run, (in_source, in_weights), with_one(x), (taps, bias), in_turns=turns)


def _weight_grad(plan: Plan, shapes: Shapes, biased: bool, x: jax.Array, dy: jax.Array) -> Weights:
    """The gradients of taps and bias, linear in the source and linear in dy."""
    fused = biased and cast(Kernels, plan.module).BIAS_GRADIENT

    def run(source: Source, dy: jax.Array) -> Weights:
        x, one = source
        if not fused:
            return _correlate(plan, shapes, x, dy), None
        *dtaps, dbias = _correlate(plan, (*shapes, dy.shape[-1:]), x, dy)
        return tuple(dtaps), scaled(dbias, one)

    def in_source(gradients: Weights, dy: jax.Array) -> Source:
        dtaps, dbias = gradients
        return _apply(plan, True, dy, dtaps, None), in_one(dbias, dy)

    def in_dy(gradients: Weights, source: Source) -> jax.Array:
        (x, one), (dtaps, dbias) = source, gradients
        return _apply(plan, False, x, dtaps, scaled(dbias, one))

    dtaps, dbias = multilinear(run, (in_source, in_dy), with_one(x), dy)
    return dtaps, summed(dy) if biased and not fused else dbias


def _forward(
    plan: Plan, transpose: bool, x: jax.Array, taps: Taps, bias: jax.Array | None
) -> jax.Array:
    """The implementation's `forward`, of each shard."""
    shapes = tuple(tap.shape for tap in taps)

    def shard(
        plan: Plan, place: sharding.Shard, x: jax.Array, taps: Taps, bias: jax.Array | None
    ) -> jax.Array:
        def run(x: jax.Array, taps: Taps, bias: jax.Array | None) -> jax.Array:
            return cast(Kernels, plan.module).forward(
                *(x, taps, bias), transpose=transpose, **plan.static_kwargs()
            )

        def below(x: jax.Array, taps: Taps, bias: jax.Array | None) -> jax.Array:
            own = plan.for_low_band("fwd", x, tuple(tap.shape for tap in taps))
            return cast(Kernels, own.module).forward(
                *(x, taps, bias), transpose=transpose, **own.static_kwargs()
            )

        return shards.forward(run, below, place, x, taps, bias)

    return sharding.split(
        shard,
        shards.rule(x.ndim - 2, len(taps), bias is not None, plan.wavelet),
        plan,
        lambda place, x, *_: shards.around(plan.problem(x, shapes), place),
        x,
        taps,
        bias,
        mapped=vmap_folding,
        # As many groups as channels XLA splits for a GPU by gathering images.
        ours=not on_cpu(),
    )


def _correlate(plan: Plan, shapes: Shapes, x: jax.Array, dy: jax.Array) -> Taps:
    """The implementation's `weight_grad`, the sum of all shards'."""

    def shard(plan: Plan, place: sharding.Shard, x: jax.Array, dy: jax.Array) -> Taps:
        def run(x: jax.Array, dy: jax.Array, shapes: Shapes) -> Taps:
            return cast(Kernels, plan.module).weight_grad(
                x, dy, kernel_shapes=shapes, **plan.static_kwargs()
            )

        def below(x: jax.Array, dy: jax.Array, shapes: Shapes) -> Taps:
            own = plan.for_low_band("bwd", x, shapes)
            return cast(Kernels, own.module).weight_grad(
                x, dy, kernel_shapes=shapes, **own.static_kwargs()
            )

        found = shards.weight_grad(run, below, place, x, dy, shapes)
        return place.sum(found, "n", "d", "h", "w")

    taps = tuple(shape for shape in shapes if len(shape) > 1)
    whole = shards.rule(x.ndim - 2, len(taps), len(shapes) > len(taps), plan.wavelet)
    image, *weights = whole.operands
    return sharding.split(
        shard,
        whole._replace(operands=(image, image), results=tuple(weights)),
        plan,
        lambda place, x, _: shards.around(plan.problem(x, taps), place),
        x,
        dy,
        mapped=vmap_sequential,
        ours=not on_cpu(),
    )


def measurement(
    operator: Operator,
    direction: str,
    problem: Problem,
    bias: bool,
    precision: jax.lax.Precision | None,
) -> JaxMeasurement:
    """The measurement that runs and times an implementation on arrays like those of a call.

    Args:
        operator: The operator, in JAX.
        direction: "fwd" or "bwd".
        problem: The call.
        bias: Whether it has a bias.
        precision: The precision of products on matrix units.

    Returns:
        A measurement of `problem.measured_as()`.
    """
    problem = problem.measured_as()
    *spatial, channels = problem.shape[1:]
    acc = accumulation_dtype(problem.dtype)
    bands = [1, *[2 ** len(spatial)] * problem.levels]
    kernel = (problem.kernel_size,) * len(spatial)
    x = jax.ShapeDtypeStruct(problem.shape, problem.dtype)
    taps = tuple(jax.ShapeDtypeStruct((*kernel, band, channels), acc) for band in bands)
    inputs = x, taps, jax.ShapeDtypeStruct((channels,), acc) if bias else None

    def run(module: Implementation, config: TuningParams) -> Callable[..., Tree]:
        plan = Plan(module, config, problem.wavelet, precision, backward=None)
        return timed_function(plan, direction)

    return JaxMeasurement(
        run,
        inputs if direction == "fwd" else (*inputs, x),
        operator.module("xla"),
        {"bias": bias, "precision": precision and precision.name},
    )


def timed_function(plan: Plan, direction: str) -> Callable[..., Tree]:
    """The function of arrays that a plan's implementation computes in one direction.

    Args:
        plan: The plan of the call.
        direction: "fwd", a function of x, taps and bias, or "bwd", of these and dy.

    Returns:
        The function, of the output, or of the gradients of x, taps and bias.
    """
    if direction == "fwd":
        return partial(_forward, plan, False)

    def backward(x: jax.Array, taps: Taps, bias: jax.Array | None, dy: jax.Array) -> Tree:
        shapes = tuple(tap.shape for tap in taps)
        dx = _forward(plan, True, dy, taps, None)
        return dx, *_weight_grad(plan, shapes, bias is not None, x, dy)

    return backward
