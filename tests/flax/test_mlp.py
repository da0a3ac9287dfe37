"""The pointwise half of a ConvNeXt block: its value, gradients, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_wtconv_jax.functional.mlp import MlpParams, norm_mlp, normalized
from pallas_kernels import oracle

C, HIDDEN, FEATURES = 3, 8, 3


def drawn(**changes):
    """Parameters far from their initial values."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = MlpParams(
        ((C, HIDDEN), (HIDDEN, FEATURES)), ((HIDDEN,), (FEATURES,)), ((C,), (C,)), None, (FEATURES,)
    )
    draw = lambda shape: jax.random.normal(next(keys), shape)  # noqa: E731
    whole = jax.tree.map(
        draw, shapes, is_leaf=lambda one: isinstance(one, tuple) and isinstance(one[0], int)
    )
    return whole._replace(**changes)


def stepwise(x, params, residual, dtype=jnp.float32):
    """Every step by itself, nothing multiplied into a kernel."""
    x, params, residual = jax.tree.map(lambda a: a.astype(dtype), (x, params, residual))
    (first, second), (inner, outer), (scale, shift) = params[:3]
    y = normalized(x) * scale + shift
    y = jax.nn.gelu(y @ first + inner, approximate=False) @ second + outer
    return residual + (y if params.layer_scale is None else y * params.layer_scale)


@pytest.mark.parametrize("side", [5, 2], ids=["many", "few"])
@pytest.mark.parametrize("layer_scale", [True, pytest.param(False, marks=pytest.mark.wide)])
def test_value_and_gradients(side, layer_scale):
    """It is that of more pixels than hidden channels, and of fewer."""
    params = drawn() if layer_scale else drawn(layer_scale=None)
    x = 3 + jax.random.normal(jax.random.key(1), (1, side, side, C))
    residual = jnp.sin(x)

    def results(function):
        loss = lambda x, p, r: (jnp.sin(function(x, p, r)).sum(), function(x, p, r))  # noqa: E731
        (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, params, residual)
        return y, gradients

    ours = jax.jit(lambda: results(lambda x, p, r: norm_mlp(x, p, residual=r)))()
    steps = jax.jit(lambda: results(stepwise))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, steps)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    rows = np.asarray(x, np.float64).reshape(-1, C)
    rows = rows - rows.mean(-1, keepdims=True)
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)
    want = oracle.mlp(rows * wide.norm[0] + wide.norm[1], wide.kernels, wide.biases)
    want = residual + (want * wide.layer_scale if layer_scale else want).reshape(x.shape)
    np.testing.assert_allclose(ours[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 1.0), ("float16", 1e-6)])
def test_16_bits_are_as_near_as_every_step_in_16_bits(dtype, size):
    """Also with the layer scale that a network begins with, of which float16 has few digits."""
    x = jax.random.normal(jax.random.key(1), (1, 6, 6, C))
    params = drawn(layer_scale=size * jnp.arange(1.0, 1.0 + FEATURES))
    zero = jnp.zeros_like(x)
    want, plain = stepwise(x, params, zero), stepwise(x, params, zero, dtype)
    got = norm_mlp(x, params, residual=zero.astype(dtype), dtype=dtype)
    assert got.dtype == dtype
    error, allowed = (float(jnp.abs(y.astype("float32") - want).max()) for y in (got, plain))
    assert error <= 2 * allowed
    wider = jax.eval_shape(lambda: norm_mlp(x, params, residual=x, dtype=dtype))
    assert wider.dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"norm": (np.ones(C, "f4"), np.ones(4, "f4"))},
            r"norm: expected \(\(3,\), \(3,\)\) for x",
        ),
        (
            {"kernels": (np.ones((4, HIDDEN), "f4"), np.ones((HIDDEN, 3), "f4"))},
            "kernels: expected",
        ),
        ({"layer_scale": np.ones(4, "f4")}, r"layer_scale: expected \(3,\)"),
        ({"x": np.ones((2, C), int)}, "x: expected a floating-point array"),
        ({"residual": np.ones((2, 4), "f4")}, r"residual: expected shape \(2, 3\), got \(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    more = {name: changes.pop(name) for name in ("x", "residual") if name in changes}
    with pytest.raises(ValueError, match=message):
        norm_mlp(**{"x": jnp.ones((2, C)), "params": drawn(**changes)} | more)
