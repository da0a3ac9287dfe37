"""Compiled WTConv against the oracle, and what JAX's transformations must do with it."""

import subprocess
import sys
from functools import partial
from itertools import combinations, product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processes import with_devices
from helpers.wtconv import WTCONV, arrays, assert_oracle, results, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.ad_checkpoint import print_saved_residuals
from jax.flatten_util import ravel_pytree

from pallas_kernels import oracle
from pallas_kernels.common.conformance import LOW, expected, worst
from pallas_kernels.dispatch import Operator
from pallas_kernels.wtconv import Implementation, wtconv1d, wtconv2d
from pallas_kernels.wtconv.cases import HARD, PAIRWISE, Case, inputs

OPTIMISED = pytest.mark.usefixtures("optimised")

SMALL = Case((7, 6), 2, 3, "float64", channels=2)
# Every third row of the pairs has each value of each column; the others widen that, half of them
# by hand.
NARROW, BY_HAND = PAIRWISE[::3], PAIRWISE[2::3]


# Hard cases whose programs take longest.
LONG = {
    "b2-14x14-c3-l3-k2-bfloat16",
    "b2-7x7-c3-l2-k5-bfloat16",
    "b2-8x11-c3-l3-k2-float32-bior2.2",
    "b2-2x3-c3-l5-k5-float16",
    "b2-12x9-c3-l2-k5-float64-db3",
}
# Compiled as a user's are, too: rounding, three axes with long filters, a kernel over the image.
AS_A_USER = ("b2-10x7-c3-l1-k2-bfloat16-s3",)
AS_A_USER_WIDE = ("b1-5x4x6-c2-l1-k3-float32-sym4", "b2-28x28-c3-l4-k5-float32")
# What others have too, but for their numbers of taps and levels.
NUMBERS = {
    "b2-17x6-c3-l3-k5-float32-nobias",
    "b2-14x14-c3-l2-k5-float32",
}


def parameters(cases):
    """Cases by their names, those in float16 not core."""
    for case in cases:
        core = [pytest.mark.core] * (case.dtype != "float16")
        wide = case in PAIRWISE and case not in NARROW or case.name in LONG | NUMBERS
        # Compiled as a user's they are computed below.
        slow = case.name in (*AS_A_USER, *AS_A_USER_WIDE) or case in BY_HAND
        marks = [pytest.mark.slow] * slow + [pytest.mark.wide] * (wide and not slow)
        yield pytest.param(case, id=case.name, marks=core + marks)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("case", list(parameters(PAIRWISE)))
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case)


@pytest.mark.parametrize("case", list(parameters(HARD)))
def test_hard_cases_are_the_oracles(case):
    assert_oracle(case)


def optimised(case):
    """A hard case for the compiler that optimises, of which a few say what all would."""
    marks = [] if case.name in AS_A_USER else [pytest.mark.slow]
    marks = [pytest.mark.wide] if case.name in AS_A_USER_WIDE else marks
    return pytest.param(case, id=case.name, marks=marks)


@OPTIMISED
@pytest.mark.core
@pytest.mark.parametrize("case", list(map(optimised, HARD)))
def test_optimised_hard_cases_are_the_oracles(case):
    assert_oracle(case)


def test_the_table_covers_every_pair():
    kinds = {
        1: {(16,): 0, (13,): 1, (28,): 2, (1,): 3, (5,): 4},
        2: {(8, 8): 0, (7, 7): 1, (28, 28): 2, (1, 1): 3, (5, 18): 4},
        3: {(4, 4, 4): 0, (5, 5, 5): 1, (6, 6, 6): 2, (1, 1, 1): 3, (4, 7, 2): 4},
    }
    values = [(1, 2, 3), range(5), range(7), (1, 2, 3, 5, 7), ("float32", *LOW, "float64")]
    rows = [(c.ndim, kinds[c.ndim][c.spatial], c.levels, c.kernel_size, c.dtype) for c in PAIRWISE]
    narrow = [rows[PAIRWISE.index(case)] for case in NARROW]
    assert [set(column) for column in zip(*narrow, strict=True)] == list(map(set, values))
    for i, j in combinations(range(len(values)), 2):
        missing = set(product(values[i], values[j])) - {(row[i], row[j]) for row in rows}
        assert not missing


