"""Operators over a mesh of devices: each shard is computed where it is, and nothing is gathered.

An operator says once what a shard computes, with `jax.lax`'s sums over the mesh inside, and by a
`Rule` which axes its arrays share. There are three ways in, and whoever calls wraps nothing:

- *Explicit axes*: types tell how arrays are split; `jax.shard_map` is made here. Weights are
  resharded to fit, and cotangents get the sharding of their argument (`multilinear`).
- *Auto axes*: XLA alone knows how arrays are split, when it compiles. It asks for the program of a
  shard by `custom_partitioning`, whose Shardy rule is the operator's. Plain JAX needs none: XLA
  splits it.
- *A stated sharding*, `out_sharding=`: the same `jax.shard_map`, over axes of either kind. A TPU's
  compiler has no custom partitioning (jax#38196), so there it is how kernels run on Auto axes.

Inside of the caller's own `jax.shard_map` arrays are a shard already.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, Protocol, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.typing import DTypeLike

from pallas_kernels.common import device
from pallas_kernels.common._compat import (
    interpreter,
    mapped_axes,
    outside_of_vmap,
    tiles_over_devices,
    vary_like,
)
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.types import Tree
from pallas_kernels.common.vmap import each, example, vmap_sequential
from pallas_kernels.dispatch import Request
from pallas_kernels.dispatch.backend import Implementation, Problem

OutSharding = jax.P | NamedSharding | None
"""The type of the argument `out_sharding=`."""
_Axes = tuple[str, ...]
_COPIES = "copies"
"""The axis of a mesh along which devices compute the same shard."""
_SAID: set[str] = set()
_log = logging.getLogger("flash_wtconv")


class Rule(NamedTuple):
    """The axes that the arrays of a function share, by names of letters.

    Attributes:
        operands: For each array of the arguments its axes, such as "n h w c"; `_` stands for one
            that no other array has.
        results: The same for the results.
        free: The axes that may be split. Where no result has one, shards sum over it.
        cells: More axes that may be: of each its name, and the number of cells that it has in every
            array, of which shards have whole ones: groups of channels, or outputs of a stride.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]
    free: frozenset[str]
    cells: tuple[tuple[str, int], ...] = ()

    def able(self, name: str) -> bool:
        """Whether an axis may be split."""
        return name in self.free or name in dict(self.cells)

    def divides(self, name: str, size: int, parts: int) -> bool:
        """Whether an axis of so many samples may be split into so many shards, all alike.

        A symbolic size that is split has been checked by JAX.

        Example:
            >>> rule = Rule(("n h c",), ("n h c",), frozenset("n"), (("h", 2),))
            >>> rule.divides("n", 4, 4), rule.divides("h", 4, 4), rule.divides("c", 4, 2)
            (True, False, False)
        """
        whole = size if name in self.free else dict(self.cells).get(name)
        return whole is not None and (not isinstance(whole, int) or whole % parts == 0)


