"""The operator's derivatives: any forward implementation pairs with any backward one.

The convolution is linear in x, with a one beside it for the bias (`common.biased`), and linear in
kernel and bias. So it has two transposes, and the derivatives of all three are the other two, of
every order, in reverse and in forward mode. Saved are x and the kernel and nothing else.

An implementation is a module with

    forward(x, kernel, bias, *, window, precision) -> y [N, H_out, W_out, C]
    input_grad(dy, kernel, *, size, window, precision) -> dx [N, *size, C]
    weight_grad(x, dy, *, kernel_size, window, precision) -> dkernel [*kernel_size, 1, C]

for `x [N, H, W, C]`, `kernel [KH, KW, 1, C]` and `bias [C]` or None, of any floating dtype. Modules
that JAX can look into, and so map with `vmap`, say so with `DIFFERENTIABLE = True`. Of those that
say `BIAS_GRADIENT = True` the gradient of the bias is asked too: their `weight_grad` takes `bias=`,
whether it is wanted, and returns `dkernel` and `dbias [C]` or None. The functions take the
parameters that `search_space` offers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import jax

from pallas_kernels.common import sharding
from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.biased import Source, in_one, scaled, summed, with_one
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement, moved_here
from pallas_kernels.common.multilinear import multilinear
from pallas_kernels.common.types import Tree
from pallas_kernels.common.vmap import vmap_folding, vmap_sequential
from pallas_kernels.conv2d import shards
from pallas_kernels.depthwise.problem import Problem
from pallas_kernels.dispatch import Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams

Weights = tuple[jax.Array, jax.Array | None]
"""The kernel and the bias."""


class Kernels(Protocol):
    """The functions of an implementation, which the docstring of this module describes.

    Attributes:
        BIAS_GRADIENT: Whether `weight_grad` sums dy on its way, for the gradient of the bias.
    """

    BIAS_GRADIENT: bool
    forward: Callable[..., jax.Array]
    input_grad: Callable[..., jax.Array]
    weight_grad: Callable[..., Tree]


class Plan(NamedTuple):
    """The static choices of one call: what computes it, and what is asked of its backward pass.

    Attributes:
        module: The implementation that computes the operator.
        config: Its parameters.
        problem: The call, whose window says which samples a tap reads.
        precision: The precision of products on matrix units.
        backward: The request by which the backward rule chooses an implementation; None in a
            plan that is timed, which nobody differentiates.
        request: The request by which `module` was chosen, None in a plan that is timed.
        stated: How the caller has stated that the output is split over a mesh.
    """

    module: Implementation
    config: TuningParams
    problem: Problem
    precision: jax.lax.Precision | None
    backward: Request | None
    request: Request | None = None
    stated: sharding.Stated | None = None

    def by(self, module: Implementation) -> "Plan":
        """The plan with another implementation, which takes its own parameters."""
        return self._replace(module=module, config=())

    def for_backward(self, x: jax.Array) -> "Plan":
        """The plan of the backward pass, whose implementation is chosen here, where it is called.

        Args:
            x: The images, or their output, which is split as they are.

        Raises:
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        assert self.backward is not None
        backward = moved_here(self.backward)
        operator = backward.operator
        spread = sharding.spread(rule(self.problem), [x], self.stated)
        problem = of_shard(self.problem, spread.shard)
        chosen = backward.choose(
            problem, measurement, operator, "bwd", problem, False, self.precision
        )
        module = operator.module(chosen.implementation)
        return self._replace(module=module, config=chosen.config, request=backward)

    def bound(self, name: str, shard: sharding.Shard, **static: object) -> Callable[..., Tree]:
        """A function of the implementation, of a shard's arrays alone."""
        return partial(
            getattr(cast(Kernels, self.module), name),
            window=shards.inside(self.problem.window, shard),
            precision=self.precision,
            **static,
            **dict(self.config),
        )

    def surrounded(self, x: jax.Array, shard: sharding.Shard) -> jax.Array:
        """The images that a shard reads, of which x has its own samples."""
        return shards.surrounded(x, self.problem.window, self.problem.kernel_size, shard)