@pytest.mark.wide
@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 11), min_size=1, max_size=3),
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_drawn_cases_are_the_oracles(spatial, levels, kernel_size, stride, channels):
    spatial = tuple(min(size, 5) for size in spatial) if len(spatial) == 3 else tuple(spatial)
    case = Case(spatial, levels, kernel_size, "float64", (1,), channels, stride)
    x, params, _ = arrays(case)
    got = WTCONV[case.ndim](x, params, stride=stride)
    want = oracle.wtconv(*inputs(case)[:2], case.ndim, stride=stride)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


@pytest.mark.core
@pytest.mark.parametrize(
    "case",
    [SMALL, pytest.param(Case((9,), 2, 2, "float64", stride=2), marks=pytest.mark.wide)],
    ids=str,
)
def test_gradients_are_finite_differences(case):
    x, params, dy = arrays(case)
    loss = jax.jit(lambda x, p: jnp.vdot(WTCONV[case.ndim](x, p, stride=case.stride), dy))
    grads = jax.grad(loss, (0, 1))(x, params)
    rng = np.random.default_rng(0)
    for _ in range(3):
        way = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (x, params))
        step = jax.tree.map(lambda a: 1e-4 * a, way)
        ahead, back = (
            loss(*jax.tree.map(lambda a, d, s=sign: a + s * d, (x, params), step))
            for sign in (1, -1)
        )
        slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, way)))
        np.testing.assert_allclose((ahead - back) / 2e-4, slope, rtol=1e-6)


def loss(x, params, **keys):
    """Something curved, so that second derivatives are not zero."""
    return jnp.sin(wtconv2d(x, params, **keys)).sum()


@pytest.mark.core
@pytest.mark.wide
def test_hessian_and_jvp_of_grad_and_jacrev_of_grad_agree():
    case = Case((3, 2), 1, 2, "float64", (1,), 1)
    x, params, _ = arrays(case)
    flat, unflatten = ravel_pytree((x, params))
    curved = lambda v: loss(*unflatten(v))  # noqa: E731
    way = jnp.cos(jnp.arange(flat.size, dtype=flat.dtype))
    gradient = jax.grad(curved)

    @jax.jit
    def derivatives(v):
        both = jax.hessian(curved)(v), jax.jacrev(gradient)(v)
        return gradient(v), both, jax.jvp(gradient, (v,), (way,))[1]

    _, (hessian, reverse), tangent = derivatives(flat)
    np.testing.assert_allclose(hessian, reverse, atol=1e-12)
    np.testing.assert_allclose(hessian @ way, tangent, atol=1e-10)
    numeric = (derivatives(flat + 1e-5 * way)[0] - derivatives(flat - 1e-5 * way)[0]) / 2e-5
    np.testing.assert_allclose(tangent, numeric, atol=1e-7)


@pytest.fixture(params=[False, True], ids=["", "bias"])
def opaque(request, monkeypatch):
    """`xla` behind a wall that JAX cannot differentiate through, as a kernel is."""
    from pallas_kernels.wtconv import xla

    class Kernel:
        DIFFERENTIABLE = False
        BIAS_GRADIENT = request.param
        unavailable, check = xla.unavailable, xla.check

        @staticmethod
        def forward(x, taps, bias, **keys):
            return _walled(partial(xla.forward, **keys), x, taps, bias)

        @staticmethod
        def weight_grad(x, dy, *, kernel_shapes, **keys):
            taps = tuple(shape for shape in kernel_shapes if len(shape) > 1)
            biased = len(kernel_shapes) > len(taps)
            assert request.param or not biased

            def gradients(x, dy):
                bias = (dy.sum((0, 1, 2)),) if biased else ()
                return *xla.weight_grad(x, dy, kernel_shapes=taps, **keys), *bias

            return _walled(gradients, x, dy)

    with monkeypatch.context() as patch:
        patch.setattr(Operator, "module", lambda self, name: Kernel)
        yield patch


def _walled(function, *args):
    @jax.custom_jvp
    def wall(*args):
        return function(*args)

    @wall.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError("a kernel has no derivative of its own")

    return wall(*args)


def assert_forward_mode(dtype, allowed):
    """Tangents, linearised and by `jacfwd`, are the oracle's within `allowed` times epsilon."""
    case = Case((3, 5), 1, 2, dtype, (1,), 2, stride=2)
    x, params, _ = arrays(case)
    place = x, params
    way = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=dtype)).reshape(a.shape), place)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (place, way))
    run = partial(wtconv2d, stride=2)

    def along(call, place, way):
        return lambda t: call(*jax.tree.map(lambda a, d: a + t * d, place, way))

    def tangents(place, way):
        _, linear = jax.linearize(run, *place)
        return linear(*way), jax.jacfwd(along(run, place, way))(jnp.zeros((), dtype))

    at = along(lambda x, params: oracle.wtconv(x, params, 2, stride=2), *exact)
    # The oracle is cubic in t, for which differences of two steps are exact.
    want = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / 12
    for got in jax.jit(tangents)(place, way):
        assert got.dtype == dtype
        error = np.abs(np.asarray(got, np.float64) - want).max()
        assert error <= allowed * jnp.finfo(dtype).eps * np.abs(want).max()


