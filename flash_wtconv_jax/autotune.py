"""Measures every choice between implementations that a function makes, before it is used."""

from collections.abc import Callable

import jax

from pallas_kernels.common.types import Json, Tree
from pallas_kernels.dispatch.tuner import recorded, tuning

__all__ = ["tune", "tuning"]


def tune(fn: Callable[..., Tree], *args: Tree, **kwargs: Tree) -> list[Json]:
    """Times the implementations of every operator that a function calls, and remembers them.

    The function is traced, not run: arrays of the shapes that it meets are drawn for the timing.
    What was measured before, here or by another process, is not measured again. Afterwards
    `implementation="auto"`, and any inside `tuning("cached")`, takes the fastest without measuring.

    Args:
        fn: A function of arrays, such as a step of training; jitted or not. A backward pass is
            measured where `fn` differentiates, as a step of training does. Functions that it calls,
            and that JAX has compiled for these shapes already, keep their choice:
            `jax.clear_caches()` forgets them.
        *args: Its arguments, or `jax.ShapeDtypeStruct`s in place of the arrays.
        **kwargs: Its named arguments.

    Returns:
        An entry for each choice among several candidates: operator, direction, problem, and
        `measured`, the candidates with their times in milliseconds, the fastest first.

    Raises:
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> from pallas_kernels.wtconv import wtconv2d
        >>> import jax.numpy as jnp
        >>> params = {"base_kernel": jnp.ones((3, 3, 1, 4)), "base_scale": jnp.ones(4)}
        >>> def loss(params, x):
        ...     return wtconv2d(x, params).sum()
        >>> used = tune(jax.jit(jax.grad(loss)), params, jnp.ones((1, 8, 8, 4)))  # doctest: +SKIP
        >>> used[0]["operator"], used[0]["direction"], used[0]["measured"][0]  # doctest: +SKIP
        ('wtconv', 'fwd', {'implementation': 'xla', 'config': {'shifted': True}, 'ms': 0.02})
    """
    # The trace of a jitted function may be remembered, with the choices that it was made with.
    # `jax.grad` and others have the function that they transform there too: only `jax.jit` lowers.
    while hasattr(fn, "lower") and hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def call(arrays: dict[int, jax.Array]) -> Tree:
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(tree, filled)
        return fn(*args, **kwargs)

    with tuning("search"), recorded() as used:
        jax.eval_shape(call, arrays)
    return used