class Shard(NamedTuple):
    """The place of a shard among all.

    Attributes:
        axes: For each axis of a rule that is split the axes of the mesh.
        counts: The number of shards along it.
    """

    axes: Mapping[str, _Axes]
    counts: Mapping[str, int]

    def local(self, shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
        """The shape of a shard of an array whose axes a rule calls so.

        Example:
            >>> Shard({"n": ("data",)}, {"n": 4}).local((8, 6, 16), "n h c")
            (2, 6, 16)
        """
        if not self.counts:
            return shape
        counts = (self.counts.get(name, 1) for name in axes.split())
        return tuple(size // n if n > 1 else size for size, n in zip(shape, counts, strict=True))

    def splits(self, *names: str) -> bool:
        """Whether any of these axes is split."""
        return any(self.counts.get(name, 1) > 1 for name in names)

    def sum(self, arrays: Tree, *names: str) -> Tree:
        """The sums of arrays over the shards along some axes of the rule."""
        axes = tuple(axis for name in names for axis in self.axes.get(name, ()))
        return jax.lax.psum(arrays, axes) if axes else arrays

    def summed(self, run: Callable[..., jax.Array], dtype: DTypeLike, *names: str) -> jax.Array:
        """The sum of what shards compute, in float32 or better.

        Args:
            run: Function of the keyword `dtype`, the dtype of its result.
            dtype: The dtype of the sum.
            *names: The axes of the rule that are summed over.
        """
        if not self.splits(*names):
            return run(dtype=dtype)
        wide = accumulation_dtype(dtype)
        return cast(jax.Array, self.sum(run(dtype=wide), *names)).astype(dtype)


WHOLE = Shard({}, {})
"""The only shard, where nothing is split."""


class Stated(NamedTuple):
    """The sharding that a caller has stated, hashable.

    Attributes:
        mesh: The mesh.
        axes: For each axis of a rule that is split the axes of the mesh.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[tuple[str, _Axes], ...]


class Spread(NamedTuple):
    """How the arrays of a call are spread over a mesh, as far as it is known when it is traced.

    Attributes:
        shard: The shards that are known.
        stated: The sharding that the caller has stated, or None.
        plain: Whether plain JAX alone can compute it: on the Auto axes of a TPU.
    """

    shard: Shard = WHOLE
    stated: Stated | None = None
    plain: bool = False

    def allowed(self, *requests: Request) -> tuple[Request, ...]:
        """The requests of a call, of plain JAX alone where no kernel can be split.

        Raises:
            NotImplementedError: They ask for kernels, by name.
        """
        return tuple(map(_plain_alone, requests)) if self.plain else requests


_NOWHERE = Spread()


class Plan(Protocol):
    """The static choices of a call, as `split` reads them; a NamedTuple.

    Attributes:
        module: The implementation that was chosen.
        request: The request by which it was, None where it is timed.
        stated: The sharding that the caller has stated, or None.
    """

    @property
    def module(self) -> Implementation:
        """The implementation."""

    @property
    def request(self) -> Request | None:
        """The request."""

    @property
    def stated(self) -> Stated | None:
        """The stated sharding."""

    def by(self, module: Implementation) -> Self:
        """The plan with another implementation, which takes its own parameters."""


def spread(rule: Rule, arrays: Sequence[jax.Array], out_sharding: object = None) -> Spread:
    """How the arrays of a call are spread over a mesh.

    Args:
        rule: The axes of the arrays. Those of the caller's may have any number of axes in place of
            the first one, of which the first is split.
        arrays: The first arguments.
        out_sharding: The argument of that name, how the (first) output is split, which has as many
            axes more or less as the first argument has; or what `Spread.stated` holds.

    Raises:
        ValueError: `out_sharding` is no sharding of the output; says what was expected.

    Example:
        >>> spread(Rule(("n c",), ("n c",), frozenset("nc")), [jax.numpy.ones((2, 3))]).plain
        False
    """
    if isinstance(out_sharding, Stated):
        return _as_stated(out_sharding)
    types = [jax.typeof(array) for array in arrays]
    mesh = next((t.sharding.mesh for t in types if not t.sharding.mesh.empty), None)
    if out_sharding is not None:
        batch = types[0].ndim - len(rule.operands[0].split()) + 1
        found = _stated(mesh, out_sharding, _batched(rule.results[0], batch), rule)
        for type_, names in zip(types, rule.operands, strict=False):
            _check_divides(type_.shape, names, rule, found.shard, out_sharding)
        return found
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return _NOWHERE
    sizes = _sizes(mesh, AxisType.Explicit)
    # Axes that are XLA's remain where others are the caller's, or the types'.
    plain = device.platform() == "tpu" and _has_auto(mesh)
    if sizes:
        every = list(zip(types, rule.operands, strict=False))
        specs = [_flat_spec(t.sharding.spec, len(t.shape), axes) for t, axes in every]
        shapes = [_flat_shape(t.shape, axes) for t, axes in every]
        return Spread(_found(rule, specs, shapes, sizes), plain=plain)
    return Spread(plain=True) if plain else _NOWHERE


def without_channels(out_sharding: OutSharding, ndim: int) -> OutSharding:
    """A stated sharding of an array of so many axes, but with its last axis whole.

    Example:
        >>> tuple(without_channels(jax.P("data", None, None, "model"), 4))
        ('data', None, None)
    """
    if isinstance(out_sharding, NamedSharding):
        return NamedSharding(out_sharding.mesh, jax.P(*out_sharding.spec[: ndim - 1]))
    return jax.P(*out_sharding[: ndim - 1]) if isinstance(out_sharding, jax.P) else out_sharding


def placed(x: jax.Array, out_sharding: OutSharding) -> jax.Array:
    """An array that plain JAX has computed, split over a mesh as it is stated; None: as it is.

    Example:
        >>> placed(jnp.ones((8, 4)), None).shape
        (8, 4)
    """
    if out_sharding is None:
        return x
    if isinstance(out_sharding, NamedSharding):
        stated = out_sharding
    else:
        stated = NamedSharding(jax.sharding.get_abstract_mesh(), out_sharding)
    mesh = stated.mesh
    if _sizes(mesh, AxisType.Explicit):
        x = jax.sharding.reshard(x, _on(mesh, stated.spec))
    return jax.lax.with_sharding_constraint(x, stated) if _sizes(mesh, AxisType.Auto) else x


def left_to_xla(x: jax.Array) -> bool:
    """Whether XLA splits what is computed of an array, on the Auto axes of its mesh.

    Then the gradient of the filters of a convolution with groups is silently wrong where images are
    split over one axis and filters over another (JAX 0.10 and 0.12).

    Example:
        >>> left_to_xla(jnp.ones((8, 4)))
        False
    """
    return _has_auto(jax.typeof(x).sharding.mesh)


def flat(x: jax.Array, batch: int) -> jax.Array:
    """An array with one axis in place of its first ones, split as the first of these is."""
    shape = math.prod(x.shape[:batch]), *x.shape[batch:]
    known = jax.typeof(x).sharding
    if batch == 1 or not _sizes(known.mesh, AxisType.Explicit):
        return x.reshape(shape)
    first, rest = (known.spec[0] if batch else None), known.spec[batch:]
    if batch > 1:
        spec = jax.P(first, *[None] * (batch - 1), *rest)
        x = jax.sharding.reshard(x, NamedSharding(known.mesh, spec))
    split = NamedSharding(known.mesh, jax.P(first, *rest))
    return jax.lax.reshape(x, shape, out_sharding=split)


def unflat(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """The inverse of `flat`."""
    shape = *batch, *x.shape[1:]
    known = jax.typeof(x).sharding
    if len(batch) == 1 or not _sizes(known.mesh, AxisType.Explicit):
        return x.reshape(shape)
    first, *rest = known.spec
    entries = [first, *[None] * (len(batch) - 1)] if batch else []
    split = NamedSharding(known.mesh, jax.P(*entries, *rest))
    return jax.lax.reshape(x, shape, out_sharding=split)


def on_rows(function: Callable[..., jax.Array], x: jax.Array, *others: jax.Array) -> jax.Array:
    """Images `[..., C]` of which a function of rows `[rows, C]` maps the pixels.

    On Explicit axes the rows of a device are its own pixels, so images that are split along several
    axes are not gathered.

    Args:
        function: The function, whose rows have nothing to do with each other.
        x: The images.
        *others: More images of the same pixels, which the function takes too; they are split as x.

    Example:
        >>> on_rows(lambda rows: rows.sum(1, keepdims=True), jnp.ones((2, 3, 4))).shape
        (2, 3, 1)
    """
    batch, (mesh, spec) = x.shape[:-1], _split_axes(x)
    if not any(spec[1:-1]):
        return unflat(function(*(flat(one, len(batch)) for one in (x, *others))), batch)
    *pixels, channels = spec
    rows = tuple(axis for axes in pixels for axis in axes)
    sizes = _sizes(mesh, AxisType.Explicit)
    own = tuple(
        size // math.prod(sizes[axis] for axis in axes)
        for size, axes in zip(batch, pixels, strict=True)
    )

    def moved(x: jax.Array, shape: tuple[int, ...], before: jax.P, after: jax.P) -> jax.Array:
        run = jax.shard_map(
            lambda x: x.reshape(*shape, x.shape[-1]),
            mesh=mesh,
            in_specs=before,
            out_specs=after,
            axis_names=set(sizes),
        )
        return run(x)

    def flattened(x: jax.Array, channels: _Axes) -> jax.Array:
        return moved(x, (math.prod(own),), jax.P(*pixels, channels), jax.P(rows, channels))

    split = NamedSharding(mesh, jax.P(*pixels, None))
    rest = (flattened(jax.sharding.reshard(one, split), ()) for one in others)
    y = function(flattened(x, channels), *rest)
    _, (_, channels) = _split_axes(y)
    return moved(y, own, jax.P(rows, channels), jax.P(*pixels, channels))


def by_pixel(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Images `[..., C]` of which a function maps each pixel, by rows where nothing is gathered.

    XLA's tiles of several axes of pixels are not contiguous, which costs a norm's backward pass
    most. Where XLA splits images it would gather their rows.

    Args:
        function: The function, of images of any rank.
        x: The images.

    Example:
        >>> by_pixel(lambda x: x - x.mean(-1, keepdims=True), jnp.ones((2, 3, 4))).shape
        (2, 3, 4)
    """
    return function(x) if left_to_xla(x) else on_rows(function, x)


def _split_axes(x: jax.Array) -> tuple[AbstractMesh, list[_Axes]]:
    """The mesh of an array, and for each of its axes the Explicit ones that split it."""
    known = jax.typeof(x).sharding
    if not _sizes(known.mesh, AxisType.Explicit):
        return known.mesh, [()] * x.ndim
    return known.mesh, [_axes(entry) for entry in known.spec]


def broadcast_to(
    value: jax.Array, shape: tuple[int, ...], others: Sequence[tuple[jax.Array, int]]
) -> jax.Array:
    """A value broadcast to a shape, on a mesh of Explicit axes split as other arrays are.

    So its gradient is one sum over the mesh, and nothing that is split is gathered for it.

    Args:
        value: The value.
        shape: The shape.
        others: For each axis of the shape the array, and its axis, that it is split as.
    """
    meshes = (jax.typeof(other).sharding.mesh for other, _ in others)
    mesh = next((mesh for mesh in meshes if _sizes(mesh, AxisType.Explicit)), None)
    if mesh is None or value.shape == shape:
        return jnp.broadcast_to(value, shape)
    split: list[_Axes | None] = []
    for other, axis in others:
        spec = jax.typeof(other).sharding.spec
        entry, taken = _axes(spec[axis]) if spec else (), {a for e in split for a in e or ()}
        split.append(entry if entry and not taken & {*entry} else None)
    first = len(shape) - value.ndim
    sizes = zip(value.shape, split[first:], strict=True)
    own = jax.P(*(None if size == 1 else entry for size, entry in sizes))
    value = jax.sharding.reshard(value, NamedSharding(mesh, own))
    return jax.lax.broadcast_in_dim(
        value,
        shape,
        tuple(range(first, len(shape))),
        out_sharding=NamedSharding(mesh, jax.P(*split)),
    )


def gathered(x: jax.Array) -> jax.Array:
    """A small array, on a mesh of Explicit axes resharded so that each device has all of it."""
    known = jax.typeof(x).sharding
    if not _sizes(known.mesh, AxisType.Explicit):
        return x
    return jax.sharding.reshard(x, NamedSharding(known.mesh, jax.P(*[None] * x.ndim)))


def is_split(x: jax.Array, axis: int) -> bool:
    """Whether an axis of an array is split over Explicit axes of a mesh."""
    return parts(x, axis) > 1


def parts(x: jax.Array, axis: int) -> int:
    """The number of shards that Explicit axes of a mesh split an axis of an array into.

    Example:
        >>> parts(jnp.ones((8, 4)), 0)
        1
    """
    known = jax.typeof(x).sharding
    sizes = _sizes(known.mesh, AxisType.Explicit)
    return math.prod(sizes[name] for name in _axes(known.spec[axis])) if sizes else 1


def whole(x: jax.Array, axis: int) -> jax.Array:
    """An array, each device of which has all of an axis, where Explicit axes split it."""
    if not is_split(x, axis):
        return x
    known = jax.typeof(x).sharding
    entries = (None if i == axis else entry for i, entry in enumerate(known.spec))
    return jax.sharding.reshard(x, NamedSharding(known.mesh, jax.P(*entries)))


def stepped(x: jax.Array, axis: int, step: int) -> jax.Array:
    """Every so many samples along an axis that is split, which JAX cannot slice in steps.

    Where shards begin with one of these samples nothing is exchanged.
    """
    known = jax.typeof(x).sharding
    cells, rest = divmod(x.shape[axis], step)
    if rest or cells % math.prod(known.mesh.shape[name] for name in _axes(known.spec[axis])):
        return jax.lax.slice_in_dim(whole(x, axis), 0, None, step, axis)
    shape = *x.shape[:axis], cells, step, *x.shape[axis + 1 :]
    spec = jax.P(*known.spec[: axis + 1], None, *known.spec[axis + 1 :])
    parts = jax.lax.reshape(x, shape, out_sharding=NamedSharding(known.mesh, spec))
    return jax.lax.index_in_dim(parts, 0, axis + 1, keepdims=False)


def placed_like(value: jax.Array, type_: Any) -> jax.Array:
    """A cotangent, resharded as its argument is where that is on a mesh of Explicit axes.

    Args:
        value: The cotangent.
        type_: The type of the argument, `jax.typeof` of it.
    """
    wanted = type_.sharding
    if wanted.mesh.empty or wanted == jax.typeof(value).sharding:
        return value
    return jax.sharding.reshard(value, wanted)


def split(
    compute: Callable[..., Tree],
    rule: Rule,
    plan: Any,
    problem: Callable[..., Problem],
    *args: Tree,
    mapped: Callable[[Callable[..., Tree]], Callable[..., Tree]],
    ours: bool = False,
) -> Tree:
    """The results of a function of an operator, whose arrays may be split over a mesh.

    Args:
        compute: What a shard computes: a function of a plan, a `Shard` and its arrays.
        rule: The axes of the arrays.
        plan: The plan of the call, a `Plan`.
        problem: Function of a `Shard` and its arrays: the description of what it computes.
        *args: The arguments, trees of arrays.
        mapped: Makes of a kernel a function that `jax.vmap` maps.
        ours: Whether plain JAX is not XLA's to split on Auto axes, where it can be asked not to. It
            gets convolutions wrong: see docs/sharding.md.

    Returns:
        The results, split as the arguments are.
    """
    leaves, tree = jax.tree.flatten(args)
    rule = _numbered(rule)
    kernel = not plan.module.DIFFERENTIABLE
    wrapped = mapped if kernel else _itself
    mesh = _mesh(leaves, plan.stated)
    kinds = [AxisType.Explicit] if plan.stated is None else [AxisType.Explicit, AxisType.Auto]
    sizes = _sizes(mesh, *kinds)
    call = _Call(compute, rule, plan, problem, tree, wrapped)
    # Plain JAX beside a mesh of Explicit axes, on which none of its arrays lies, stays as it is.
    lies = kernel or plan.stated is not None or any(map(lies_on_a_mesh, leaves))
    if sizes and lies:
        return call.by_shard_map(mesh, sizes, leaves)
    if _splits_later(mesh) and (kernel or (ours and _has_auto(mesh))):
        return call._replace(mapped=mapped).by_partitioning(leaves)
    return wrapped(partial(compute, plan, WHOLE))(*args)


def split_each(
    compute: Callable[..., Tree],
    rule: Rule,
    plan: Any,
    problem: Callable[..., Problem],
    *args: Tree,
    depth: int = 0,
) -> Tree:
    """The results of `split`, whose `jax.vmap` is one call after the other on every shard.

    The axis that is mapped may be split itself: scenes that are stacked over the devices.

    Args:
        compute: As `split` takes it, as are the others.
        rule: The axes of the arrays of one call.
        plan: The plan.
        problem: The description of one call.
        *args: The arguments.
        depth: The number of the axes that are mapped already.
    """
    whole = partial(split, compute, rule, plan, problem)
    mesh = _mesh(jax.tree.leaves(args), plan.stated)
    if plan.module.DIFFERENTIABLE and AxisType.Explicit not in mesh.axis_types:
        # Plain JAX is mapped, and split, by JAX.
        return whole(*args, mapped=_itself)
    call = custom_vmap(partial(whole, mapped=vmap_sequential))

    @call.def_vmap
    def stacked(_: int, batched: tuple[Tree, ...], *args: Tree) -> tuple[Tree, Tree]:
        axis = f"s{depth}"
        flags = jax.tree.leaves(batched)
        operands = tuple(
            f"{axis} {axes}" if flag else axes
            for axes, flag in zip(rule.operands, flags, strict=True)
        )
        results = tuple(f"{axis} {axes}" for axes in rule.results)
        free = rule.free | {axis}

        def one_by_one(plan: Any, place: Shard, *args: Tree) -> Tree:
            return each(partial(compute, plan, place), batched, args)

        def of_one(place: Shard, *args: Tree) -> Problem:
            examples = map(example, jax.tree.leaves(args), flags)
            return problem(place, *jax.tree.unflatten(jax.tree.structure(args), examples))

        with outside_of_vmap(_first_axes(args, flags)):
            found = split_each(
                one_by_one,
                Rule(operands, results, free, rule.cells),
                plan,
                of_one,
                *args,
                depth=depth + 1,
            )
        return found, jax.tree.map(lambda _: True, found)

    return call(*args)


def _first_axes(args: Tree, flags: Sequence[bool]) -> set[str]:
    """The Explicit axes of a mesh that the first axis of batched arrays is split over."""
    leaves = zip(jax.tree.leaves(args), flags, strict=True)
    specs = (jax.typeof(leaf).sharding.spec for leaf, flag in leaves if flag)
    return {axis for spec in specs if spec for axis in _axes(spec[0])}


class _Call(NamedTuple):
    """The arguments of `split`."""

    compute: Callable[..., Tree]
    rule: Rule
    plan: Any
    problem: Callable[..., Problem]
    tree: Any
    mapped: Callable[[Callable[..., Tree]], Callable[..., Tree]]

    def by_shard_map(
        self, mesh: Mesh | AbstractMesh, sizes: Mapping[str, int], leaves: Sequence[jax.Array]
    ) -> Tree:
        """The results by a `jax.shard_map` over axes of a mesh, of these sizes."""
        rule, stated = self.rule, cast(Plan, self.plan).stated
        if stated is None:
            specs = [jax.typeof(leaf).sharding.spec for leaf in leaves]
            shard = _found(rule, specs, [leaf.shape for leaf in leaves], sizes)
        else:
            shard = _shard({name: axes for name, axes in stated.axes if rule.able(name)}, sizes)
        wanted = [_spec(axes, shard) for axes in rule.operands]
        if AxisType.Explicit in mesh.axis_types:
            leaves = [
                jax.sharding.reshard(leaf, _on(mesh, spec))
                for leaf, spec in zip(leaves, wanted, strict=True)
            ]
        trees: list[Any] = []

        def body(*leaves: jax.Array) -> tuple[jax.Array, ...]:
            args = self.tree.unflatten(leaves)
            found = self.mapped(partial(self.compute, self.plan, shard))(*args)
            parts, tree = jax.tree.flatten(found)
            trees.append(tree)
            return tuple(parts)

        run = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=tuple(wanted),
            out_specs=tuple(_spec(axes, shard) for axes in rule.results),
            axis_names=set(sizes),
            check_vma=False,
        )
        # What varies over an axis of the caller's own map loses that in one that does not check it.
        parts = vary_like(leaves, run(*leaves))
        return trees[0].unflatten(parts)

    def by_partitioning(self, leaves: Sequence[jax.Array]) -> Tree:
        """The results by a program that XLA asks for when it knows how it splits the arrays."""
        rule = self.rule
        trees: list[Any] = []

        def run(*leaves: jax.Array) -> tuple[jax.Array, ...]:
            found = self.compute(self.plan, WHOLE, *self.tree.unflatten(leaves))
            parts, tree = jax.tree.flatten(found)
            trees.append(tree)
            return tuple(parts)

        def whole(*args: Tree) -> Tree:
            leaves = jax.tree.leaves(args)
            traced = jax.make_jaxpr(run)(*leaves)

            def known(*leaves: jax.Array) -> tuple[jax.Array, ...]:
                own, constants = leaves[: len(rule.operands)], leaves[len(rule.operands) :]
                return tuple(jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, constants))(*own))

            # What a function closes over is an argument here.
            more = (f"k{i}" for i in count())
            constants = [" ".join(islice(more, np.ndim(value))) for value in traced.consts]
            every = rule._replace(operands=(*rule.operands, *constants))
            shapes = [[a.shape for a in avals] for avals in (traced.in_avals, traced.out_avals)]
            shapes[0] += map(np.shape, traced.consts)
            call = custom_partitioning(known)
            call.def_partition(self._partitioned, decode_shardings=False, **_shardy(every, *shapes))
            return trees[0].unflatten(call(*leaves, *traced.consts))

        return self.mapped(whole)(*self.tree.unflatten(leaves))

    def _partitioned(self, mesh: Mesh, operands: Tree, results: Tree) -> tuple[Any, ...]:
        """The answer to XLA: a mesh, the function of a shard, and all shardings."""
        rule = self.rule
        arrays, constants = operands[: len(rule.operands)], operands[len(rule.operands) :]
        own, shard = _own_mesh(rule, [*arrays, *results], mesh)

        def placed(every: Iterable[str]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(own, _spec(axes, shard)) for axes in every)

        local = [
            jax.ShapeDtypeStruct(shard.local(array.shape, axes), array.dtype)
            for array, axes in zip(arrays, rule.operands, strict=True)
        ]
        split = *placed(rule.operands), *placed([""] * len(constants))
        return own, self._fitting(shard, own, local), placed(rule.results), split

    def _fitting(
        self, shard: Shard, mesh: Mesh, local: Sequence[jax.ShapeDtypeStruct]
    ) -> Callable[..., Any]:
        """The function of a shard by the first plan that takes it; the last one's is plain JAX.

        XLA would end the program, by an error that nobody can read, if anything were raised here.
        """
        args = self.tree.unflatten(local)

        def by(plan: Any) -> Callable[..., Any]:
            def run(*leaves: jax.Array) -> tuple[jax.Array, ...]:
                own = leaves[: len(self.rule.operands)]
                found = self.compute(plan, shard, *self.tree.unflatten(own))
                return tuple(jax.tree.leaves(found))

            return run

        plans = list(_plans(self.plan, self.problem(shard, *args)))
        for plan in plans[:-1]:
            try:
                jax.make_jaxpr(by(plan), axis_env=list(mesh.shape.items()))(*local)
            # Whatever a kernel raises, there is another way.
            except Exception as error:
                name = plan.module.__name__
                _say(logging.WARNING, f"{name} cannot compute a shard, and is left out: {error}")
            else:
                return by(plan)
        return by(plans[-1])


