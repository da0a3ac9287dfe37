"""Rules by which `jax.vmap` maps kernels, which have one batch axis and no batching rule."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.common.refusals import naming_xla
from pallas_kernels.common.types import Tree


def vmap_folding(run: Callable[..., Tree], own: int = 1) -> Callable[..., Tree]:
    """A kernel whose vmap folds into the batch of its arguments, so that it stays one call.

    Args:
        run: Function of `own` trees of arrays `[N, ...]`, and of arrays that all images share, to
            a tree of arrays `[N, ...]`. It is called once for each example where the shared arrays
            are batched too.
        own: Number of the arguments that each image has its own of.

    Returns:
        The same function.

    Example:
        >>> jax.vmap(vmap_folding(lambda x, w: x * w), (0, None))(jnp.ones((2, 3, 4)), 2.0).shape
        (2, 3, 4)
    """
    call = custom_vmap(naming_xla()(run))

    @call.def_vmap
    def rule(size: int, batched: tuple[Tree, ...], *args: Tree) -> tuple[Tree, Tree]:
        if any(jax.tree.leaves(batched[own:])):
            out = each(call, batched, args)
        elif size == 0:
            first = jax.tree.map(example, args[:own], tuple(batched[:own]))
            one = jax.eval_shape(run, *first, *args[own:])
            out = jax.tree.map(lambda y: jnp.zeros((0, *y.shape), y.dtype), one)
        else:
            folded = jax.tree.map(partial(_fold, size), args[:own], tuple(batched[:own]))
            rows = call(*folded, *args[own:])
            out = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), rows)
        return out, jax.tree.map(lambda _: True, out)

    return call


def vmap_sequential(run: Callable[..., Tree]) -> Callable[..., Tree]:
    """A kernel that sums over its batch, whose vmap is one call after the other.

    Args:
        run: Any function of arrays.

    Returns:
        The same function.

    Example:
        >>> jax.vmap(vmap_sequential(lambda x: x.sum()))(jnp.ones((2, 3)))
        Array([3., 3.], dtype=float32)
    """
    call = custom_vmap(naming_xla()(run))

    @call.def_vmap
    def rule(size: int, batched: tuple[Tree, ...], *args: Tree) -> tuple[Tree, Tree]:
        out = each(call, batched, args)
        return out, jax.tree.map(lambda _: True, out)

    return call


def example(array: jax.Array, batched: bool) -> jax.ShapeDtypeStruct:
    """The shape and dtype of one example's array.

    Args:
        array: The array of all examples.
        batched: Whether each example has its own, along the first axis.

    Example:
        >>> example(jnp.ones((2, 3)), True).shape
        (3,)
    """
    return jax.ShapeDtypeStruct(array.shape[1:] if batched else array.shape, array.dtype)


def _fold(size: int, array: jax.Array, batched: bool) -> jax.Array:
    """The arrays `[N, ...]` of `size` examples as one `[size * N, ...]`."""
    each = array if batched else jnp.broadcast_to(array, (size, *array.shape))
    return each.reshape(-1, *each.shape[2:])


def each(function: Callable[..., Tree], batched: Tree, args: Tree) -> Tree:
    """The results of a function for one example after the other.

    Args:
        function: The function.
        batched: A tree like `args`: whether each array is batched, along its first axis.
        args: The arguments; what is not batched all examples share.

    Example:
        >>> each(jnp.multiply, (True, False), (jnp.arange(3), 2))
        Array([0, 2, 4], dtype=int32)
    """
    leaves, tree = jax.tree.flatten(args)
    flags = jax.tree.leaves(batched)
    moving = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

    def one(examples: list[jax.Array]) -> Tree:
        own = iter(examples)
        merged = [next(own) if f else leaf for leaf, f in zip(leaves, flags, strict=True)]
        return function(*jax.tree.unflatten(tree, merged))

    return jax.lax.map(one, moving)
