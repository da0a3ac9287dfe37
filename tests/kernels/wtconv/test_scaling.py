"""The kernels of WTConv times their scales: by XLA, by launches on the CPU, and on a GPU."""

from collections import Counter
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda import EMULATED, emulate, gpu_of, plant, recorded

from pallas_kernels.common import cuda_call
from pallas_kernels.common.on_cpu.cuda import HOPPER
from pallas_kernels.wtconv import cuda as cuda_jax
from pallas_kernels.wtconv import scaling, vjp, wtconv2d
from pallas_kernels.wtconv.problem import Problem

PLAN = vjp.Plan(cuda_jax, (), "haar", None, None)
PROBLEM = Problem((2, 9, 8, 20), jnp.dtype("float32"), 3, 2, "haar")
HALF = PROBLEM._replace(dtype=jnp.dtype("float16"))


def parameters(dtype, channels=70, bias=True):
    """Weights and scales of two levels, whose channels are not those of whole blocks."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape, scale=0.25), dtype)

    taps = draw(3, 3, 1, channels), *(draw(3, 3, 4, channels) for _ in range(2))
    scales = draw(channels), *(draw(4, channels) for _ in range(2))
    return (taps, draw(channels) if bias else None), scales


def by_xla(weights, scales):
    taps, bias = weights
    wide = jnp.float32
    found = [tap.astype(wide) * scale.astype(wide) for tap, scale in zip(taps, scales, strict=True)]
    return found, None if bias is None else bias.astype(wide) * scales[0].astype(wide)


def loss(scaled, weights, scales):
    """A function of the third degree, so that second derivatives are none of zeros."""
    found = jax.tree.leaves(scaled(weights, scales))
    return sum((each**3).sum() for each in found)


def both(scaled, *args):
    """The products, their gradients, and the gradients of something that these add up to."""

    def squares(*args):
        return sum((g.astype("float32") ** 2).sum() for g in jax.tree.leaves(gradient(*args)))

    gradient = jax.grad(partial(loss, scaled), (0, 1))
    return scaled(*args), gradient(*args), jax.grad(squares, (0, 1))(*args)


def assert_close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        most = float(jnp.abs(other.astype("float32")).max())
        # XLA adds in another order.
        margin = 4 * most * float(jnp.finfo(one.dtype).eps)
        chex.assert_trees_all_close(one, other, rtol=0, atol=margin)


@EMULATED
@pytest.mark.parametrize(
    ("problem", "dtype", "bias"),
    [
        (PROBLEM, "float32", True),
        (HALF, "float16", False),
        pytest.param(PROBLEM, "bfloat16", True, marks=pytest.mark.slow),
        pytest.param(HALF, "float32", False, marks=pytest.mark.slow),
    ],
)
def test_products_and_all_derivatives_are_xlas(problem, dtype, bias, monkeypatch):
    emulate(monkeypatch, cuda_jax)
    given = parameters(dtype, bias=bias)
    got = jax.jit(partial(both, partial(scaling.scaled, PLAN, problem)))(*given)
    assert_close(got, jax.jit(partial(both, by_xla))(*given))


FAULTS = {
    "another scale": ("Offset(band) * channels + channel :", "channel :"),
    "the bias": ("if (number_of_row == 0) offset", "if (number_of_row == TAPS) offset"),
    "the bias's part of a sum": ("based && bias ?", "false ?"),
    "a tap": ("tap < TAPS; tap++", "tap < TAPS - 1; tap++"),
    "another level": ("EACH(CHOOSE);\n  if (based) gradients", "if (based) gradients"),
}


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    found = plant(monkeypatch, *FAULTS[fault])
    emulate(monkeypatch, cuda_jax)
    given = parameters("float32")
    got = both(partial(scaling.scaled, PLAN, PROBLEM), *given)
    with pytest.raises(AssertionError):
        assert_close(got, both(by_xla, *given))
    assert any(found)


@EMULATED
def test_vmap_and_forward_mode(monkeypatch):
    """Each example has weights of its own, and all share the scales."""
    emulate(monkeypatch, cuda_jax)
    weights, scales = parameters("float32", channels=5)
    many = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), weights)

    def run(scaled):
        moved = partial(jax.jvp, scaled, tangents=(weights, scales))
        mapped = jax.vmap(lambda weights: scaled(weights, scales))(many)
        return mapped, moved((weights, scales))

    assert_close(run(partial(scaling.scaled, PLAN, PROBLEM)), run(by_xla))


def test_a_pullback_on_a_cpu_launches_nothing(monkeypatch):
    """The program that the GPU's forward pass was traced in may be differentiated elsewhere."""
    given = parameters("float32")
    launches = recorded(monkeypatch, cuda_jax)
    monkeypatch.setattr(cuda_jax, "device_properties", lambda: HOPPER)
    _, pullback = jax.vjp(partial(scaling.scaled, PLAN, PROBLEM), *given)
    before = len(launches)
    monkeypatch.setattr(cuda_jax, "unavailable", lambda platform: "needs a GPU, this is a cpu")
    found, want = by_xla(*given), jax.vjp(by_xla, *given)[1]
    assert_close(pullback((tuple(found[0]), found[1])), want(found))
    assert before == len(launches) == 1


