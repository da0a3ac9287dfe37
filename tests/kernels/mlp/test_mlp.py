"""The MLP in plain JAX: the oracle, derivatives of both modes and second order, what is refused."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import conformance
from pallas_kernels.common.gelu import gelu, in_kernel
from pallas_kernels.mlp import conformance as room
from pallas_kernels.mlp import mlp
from pallas_kernels.mlp.baseline_jax import mlp as plain
from pallas_kernels.mlp.cases import CASES, Case

pytestmark = pytest.mark.core


def arrays(dtype="float64"):
    """x, both kernels and both biases."""
    x, first, second, inner, outer, _ = map(jnp.asarray, Case(3, 2, 4, 3, dtype).drawn())
    return x, (first, second), (inner, outer)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.wide] * (case.dtype.endswith("16") and i > 0))
        for i, case in enumerate(CASES)
    ],
    ids=lambda case: case.name,
)
def test_oracle(case):
    with jax.enable_x64(case.dtype == "float64"):
        got = room.computed(case, "xla")(*case.drawn())
        bounds = conformance.bounds(case, lambda case: room.baseline(case)(*case.drawn()))
    for name, want in conformance.expected(case).items():
        assert conformance.worst(got[name], want) <= bounds[name], name


def test_derivatives_are_those_of_plain_jax():
    """In both modes and to second order, by every argument, the residual too."""
    with jax.enable_x64(True):
        args = *arrays(), jnp.ones((3, 3))
        moved = jax.tree.map(jnp.cos, args)

        def loss(function, x, kernels, biases, residual):
            return jnp.sum(jnp.sin(function(x, kernels, biases) + residual))

        def residual_inside(x, kernels, biases, residual):
            return jnp.sum(jnp.sin(mlp(x, kernels, biases, residual=residual)))

        everything = tuple(range(4))
        results = []
        for function in (residual_inside, partial(loss, plain)):
            gradient = jax.grad(function, everything)
            results.append(
                jax.jit(lambda *args, g=gradient: (g(*args), jax.jvp(g, args, moved)[1]))(*args)
            )
            reverse = jax.grad(
                lambda *args, g=gradient: sum(
                    map(jnp.vdot, jax.tree.leaves(g(*args)), jax.tree.leaves(moved))
                ),
                everything,
            )
            results[-1] += (jax.jit(reverse)(*args),)
        ours, theirs = map(jax.tree.leaves, results)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_vmap_and_batches_of_any_rank():
    x, kernels, biases = arrays("float32")
    many = jnp.stack([x, 2 * x])
    want = jnp.stack([plain(one, kernels, biases) for one in many])
    np.testing.assert_allclose(mlp(many, kernels, biases), want, atol=1e-5)
    each = jax.vmap(lambda x, first: mlp(x, (first, kernels[1]), biases))
    np.testing.assert_allclose(each(many, jnp.stack([kernels[0]] * 2)), want, atol=1e-5)
    np.testing.assert_allclose(mlp(x[0], kernels, biases), want[0, 0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gelu_in_16_bits(dtype):
    """Value and slope over all of its bend, as float64 has them, rounded; the ends too."""
    x = jnp.linspace(-9, 9, 3001).astype(dtype)
    wide = np.asarray(x, np.float64)
    share = 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
    density = np.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    y, slope = jax.jit(lambda x: jax.jvp(gelu, (x,), (jnp.ones_like(x),)))(x)
    half = float(jnp.finfo(dtype).eps) / 2
    kernels = in_kernel(x.astype(jnp.float32)).astype(dtype)
    for got, want in ((y, wide * share), (slope, share + wide * density), (kernels, wide * share)):
        error = np.abs(np.asarray(got, np.float64) - want)
        assert np.all(error <= half * np.abs(want) + 1.5e-7 * np.abs(wide) + 1e-7)
    ends = jnp.array([jnp.inf, -60000.0, 60000.0, jnp.nan], dtype)
    for got in (gelu(ends), in_kernel(ends.astype(jnp.float32)).astype(dtype)):
        np.testing.assert_array_equal(np.isnan(got), [False, False, False, True])
        assert got[:3].tolist() == [np.inf, 0.0, float(ends[2])]
    # Nothing but x is kept for the backward pass.
    kept = jax.tree.leaves(jax.vjp(gelu, x)[1])
    assert {one.dtype for one in kept} == {x.dtype}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.ones((3, 5), "f4")}, "kernels: expected .C, hidden. and .* C = 5"),
        ({"kernels": (np.ones((2, 4), "f4"), np.ones((5, 3), "f4"))}, "got shapes"),
        ({"kernels": (np.ones((2, 4), "f4"), np.ones((4, 3), "float16"))}, "x's dtype, float32"),
        (
            {"biases": (np.ones(4, "f4"), np.ones(4, "f4"))},
            r"biases: expected shapes \(\(4,\), \(3,\)\)",
        ),
        ({"residual": np.ones((3, 4), "f4")}, r"residual: expected shape \(3, 3\)"),
        ({"epsilon": -1.0}, r"epsilon=-1\.0: expected a number greater than 0"),
        ({"x": np.ones((3, 2), int)}, "x: expected a floating-point array"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    x, kernels, biases = arrays("float32")
    given = {"x": x, "kernels": kernels, "biases": biases} | changes
    with pytest.raises(ValueError, match=message):
        mlp(**given)
