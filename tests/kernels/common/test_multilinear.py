"""`multilinear` against what JAX derives of the same function."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common.multilinear import multilinear

pytestmark = pytest.mark.core


def product(pair, w, in_turns=False):
    """`x w + v w` for `pair = (x, v)`: a tree, of which a part may be constant."""

    def in_pair(dy, w):
        return (rest := jnp.outer(dy, w)), rest.sum(0)

    return multilinear(
        plain,
        (in_pair, lambda dy, pair: dy @ pair[0] + dy.sum() * pair[1]),
        pair,
        w,
        in_turns=in_turns,
    )


def plain(pair, w):
    x, v = pair
    return x @ w + v @ w


def curved(function):
    return lambda x, v, w: jnp.sin(function((x, v), w)).sum()


X, V, W = jnp.arange(6.0).reshape(2, 3), jnp.ones(3), jnp.array([0.5, -1, 2])
TRANSFORMS = {
    "forward": lambda f: jax.jvp(f, (X, V, W), (X, V, W)),
    "of one of a tree": lambda f: jax.value_and_grad(f, 1)(X, V, W),
    "forward over reverse": lambda f: jax.hessian(f, (0, 2))(X, V, W),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f, 2), 0)(X, V, W),
    "reverse of vmap": lambda f: jax.grad(lambda w: jax.vmap(f, (2, None, None))(XS, V, w).sum())(
        W
    ),
    "vmap of reverse": lambda f: jax.vmap(jax.grad(f, (0, 2)), (2, None, None))(XS, V, W),
}
XS = jnp.stack([X, 2 * X], 2)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations(name):
    @jax.jit
    def both():
        functions = product, partial(product, in_turns=True), plain
        return tuple(TRANSFORMS[name](curved(function)) for function in functions)

    chex.assert_trees_all_close(*both(), rtol=1e-5, atol=1e-5)


def test_transposes_in_turns():
    """The first argument's waits for the last's; one alone waits for nothing."""

    def first(dy, w):
        return jnp.outer(jnp.cos(dy), w)

    def last(dy, x):
        return jnp.sin(dy) @ x

    def run(*arguments):
        def value(x, w):
            return multilinear(jnp.matmul, (first, last), x, w, in_turns=True).sum()

        return jax.make_jaxpr(jax.grad(value, arguments))(X, W)

    names = [eqn.primitive.name for eqn in run(0, 1).eqns]
    assert names.index("sin") < names.index("optimization_barrier") < names.index("cos")
    assert "optimization_barrier" not in str(run(0))


def scaled(x, w):
    """`x w / |w|`, linear in x alone."""

    def run(w, x):
        return x @ w / jnp.linalg.norm(w)

    def transpose(dy, w):
        return jnp.outer(dy, w) / jnp.linalg.norm(w)

    return multilinear(run, (transpose,), x, known=(w,), plain=run)


KNOWN = {
    "forward": lambda f: jax.jvp(f, (X, W), (X, X[0])),
    "reverse": lambda f: jax.grad(f, (0, 1))(X, W),
    "of what is known": lambda f: jax.hessian(f, 1)(X, W),
    "reverse over reverse": lambda f: jax.grad(lambda x, w: (jax.grad(f)(x, w) ** 2).sum(), (0, 1))(
        X, W
    ),
    "vmap of reverse": lambda f: jax.vmap(jax.grad(f, (0, 1)), (2, None))(XS, W),
    "reverse of vmap": lambda f: jax.grad(lambda w: jax.vmap(f, (None, 0))(X, w).sum())(X),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_differentiated_in_plain_jax(name):
    def plain(x, w):
        return x @ w / jnp.linalg.norm(w)

    @jax.jit
    def both():
        return tuple(
            KNOWN[name](lambda x, w, f=function: jnp.sin(f(x, w)).sum())
            for function in (scaled, plain)
        )

    chex.assert_trees_all_close(*both(), rtol=1e-5, atol=1e-5)
