"""Instance normalisation against the oracle, the oracle against JAX, and what is refused."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stylize import assert_oracle, assert_sharded

from pallas_kernels import oracle
from pallas_kernels.common.conformance import worst
from pallas_kernels.stylize import baseline_jax, instance_norm, xla
from pallas_kernels.stylize.cases import HARD, PAIRWISE, Case

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("case", HARD + PAIRWISE[:2], ids=lambda case: case.name)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case)


@pytest.mark.wide
@pytest.mark.parametrize("case", PAIRWISE[2:], ids=lambda case: case.name)
def test_every_pair_of_arguments_is_the_oracles(case):
    assert_oracle(case)


@pytest.mark.parametrize("case", PAIRWISE[4:6] + HARD[2:3], ids=lambda case: case.name)
def test_the_oracle_is_jaxs_norm(case):
    """By JAX's own derivatives of the baseline, which knows no formula of ours."""
    case = case._replace(dtype="float64")
    x, scale, bias, residual, dy = case.drawn()
    arrays = (x, scale, bias) if residual is None else (x, scale, bias, residual)
    y, pullback = jax.vjp(partial(baseline_jax.instance_norm, activation=case.activation), *arrays)
    want = case.expected()
    chex.assert_trees_all_close([y, *pullback(dy)], list(want.values()), rtol=1e-10, atol=1e-10)


def planted(change):
    """The norm of a case with a mistake in it."""

    def run(x, scale, bias):
        mean = x.mean((-3, -2), keepdims=True)
        variance = x.var((-3, -2), keepdims=True)
        mean, variance = change(x, mean, variance)
        return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias

    return run


FAULTS = {
    "unbiased variance": lambda x, m, v: (m, v * 80 / 79),
    "statistics of a tile": lambda x, m, v: (
        x[:, :8].mean((1, 2), keepdims=True),
        x[:, :8].var((1, 2), keepdims=True),
    ),
    "statistics of the batch": lambda x, m, v: (x.mean((0, 1, 2)), x.var((0, 1, 2))),
    "no eps": lambda x, m, v: (m, v - 1e-5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    case = Case(10, 8, 3, deviation=0.3)
    x, scale, bias, _, _ = (None if a is None else a.astype("f8") for a in case.drawn())
    want = oracle.instance_norm(x, scale, bias)
    assert worst(planted(lambda x, m, v: (m, v))(x, scale, bias), want) <= case.tolerance("y")
    assert worst(planted(FAULTS[fault])(x, scale, bias), want) > case.tolerance("y")


def test_a_first_pixel_far_from_the_others_costs_no_digits():
    x = np.random.default_rng(0).normal(size=(1, 40, 50, 2)).astype(np.float32)
    x[:, 0, 0] = 1e6
    y = instance_norm(x, eps=1e-5)
    want = oracle.instance_norm(x)
    # All but that pixel are the same to a few bits, 1/45 of it.
    error = np.abs(np.asarray(y, np.float64) - want)
    assert error.max() <= 1e-5 * np.abs(want).max()


ARRAYS = [np.asarray(a, np.float64) for a in Case(3, 4, 2, residual=True, styles=True).drawn()[:4]]


def loss(call, activation="relu"):
    def run(x, scale, bias, residual):
        return jnp.sin(call(x, scale, bias, residual=residual, activation=activation)).sum()

    return run


ALL = 0, 1, 2, 3


def slopes(call):
    return jax.grad(loss(call), ALL)


TRANSFORMS = {
    "reverse over reverse": lambda f: jax.grad(
        lambda *args: sum(jnp.sum(g**3) for g in slopes(f)(*args)), ALL
    ),
    "reverse over reverse, plain": lambda f: jax.grad(
        lambda x, *rest: (jax.grad(loss(f, None))(x, *rest) ** 3).sum()
    ),
    "forward over reverse": lambda f: lambda *args: jax.jvp(slopes(f), args, args),
    "forward over forward": lambda f: (
        lambda x, s, *rest: jax.jacfwd(jax.jacfwd(loss(f), 1), 1)(x, s, *rest)
    ),
    "jacrev of grad": lambda f: lambda x, s, *rest: jax.jacrev(jax.grad(loss(f), 1))(x, s, *rest),
    "vmap of gradients": lambda f: (
        lambda x, s, b, r: jax.vmap(jax.grad(loss(f), (0, 1)), (0, None, None, 0))(
            jnp.stack([x, x**2]), s, b, jnp.stack([r, -r])
        )
    ),
    "vmap of styles": lambda f: (
        lambda x, s, b, r: jax.vmap(partial(f, residual=r), (None, 0, 0))(
            x, jnp.stack([s, -s]), jnp.stack([b, 2 * b])
        )
    ),
    "remat": lambda f: slopes(jax.remat(f, static_argnums=4)),
}


class Kernel:
    """Plain JAX as a kernel, which JAX cannot look into."""

    DIFFERENTIABLE = False
    unavailable, check = xla.unavailable, xla.check
    forward, backward = xla.forward, xla.backward


@pytest.mark.parametrize("module", [xla, Kernel])
@pytest.mark.parametrize("name", list(TRANSFORMS)[:-1])
def test_transformations(name, module, monkeypatch):
    from pallas_kernels.dispatch import Operator

    monkeypatch.setattr(Operator, "module", lambda self, name: module)

    def plain(x, scale, bias, residual, activation=None):
        return baseline_jax.instance_norm(x, scale, bias, residual, activation=activation)

    transform = TRANSFORMS[name]
    got, want = (jax.jit(transform(f))(*ARRAYS) for f in (instance_norm, plain))
    chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_saved_are_x_its_statistics_and_what_a_slope_needs(activation):
    x, scale, bias, residual, _ = Case(5, 4, 3, residual=True, dtype="bfloat16").drawn()
    run = lambda x, residual: instance_norm(  # noqa: E731
        x, scale, bias, residual=residual, activation=activation
    )
    saved = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], x, residual)
    sizes = sorted(a.size for a in jax.tree.leaves(saved))
    images = [x.size] if activation is None else [x.size, x.size]
    assert sizes == [6, 6, 18, *images]


