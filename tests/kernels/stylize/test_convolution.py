"""A convolution that leaves its moments, with its norm: oracle, faults, choices, derivatives."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.triton import INTERPRETED, interpret, launch, tensor

from pallas_kernels import oracle
from pallas_kernels.common.conformance import bounds, expected, worst
from pallas_kernels.conv2d import conv2d
from pallas_kernels.conv2d.moments import Moments, of_tiles
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.dispatch import table
from pallas_kernels.stylize import baseline_jax, formulas, triton_launches
from pallas_kernels.stylize.convolution import api, conformance, conv2d_instance_norm, vjp, xla
from pallas_kernels.stylize.convolution import triton as room
from pallas_kernels.stylize.convolution.cases import CASES
from pallas_kernels.stylize.convolution.problem import Problem
from pallas_kernels.stylize.convolution.shapes import SHAPES

SLOW, WIDE = pytest.mark.slow, pytest.mark.wide


@pytest.fixture
def platform(request, implementation, monkeypatch):
    """The interpreter of an implementation's platform."""
    if implementation == "mosaic_tpu":
        request.getfixturevalue("tpu_interpreter")
    elif implementation == "triton":
        for part in room.PARTS:
            interpret(monkeypatch, part)
        monkeypatch.setattr(room, "unavailable", lambda platform: None)


def assert_oracle(case, implementation):
    """Output and gradients of a case are the oracle's."""
    with jax.enable_x64(case.dtype == "float64"):
        got = jax.jit(conformance.computed(case, implementation))(*case.drawn())
        allowed = bounds(case, lambda case: jax.jit(conformance.baseline(case))(*case.drawn()))
    want = expected(case)
    assert {n: a.shape for n, a in got.items()} == {n: a.shape for n, a in want.items()}
    found = {name: worst(got[name], value) for name, value in want.items()}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= allowed[name]} == {}


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        # The contract's tests compute the smallest case by each.
        pytest.param(
            *(name, case),
            id=f"{name}-{case.name}",
            marks=[*marks, WIDE if (name, case) == ("xla", CASES[0]) else SLOW],
        )
        for name, marks in (("xla", []), ("triton", [INTERPRETED]), ("mosaic_tpu", []))
        for case in CASES
        if name == "xla" or case.dtype == "float32" and (name, case) != ("mosaic_tpu", CASES[4])
    ],
)
def test_output_and_gradients_are_the_oracles(implementation, case):
    assert_oracle(case, implementation)


def first_tile(tiles):
    """A fault: the statistics of a tile, not those of the image."""
    return formulas_of_tiles(Moments(*(one[:, :1] for one in tiles)))


def unbiased(tiles):
    """A fault: the variance that divides by one pixel less."""
    near, found = formulas_of_tiles(tiles)
    return near, found._replace(
        squares=found.squares * (found.counts / (found.counts - 1))[:, None]
    )


formulas_of_tiles = formulas.combined


@pytest.mark.parametrize(
    "fault",
    [pytest.param(first_tile, marks=pytest.mark.slow), unbiased],
    ids=lambda fault: fault.__name__,
)
def test_planted_faults_are_found(fault, monkeypatch):
    case = CASES[1]
    x, w, scale, bias, _, _ = case.drawn()
    want = oracle.conv2d_instance_norm(x, w, scale, bias, **case.arguments)
    jax.clear_caches()
    run = partial(conv2d_instance_norm, implementation="xla", **case.arguments)
    assert worst(run(x, w, scale, bias), want) < 1e-5
    monkeypatch.setattr(formulas, "combined", fault)
    jax.clear_caches()
    assert worst(run(x, w, scale, bias), want) > 1e-3
    jax.clear_caches()