@pytest.mark.core
@pytest.mark.parametrize(("dtype", "allowed"), [("float64", 100), ("bfloat16", 2)])
def test_forward_mode_is_the_oracles(dtype, allowed):
    assert_forward_mode(dtype, allowed)


def test_forward_mode_of_kernels_that_have_no_derivative(opaque):
    assert_forward_mode("float64", 100)


def test_jacrev_of_grad_through_kernels_that_have_no_derivative(opaque):
    case = Case((3, 5), 1, 2, "float64", (1,), 2, stride=2)
    x, params, _ = arrays(case)

    def twice(x, params):
        gradients = jax.grad(loss, (0, 1))(x, params, stride=2)
        return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(gradients))

    # Each a function of its own, or the second would be the first's program.
    got, want = (partial(twice) for _ in range(2))
    got = jax.jit(jax.grad(got, (0, 1)))(x, params)
    opaque.undo()
    want = jax.jit(jax.grad(want, (0, 1)))(x, params)
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=1e-10)


@pytest.mark.core
def test_residuals_are_x_and_the_taps(capsys):
    case = Case((16, 16), 2, 3, "float32", (4,), 8)
    x, params, _ = arrays(case)
    print_saved_residuals(lambda x, p: wtconv2d(x, p).sum(), x, params)
    sizes = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    # Parameters are saved for the product with the scales, x for the correlation: no coefficients.
    big = [s for s in sizes if s.startswith("f32[4,")]
    assert set(big) == {"f32[4,16,16,8]"}


@pytest.mark.wide
@OPTIMISED
@pytest.mark.core
def test_gradients_are_bitwise_reproducible():
    case = Case((17, 14), 2, 3, "float32", (8,), 16)
    first = jax.tree.leaves(value_and_grads(wtconv2d, case))
    again = jax.tree.leaves(value_and_grads(wtconv2d, case))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("case", "part", "cut"),
    [
        pytest.param(
            Case((9, 8), 2, 3, "float64", (6,), 4),
            2 * 9 * 8 * 4 * 8,
            (3, 1, False),
            marks=pytest.mark.wide,
        ),
        pytest.param(
            Case((9, 8), 2, 3, "float64", (2,), 4),
            9 * 8 * 2 * 8,
            (2, 2, False),
            marks=pytest.mark.wide,
        ),
        pytest.param(
            Case((21, 5), 2, 4, "float64", (2,), 3), 1, (2, 1, True), marks=pytest.mark.wide
        ),
        (Case((9,), 0, 3, "float64", (2,), 4), 1, (2, 2, True)),
    ],
    ids=["images", "channels", "strips", "strips of channels, no levels"],
)
def test_in_parts_as_a_whole(monkeypatch, case, part, cut):
    from pallas_kernels.wtconv import xla, xla_strips

    function = WTCONV[case.ndim]
    whole = value_and_grads(function, case)
    monkeypatch.setattr(xla, "_PART_BYTES", part)
    monkeypatch.setattr(xla, "_MIN_CHANNELS", 2)
    monkeypatch.setattr(xla_strips, "_STRIP_BYTES", 8 * 8 * 5)
    jax.clear_caches()
    assert xla._cut((*case.batch, *case.spatial, case.channels), "float64", "haar") == cut
    parts = value_and_grads(function, case)
    jax.clear_caches()
    chex.assert_trees_all_close(parts, whole, rtol=1e-7, atol=1e-11)


@pytest.mark.core
@pytest.mark.parametrize(
    "case",
    # More taps than one loop adds, fewer of them than the kernel has, even ones.
    [Case((15, 9), 1, 13), Case((3, 4), 1, 39), Case((40,), 0, 36)],
    ids=lambda c: c.name,
)
def test_large_kernels(case):
    case = case._replace(dtype="float64", channels=1)
    assert_oracle(case)


