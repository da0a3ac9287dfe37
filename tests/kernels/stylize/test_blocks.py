"""Convolutions with a norm behind against the oracle, the oracle against JAX, and refusals."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.triton import INTERPRETED, interpret

from pallas_kernels import oracle
from pallas_kernels.common.conformance import bounds, expected, rounded, worst
from pallas_kernels.conv2d import triton as conv2d_triton
from pallas_kernels.stylize import baseline_jax, conv2d_instance_norm, residual_block
from pallas_kernels.stylize import triton as stylize_triton
from pallas_kernels.stylize.cases import CONV_CASES

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 6, 5, 3))
W, SCALE, BIAS = RNG.normal(size=(3, 3, 3, 4)), RNG.normal(size=4), RNG.normal(size=(2, 4))
WIDE = pytest.mark.wide
TAKEN = {"xla": CONV_CASES, "triton": CONV_CASES[2:3], "mosaic_tpu": CONV_CASES[:1]}
QUICK = [("xla", CONV_CASES[0])]


@pytest.fixture
def platform(request, implementation, monkeypatch):
    """The interpreter of an implementation's platform."""
    if implementation == "mosaic_tpu":
        request.getfixturevalue("tpu_interpreter")
    elif implementation == "triton":
        for room in (conv2d_triton, stylize_triton):
            interpret(monkeypatch, room)


def value_and_grads(case, function):
    """The output and its gradients, as one program."""
    *arrays, dy = case.drawn()
    names = "dx", "dw", "dscale", "dbias", "dresidual"

    @jax.jit
    def run(dy, *arrays):
        y, pullback = jax.vjp(function, *arrays)
        return y, pullback(dy)

    y, slopes = run(dy, *arrays)
    found = zip(names, slopes, strict=True)
    return {"y": y, **{name: value for name, value in found if value is not None}}


def plain_results(case):
    """The baseline's results of a case, and its gradients."""

    def run(x, *rest):
        images = x.reshape(-1, *x.shape[-3:])
        y = baseline_jax.conv2d_instance_norm(images, *rest, **case.arguments)
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    return value_and_grads(case, run)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        pytest.param(
            name,
            case,
            id=f"{name}-{case.name}",
            marks=[*marks, *[pytest.mark.wide] * ((name, case) not in QUICK)],
        )
        for name, marks in (("xla", []), ("triton", [INTERPRETED]), ("mosaic_tpu", [WIDE]))
        for case in TAKEN[name]
    ],
)
def test_output_and_gradients_are_the_oracles(implementation, case):
    def run(x, w, scale, bias, residual):
        names = {"conv_implementation": implementation, "norm_implementation": implementation}
        return conv2d_instance_norm(x, w, scale, bias, residual=residual, **case.arguments, **names)

    got, want = value_and_grads(case, run), expected(case)
    allowed = bounds(case, plain_results)
    assert {n: a.shape for n, a in got.items()} == {n: a.shape for n, a in want.items()}
    found = {name: worst(got[name], value) for name, value in want.items()}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= allowed[name]} == {}


def branches():
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(3, 3, 3, 3)), *rng.normal(size=(2, 3))) for _ in range(2)]


def test_a_residual_block_is_the_oracles():
    dy = RNG.normal(size=X.shape)

    @jax.jit
    def both(dy, *arguments):
        y, pullback = jax.vjp(residual_block, *arguments)
        return y, pullback(dy)

    y, got = both(dy, X, *branches())
    chex.assert_trees_all_close(y, oracle.residual_block(X, *branches()), rtol=0, atol=1e-11)
    want = oracle.residual_block_vjp(X, *branches(), dy)
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-10)


def test_the_oracles_gradients_are_its_derivatives():
    """Along one direction of all arguments at once."""
    first, second = branches()
    rng = np.random.default_rng(2)
    arguments = [X, *first, *second]
    moves = [rng.normal(size=a.shape) for a in arguments]
    dy = rng.normal(size=X.shape)

    def at(step):
        x, *rest = (a + step * move for a, move in zip(arguments, moves, strict=True))
        return np.vdot(dy, oracle.residual_block(x, rest[:3], rest[3:]))

    dx, of_first, of_second = oracle.residual_block_vjp(X, first, second, dy)
    slope = sum(map(np.vdot, [dx, *of_first, *of_second], moves))
    np.testing.assert_allclose((at(1e-6) - at(-1e-6)) / 2e-6, slope, rtol=1e-6)


def test_a_convolutions_bias_cancels():
    """So there is none: the output with one differs by rounding, its gradient would be 0."""
    z = oracle.conv2d(X, W, padding="reflect", bias=100 * SCALE)
    want = oracle.conv2d_instance_norm(X, W, SCALE, BIAS, padding="reflect")
    np.testing.assert_allclose(oracle.instance_norm(z, SCALE, BIAS), want, atol=1e-9)
    dy = RNG.normal(size=want.shape)
    dz = oracle.instance_norm_vjp(z, SCALE, BIAS, dy).x
    np.testing.assert_allclose(dz.sum((0, 1, 2)), 0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision(dtype):
    """The convolution's output and the norm's are rounded, and nothing on their way is."""
    x, w = (rounded(a, dtype) for a in (X, W))
    y = conv2d_instance_norm(x, w, SCALE, BIAS, padding="reflect")
    want = oracle.conv2d_instance_norm(x, w, SCALE, BIAS, padding="reflect")
    assert y.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    assert np.abs(np.asarray(y, np.float64) - want).max() <= 2 * eps * np.abs(want).max()


def test_each_has_its_implementations(monkeypatch):
    run = partial(conv2d_instance_norm, X, W)
    with pytest.raises(NotImplementedError, match="conv2d .* triton: needs a GPU"):
        run(conv_implementation="triton")
    with pytest.raises(NotImplementedError, match="instance_norm .* triton: needs a GPU"):
        run(norm_implementation="triton")
    assert run(conv_implementation=["triton", "xla"], norm_implementation="xla").shape


WRONG = {
    r"conv_implementation names \['cudnn'\]": {"conv_implementation": "cudnn"},
    r"norm_implementation names \['mosaic'\]": {"norm_implementation": "mosaic"},
    r"scale: expected shape \(4,\), one a channel, or \(2, 4\)": {"scale": np.ones(3)},
    r"residual: expected the output's shape and dtype, \(2, 4, 3, 4\) float64, got \(2, 6": {
        "residual": X
    },
    r"activation='gelu': expected None or 'relu'": {"activation": "gelu"},
    r"eps=-1: expected a number": {"eps": -1},
    r"w: expected filters of C / groups": {"w": W[:, :, :2]},
    r"upsample=3: expected 1 or 2": {"upsample": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    with pytest.raises(ValueError, match=message):
        conv2d_instance_norm(**{"x": X, "w": W} | WRONG[message])


WRONG_BLOCK = {
    r"first: expected \(filters, scale, bias\), got ndarray": {"first": W},
    r"second\[0\]: expected filters \[HF, WF, C, C\] of the 3 channels": {
        "second": (W, None, None)
    },
    r"padding=0: expected one that keeps the size of x": {"padding": 0},
}


@pytest.mark.parametrize("message", WRONG_BLOCK)
def test_what_is_wrong_of_a_block_says_so(message):
    first, second = branches()
    with pytest.raises(ValueError, match=message):
        residual_block(**{"x": X, "first": first, "second": second} | WRONG_BLOCK[message])
