"""Rules by which `jax.vmap` maps kernels, which have one batch axis and no batching rule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.common.types import Tree


def vmap_folding(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A kernel whose vmap folds into the batch of its first argument, so that it stays one call.

    Args:
        run: Function of `x [N, ...]` and of arrays that all images share, to `[N, ...]`. It is
            called once for each example where the shared arrays are batched too.

    Returns:
        The same function.

    Example:
        >>> jax.vmap(vmap_folding(lambda x, w: x * w), (0, None))(jnp.ones((2, 3, 4)), 2.0).shape
        (2, 3, 4)
    """
    call = custom_vmap(run)

    @call.def_vmap
    def rule(
        size: int, batched: tuple[Tree, ...], x: jax.Array, *shared: Tree
    ) -> tuple[jax.Array, bool]:
        if any(jax.tree.leaves(batched[1:])):
            return _each(call, batched, (x, *shared)), True
        if size == 0:
            one = jax.eval_shape(run, jax.ShapeDtypeStruct(x.shape[1:], x.dtype), *shared)
            return jnp.zeros((0, *one.shape), one.dtype), True
        y = call(x.reshape(-1, *x.shape[2:]), *shared)
        return y.reshape(*x.shape[:2], *y.shape[1:]), True

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
    call = custom_vmap(run)

    @call.def_vmap
    def rule(size: int, batched: tuple[Tree, ...], *args: Tree) -> tuple[Tree, Tree]:
        out = _each(call, batched, args)
        return out, jax.tree.map(lambda _: True, out)

    return call


def _each(function: Callable[..., Tree], batched: Tree, args: Tree) -> Tree:
    """The results of `function` for each example; arguments that are not batched are shared."""
    leaves, tree = jax.tree.flatten(args)
    flags = jax.tree.leaves(batched)
    moving = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

    def one(examples: list[jax.Array]) -> Tree:
        own = iter(examples)
        merged = [next(own) if f else leaf for leaf, f in zip(leaves, flags, strict=True)]
        return function(*jax.tree.unflatten(tree, merged))

    return jax.lax.map(one, moving)