def rule(problem: Problem) -> sharding.Rule:
    """The axes of x, the kernel and the output: those of a convolution of a group a channel.

    Example:
        >>> from pallas_kernels.conv2d.problem import Window
        >>> window = Window(pads=((1, 1), (1, 1)), groups=4)
        >>> rule(Problem((2, 8, 8, 4), "float32", (3, 3), window)).operands
        ('n h w g', '_ _ _ g')
    """
    return shards.rule(problem.window, problem.shape[1:3], problem.kernel_size)


def of_shard(problem: Problem, shard: sharding.Shard) -> Problem:
    """The convolution that a shard computes, with the samples around it."""
    if not shard.counts:
        return problem
    window = problem.window
    return problem._replace(
        shape=shards.local_shape(problem.shape, window, problem.kernel_size, shard),
        window=shards.inside(window, shard),
    )


@partial(jax.jit, static_argnums=0)
def depthwise_conv2d(
    plan: Plan, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """The convolution of images `[*batch, H, W, C]`."""
    batch = x.shape[:-3]
    # Here, since an eager reshape takes the host longer than all checks of the arguments.
    arrays = sharding.flat(x, len(batch)), kernel, bias
    y = _apply(plan, *vary_like(arrays, arrays))
    return sharding.unflat(y, batch)


def _apply(plan: Plan, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """The operator, linear in its source and linear in its weights."""
    taps, dtypes = kernel.shape[:2], jax.tree.map(lambda weight: weight.dtype, (kernel, bias))

    def run(source: Source, weights: Weights) -> jax.Array:
        (x, one), (kernel, bias) = source, weights
        return _forward(plan, x, kernel, scaled(bias, one))

    def in_source(dy: jax.Array, weights: Weights) -> Source:
        kernel, bias = weights
        return _input_grad(plan.for_backward(dy), dy, kernel), in_one(bias, dy)

    def in_weights(dy: jax.Array, source: Source) -> Weights:
        x, one = source
        dkernel, dbias = _weight_grad(plan.for_backward(x), taps, dtypes[1] is not None, x, dy)
        found = dkernel, scaled(dbias, one)
        return jax.tree.map(lambda gradient, dtype: gradient.astype(dtype), found, dtypes)

    return multilinear(run, (in_source, in_weights), with_one(x), (kernel, bias))


def _input_grad(plan: Plan, dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient of x, linear in dy and linear in the kernel."""
    taps, dtype = kernel.shape[:2], kernel.dtype

    def in_dy(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _apply(plan, x, kernel, None)

    def in_kernel(x: jax.Array, dy: jax.Array) -> jax.Array:
        return _weight_grad(plan, taps, False, x, dy)[0].astype(dtype)

    return multilinear(partial(_dx, plan), (in_dy, in_kernel), dy, kernel)


def _weight_grad(
    plan: Plan, taps: tuple[int, ...], biased: bool, x: jax.Array, dy: jax.Array
) -> Weights:
    """The gradients of kernel and bias, linear in the source and linear in dy."""
    fused = biased and cast(Kernels, plan.module).BIAS_GRADIENT

    def run(source: Source, dy: jax.Array) -> Weights:
        x, one = source
        dkernel, dbias = _dweights(plan, taps, fused, x, dy)
        return dkernel, scaled(dbias, one)

    def in_source(gradients: Weights, dy: jax.Array) -> Source:
        dkernel, dbias = gradients
        return _input_grad(plan, dy, dkernel), in_one(dbias, dy)

    def in_dy(gradients: Weights, source: Source) -> jax.Array:
        (x, one), (dkernel, dbias) = source, gradients
        return _apply(plan, x, dkernel, scaled(dbias, one))

    dkernel, dbias = multilinear(run, (in_source, in_dy), with_one(x), dy)
    return dkernel, summed(dy) if biased and not fused else dbias


def _forward(plan: Plan, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """The implementation's `forward`, of each shard."""

    def shard(
        plan: Plan, place: sharding.Shard, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        return plan.bound("forward", place)(plan.surrounded(x, place), kernel, bias)

    operands, (output,), free, cells = rule(plan.problem)
    features = [output.split()[-1]] * (bias is not None)
    return sharding.split(
        shard,
        sharding.Rule((*operands, *features), (output,), free, cells),
        plan,
        lambda place, *_: of_shard(plan.problem, place),
        *(x, kernel, bias),
        mapped=vmap_folding,
        ours=True,
    )


def _dx(plan: Plan, dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """The implementation's `input_grad`, of each shard."""
    (images, taps), (output,), free, cells = rule(plan.problem)

    def shard(plan: Plan, place: sharding.Shard, dy: jax.Array, kernel: jax.Array) -> jax.Array:
        own = dy.shape[0], *place.local(plan.problem.shape, images)[1:]
        extend = partial(plan.surrounded, shard=place)
        around = jax.eval_shape(extend, jax.ShapeDtypeStruct(own, dy.dtype)).shape
        # What is added to the neighbours' samples goes back to them, in the wider dtype. One tap
        # reads none of them.
        wide = dy if around == own else dy.astype(accumulation_dtype(dy.dtype))
        dx = plan.bound("input_grad", place, size=around[1:3])(wide, kernel)
        if around != own:
            (dx,) = jax.linear_transpose(extend, jax.ShapeDtypeStruct(own, wide.dtype))(dx)
        return dx.astype(dy.dtype)

    return sharding.split(
        shard,
        sharding.Rule((output, taps), (images,), free, cells),
        plan,
        lambda place, *_: of_shard(plan.problem, place),
        *(dy, kernel),
        mapped=vmap_folding,
        ours=True,
    )


def _dweights(
    plan: Plan, taps: tuple[int, ...], bias: bool, x: jax.Array, dy: jax.Array
) -> Weights:
    """The implementation's `weight_grad`, with the gradient of a bias where it is asked for.

    It is the sum of all shards'.
    """
    (images, kernel), (output,), free, cells = rule(plan.problem)

    def shard(plan: Plan, place: sharding.Shard, x: jax.Array, dy: jax.Array) -> Weights:
        both = cast(Kernels, plan.module).BIAS_GRADIENT
        static = {"bias": bias} if both else {}
        run = plan.bound("weight_grad", place, kernel_size=taps, **static)
        found = run(plan.surrounded(x, place), dy)
        dkernel, dbias = found if both else (found, None)
        # An implementation that stands in for another one may not sum dy.
        dbias = summed(dy) if bias and dbias is None else dbias
        return place.sum((dkernel, dbias), "n", "h", "w")

    features = [output.split()[-1]] * bias
    return cast(
        Weights,
        sharding.split(
            shard,
            sharding.Rule((images, output), (kernel, *features), free, cells),
            plan,
            lambda place, *_: of_shard(plan.problem, place),
            *(x, dy),
            mapped=vmap_sequential,
            ours=True,
        ),
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
        direction: "fwd", or "bwd", for which the bias does not count.
        problem: The call.
        bias: Whether it has a bias.
        precision: The precision of products on matrix units.

    Returns:
        A measurement of the problem.
    """
    n, *size, channels = problem.shape
    acc = accumulation_dtype(problem.dtype)
    x = jax.ShapeDtypeStruct(problem.shape, problem.dtype)
    kernel = jax.ShapeDtypeStruct((*problem.kernel_size, 1, channels), acc)
    output = n, *problem.window.output(size, problem.kernel_size), channels
    last: jax.ShapeDtypeStruct | None = jax.ShapeDtypeStruct(output, problem.dtype)
    if direction == "fwd":
        last = jax.ShapeDtypeStruct((channels,), acc) if bias else None

    def run(module: Implementation, config: TuningParams) -> Callable[..., Tree]:
        return timed_function(Plan(module, config, problem, precision, backward=None), direction)

    static = {"bias": bias, "precision": precision and precision.name}
    return JaxMeasurement(run, (x, kernel, last), operator.module("xla"), static)


def timed_function(plan: Plan, direction: str) -> Callable[..., Tree]:
    """The function of arrays that a plan's implementation computes in one direction.

    Args:
        plan: The plan of the call.
        direction: "fwd", a function of x, kernel and bias, or "bwd", of x, kernel and dy.

    Returns:
        The function, of the output, or of the gradients of x and of the kernel.
    """
    if direction == "fwd":
        return partial(_forward, plan)

    def backward(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _dx(plan, dy, kernel), _dweights(plan, kernel.shape[:2], False, x, dy)[0]

    return backward
