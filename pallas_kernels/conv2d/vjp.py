"""The operator's derivatives: any forward implementation pairs with any backward one.

The convolution is linear in x and linear in w, so it has two transposes, and the derivatives of
all three are the other two, of every order, in reverse and in forward mode. Saved are x and w, and
for the activation its output (ReLU) or its input (GELU), in the output's dtype.

An implementation is a module with

    forward(x, w, bias, *, window, activation, out_dtype, precision, config, moments=False) -> y
    input_grad(dy, w, *, shape, dtype, window, precision, config) -> dx [N, *shape]
    weight_grad(x, dy, *, shape, dtype, window, precision, config) -> dw [*shape]

for `x [N, H, W, C]`, `w [HF, WF, C / groups, NF]` of one dtype and `bias [NF]` or None, or the
layout "nchw_fchw" of `problem.Window`. Their windows never upsample: `upsampling` calls them for
smaller convolutions that do the same. With `moments` a forward returns `(y, moments)`. Modules
that JAX can look into, and so map with `vmap`, say so with `DIFFERENTIABLE = True`. A module that
computes all of those smaller convolutions in one launch has

    upsampled_with_moments(x, w, *, joint, out_dtype, precision, config) -> (y, moments)

for the filters that `upsampling.joint_filters` makes.
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
from pallas_kernels.common.measurement import JaxMeasurement, moved_here
from pallas_kernels.common.multilinear import multilinear
from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.common.vmap import vmap_folding, vmap_sequential
from pallas_kernels.conv2d import shards, upsampling, whole_rows, xla
from pallas_kernels.conv2d.activations import activate
from pallas_kernels.conv2d.moments import WithMoments
from pallas_kernels.conv2d.problem import Problem, Window
from pallas_kernels.conv2d.xla import along_features, epilogue
from pallas_kernels.dispatch import Candidate, Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams

Tangent = jax.Array | SymbolicZero


class Kernels(Protocol):
    """The functions of an implementation, which the docstring of this module describes."""

    forward: Callable[..., Tree]
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
        whole_rows: Whether a row of taps is multiplied as one, see the module of that name; None
            leaves it to that.
        request: The request by which `module` was chosen, None in a plan that is timed.
        stated: How the caller has stated that the output is split over a mesh.
    """

    module: Implementation
    config: TileConfig | None
    window: Window
    precision: jax.lax.Precision | None
    given: TileConfig | None
    backward: Request | None
    whole_rows: bool | None = None
    request: Request | None = None
    stated: sharding.Stated | None = None

    def by(self, module: Implementation) -> "Plan":
        """The plan with another implementation, which takes its own parameters."""
        return self._replace(module=module, config=self.given)

    def for_backward(self, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype) -> "Plan":
        """The plan of the backward pass, whose implementation is chosen here, where it is called.

        Args:
            x: The images, or another array that is split as they are.
            w: The filters.
            out_dtype: The dtype of the output.

        Raises:
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        assert self.backward is not None
        spread = sharding.spread(shards.rule_of(self.window, x.shape, w.shape), [x, w], self.stated)
        problem = problem_of(self.window, x.shape, w.shape, x.dtype, out_dtype)
        problem = of_shard(upsampling.implemented(problem), spread.shard)
        backward = moved_here(self.backward)
        operator = backward.operator
        static = problem, False, None, self.precision, self.given
        chosen = backward.choose(problem, measurement, operator, "bwd", *static)
        return self._replace(
            module=operator.module(chosen.implementation),
            config=tiles(self.given, chosen),
            whole_rows=takes_whole_rows(chosen, spread.shard),
            request=backward,
        )

    def rows_as_one(
        self,
        window: Window,
        filters: tuple[int, ...],
        dtype: jnp.dtype,
        *arrays: jax.Array,
        forward: bool = False,
    ) -> bool:
        """Whether a row of taps is multiplied as one.

        Args:
            window: The window.
            filters: The shape of the filters in its layout.
            dtype: The dtype of images and filters.
            *arrays: What is multiplied. Unasked, nothing that lies on a mesh of Explicit axes is:
                what becomes channels or features may be split there.
            forward: Whether the output is computed, and not a gradient.
        """
        if self.whole_rows is not None:
            return self.whole_rows
        if any(map(sharding.lies_on_a_mesh, arrays)):
            return False
        rounds = forward and self.module.DIFFERENTIABLE
        return whole_rows.unasked(window, window.filters(filters), dtype, rounds=rounds)

    def static_kwargs(self, window: Window) -> dict[str, object]:
        """The keyword arguments of every function of an implementation, for a window."""
        return {"window": window, "precision": self.precision, "config": self.config}


def tiles(given: TileConfig | None, chosen: Candidate) -> TileConfig | None:
    """The tiles that the caller gave, else those that were measured; None where neither is."""
    own = {name: value for name, value in dict(chosen.config).items() if name != whole_rows.NAME}
    return given or (TileConfig(**own) if own else None)


def takes_whole_rows(chosen: Candidate, shard: sharding.Shard = sharding.WHOLE) -> bool | None:
    """Whether rows of taps multiplied as one were measured to be the fastest; None: they were not.

    They become channels or features, which then cannot be split over a mesh.
    """
    if shard.splits(*"cfghw"):
        return False
    found = dict(chosen.config).get(whole_rows.NAME)
    return None if found is None else bool(found)


def of_shard(problem: Problem, shard: sharding.Shard) -> Problem:
    """The convolution that a shard computes."""
    if not shard.counts:
        return problem
    window, taps = problem.window, (problem.kernel_height, problem.kernel_width)
    (features,) = shard.local((problem.features,), "f" if window.groups == 1 else "g")
    return problem._replace(
        shape=shards.local_shape(problem.shape, window, taps, shard),
        features=features,
        window=shards.inside(window, shard),
    )


def problem_of(
    window: Window,
    images: tuple[int, ...],
    filters: tuple[int, ...],
    dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    shard: sharding.Shard = sharding.WHOLE,
) -> Problem:
    """The description of a convolution of images and filters of these shapes, a shard's own."""
    height, width, _, features = window.filters(filters)
    n, *size, channels = window.images(images)
    shape = n, *shards.read(size, window, (height, width), shard), channels
    own = shards.inside(window, shard)
    return Problem(shape, dtype, height, width, features, own, out_dtype)