def test_what_is_mixed_is_left_to_xla(monkeypatch):
    """A launch reads parameters of one dtype."""
    launches = recorded(monkeypatch, cuda_jax)
    monkeypatch.setattr(cuda_jax, "device_properties", lambda: HOPPER)
    weights, (first, *others) = parameters("bfloat16")
    given = weights, (first.astype("float32"), *others)

    def gradient(scaled):
        return jax.jit(jax.grad(partial(loss, scaled), (0, 1)))(*given)

    got = gradient(partial(scaling.scaled, PLAN, PROBLEM))
    assert not launches
    assert_close(got, gradient(by_xla))


def test_weights_alone_vary_over_a_mesh(monkeypatch):
    """In a `shard_map` gradients of what all devices share are sums over it."""
    recorded(monkeypatch, cuda_jax)
    monkeypatch.setattr(cuda_jax, "device_properties", lambda: HOPPER)
    weights, scales = parameters("float32")

    def run(weights, scales):
        weights = jax.tree.map(lambda w: jax.lax.pcast(w, "d", to="varying"), weights)
        return jax.lax.psum(loss(partial(scaling.scaled, PLAN, PROBLEM), weights, scales), "d")

    spread = jax.shard_map(
        run, mesh=jax.make_mesh((1,), ("d",)), in_specs=jax.P(), out_specs=jax.P()
    )
    found = jax.eval_shape(jax.grad(spread, (0, 1)), weights, scales)
    chex.assert_trees_all_equal_shapes(found, (weights, scales))


@pytest.mark.parametrize(
    ("dtype", "launches"), [("float32", (2, 1)), ("bfloat16", (1, 1)), ("resident", (0, 0))]
)
def test_layers_launch_what_spares_xla_launches(dtype, launches, monkeypatch):
    """Forward and backward: products twice in float32, in 16 bits backward alone."""
    gpu_of(monkeypatch)
    found = recorded(monkeypatch, cuda_jax)
    kernel_size = 7 if dtype == "resident" else 3
    x = jnp.ones((2, 8, 8, 32), "float32" if dtype == "resident" else dtype)
    side = kernel_size, kernel_size
    params = {"base_kernel": jnp.ones((*side, 1, 32)), "base_scale": jnp.ones(32)}
    params |= {"wavelet_kernel_0": jnp.ones((*side, 4, 32)), "wavelet_scale_0": jnp.ones((4, 32))}

    def loss(x, params):
        return wtconv2d(x, params, implementation="cuda").astype("float32").sum()

    jax.jit(jax.grad(loss, (0, 1))).trace(x, params)
    names = Counter(name for name, *_ in found)
    assert (names["scaled_taps"], names["scale_sums"]) == launches


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_on_a_gpu(dtype):
    if cuda_call.unavailable("gpu"):
        pytest.skip(str(cuda_call.unavailable("gpu")))
    given = parameters(dtype, channels=384)
    got = jax.jit(partial(both, partial(scaling.scaled, PLAN, PROBLEM)))(*given)
    assert_close(got, jax.jit(partial(both, by_xla))(*given))