def _plans(plan: Any, problem: Problem) -> Iterator[Any]:
    """The plans that may compute a shard, of which Auto axes tell when XLA compiles.

    The one that was chosen for the whole comes first, then the candidates of its request, and last
    plain JAX. Nothing is measured.
    """
    request = cast(Plan, plan).request
    if request is None:
        yield plan
        return
    operator, reasons = request.operator, []
    try:
        plan.module.check(request.direction, problem)
    except NotImplementedError as error:
        reasons.append(f"{plan.module.__name__} {error}")
    else:
        yield plan
        yield plan.by(plan.module)
    try:
        yield from (plan.by(operator.module(name)) for name in request.able(problem))
    except NotImplementedError as error:
        reasons.append(str(error))
    if reasons:
        _say(logging.WARNING, f"of a shard, {'; '.join(reasons)}: another one computes it")
    yield plan.by(operator.module("xla"))


def _plain_alone(request: Request) -> Request:
    """A request of plain JAX alone, if the given one allows it."""
    operator = request.operator
    how = (
        "on Auto axes of a mesh a TPU's compiler cannot split a kernel: say how its output is "
        "split, out_sharding=jax.P(...), or make the mesh with Explicit axes, jax.make_mesh's "
        "default"
    )
    if request.names is not None and "xla" not in request.names:
        raise NotImplementedError(
            f"{operator.name} ({request.direction}) cannot run with {request.filter}: {how}"
        )
    if operator.rule["tpu"][0] != "xla":
        _say(logging.WARNING, f"{operator.name}: plain JAX computes it, since {how}")
    return request._replace(names=("xla",), several=False, epoch=None)