@pytest.mark.core
@pytest.mark.parametrize(
    "case", [Case((14, 14), 2, 5), Case((13,), 3, 2), Case((5, 4, 6), 1, 3)], ids=lambda c: c.name
)
def test_the_form_for_accelerators(monkeypatch, case):
    """Grouped convolutions, which `xla` takes where the device is no CPU."""
    from pallas_kernels.wtconv import xla

    monkeypatch.setattr(xla, "on_cpu", lambda: False)
    jax.clear_caches()
    got, want = results(WTCONV[case.ndim], case), expected(case)
    jax.clear_caches()
    assert max(worst(got[name], want[name]) for name in want) <= 1e-5


@pytest.mark.core
def test_vmap_over_x_and_over_parameters():
    case = Case((5, 4), 1, 3, "float64", (3, 2), 2)
    x, params, _ = arrays(case)
    one = jax.jit(wtconv2d)
    mapped = jax.jit(jax.vmap(wtconv2d, (0, None)))(x, params)
    np.testing.assert_allclose(mapped, one(x, params), atol=1e-12)
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    got = jax.jit(jax.vmap(wtconv2d))(x, several)
    for i in range(3):
        alone = jax.tree.map(lambda p, i=i: p[i], several)
        np.testing.assert_allclose(got[i], one(x[i], alone), atol=1e-12)
    gradient = jax.grad(lambda p, x: loss(x, p))
    per_example = jax.jit(jax.vmap(gradient, (None, 0)))(params, x)
    total = jax.jit(gradient)(params, x)
    summed = jax.tree.map(lambda g: g.sum(0), per_example)
    chex.assert_trees_all_close(summed, total, rtol=1e-7, atol=1e-10)


@pytest.mark.core
def test_checkpoint_gives_the_same_gradients():
    x, params, _ = arrays(SMALL)
    want = jax.jit(jax.grad(loss, (0, 1)))(x, params)
    got = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(x, params)
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=1e-12)


@pytest.mark.wide
@pytest.mark.core
def test_export_with_a_symbolic_batch():
    x, params, _ = arrays(SMALL)

    @jax.jit
    def gradient(x, params):
        return wtconv2d(x, params), jax.grad(loss, (0, 1))(x, params)

    shape = export.symbolic_shape("b, 7, 6, 2")
    sizes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    exported = export.export(gradient)(jax.ShapeDtypeStruct(shape, x.dtype), sizes)
    loaded = export.deserialize(exported.serialize())
    for n in (1, 3):
        batch = jnp.concatenate([x] * n)[:n]
        want = gradient(batch, params)
        chex.assert_trees_all_close(loaded.call(batch, params), want, rtol=1e-7, atol=1e-11)


@pytest.mark.core
@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        ("b, h, w, 2", 2),
        pytest.param("1, 2*h, 2*w, 2", 1, marks=pytest.mark.wide),
        pytest.param("b, h, w, 2", 3, marks=pytest.mark.wide),
        *(pytest.param("b, h, w, 2", levels, marks=pytest.mark.slow) for levels in (0, 1)),
        *(pytest.param("1, 2*h, 2*w, 2", levels, marks=pytest.mark.slow) for levels in (0, 2, 3)),
    ],
)
def test_export_with_symbolic_sizes(shape, levels):
    def exported(run):
        def call(x, params, dy):
            image = jax.ShapeDtypeStruct(export.symbolic_shape(shape), x.dtype)
            weights = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
            return export.export(jax.jit(run))(image, weights, image).call(x, params, dy)

        return call

    case = Case((5, 7), levels, 3, "float64", (2,), 2)
    if shape.startswith("1"):
        case = case._replace(spatial=(6, 10), batch=(1,))
    got, want = results(wtconv2d, case, exported), expected(case)
    assert max(worst(got[name], want[name]) for name in want) <= 1e-12


def test_a_stride_of_a_symbolic_size():
    x, params, _ = arrays(Case((7,), 1, 3, "float64", (2,), 2))
    image = jax.ShapeDtypeStruct(export.symbolic_shape("2, n, 2"), x.dtype)
    run = jax.jit(partial(wtconv1d, params=params, stride=3))
    want = oracle.wtconv(x, params, 1, stride=3)
    np.testing.assert_allclose(export.export(run)(image).call(x), want, rtol=0, atol=1e-12)


def _lowered_gradients(size, levels):
    """The program of the gradients of a square image, before XLA has it."""
    x, params, _ = arrays(Case((size, size), levels, 5, "float32", channels=2))
    return jax.jit(jax.grad(lambda *both: wtconv2d(*both).sum(), (0, 1))).lower(x, params).as_text()


