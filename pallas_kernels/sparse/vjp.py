"""The derivatives of sparse convolutions: any forward implementation pairs with any backward one.

A convolution is linear in x and linear in w, so it has two transposes, and the derivatives of all
three are the other two, of every order. Saved are x and w.

An implementation is a module with

    forward(x, w, rows, *, precision, ...) -> y [M, F]
    input_grad(dy, w, rows, *, precision, ...) -> dx [N, C]
    weight_grad(x, dy, rows, *, shape, precision, ...) -> dw [*shape]

for `x [N, C]` and `w [K, G, C / G, F / G]` of one dtype (the depthwise operator: `w [K, C]`), and
the `maps.RowTable` of what is gathered: `rows.table [K, M]` holds rows of x for `forward` and
`weight_grad`, and `[K, N]` rows of dy for `input_grad`, which gathers as `forward` does, by weights
that are transposed. More keywords are those of the implementation's search space. Where a table
holds -1 nothing is read; a row that reads nothing may hold anything in dy, and is zero in y.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from pallas_kernels.common import sharding
from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.dispatch import Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.sparse.maps import KernelMap, kernel_map
from pallas_kernels.sparse.problem import Problem
from pallas_kernels.sparse.shapes import room
from pallas_kernels.sparse.voxels import from_coords


class Kernels(Protocol):
    """The functions of an implementation, which the docstring of this module describes."""

    forward: Callable[..., jax.Array]
    input_grad: Callable[..., jax.Array]
    weight_grad: Callable[..., jax.Array]


class Plan(NamedTuple):
    """The static choices of one call: what computes it, and what is asked of its backward pass.

    Attributes:
        module: The implementation that computes the operator.
        config: Its parameters, none for those that it takes unasked.
        problem: The call.
        precision: The precision of products on matrix units.
        backward: The request by which the backward rule chooses an implementation; None in a
            plan that is timed, which nobody differentiates.
        request: The request by which `module` was chosen, None in a plan that is timed.
    """

    module: Implementation
    config: TuningParams
    problem: Problem
    precision: jax.lax.Precision | None
    backward: Request | None
    request: Request | None = None

    @property
    def stated(self) -> None:
        """No sharding is stated: on a TPU plain JAX computes it in any case."""

    def by(self, module: Implementation) -> "Plan":
        """The plan with another implementation, which takes its own parameters."""
        return self._replace(module=module, config=())

    def for_backward(self, x: jax.Array, w: jax.Array) -> "Plan":
        """The plan of the backward pass, whose implementation is chosen here.

        Raises:
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        assert self.backward is not None
        operator = self.backward.operator
        problem = of_shard(self.problem, sharding.spread(rule(self.problem), [x, w]).shard)
        static = operator, "bwd", problem, self.precision
        chosen = self.backward.choose(problem, measurement, *static)
        module = operator.module(chosen.implementation)
        return self._replace(module=module, config=chosen.config, request=self.backward)

    def run(self, function: str, *arrays: Tree) -> jax.Array:
        """The result of one of the implementation's functions, of all shards."""
        (of_x, of_w), (of_y,), free, _ = rule(self.problem)
        operands, result, summed = {
            "forward": ((of_x, of_w), of_y, "c"),
            "input_grad": ((of_y, of_w), of_x, "f"),
            # All rows are there, so that nothing is to be summed.
            "weight_grad": ((of_x, of_y), of_w, ""),
        }[function]

        def shard(plan: Plan, place: sharding.Shard, *arrays: Tree) -> jax.Array:
            static = {"precision": plan.precision, **dict(plan.config)}
            if function == "weight_grad":
                static["shape"] = place.local(plan.problem.weight_shape, of_w)
            found = getattr(cast(Kernels, plan.module), function)(*arrays, **static)
            # A depthwise convolution has its channels in the output, and sums none of them.
            if summed in result.split() or not place.splits(summed):
                return found
            wide = found.astype(accumulation_dtype(found.dtype))
            return place.sum(wide, summed).astype(found.dtype)

        tables = "_ _", "_", "_ _"
        return sharding.split_each(
            shard,
            sharding.Rule((*operands, *tables), (result,), free),
            self,
            lambda place, *_: of_shard(self.problem, place),
            *arrays,
        )


def rule(problem: Problem) -> sharding.Rule:
    """The axes of x, w and y: channels and features may be split, the rows of a map never.

    Example:
        >>> from pallas_kernels.sparse.problem import Window
        >>> rule(Problem((1, 64, 4), "float32", 8, Window((3,), (1,), (1,)))).operands
        ('_ c', '_ _ c f')
    """
    if len(problem.weight_shape) == 2:
        return sharding.Rule(("_ c", "_ c"), ("_ c",), frozenset("c"))
    free = "cf" if problem.window.groups == 1 else ""
    return sharding.Rule(("_ c", "_ _ c f"), ("_ f",), frozenset(free))


def of_shard(problem: Problem, shard: sharding.Shard) -> Problem:
    """The convolution that a shard computes."""
    if not shard.counts:
        return problem
    shape = shard.local(problem.shape, "_ _ c")
    if len(problem.weight_shape) == 2:
        window = problem.window._replace(groups=shape[-1])
        return problem._replace(shape=shape, features=shape[-1], window=window)
    (features,) = shard.local((problem.features,), "f")
    return problem._replace(shape=shape, features=features)