def _say(level: int, message: str) -> None:
    """Logs a message once."""
    if message not in _SAID:
        _SAID.add(message)
        _log.log(level, "%s", message)


def _itself(function: Callable[..., Tree]) -> Callable[..., Tree]:
    return function


def _stated(mesh: AbstractMesh | None, out_sharding: object, out: str, rule: Rule) -> Spread:
    """The spread that the argument `out_sharding=` states."""
    given: Mesh | AbstractMesh | None = None
    spec = out_sharding
    if isinstance(out_sharding, NamedSharding):
        spec, given = out_sharding.spec, out_sharding.mesh
    if not isinstance(spec, jax.P):
        raise ValueError(
            f"out_sharding={out_sharding!r}: expected a jax.P, such as jax.P('data'), or a "
            "jax.sharding.NamedSharding"
        )
    known = given or mesh or jax.sharding.get_abstract_mesh()
    if known.empty:
        raise ValueError(
            f"out_sharding={out_sharding!r}: there is no mesh; set one, with jax.set_mesh(mesh), "
            "or give a jax.sharding.NamedSharding"
        )
    sizes = _sizes(known, AxisType.Explicit, AxisType.Auto)
    names = out.split()
    if len(spec) > len(names):
        raise ValueError(
            f"out_sharding={out_sharding!r}: has {len(spec)} entries, but the output has the axes "
            f"[{', '.join(names)}]"
        )
    axes = {name: _axes(entry) for name, entry in zip(names, spec, strict=False) if entry}
    unknown = [axis for found in axes.values() for axis in found if axis not in sizes]
    if unknown:
        raise ValueError(
            f"out_sharding={out_sharding!r}: names {unknown}, but the mesh has the axes "
            f"{list(sizes)}"
        )
    whole = [name for name in axes if not rule.able(name)]
    if whole:
        able = [name for name in names if rule.able(name)]
        raise ValueError(
            f"out_sharding={out_sharding!r}: splits {', '.join(whole)} of the output's axes "
            f"[{', '.join(names)}], of which {', '.join(able)} can be split"
        )
    return _as_stated(Stated(given or known, tuple(axes.items())))


