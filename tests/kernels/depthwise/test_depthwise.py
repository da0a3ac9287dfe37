"""Depthwise convolution against the oracle, and what JAX's transformations must do with it."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sharded import over_the_batch

from pallas_kernels import oracle
from pallas_kernels.common.conformance import bounds, expected, worst
from pallas_kernels.depthwise import conformance, depthwise_conv2d, xla
from pallas_kernels.depthwise.api import OPERATOR
from pallas_kernels.depthwise.baseline_jax import depthwise_conv2d as plain
from pallas_kernels.depthwise.cases import CASES, HARD, PAIRWISE, Case

# Of each sort one: stride 1, a stride in 16 bits, an even kernel, a large one, dilation.
NARROW = (PAIRWISE[0], PAIRWISE[7], PAIRWISE[11], HARD[0], HARD[11])
# Their sorts have other rows: kernels of these sizes, padding in numbers, a stride for each axis.
SLOW = (*PAIRWISE[5:7], *PAIRWISE[8:11], *PAIRWISE[12:14], HARD[4], HARD[5], HARD[9])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def parameters(cases):
    """Cases by their names; `NARROW` always runs."""
    for case in cases:
        mark = pytest.mark.slow if case in SLOW else pytest.mark.wide
        yield pytest.param(case, id=case.name, marks=pytest.mark.core if case in NARROW else mark)


def results(function, case):
    """The output and the gradients of a case, as one program."""
    return jax.jit(function(case))(*jax.tree.map(jnp.asarray, case.drawn()))


def assert_oracle(case, implementation):
    """Output and gradients of a case are the oracle's, in dtype, shape and value."""
    ours = partial(conformance.computed, implementation=implementation)
    got, want = results(ours, case), expected(case)
    assert {name: a.dtype for name, a in got.items()} == dict.fromkeys(want, jnp.dtype(case.dtype))
    chex.assert_trees_all_equal_shapes(got, want)
    allowed = bounds(case, partial(results, conformance.baseline))
    errors = {name: worst(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {n: e for n, e in errors.items() if not e <= allowed[n]} == {}


@pytest.mark.parametrize("case", list(parameters(CASES)))
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, None)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu_every_implementation_computes_what_the_oracle_does(case):
    problem = conformance.problem(case)
    for name in map(str, OPERATOR.implementations):
        try:
            for direction in OPERATOR.directions:
                OPERATOR.pick(direction, name, "gpu", problem)
        except NotImplementedError:
            continue
        assert_oracle(case, name)


def test_the_table_has_every_kernel_with_and_without_a_stride():
    assert {(case.k, case.stride) for case in PAIRWISE} == {
        (k, stride) for k in range(3, 10) for stride in (1, 2)
    }


@pytest.mark.parametrize("k", [1, 4, 5])
def test_the_oracle_is_the_base_convolution_of_wtconv(k):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(k, k, 1, 3))
    params = {"base_kernel": kernel, "base_scale": np.ones(3), "base_bias": rng.normal(size=3)}
    dy = rng.normal(size=x.shape)
    want = oracle.wtconv(x, params, 2, stride=2)
    # Padded as PyTorch pads, a stride samples the pixels of stride 1.
    sides = ((k - 1) // 2, k // 2)
    got = oracle.depthwise_conv2d(
        *(x, kernel, params["base_bias"]), stride=2, padding=(sides, sides)
    )
    np.testing.assert_allclose(got, want, atol=1e-12)
    dx, gradients = oracle.wtconv_vjp(x, params, dy, 2)
    found = oracle.depthwise_conv2d_vjp(x, kernel, dy)
    names = "base_kernel", "base_bias"
    chex.assert_trees_all_close(found, (dx, *(gradients[n] for n in names)), atol=1e-12)


@pytest.mark.wide
@pytest.mark.parametrize("case", [HARD[8], HARD[11]], ids=lambda case: case.name)
def test_the_oracle_is_jaxs_convolution(case):
    case = case._replace(dtype="float64")
    got, want = results(conformance.baseline, case), expected(case)
    chex.assert_trees_all_close(got, want, atol=1e-12)


STRIDED = Case(1, 5, 4, 2, 3, "float64", stride=2)
SAME = Case(1, 4, 3, 2, 2, "float64")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(STRIDED, marks=pytest.mark.wide),
        pytest.param(SAME, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_derivatives_of_every_order_are_those_of_plain_jax(case, monkeypatch):
    """Behind a wall that JAX cannot differentiate through, as a kernel is; mapped, too."""
    monkeypatch.setattr(xla, "DIFFERENTIABLE", False)
    x, kernel, bias, _ = jax.tree.map(jnp.asarray, case.drawn())

    def derivatives(function):
        def curved(*weights):
            return jnp.sin(jax.remat(partial(function, **case.arguments))(*weights)).sum()

        gradient = jax.grad(curved, (0, 1, 2))
        way = x + 1, kernel - 1, bias * 2
        third = jax.grad(lambda *at: jnp.vdot(jax.jvp(gradient, at, way)[1][1], kernel))
        each = jax.vmap(gradient, (0, None, None))(jnp.stack([x, -x]), kernel, bias)
        kernels = jax.vmap(gradient, (None, 0, None))(x, jnp.stack([kernel, -kernel]), bias)
        return third(x, kernel, bias), each, kernels

    got, want = (jax.jit(partial(derivatives, one))() for one in (depthwise_conv2d, plain))
    chex.assert_trees_all_close(got, want, atol=1e-11)


def test_saved_are_x_and_the_kernel():
    x, kernel, bias, _ = jax.tree.map(jnp.asarray, STRIDED._replace(dtype="bfloat16").drawn())
    run = partial(depthwise_conv2d, stride=2)
    saved = jax.eval_shape(lambda *given: jax.vjp(run, *given)[1], x, kernel, bias)
    # Beside them the bias, and the one that multiplies it.
    found = [(a.shape, a.dtype) for a in jax.tree.leaves(saved) if a.ndim > 1]
    assert sorted(found, key=str) == sorted([(a.shape, a.dtype) for a in (x, kernel)], key=str)


@pytest.mark.wide
@pytest.mark.parametrize("case", [STRIDED, SAME], ids=str)
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sharded_over_the_batch(case, check_vma):
    case = case._replace(n=2, dtype="float32")
    run = partial(depthwise_conv2d, **case.arguments)
    local = over_the_batch(run, (True, False, False), check_vma)

    def found(function):
        *weights, dy = jax.tree.map(jnp.asarray, case.drawn())
        return jax.jit(lambda *at: jax.vjp(function, *at)[1](dy))(*weights)

    chex.assert_trees_all_close(found(local), found(run), atol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_images_of_any_size_are_exported(stride):
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, h, w, 3"), jnp.float32)
    kernel = np.ones((3, 3, 1, 3), np.float32)
    run = partial(depthwise_conv2d, kernel=kernel, stride=stride)
    gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sin(run(x)).sum()))
    ones = np.ones((2, 5, 6, 3), np.float32)
    got = jax.export.export(gradient)(x).call(ones)
    chex.assert_trees_all_close(got, gradient(ones), rtol=1e-5)


def test_batch_dimensions():
    x, kernel = jnp.arange(2.0 * 3 * 4 * 5 * 2).reshape(2, 3, 4, 5, 2), jnp.ones((3, 3, 1, 2))
    shapes = [jax.eval_shape(depthwise_conv2d, a, kernel).shape for a in (x, x[0, 0])]
    assert shapes == [(2, 3, 4, 5, 2), (4, 5, 2)]


WRONG = {
    "x: expected [*batch, H, W, C] of at least one": {"x": jnp.ones((4, 3))},
    "kernel: expected [KH, KW, 1, C] of at least one tap for x with C = 3": {
        "kernel": jnp.ones((3, 3, 3, 3))
    },
    "bias: expected shape (3,), one a channel, got (1,)": {"bias": jnp.ones(1)},
    "stride=0: expected an integer >= 1": {"stride": 0},
    "stride=(1, 2, 1): expected": {"stride": (1, 2, 1)},
    "padding='same': the names are 'SAME'": {"padding": "same"},
    "dilation=1.5: expected": {"dilation": 1.5},
    "kernel: filters of 3x3 taps with dilation (9, 9) do not fit": {
        "dilation": 9,
        "padding": "VALID",
    },
    "precision='best': expected": {"precision": "best"},
    "names ['cudnn'], but depthwise has the implementations": {"implementation": "cudnn"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    given = {"x": jnp.ones((2, 5, 4, 3)), "kernel": jnp.ones((3, 3, 1, 3))} | WRONG[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        depthwise_conv2d(**given)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(1, 8, 8, 4, 3, stride=2), "strides of 2x2, 1 alone"),
        (Case(1, 8, 8, 4, 3, dilation=2), "dilations of 2x2, 1 alone"),
        (Case(1, 8, 8, 4, 3, width=5), "kernels of 3x5, square ones alone"),
        (Case(1, 8, 8, 4, 3, padding="VALID"), "padding by ((0, 0), (0, 0)), zeros that keep"),
        (Case(1, 8, 8, 4, 3, padding="reflect"), "padding by ((1, 1), (1, 1)), zeros that keep"),
        (Case(1, 9, 9, 4, 11), "kernels of 11, up to 9"),
        (Case(1, 8, 8, 4, 3, "float16"), "float16"),
    ],
)
def test_what_a_tpus_kernels_refuse_is_left_to_plain_jax(case, reason):
    problem = conformance.problem(case)
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        OPERATOR.module("mosaic_tpu").check("fwd", problem)
    OPERATOR.module("xla").check("fwd", problem)