@partial(jax.jit, static_argnums=(0, 1, 2))
def conv2d(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """The convolution of images `[*batch, H, W, C]`, in the plan's layout, with its epilogue."""
    batch = x.shape[:-3]
    # Here, since an eager reshape takes the host longer than all checks of the arguments.
    x = sharding.flat(x, len(batch))
    if plan.window.upsample > 1:
        for axis in upsampling.image_axes(plan.window):
            x = sharding.whole(x, axis)
    arrays = x, w, bias
    y = _apply(plan, activation, out_dtype, *vary_like(arrays, arrays))
    return sharding.unflat(y, batch)


def conv2d_with_moments(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> WithMoments:
    """The convolution of images `[N, H, W, C]`, and the moments of its tiles, see `moments`.

    For operators that normalise what comes out. They bring its derivatives along: JAX does not
    differentiate a kernel.
    """
    return cast(WithMoments, _forward(plan, activation, out_dtype, x, w, bias, moments=True))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _apply(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    return _forward(plan, activation, out_dtype, x, w, bias)


def _apply_jvp(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    primals: tuple[jax.Array, jax.Array, jax.Array | None],
    tangents: tuple[Tangent, Tangent, Tangent | None],
) -> tuple[jax.Array, jax.Array]:
    acc = accumulation_dtype(out_dtype)
    # ReLU's slope is that at its output, GELU's needs its input.
    kept = _apply(plan, None if activation == "gelu" else activation, out_dtype, *primals)
    (x, w, _), (dx, dw, dbias) = primals, tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(linear(plan, out_dtype, dx, w))
    if not isinstance(dw, SymbolicZero):
        terms.append(linear(plan, out_dtype, x, dw))
    if not isinstance(dbias, SymbolicZero | None):
        # In the wider dtype, in which the transpose sums.
        wide = along_features(dbias.astype(acc), plan.window)
        placed = [(kept, axis) for axis in range(4)]
        terms.append(sharding.broadcast_to(wide, kept.shape, placed).astype(out_dtype))

    def epilogue(kept: jax.Array) -> jax.Array:
        return activate(kept.astype(acc), activation).astype(out_dtype)

    # Its slope is computed anew in the backward pass, for which nothing but `kept` is saved.
    lean = jax.checkpoint(epilogue, prevent_cse=False)
    y, dy = jax.jvp(lean, (kept,), (sum(terms[1:], terms[0]),))
    return y if activation == "gelu" else kept, dy


_apply.defjvp(_apply_jvp, symbolic_zeros=True)


def linear(plan: Plan, out_dtype: jnp.dtype, x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution alone of images `[N, H, W, C]`, linear in x and linear in w.

    Args:
        plan: The plan of the call.
        out_dtype: The dtype of the output.
        x: The images.
        w: The filters.
    """
    of_x, of_w = (x.shape[1:], x.dtype), (w.shape, w.dtype)

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return _forward(plan, None, out_dtype, x, w, None)

    def in_x(dy: jax.Array, w: jax.Array) -> jax.Array:
        return _input_grad(plan.for_backward(x, w, out_dtype), *of_x, dy, w)

    def in_w(dy: jax.Array, x: jax.Array) -> jax.Array:
        return _weight_grad(plan.for_backward(x, w, out_dtype), *of_w, x, dy)

    return multilinear(run, (in_x, in_w), x, w)


def _input_grad(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, dy: jax.Array, w: jax.Array
) -> jax.Array:
    """The gradient of x, linear in dy and linear in w."""
    out_dtype, of_w = dy.dtype, (w.shape, w.dtype)

    def in_dy(x: jax.Array, w: jax.Array) -> jax.Array:
        return linear(plan, out_dtype, x, w)

    def in_w(x: jax.Array, dy: jax.Array) -> jax.Array:
        return _weight_grad(plan, *of_w, x, dy)

    return multilinear(partial(_dx, plan, shape, dtype), (in_dy, in_w), dy, w)


def _weight_grad(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, x: jax.Array, dy: jax.Array
) -> jax.Array:
    """The gradient of w, linear in x and linear in dy."""
    out_dtype, of_x = dy.dtype, (x.shape[1:], x.dtype)

    def in_x(w: jax.Array, dy: jax.Array) -> jax.Array:
        return _input_grad(plan, *of_x, dy, w)

    def in_dy(w: jax.Array, x: jax.Array) -> jax.Array:
        return linear(plan, out_dtype, x, w)

    return multilinear(partial(_dw, plan, shape, dtype), (in_x, in_dy), x, dy)


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
        chosen = Candidate("", found)
        own = tiles(config, chosen)
        rows = takes_whole_rows(chosen)
        plan = Plan(module, own, window, precision, config, backward=None, whole_rows=rows)
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
    *,
    moments: bool = False,
) -> Tree:
    """The output of an implementation, and where asked for its moments."""

    def kernel(
        window: Window, x: jax.Array, w: jax.Array, bias: jax.Array | None, **static: Any
    ) -> Tree:
        if moments:
            # The tiles of a shard are not those of the whole.
            one = partial(
                cast(Kernels, plan.module).forward, **static, **plan.static_kwargs(window)
            )
            return one(x, w, bias) if plan.module.DIFFERENTIABLE else vmap_folding(one)(x, w, bias)
        whole = shards.rule_of(window, x.shape, w.shape)
        features = "f" if window.groups == 1 else "g"

        def problem(place: sharding.Shard, x: jax.Array, w: jax.Array, _: Tree) -> Problem:
            return problem_of(window, x.shape, w.shape, x.dtype, static["out_dtype"], place)

        return sharding.split(
            partial(_shard_forward, window=window, **static),
            whole._replace(operands=(*whole.operands, *[features] * (bias is not None))),
            plan,
            problem,
            *(x, w, bias),
            mapped=vmap_folding,
            ours=True,
        )

    static: dict[str, Any] = {"activation": activation, "out_dtype": out_dtype}
    if moments:
        static["moments"] = True

    def run(window: Window, x: jax.Array, w: jax.Array, bias: jax.Array | None) -> Tree:
        rows = plan.rows_as_one(window, w.shape, x.dtype, x, w, forward=True)
        whole = partial(whole_rows.forward, kernel) if rows else kernel
        return whole(window, x, w, bias, **static)

    if plan.window.upsample == 1:
        return run(plan.window, x, w, bias)
    at_once = getattr(plan.module, "upsampled_with_moments", None)
    if moments and at_once is not None and bias is None and activation is None:
        size = plan.window.images(x.shape)[1:3]
        joint = upsampling.joint(plan.window, x.shape, w.shape)
        if joint is not None:
            filters = upsampling.joint_filters(w, plan.window, size)
            how = {"precision": plan.precision, "config": plan.config}
            one = partial(at_once, joint=joint, out_dtype=out_dtype, **how)
            return vmap_folding(one)(x, filters)
    upsampled = upsampling.forward_with_moments if moments else upsampling.forward
    return upsampled(run, plan.window, x, w, bias)


def _shard_forward(
    plan: Plan,
    place: sharding.Shard,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    *,
    window: Window,
    activation: str | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """The output of a shard: channels that are split are summed before the epilogue."""
    forward = cast(Kernels, plan.module).forward
    x = shards.surrounded(x, window, window.filters(w.shape)[:2], place)
    window = shards.inside(window, place)
    static = plan.static_kwargs(window)
    if not place.splits("c"):
        return cast(
            jax.Array, forward(x, w, bias, activation=activation, out_dtype=out_dtype, **static)
        )
    wide = accumulation_dtype(x.dtype)
    y = place.sum(forward(x, w, None, activation=None, out_dtype=wide, **static), "c")
    return epilogue(y, bias, window, activation).astype(out_dtype)


def _dx(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, dy: jax.Array, w: jax.Array
) -> jax.Array:
    def kernel(
        window: Window, dy: jax.Array, w: jax.Array, *, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array:
        (images, filters), (output,), free, cells = shards.rule_of(window, (1, *shape), w.shape)

        def shard(plan: Plan, place: sharding.Shard, dy: jax.Array, w: jax.Array) -> jax.Array:
            own = dy.shape[0], *place.local((0, *shape), images)[1:]
            wide = accumulation_dtype(dtype) if place.splits("f", "h", "w") else dtype
            taps = window.filters(w.shape)[:2]
            extend = partial(shards.surrounded, window=window, taps=taps, shard=place)
            read = jax.eval_shape(extend, jax.ShapeDtypeStruct(own, wide)).shape
            static = plan.static_kwargs(shards.inside(window, place))
            run = cast(Kernels, plan.module).input_grad
            dx = place.sum(run(dy, w, shape=read[1:], dtype=wide, **static), "f")
            if place.splits("h", "w"):
                # What is added to the neighbours' samples goes back to them.
                (dx,) = jax.linear_transpose(extend, jax.ShapeDtypeStruct(own, wide))(dx)
            return dx.astype(dtype)

        def problem(place: sharding.Shard, dy: jax.Array, w: jax.Array) -> Problem:
            image = dy.shape[0], *place.local((0, *shape), images)[1:]
            return problem_of(window, image, w.shape, dtype, dy.dtype, place)

        return sharding.split(
            shard,
            sharding.Rule((output, filters), (images,), free, cells),
            plan,
            problem,
            *(dy, w),
            mapped=vmap_folding,
            ours=True,
        )

    def run(window: Window, dy: jax.Array, w: jax.Array, **of_x: Any) -> jax.Array:
        rows = plan.rows_as_one(window, w.shape, w.dtype, dy, w)
        whole = partial(whole_rows.input_grad, kernel) if rows else kernel
        return whole(window, dy, w, **of_x)

    if plan.window.upsample == 1:
        return run(plan.window, dy, w, shape=shape, dtype=dtype)
    return upsampling.input_grad(run, plan.window, dy, w, shape=shape, dtype=dtype)


def _dw(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, x: jax.Array, dy: jax.Array
) -> jax.Array:
    def kernel(
        window: Window, x: jax.Array, dy: jax.Array, *, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array:
        (images, filters), (output,), free, cells = shards.rule_of(window, x.shape, shape)
        taps = window.filters(shape)[:2]

        def shard(plan: Plan, place: sharding.Shard, x: jax.Array, dy: jax.Array) -> jax.Array:
            x = shards.surrounded(x, window, taps, place)
            static = plan.static_kwargs(shards.inside(window, place))
            static["shape"] = place.local(shape, filters)
            run = partial(cast(Kernels, plan.module).weight_grad, x, dy, **static)
            return place.summed(run, dtype, "n", "h", "w")

        def problem(place: sharding.Shard, x: jax.Array, dy: jax.Array) -> Problem:
            local = place.local(shape, filters)
            return problem_of(window, x.shape, local, x.dtype, dy.dtype, place)

        return sharding.split(
            shard,
            sharding.Rule((images, output), (filters,), free, cells),
            plan,
            problem,
            *(x, dy),
            mapped=vmap_sequential,
            ours=True,
        )

    def run(window: Window, x: jax.Array, dy: jax.Array, **of_w: Any) -> jax.Array:
        rows = plan.rows_as_one(window, of_w["shape"], x.dtype, x, dy)
        whole = partial(whole_rows.weight_grad, kernel) if rows else kernel
        return whole(window, x, dy, **of_w)

    if plan.window.upsample == 1:
        return run(plan.window, x, dy, shape=shape, dtype=dtype)
    rounds = cast(Kernels, plan.module).weight_grad is xla.weight_grad
    return upsampling.weight_grad(run, plan.window, x, dy, shape=shape, dtype=dtype, rounds=rounds)
