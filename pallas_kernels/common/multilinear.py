"""Functions linear in each argument, which JAX differentiates by transposes that they bring along.

Where JAX transposes plain code itself, it keeps what the code computes on its way; a kernel it
cannot transpose at all. `jax.custom_vjp` helps both, but takes forward mode away. So this is an
operation of JAX's own kind: its derivative is the sum of itself with one argument after the other
replaced by its tangent, and its transposes are the given ones. Reverse mode then keeps the
arguments and nothing else, and every order and mixture of the modes works.

The transposes of one value wait for each other where that is asked for, since XLA orders what does
not depend on each other by estimates, and often keeps the memory of both.

A function may also depend on what it is not linear in, such as the statistics that a derivative was
taken at. Its derivative by these is that of the same function in plain JAX.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from itertools import chain, islice
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from pallas_kernels.common.sharding import placed_like
from pallas_kernels.common.types import Tree

Function = Callable[..., Tree]


def multilinear(
    function: Function,
    transposes: Sequence[Function],
    *arguments: Tree,
    known: Sequence[Tree] = (),
    plain: Function | None = None,
    in_turns: bool = False,
) -> Tree:
    """The value of a function that is linear in each of its arguments.

    Args:
        function: Function of what is known and of the arguments, trees of arrays, to a tree of
            arrays. `jax.vmap` maps it, and JAX never differentiates it.
        transposes: For each argument the transpose in it: a function of the cotangent of the value,
            of what is known, and of the other arguments, in their order, to a tree like the
            argument. JAX differentiates it for derivatives of higher order.
        *arguments: The arguments.
        known: Trees of arrays that the function is not linear in.
        plain: The same function, which JAX differentiates by what is known.
        in_turns: Whether the transposes are computed one after the other, the last argument's
            first, so that what one needs for a while is free for the next.

    Returns:
        `function(*known, *arguments)`.

    Example:
        >>> def product(x, y):
        ...     return multilinear(jax.numpy.multiply, (product, product), x, y)
        >>> cube = lambda x: product(x, product(x, x))
        >>> value, tangent = jax.jvp(jax.grad(cube), (2.0,), (1.0,))
        >>> float(value), float(tangent)
        (12.0, 12.0)
    """
    every = (*known, *arguments)
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*every)
    out = _multilinear.bind(
        *jax.tree.leaves(every),
        function=function,
        transposes=tuple(transposes),
        known=len(known),
        plain=plain,
        in_turns=in_turns,
        trees=tuple(map(jax.tree.structure, every)),
        out_tree=jax.tree.structure(shapes),
        jaxpr=jaxpr,
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


_multilinear = Primitive("multilinear")
_multilinear.multiple_results = True


@_multilinear.def_impl
def _run(*leaves: jax.Array, jaxpr: ClosedJaxpr, **_: object) -> list[jax.Array]:
    return jaxpr_as_fun(jaxpr)(*leaves)


@_multilinear.def_effectful_abstract_eval
def _typed(*_: object, jaxpr: ClosedJaxpr, **__: object) -> tuple[list[Any], set[Any]]:
    # Interpreted kernels have effects.
    return jaxpr.out_avals, jaxpr.effects


mlir.register_lowering(_multilinear, mlir.lower_fun(_run, multiple_results=True))


def _differentiate(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    trees: Sequence[Any],
    known: int,
    plain: Function | None,
    **rest: Any,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The rule of forward mode, from which JAX makes that of reverse mode by `_transpose`."""
    start = sum(tree.num_leaves for tree in trees[:known])
    terms = []
    if not all(isinstance(tangent, ad.Zero) for tangent in tangents[:start]):

        def in_known(*leaves: jax.Array) -> list[jax.Array]:
            parts = zip(trees, _parted(leaves, trees), strict=True)
            assert plain is not None
            return jax.tree.leaves(plain(*(tree.unflatten(part) for tree, part in parts)))

        terms.append(_moved(in_known, primals, tangents[:start])[1])
    parts = _parted(tangents, trees)
    moving = [
        i
        for i in range(known, len(trees))
        if not all(isinstance(tangent, ad.Zero) for tangent in parts[i])
    ]
    whole = [list(map(ad.instantiate_zeros, parts[i])) for i in moving]
    about = {"trees": trees, "known": known, "plain": plain, **rest}
    if rest["in_turns"] and len(moving) > 1:
        terms.append(_in_turns.bind(*primals, *chain(*whole), moving=tuple(moving), **about))
    else:
        terms += _terms(primals, zip(moving, whole, strict=True), **about)
    value = _multilinear.bind(*primals, **about)
    return value, [reduce(ad.add_tangents, parts) for parts in zip(*terms, strict=True)]