def _check_divides(
    shape: tuple[int, ...], axes: str, rule: Rule, shard: Shard, out_sharding: object
) -> None:
    """Raises ValueError where a stated sharding splits an argument into unequal shards."""
    for name, size in zip(axes.split(), _flat_shape(shape, axes), strict=True):
        parts = shard.counts.get(name, 1)
        if parts > 1 and not rule.divides(name, size, parts):
            unit = size // dict(rule.cells).get(name, size)
            even = f" into multiples of {unit}" if unit > 1 else ""
            raise ValueError(
                f"out_sharding={out_sharding!r}: splits an axis of {size} over {parts} devices, "
                f"which does not divide{even}; the argument is {shape}"
            )


def _as_stated(stated: Stated) -> Spread:
    """The spread that was stated."""
    sizes = _sizes(stated.mesh, AxisType.Explicit, AxisType.Auto)
    return Spread(_shard(dict(stated.axes), sizes), stated)


def _batched(axes: str, batch: int) -> str:
    """The axes of an array whose first one stands for so many."""
    first, *rest = axes.split()
    return " ".join([*[first, *(f"{first}{i}" for i in range(2, batch + 1))][:batch], *rest])


def _mesh(leaves: Sequence[jax.Array], stated: Stated | None) -> Mesh | AbstractMesh:
    """The mesh that arrays lie on, else the context's; an empty one where there is none."""
    if stated is not None:
        return stated.mesh
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in leaves)
    found = next((mesh for mesh in meshes if not mesh.empty), None)
    return found or jax.sharding.get_abstract_mesh()