@pytest.mark.core
def test_levels_of_a_single_pixel_cost_no_borders_and_no_loops():
    border = 'inlineable = "false"'
    # The maps of the levels are 2x2, and pixels from then on.
    few, many = (_lowered_gradients(4, levels).count(border) for levels in (3, 5))
    assert few == many
    assert few < _lowered_gradients(16, 3).count(border)
    assert "stablehlo.while" not in _lowered_gradients(1, 3)


@pytest.mark.core
def test_one_dtype_comes_out_whatever_the_parameters_are():
    case = Case((6, 6), 1, 3)
    x, params, _ = arrays(case)
    half = x.astype("bfloat16")
    y, pullback = jax.vjp(wtconv2d, half, params)
    dx, dparams = pullback(y)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves(dparams)} == {jnp.dtype("float32")}
    want = oracle.wtconv(np.asarray(half, np.float64), inputs(case)[1], 2)
    largest = np.abs(want).max()
    assert np.abs(np.asarray(y, np.float64) - want).max() <= jnp.finfo("bfloat16").eps / 2 * largest


@OPTIMISED
@pytest.mark.core
@pytest.mark.wide
def test_peak_memory_of_a_large_layer():
    """Six inputs of temporaries are allowed for (8, 112, 112, 64) at three levels."""
    shape = (8, 112, 112, 64)
    sizes = {"base_kernel": (5, 5, 1, 64), "base_scale": (64,), "base_bias": (64,)}
    for i in range(3):
        sizes |= {f"wavelet_kernel_{i}": (5, 5, 4, 64), f"wavelet_scale_{i}": (4, 64)}
    x, *params = (jax.ShapeDtypeStruct(s, "float32") for s in (shape, *sizes.values()))
    params = dict(zip(sizes, params, strict=True))

    def both(x, params, dy):
        y, pullback = jax.vjp(wtconv2d, x, params)
        return y, pullback(dy)

    memory = jax.jit(both).lower(x, params, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 6 * 4 * np.prod(shape)


BAD = {
    "x rank": (dict(x=np.ones((6, 3), "f4")), "x: expected an array .*H, W, C\\].*\\(6, 3\\)"),
    "x integer": (dict(x=np.ones((6, 6, 3), int)), "x: .*floating.*int"),
    "x empty": (dict(x=np.ones((0, 6, 3), "f4")), "x: .*at least one"),
    "channels": (
        dict(x=np.ones((6, 6, 4), "f4")),
        "x with 4 channels.*'base_kernel': expected shape",
    ),
    "stride": (dict(stride=0), "stride=0"),
    "wavelet": (dict(wavelet="no"), "wavelet='no' is not a discrete wavelet"),
    "continuous": (dict(wavelet="morl"), "wavelet='morl' is not a discrete wavelet"),
    "implementation": (dict(implementation="no"), "\\['no'\\].*'xla'\\]"),
    "precision": (dict(precision="no"), "precision='no'"),
    "missing": (dict(drop="base_kernel"), "missing \\['base_kernel'\\]"),
    "gap": (dict(drop="wavelet_kernel_0"), "unexpected 'wavelet_kernel_1'.*without a gap"),
    "no scale": (dict(drop="wavelet_scale_1"), "missing 'wavelet_scale_1'"),
    "surplus": (dict(add={"kernel": np.ones(3, "f4")}), "unexpected 'kernel'"),
    "misshapen": (
        dict(add={"base_bias": np.ones(2, "f4")}),
        "'base_bias': expected shape \\(3,\\)",
    ),
    "kernel 0": (dict(add={"base_kernel": np.ones((0, 0, 1, 3), "f4")}), "'base_kernel'.*k >= 1"),
    "oblong": (
        dict(add={"base_kernel": np.ones((3, 5, 1, 3), "f4")}),
        "'base_kernel': expected shape",
    ),
    "integers": (
        dict(add={"base_scale": np.ones(3, int)}),
        "params\\['base_scale'\\]: expected a floating.*int",
    ),
    "x none": (dict(x=None), "x: expected an array, got NoneType"),
    "x float8": (dict(x=np.ones((6, 6, 3), "float8_e5m2")), "x: .*floating.*float8_e5m2"),
    "a string": (dict(add={"base_bias": "no"}), "params\\['base_bias'\\]: expected an array"),
    "stride large": (dict(stride=10**30), "stride=10+: expected an integer <= 2147483647"),
    "stride bool": (dict(stride=True), "stride=True: expected an integer"),
    "stride float": (dict(stride=2.0), "stride=2.0: expected an integer"),
}


@pytest.mark.core
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad):
    changes, message = BAD[bad]
    x, params, _ = arrays(Case((6, 6), 2, 3))
    params.pop(changes.get("drop"), None)
    params |= changes.get("add", {})
    keys = {name: changes[name] for name in changes if name not in ("x", "drop", "add")}
    with pytest.raises(ValueError, match=message):
        wtconv2d(changes.get("x", x), params, **keys)