def test_slopes_at_kinks_are_those_of_jax():
    x, scale = jnp.zeros((1, 2, 1, 5)), jnp.ones(5)
    bias = jnp.asarray([-1, -0.0, 0, 1, np.nan])
    run = lambda bias: instance_norm(x, scale, bias, activation="relu").sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(run)(bias), [0, 0, 0, 2, 0])
    assert np.isnan(run(bias))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_stays_in_its_channel_and_image(value):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 2))
    x[1, 2, 1, 0] = value
    y = instance_norm(x, activation="relu")
    assert np.isnan(y[1, :, :, 0]).all()
    assert np.isfinite(y[0]).all() and np.isfinite(y[1, :, :, 1]).all()


def test_images_of_any_size_are_exported():
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, h, w, 3"), jnp.float32)
    run = lambda x: instance_norm(x, np.ones(3, "f4"), activation="relu")  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(lambda x: (run(x) ** 2 * x).sum()))
    drawn = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    got = jax.export.export(gradient)(x).call(drawn)
    chex.assert_trees_all_close(got, gradient(drawn), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("xla", check_vma)


def test_images_that_are_sharded_over_explicit_axes_have_such_gradients():
    mesh = jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Explicit,))
    images = jax.NamedSharding(mesh, jax.P("n", None, None, None))
    x, scale, bias, _, dy = Case(5, 4, 3, activation="relu").drawn()
    sharded = jax.device_put(x, images)

    def run(x, scale):
        return jax.grad(lambda *a: (instance_norm(*a, bias) * dy).sum(), (0, 1))(x, scale)

    dx, dscale = jax.jit(run)(sharded, scale)
    assert jax.typeof(dx).sharding.spec == images.spec
    chex.assert_trees_all_close((dx, dscale), run(x, scale), rtol=1e-5, atol=1e-5)


def test_the_fastest_is_chosen_by_measurement():
    x, scale, bias, _, _ = Case(5, 4, 3).drawn()
    got = instance_norm(x, scale, bias, implementation="auto")
    np.testing.assert_array_equal(got, instance_norm(x, scale, bias))


X = np.ones((2, 8, 6, 4), np.float32)
WRONG = {
    r"x: expected \[\*batch, H, W, C\] of at least one pixel.*\(8, 6\)": {"x": X[0, :, :, 0]},
    r"x: expected \[\*batch, H, W, C\] of at least one pixel.*\(2, 0, 6, 4\)": {"x": X[:, :0]},
    r"x: expected a floating-point array .* got int32": {"x": X.astype(np.int32)},
    r"scale: expected shape \(4,\), one a channel, or \(2, 4\), .*got \(3,\)": {
        "scale": np.ones(3)
    },
    r"bias: expected shape \(4,\), one a channel, got \(1, 4\)": {
        "x": X[0],
        "bias": np.ones((1, 4)),
    },
    r"bias: expected an array, got str": {"bias": "none"},
    r"residual: expected x's shape and dtype, \(2, 8, 6, 4\) float32, got .* float16": {
        "residual": X.astype(np.float16)
    },
    r"activation='gelu': expected None or 'relu'": {"activation": "gelu"},
    r"activation=\[\]: expected None or 'relu'": {"activation": []},
    r"eps=0: expected a number greater than 0": {"eps": 0},
    r"eps='small': expected a number": {"eps": "small"},
    r"eps=nan: expected a number": {"eps": np.nan},
    r"implementation names \['cudnn'\]": {"implementation": "cudnn"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    with pytest.raises(ValueError, match=message):
        instance_norm(**{"x": X} | WRONG[message])