@partial(jax.jit, static_argnums=0)
def convolution(plan: Plan, x: jax.Array, w: jax.Array, maps: KernelMap) -> jax.Array:
    """The convolution of `x [N, C]`: `[M, F]`."""
    arrays = x, w, maps
    return _convolution(plan, *vary_like(arrays, arrays))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(plan: Plan, x: jax.Array, w: jax.Array, maps: KernelMap) -> jax.Array:
    return plan.run("forward", x, w, maps.forward)


def _convolution_fwd(
    plan: Plan, x: jax.Array, w: jax.Array, maps: KernelMap
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, KernelMap]]:
    return _convolution(plan, x, w, maps), (x, w, maps)


def _convolution_bwd(
    plan: Plan, residuals: tuple[jax.Array, jax.Array, KernelMap], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, maps = residuals
    backward = plan.for_backward(x, w)
    return (
        _like(_input_grad(backward, dy, w, maps), x),
        _like(_weight_grad(backward, x, dy, maps), w),
        None,
    )


_convolution.defvjp(_convolution_fwd, _convolution_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _input_grad(plan: Plan, dy: jax.Array, w: jax.Array, maps: KernelMap) -> jax.Array:
    if maps.backward is None:
        # The table whose offsets run the other way, without a copy of it.
        return plan.run("input_grad", dy, w[::-1], maps.forward)
    return plan.run("input_grad", dy, w, maps.backward)


def _input_grad_fwd(
    plan: Plan, dy: jax.Array, w: jax.Array, maps: KernelMap
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, KernelMap]]:
    return _input_grad(plan, dy, w, maps), (dy, w, maps)


def _input_grad_bwd(
    plan: Plan, residuals: tuple[jax.Array, jax.Array, KernelMap], x: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    dy, w, maps = residuals
    return (
        _like(_convolution(plan, x, w, maps), dy),
        _like(_weight_grad(plan, x, dy, maps), w),
        None,
    )


_input_grad.defvjp(_input_grad_fwd, _input_grad_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_grad(plan: Plan, x: jax.Array, dy: jax.Array, maps: KernelMap) -> jax.Array:
    return plan.run("weight_grad", x, dy, maps.forward)


def _weight_grad_fwd(
    plan: Plan, x: jax.Array, dy: jax.Array, maps: KernelMap
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, KernelMap]]:
    return _weight_grad(plan, x, dy, maps), (x, dy, maps)


def _weight_grad_bwd(
    plan: Plan, residuals: tuple[jax.Array, jax.Array, KernelMap], w: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, dy, maps = residuals
    return (
        _like(_input_grad(plan, dy, w, maps), x),
        _like(_convolution(plan, x, w, maps), dy),
        None,
    )


_weight_grad.defvjp(_weight_grad_fwd, _weight_grad_bwd)


def _like(gradient: jax.Array, argument: jax.Array) -> jax.Array:
    """A gradient, split over a mesh as its argument is."""
    return sharding.placed_like(gradient, jax.typeof(argument))


def measurement(
    operator: Operator,
    direction: str,
    problem: Problem,
    precision: jax.lax.Precision | None,
) -> JaxMeasurement:
    """The measurement that runs and times an implementation on a scene of a call's size.

    Args:
        operator: The operator, in JAX.
        direction: "fwd" or "bwd".
        problem: The call.
        precision: The precision of products on matrix units.

    Returns:
        A measurement of the problem that the call is measured as.
    """
    asked = problem.measured_as()

    def run(module: Implementation, config: TuningParams) -> Callable[..., Tree]:
        return timed_function(Plan(module, config, asked, precision, None), direction)

    _, capacity, channels = asked.shape
    x = jax.ShapeDtypeStruct((capacity, channels), asked.dtype)
    w = jax.ShapeDtypeStruct(asked.weight_shape, asked.dtype)
    # A strided map has as many rows as the input at most.
    dy = jax.ShapeDtypeStruct((capacity, asked.features), asked.dtype)
    inputs = (x, w, partial(scene_map, asked)) + ((dy,) if direction == "bwd" else ())
    static: Json = {"precision": precision and precision.name}
    return JaxMeasurement(run, inputs, operator.module("xla"), static)


def timed_function(plan: Plan, direction: str) -> Callable[..., Tree]:
    """The function of arrays that a plan's implementation computes in one direction.

    Args:
        plan: The plan of the call.
        direction: "fwd", a function of x, w and the map, or "bwd", of x, w, the map and dy.

    Returns:
        The function: of the output, or of the gradients of x and w.
    """
    if direction == "fwd":
        return partial(_convolution, plan)

    def backward(
        x: jax.Array, w: jax.Array, maps: KernelMap, dy: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return _input_grad(plan, dy, w, maps), _weight_grad(plan, x, dy, maps)

    return backward


def scene_map(problem: Problem) -> KernelMap:
    """The map of a call like this one over the voxels of a room.

    Example:
        >>> from pallas_kernels.sparse.problem import Window
        >>> window = Window((3, 3, 3), (1, 1, 1), (1, 1, 1))
        >>> scene_map(Problem((1, 64, 4), "float32", 8, window)).table.shape
        (27, 64)
    """
    batch, capacity, _ = problem.shape
    window = problem.window
    coords = room(capacity, batch=batch, ndim=len(window.kernel_size))
    voxels = from_coords(coords, jnp.zeros((capacity, 0)), batch_size=batch, capacity=capacity)
    maps, _ = kernel_map(voxels, *window[:3])
    return maps.swapped() if window.transposed else maps