def lies_on_a_mesh(x: jax.Array) -> bool:
    """Whether the type of an array has a mesh, of axes of any kind.

    Example:
        >>> lies_on_a_mesh(jnp.ones(4))
        False
    """
    return not jax.typeof(x).sharding.mesh.empty


def _sizes(mesh: Mesh | AbstractMesh, *kinds: AxisType) -> dict[str, int]:
    """The axes of a mesh that are of some kinds, and their sizes."""
    if mesh.empty:
        return {}
    every, mapped = zip(mesh.axis_names, mesh.axis_types, strict=True), mapped_axes()
    return {name: mesh.shape[name] for name, kind in every if kind in kinds and name not in mapped}


def _splits_later(mesh: Mesh | AbstractMesh) -> bool:
    """Whether XLA may split arrays, as far as it is known when they are traced."""
    if interpreter() is not None:
        # Its callbacks cannot stand in the program of a shard.
        return False
    if mesh.empty:
        # What `jax.jit(..., in_shardings=...)` is told nobody else is.
        return jax.device_count() > 1 and device.platform() != "tpu"
    # It does not split the shards that others have made, and TPUs' does not ask.
    whole = AxisType.Manual not in mesh.axis_types and _has_auto(mesh)
    return whole and device.platform() != "tpu"