@pytest.mark.core
def test_parameters_that_are_no_dict_of_arrays():
    x, params, _ = arrays(Case((6, 6), 2, 3))
    for bad in (None, list(params.values())):
        with pytest.raises(ValueError, match="params: expected a dict of arrays by name, got"):
            wtconv2d(x, bad)
    with pytest.raises(ValueError, match='hand on what is inside, variables\\["params"\\]'):
        wtconv2d(x, {"params": params})


@pytest.mark.core
def test_a_stride_may_be_a_numpy_integer():
    x, params, _ = arrays(SMALL)
    assert np.array_equal(wtconv2d(x, params, stride=np.int64(2)), wtconv2d(x, params, stride=2))


@pytest.mark.core
def test_wavelets_are_named_in_any_case():
    x, params, _ = arrays(SMALL)
    for name, other in (("haar", "Haar"), ("db2", "DB2")):
        # Equal, and the same program: implementations see the name in lower case.
        np.testing.assert_array_equal(
            wtconv2d(x, params, wavelet=other), wtconv2d(x, params, wavelet=name)
        )


def test_a_stride_longer_than_the_signal_is_an_error():
    x, params, _ = arrays(Case((2,), 0, 1))
    with pytest.raises(ValueError, match="stride=3 averages groups of 3"):
        wtconv1d(x, params, stride=3)


@pytest.mark.core
def test_implementations_by_name_member_sequence_and_environment(monkeypatch):
    x, params, _ = arrays(SMALL)
    want = wtconv2d(x, params)
    # Of a sequence the fastest form is taken, whose sums may run in another order.
    same = partial(np.testing.assert_allclose, desired=want, rtol=0, atol=1e-13)
    for choice in ("xla", Implementation.XLA, ["xla", Implementation.XLA]):
        same(wtconv2d(x, params, implementation=choice))
    monkeypatch.setenv("FLASH_WTCONV_WTCONV_BWD", "nothing")
    with pytest.raises(ValueError, match="FLASH_WTCONV_WTCONV_BWD"):
        wtconv2d(x, params)
    monkeypatch.setenv("FLASH_WTCONV_WTCONV_BWD", "xla")
    monkeypatch.setenv("FLASH_WTCONV_WTCONV_FWD", "[mosaic_tpu, XLA]")
    same(wtconv2d(x, params))
    monkeypatch.setenv("FLASH_WTCONV_WTCONV_FWD", "mosaic_tpu")
    with pytest.raises(NotImplementedError, match="mosaic_tpu: .*TPU"):
        wtconv2d(x, params)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels.wtconv import wtconv2d, xla
from pallas_kernels.wtconv.cases import Case, inputs

xla._PART_BYTES = 1  # Where there is one device, a batch this large is cut.
case = Case((7, 6), 2, 3, batch=(4,), channels=4)
x, params, dy = jax.tree.map(lambda a: jnp.asarray(a, "float32"), inputs(case))

def both(function, x, params, dy):
    y, pullback = jax.vjp(function, x, params)
    return y, pullback(dy)

want = both(wtconv2d, x, params, dy)
spec = P("n", None, None, "c")
specs = {name: P(*[None] * (p.ndim - 1), "c") for name, p in params.items()}
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("n", "c"), axis_types=(kind, kind))
    place = lambda tree, specs: jax.tree.map(
        lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs
    )
    local = jax.shard_map(
        wtconv2d, mesh=mesh, in_specs=(spec, specs), out_specs=spec, check_vma=False
    )
    for function in [local] + [wtconv2d] * (kind is AxisType.Auto):
        run = jax.jit(lambda *arrays, function=function: both(function, *arrays))
        arrays = place(x, spec), place(params, specs), place(dy, spec)
        program = run.lower(*arrays).compile()
        # Images and channels do not mix: only sums of weight gradients cross devices.
        assert not any(op in program.as_text() for op in ("all-gather(", "all-to-all("))
        got = program(*arrays)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4), got, want)
"""


@pytest.mark.wide
def test_sharded_over_batch_and_channels_nothing_is_gathered():
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=with_devices(4))