def _moved(
    function: Callable[..., list[jax.Array]], primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The value of a function and its derivative, by JAX, along the tangents that are not zero.

    Args:
        function: The function, of all primals.
        primals: Its arguments.
        tangents: The tangents of the first of them; the others do not move.
    """
    moved = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def run(*values: jax.Array) -> list[jax.Array]:
        leaves = list(primals)
        for i, value in zip(moved, values, strict=True):
            leaves[i] = value
        return function(*leaves)

    primal, tangent = ([values[i] for i in moved] for values in (primals, tangents))
    return jax.jvp(run, primal, tangent)


def _terms(
    primals: Sequence[Any],
    tangents: Iterable[tuple[int, Sequence[Any]]],
    *,
    trees: Sequence[Any],
    **rest: Any,
) -> list[list[jax.Array]]:
    """The values with a tangent in place of each argument that has one."""
    parts = _parted(primals, trees)
    return [
        _multilinear.bind(*chain(*parts[:i], whole, *parts[i + 1 :]), trees=trees, **rest)
        for i, whole in tangents
    ]


_in_turns = Primitive("multilinear_in_turns")
"""The sum of such terms as one operation, whose transpose is told of all of them."""
_in_turns.multiple_results = True


@_in_turns.def_impl
def _sum(
    *leaves: Any, moving: tuple[int, ...], trees: Sequence[Any], **rest: Any
) -> list[jax.Array]:
    every = [*trees, *(trees[i] for i in moving)]
    parts = _parted(leaves, every)
    primals = list(chain(*parts[: len(trees)]))
    tangents = zip(moving, parts[len(trees) :], strict=True)
    terms = _terms(primals, tangents, trees=trees, **rest)
    return [reduce(jnp.add, summands) for summands in zip(*terms, strict=True)]


_in_turns.def_effectful_abstract_eval(_typed)
mlir.register_lowering(_in_turns, mlir.lower_fun(_sum, multiple_results=True))


def _differentiate_sum(
    primals: Sequence[Any], tangents: Sequence[Any], **about: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The rule of forward mode: that of the terms."""
    return _moved(partial(_sum, **about), primals, tangents)


def _batch_sum(
    leaves: Sequence[jax.Array], axes: Sequence[int | None], **about: Any
) -> tuple[list[jax.Array], list[int]]:
    """The rule of `jax.vmap`: that of the terms, which wait for nothing."""
    out = jax.vmap(partial(_sum, **about), tuple(axes))(*leaves)
    return out, [0] * len(out)


def _transpose_in_turns(
    cotangents: Sequence[Any],
    *leaves: Any,
    moving: tuple[int, ...],
    transposes: Sequence[Function],
    trees: Sequence[Any],
    out_tree: Any,
    known: int,
    **_: object,
) -> list[Any]:
    """The rule of reverse mode, of the tangents that follow the primals."""
    parts = _parted(leaves, [*trees, *(trees[i] for i in moving)])
    arguments = [tree.unflatten(part) for tree, part in zip(trees, parts, strict=False)]
    cotangent = out_tree.unflatten(map(ad.instantiate_zeros, cotangents))
    found: dict[int, Tree] = {}
    for number, i in reversed(list(enumerate(moving))):
        part = parts[len(trees) + number]
        if not any(map(ad.is_undefined_primal, part)):
            found[number] = [None] * len(part)
            continue
        if found:
            cotangent, found = jax.lax.optimization_barrier((cotangent, found))
        values = transposes[i - known](cotangent, *arguments[:i], *arguments[i + 1 :])
        found[number] = _wanted(part, values)
    nothing = [None] * sum(map(len, parts[: len(trees)]))
    return [*nothing, *chain(*(found[number] for number in range(len(moving))))]


ad.primitive_jvps[_in_turns] = _differentiate_sum
ad.primitive_transposes[_in_turns] = _transpose_in_turns
batching.primitive_batchers[_in_turns] = _batch_sum


def _transpose(
    cotangents: Sequence[Any],
    *leaves: Any,
    transposes: Sequence[Function],
    trees: Sequence[Any],
    out_tree: Any,
    known: int,
    **_: object,
) -> list[Any]:
    """The rule of reverse mode, for the one argument that is not known."""
    parts = _parted(leaves, trees)
    (i,) = (i for i, part in enumerate(parts) if any(map(ad.is_undefined_primal, part)))
    arguments = [tree.unflatten(part) for tree, part in zip(trees, parts, strict=True)]
    cotangent = out_tree.unflatten(map(ad.instantiate_zeros, cotangents))
    found = transposes[i - known](cotangent, *arguments[:i], *arguments[i + 1 :])
    nothing = [[None] * len(part) for part in parts]
    return [*chain(*nothing[:i], _wanted(parts[i], found), *nothing[i + 1 :])]


def _wanted(part: Sequence[Any], found: Tree) -> list[Any]:
    """The cotangents of an argument, of which a part may be known after all.

    These are the zeros of what is not differentiated.
    """
    return [
        placed_like(value, leaf.aval) if ad.is_undefined_primal(leaf) else None
        for leaf, value in zip(part, jax.tree.leaves(found), strict=True)
    ]


def _batch(
    leaves: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    function: Function,
    transposes: Sequence[Function],
    trees: Sequence[Any],
    known: int,
    plain: Function | None,
    in_turns: bool,
    **_: object,
) -> tuple[list[jax.Array], list[int]]:
    """The rule of `jax.vmap`: the functions are mapped."""
    first = [
        leaf if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    mapped = _parted([None if axis is None else 0 for axis in axes], trees)
    arguments, places = (
        [tree.unflatten(part) for tree, part in zip(trees, parts, strict=True)]
        for parts in (_parted(first, trees), mapped)
    )

    def each(i: int) -> Function:
        transpose = jax.vmap(transposes[i - known], (0, *places[:i], *places[i + 1 :]))

        def transposed(*others: Tree) -> Tree:
            found = zip(jax.tree.leaves(transpose(*others)), mapped[i], strict=True)
            # The examples share what is not mapped.
            return trees[i].unflatten(g.sum(0) if axis is None else g for g, axis in found)

        return transposed

    mine = multilinear(
        jax.vmap(function, tuple(places)),
        [*map(each, range(known, len(trees)))],
        *arguments[known:],
        known=arguments[:known],
        plain=plain and jax.vmap(plain, tuple(places)),
        in_turns=in_turns,
    )
    out = jax.tree.leaves(mine)
    return out, [0] * len(out)


ad.primitive_jvps[_multilinear] = _differentiate
ad.primitive_transposes[_multilinear] = _transpose
batching.primitive_batchers[_multilinear] = _batch


def _parted(leaves: Sequence[Any], trees: Sequence[Any]) -> list[list[Any]]:
    """The leaves of each tree."""
    rest = iter(leaves)
    return [list(islice(rest, tree.num_leaves)) for tree in trees]