def _has_auto(mesh: Mesh | AbstractMesh) -> bool:
    return any(size > 1 for size in _sizes(mesh, AxisType.Auto).values())


def _axes(entry: object) -> _Axes:
    """The axes of a mesh that an entry of a `jax.P` names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(cast(Iterable[str], entry))


def _on(mesh: Mesh | AbstractMesh, spec: jax.P) -> NamedSharding:
    """A sharding as types have it: over the Explicit axes of a mesh."""
    explicit = _sizes(mesh, AxisType.Explicit)
    entries = (tuple(axis for axis in _axes(entry) if axis in explicit) for entry in spec)
    return NamedSharding(mesh, jax.P(*(entry or None for entry in entries)))


def _spec(axes: str, shard: Shard) -> jax.P:
    """How an array with these axes is split."""
    return jax.P(*(shard.axes.get(name) for name in axes.split()))


def _shard(axes: Mapping[str, _Axes], sizes: Mapping[str, int]) -> Shard:
    return Shard(axes, {name: math.prod(sizes[a] for a in found) for name, found in axes.items()})


def _flat_spec(spec: jax.P, ndim: int, axes: str) -> tuple[object, ...]:
    """The entries for the axes of a rule, the first of which stands for a batch of any rank."""
    entries = (*spec, *[None] * (ndim - len(spec)))
    rest = len(axes.split()) - 1
    return (entries[0] if ndim > rest else None), *entries[ndim - rest :]


def _flat_shape(shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
    """The same for a shape; of a batch its first axis, which alone is split."""
    rest = len(axes.split()) - 1
    return (shape[0] if len(shape) > rest else 1), *shape[len(shape) - rest :]


def _found(
    rule: Rule,
    specs: Sequence[Iterable[object]],
    shapes: Sequence[tuple[int, ...]],
    sizes: Mapping[str, int],
) -> Shard:
    """The shards by the types of arrays: the first array that has an axis tells how it is split.

    It stays whole where it does not divide, or where the mesh's axes are taken.
    """
    found: dict[str, _Axes] = {}
    seen: set[str] = set()
    for names, spec, shape in zip(rule.operands, specs, shapes, strict=False):
        for name, entry, size in zip(names.split(), [*spec], shape, strict=False):
            if name in seen:
                continue
            seen.add(name)
            axes = tuple(axis for axis in _axes(entry) if axis in sizes)
            taken = {axis for other in found.values() for axis in other}
            free = axes and not taken & set(axes)
            if free and rule.divides(name, size, math.prod(sizes[axis] for axis in axes)):
                found[name] = axes
    return _shard(found, sizes)


def _names(arrays: Iterable[str]) -> dict[str, None]:
    """The axes of arrays, in order."""
    return dict.fromkeys(name for axes in arrays for name in axes.split())


def _numbered(rule: Rule) -> Rule:
    """The rule with a name of its own for each `_`."""
    counter = count()

    def named(axes: str) -> str:
        return " ".join(f"u{next(counter)}" if name == "_" else name for name in axes.split())

    return rule._replace(
        operands=tuple(map(named, rule.operands)), results=tuple(map(named, rule.results))
    )


def _shardy(
    rule: Rule, operands: Iterable[Iterable[int]], results: Iterable[Iterable[int]]
) -> dict[str, Any]:
    """The arguments of `def_partition` that say to Shardy what a rule does, of arrays' shapes.

    An axis of cells is a compound factor, of which Shardy splits the first one: the cells.
    """
    cells, alone, sizes = dict(rule.cells), set[str](), dict[str, int]()

    def factors(axes: str, shape: Iterable[int]) -> str:
        found = []
        for name, size in zip(axes.split(), shape, strict=True):
            inner = size // cells[name] if name in cells else 1
            if inner > 1 and cells[name] > 1:
                sizes.update({name: cells[name], f"{name}x{inner}": inner})
                found.append(f"({name} {name}x{inner})")
            else:
                # One cell is not split, and Shardy has no factor of one beside another.
                found.append(name if inner == 1 else f"{name}x{inner}")
                alone.add(found[-1])
        return " ".join(found)

    read, written = (
        [*map(factors, arrays, shapes)]
        for arrays, shapes in ((rule.operands, operands), (rule.results, results))
    )
    # In the order in which they come, as Shardy insists.
    every, seen = (
        _names(text.replace("(", "").replace(")", "") for text in texts)
        for texts in ((*read, *written), written)
    )
    return {
        "sharding_rule": f"{', '.join(read)} -> {', '.join(written)}",
        "need_replication_factors": tuple(n for n in every if not rule.able(n)),
        "reduction_factors": tuple(n for n in every if rule.able(n) and n not in seen),
        **{name: size for name, size in sizes.items() if name not in alone},
    }


def _own_mesh(rule: Rule, arrays: Sequence[Any], mesh: Mesh) -> tuple[Mesh, Shard]:
    """A mesh of the axes that XLA splits, by their names in the rule, and the shards on it.

    Not the caller's mesh: XLA may split over a part of one of its axes, such as a batch of 6 over
    4 devices, which no spec over them says.
    """
    devices = np.asarray(_devices(arrays, mesh))
    places: dict[str, np.ndarray] = {}
    key = np.zeros(devices.size, np.int64)
    for array, names in zip(arrays, (*rule.operands, *rule.results), strict=True):
        tiles = tiles_over_devices(array.sharding, len(array.shape))
        if tiles is None:
            continue
        for axis, name in enumerate(names.split()):
            place = tiles[axis]
            parts = int(place.max()) + 1
            if name in places or parts == 1 or not rule.divides(name, array.shape[axis], parts):
                continue
            # All shards of both must exist, each on as many devices.
            both = key * parts + place
            every = np.bincount(both, minlength=(int(key.max()) + 1) * parts)
            if every.min() == every.max():
                places[name], key = place, both
    shards = int(key.max()) + 1
    order = np.argsort(key, kind="stable")
    counts = {name: int(place.max()) + 1 for name, place in places.items()}
    grid = devices[order].reshape(*counts.values(), devices.size // shards)
    own = Mesh(grid, (*counts, _COPIES))
    return own, Shard({name: (name,) for name in counts}, counts)


def _devices(arrays: Sequence[Any], mesh: Mesh) -> list[jax.Device]:
    """The devices of a program in XLA's order."""
    for array in arrays:
        if array.sharding is not None:
            return list(array.sharding._device_assignment)
    return list(mesh.devices.flat)