def large(mean):
    """A convolution whose output has this mean and deviations of about 1, and its norm's oracle."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 8, 3)).astype(np.float32)
    x[..., 2] = 1
    w = rng.normal(size=(1, 1, 3, 4)).astype(np.float32)
    w[..., 2, :] = mean
    return x, w, oracle.conv2d_instance_norm(x, w, 1.0, 0.0)


def test_a_mean_of_many_deviations_costs_what_rounding_the_output_does():
    x, w, want = large(1e4)
    run = jax.jit(partial(conv2d_instance_norm, implementation="xla"))
    z = np.asarray(jax.jit(conv2d)(x, w))
    assert worst(run(x, w), want) <= 1.5 * worst(oracle.instance_norm(z), want) < 5e-3
    # A one-pass variance has nothing left.
    naive = (z - z.mean((1, 2), keepdims=True)) / np.sqrt(
        np.maximum((z**2).mean((1, 2)) - z.mean((1, 2)) ** 2, 0) + 1e-5
    )[:, None, None]
    assert worst(naive, want) > 0.1


def of_tiles_of(x, sizes):
    """The moments of consecutive pixels of images."""
    pixels = x.reshape(len(x), -1, x.shape[-1]).astype(np.float64)
    parts = np.split(pixels, np.cumsum(sizes)[:-1], axis=1)
    mean, squares = (
        np.stack([f(part) for part in parts], 1).astype(np.float32)
        for f in (lambda p: p.mean(1), lambda p: p.var(1) * p.shape[1])
    )
    return of_tiles(sizes, jnp.asarray(mean), jnp.asarray(squares))


@INTERPRETED
@pytest.mark.parametrize(("mean", "in_place"), [(0.5, True), (1e4, False)])
def test_the_pass_of_given_statistics_is_the_oracles(mean, in_place, monkeypatch):
    """Several tiles, the last in part; two blocks of channels and of pixels."""
    monkeypatch.setattr(triton_launches, "_TILE", 64)
    monkeypatch.setattr(triton_launches, "_COMBINED", 4)
    rng = np.random.default_rng(1)
    x = (mean + rng.normal(size=(2, 7, 5, 6))).astype(np.float32)
    scale, bias = rng.normal(size=(2, 2, 6)).astype(np.float32)
    residual = rng.normal(size=x.shape).astype(np.float32)
    moments = of_tiles_of(x, [2] * 17 + [1])
    given = [tensor(np.array(a)) for a in (x, *moments, scale, bias, residual)]
    y, statistics = triton_launches.normalise(
        *(given[0], given[1:4], *given[4:], 1e-5, "relu", launch), in_place=in_place
    )
    assert (y is given[0]) == in_place
    want = oracle.instance_norm(x, scale, bias, activation="relu", residual=residual)
    # The means of the tiles are rounded to float32.
    assert worst(y, want) < max(1e-5, mean * 4e-8)
    known = formulas.statistics_of_tiles(moments, 1e-5)
    np.testing.assert_allclose(statistics[:, 2], known[:, 2], rtol=1e-6)
    middle = [np.float64(s[:, 0]) + np.float64(s[:, 1]) for s in (statistics, known)]
    np.testing.assert_allclose(*middle, rtol=1e-9, atol=1e-6)


def test_the_norm_is_written_over_what_no_derivative_reads(monkeypatch):
    def told(x, *arrays, in_place, **rest):
        return jnp.full_like(x, in_place), jnp.zeros((len(x), 3, x.shape[-1]))

    monkeypatch.setattr(xla, "normalise", told)
    # An epsilon of its own, since JAX remembers what it has traced.
    run = partial(conv2d_instance_norm, implementation="xla", eps=0.123)
    assert run(X, W).all()
    y, _ = jax.vjp(run, X, W)
    assert not y.any()


@WIDE
def test_derivatives_of_every_order_and_mode():
    case = CASES[0]
    x, w, scale, bias, residual, _ = (np.asarray(a, np.float64) for a in case.drawn())

    def loss(function, *arguments):
        return jnp.sin(function(*arguments, **case.arguments)).sum()

    def ours(x, w, scale, bias, residual, **rest):
        rest |= {"residual": residual, "implementation": "xla"}
        return conv2d_instance_norm(x, w, scale, bias, **rest)

    def slopes(function, *arguments):
        gradient = jax.grad(partial(loss, function), 1)
        return [outer(gradient, 2)(*arguments) for outer in (jax.jacrev, jax.jacfwd)]

    with jax.enable_x64(True):
        found, plain = (
            jax.jit(partial(slopes, function))(x, w, scale, bias, residual)
            for function in (ours, baseline_jax.conv2d_instance_norm)
        )
        chex.assert_trees_all_close(found, plain, rtol=0, atol=1e-11)


class Taken(Exception):
    """The error that a spy raises."""


@pytest.fixture
def spied(monkeypatch):
    def taken(plan, *_):
        raise Taken(plan.module.__name__.rsplit(".", 1)[1])

    monkeypatch.setattr(vjp, "conv2d_instance_norm", taken)


X, W = np.ones((1, 4, 5, 2), np.float32), np.ones((3, 3, 2, 3), np.float32)


@pytest.mark.usefixtures("spied")
def test_both_at_once_where_something_says_so(monkeypatch):
    assert conv2d_instance_norm(X, W).shape == (1, 2, 3, 3)
    with pytest.raises(Taken, match="xla"):
        conv2d_instance_norm(X, W, implementation="xla", conv_implementation="xla")
    assert conv2d_instance_norm(X, W, norm_implementation="xla").shape
    with monkeypatch.context() as measured:
        known, best = [], ["xla"]

        def fastest(name, direction, problem, kind):
            known.append((name, direction, kind))
            return best[0] if name == "conv2d_instance_norm" else None

        measured.setattr(table, "fastest", fastest)
        with pytest.raises(Taken, match="xla"):
            conv2d_instance_norm(X, W)
        assert ("conv2d_instance_norm", "fwd", "cpu") in known
        # A filter on a part asks for the parts.
        assert conv2d_instance_norm(X, W, conv_implementation="xla").shape
        # The parts, too, where they were the fastest, or what was does not take the call.
        for best[0] in ("parts", "triton"):
            assert conv2d_instance_norm(X, W).shape
    monkeypatch.setenv("FLASH_WTCONV_CONV2D_INSTANCE_NORM_FWD", "xla")
    with pytest.raises(Taken, match="xla"):
        conv2d_instance_norm(X, W)


def test_what_a_kernel_does_not_take_it_says(monkeypatch):
    with pytest.raises(NotImplementedError, match="conv2d_instance_norm .* needs a GPU"):
        conv2d_instance_norm(X, W, implementation="triton")
    monkeypatch.setattr(room, "unavailable", lambda platform: None)
    problem = Problem((2, 8, 8, 4), np.dtype("float32"), 3, 3, 8, Window())
    for change, reason in (
        ({"dtype": np.dtype("float64")}, "float64"),
        ({"shape": (65536, 8, 8, 4)}, "65536 images with their moments, up to 65535"),
        ({"shape": (0, 8, 8, 4)}, "an empty array"),
    ):
        with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
            room.check("fwd", problem._replace(**change))
    # Another is taken then.
    wide = jax.ShapeDtypeStruct((65536, 3, 3, 1), np.float32)
    run = partial(conv2d_instance_norm, implementation=["triton", "xla"])
    monkeypatch.setenv("FLASH_WTCONV_TUNING", "off")
    assert jax.eval_shape(run, wide, W[:, :, :1]).shape == (65536, 1, 1, 3)


@WIDE
@INTERPRETED
@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.usefixtures("platform")
def test_kernels_are_mapped():
    x = np.random.default_rng(0).normal(size=(2, 1, 4, 5, 2)).astype(np.float32)

    def run(implementation, x):
        call = partial(conv2d_instance_norm, padding="reflect", implementation=implementation)
        return jax.jit(jax.vmap(call, (0, None)))(x, W * 0.1)

    np.testing.assert_allclose(run("triton", x), run("xla", x), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.dtype != "float64"], ids=lambda case: case.name
)
def test_on_a_gpu_output_and_gradients_are_the_oracles(implementation, case):
    try:
        api.OPERATOR.module(implementation).check("fwd", conformance.problem(case))
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert_oracle(case, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
@pytest.mark.parametrize("name", SHAPES)
def test_layers_of_the_network_are_xlas_and_bitwise_reproducible(name, implementation):
    shape = SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape[:4], "bfloat16")
    w = jax.random.normal(keys[1], (shape.kernel, shape.kernel, shape.channels, shape.features))
    w = (w / (shape.kernel * shape.channels**0.5)).astype(x.dtype)

    def run(implementation):
        rest = {"stride": shape.stride, "padding": shape.padding, "upsample": shape.upsample}
        return jax.jit(partial(conv2d_instance_norm, implementation=implementation, **rest))(x, w)

    y = run(implementation)
    chex.assert_trees_all_close(y, run("xla"), rtol=0.03, atol=0.03)
    assert jnp.array_equal(y, run(implementation))
