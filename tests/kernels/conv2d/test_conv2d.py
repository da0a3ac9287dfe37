"""The dense convolution against the oracle, the oracle against JAX's, and what is refused."""

import re
from contextlib import nullcontext
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.conv2d import (
    MOMENTS,
    WHOLE_ROWS,
    arrays,
    assert_close,
    assert_moments,
    assert_oracle,
    assert_sharded,
    assert_whole_rows,
    expected,
    ours,
    plain,
    value_and_grads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_wtconv_jax import tuning
from pallas_kernels import oracle
from pallas_kernels.conv2d import (
    TileConfig,
    api,
    conv2d,
    get_igemm_conv2d,
    moments,
    upsampling,
    vjp,
    whole_rows,
    xla,
)
from pallas_kernels.conv2d.cases import HARD, TABLE, UPSAMPLED, Case, inputs
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.dispatch import Operator


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "case",
    # As on a GPU: what follows is more of the same sizes.
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.wide] * (i >= 22))
        for i, case in enumerate(TABLE)
    ],
)
def test_the_table(case):
    x, w, _, _ = arrays(case)
    got = conv2d(x, w, out_dtype="float32", **case.arguments)
    assert got.dtype == jnp.float32
    want = oracle.conv2d(x, w, **case.arguments)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "case", [c for c in HARD if c.n] + list(TABLE[18:22]), ids=lambda case: case.name
)
def test_the_oracle_is_jaxs_convolution(case):
    case = case._replace(dtype="float64", out_dtype=None)
    x, w, bias, _ = arrays(case)
    want = oracle.conv2d(*inputs(case)[:2], bias=bias, **case.arguments)
    np.testing.assert_allclose(jax.jit(plain(case))(x, w, bias), want, rtol=0, atol=1e-12)
    # Any number of batch dimensions, none included.
    for batch in (x[0], x[:, None]):
        again = oracle.conv2d(batch, w, bias=bias, **case.arguments)
        # NumPy's products sum in an order of the batch's.
        again = again.reshape(-1, *want.shape[1:])
        np.testing.assert_allclose(again[:1], want[:1], rtol=0, atol=1e-12)


@pytest.mark.core
@pytest.mark.parametrize(
    "case",
    [
        # Those of low precision are computed below, compiled as a user's are.
        *(
            pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (i in (7, 8)))
            for i, case in enumerate(HARD)
        ),
        *(pytest.param(case, id=case.name, marks=pytest.mark.wide) for case in UPSAMPLED),
    ],
)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case)


@pytest.mark.core
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if i == 8 else [pytest.mark.slow])
        for i, case in enumerate(HARD)
    ],
)
def test_optimised_hard_cases_are_the_oracles(case):
    """Compiled as a user's programs are; one of low precision at `make test`."""
    assert_oracle(case)


@st.composite
def drawn(draw):
    """A rectangular case of which something comes out."""
    number = lambda most: draw(st.integers(1, most))  # noqa: E731
    groups, hf, wf = number(3), number(4), number(4)
    pads = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(2))
    dilation = number(2), number(2)
    least = [
        max(1, d * (k - 1) + 1 - sum(pad))
        for d, k, pad in zip(dilation, (hf, wf), pads, strict=True)
    ]
    # Large enough to be mirrored, too.
    padding = draw(st.sampled_from([pads, ("reflect", pads), "SAME", "reflect", "VALID"]))
    extra = [0, 0] if padding == pads else [6, 6]
    h, w = (n + more + draw(st.integers(0, 5)) for n, more in zip(least, extra, strict=True))
    return Case(
        *(number(2), h, w, groups * number(2), hf, wf, groups * number(3)),
        stride=(number(3), number(3)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "gelu"])),
        layout=draw(st.sampled_from(["nhwc_hwcf", "nchw_fchw"])),
        dtype="float64",
        upsample=draw(st.integers(1, 2)),
    )


@pytest.mark.wide
@settings(max_examples=10)
@given(drawn())
def test_drawn_cases_are_the_oracles(case):
    got, want = value_and_grads(ours(case), case), expected(case)
    assert_close(case, got, want)


def loss(call):
    return lambda *args: jnp.sin(call(*args)).sum()


def slopes(call):
    return jax.grad(loss(call), (0, 1, 2))


TRANSFORMS = {
    "reverse over reverse": lambda f: jax.grad(
        lambda *args: sum(jnp.sum(g**2) for g in slopes(f)(*args)), (0, 1, 2)
    ),
    "forward over reverse": lambda f: lambda *args: jax.jvp(slopes(f), args, args),
    "vmap of gradients": lambda f: (
        lambda x, w, b: jax.vmap(jax.grad(loss(f), 1), (0, None, None))(x[:, None], w, b)
    ),
    "vmap of filters": lambda f: (
        lambda x, w, b: jax.vmap(f, (0, 0, None))(x[:, None], jnp.stack([w, 2 * w]), b)
    ),
    # Parts of the first two.
    "gradients": slopes,
    "forward": lambda f: lambda *args: jax.jvp(loss(f), args, args),
    "remat": lambda f: slopes(jax.remat(f)),
}


@pytest.mark.core
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.wide] * (name in ("gradients", "forward", "remat")))
        for name in TRANSFORMS
    ],
)
def test_transformations(name):
    assert_transformed(
        name, Case(2, 7, 6, 4, 3, 2, 6, 2, "reflect", 1, 2, True, "gelu", dtype="float64")
    )


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("reverse over reverse", "reflect"),
        pytest.param("reverse over reverse", "SAME", marks=pytest.mark.wide),
        pytest.param("forward over reverse", "VALID", marks=pytest.mark.wide),
        pytest.param("forward over reverse", ("reflect", 2), marks=pytest.mark.wide),
        pytest.param("vmap of filters", ((1, 0), (2, 0)), marks=pytest.mark.wide),
        pytest.param("vmap of gradients", "reflect", marks=pytest.mark.wide),
    ],
)
def test_transformations_of_upsampled_images(name, padding):
    case = Case(2, 3, 4, 2, 3, 3, 2, 1, padding, bias=True, dtype="float64", upsample=2)
    assert_transformed(name, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 11, 3, 3, 3, 2, padding="reflect", bias=True, activation="relu", upsample=2),
        pytest.param(
            Case(1, 3, 13, 2, 5, 3, 3, 1, ((2, 2), (1, 1)), layout="nchw_fchw", upsample=2),
            marks=pytest.mark.wide,
        ),
    ],
    ids=lambda case: case.name,
)
def test_phases_of_upsampled_images_are_one_convolution_on_a_gpu(case, monkeypatch):
    monkeypatch.setattr(upsampling, "platform", lambda: "gpu")
    shapes, forward = [], xla.forward

    def recorded(x, w, bias, **how):
        shapes.append(w.shape)
        return forward(x, w, bias, **how)

    monkeypatch.setattr(xla, "forward", recorded)
    x, w, bias, _ = arrays(case)
    y = ours(case, "xla")(x, w, bias)
    assert len(set(shapes)) == 1 and 4 * case.nf in shapes[0]
    wide = (np.asarray(a, np.float64) for a in (x, w, bias) if a is not None)
    x, w, *bias = wide
    rest = {"bias": bias[0]} if bias else {}
    np.testing.assert_allclose(y, oracle.conv2d(x, w, **rest, **case.arguments), atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 11, 3, 3, 3, 2, padding="reflect", upsample=2),
        pytest.param(
            Case(1, 6, 7, 2, 2, 3, 3, (3, 1), ("reflect", ((0, 1), (1, 0))), (1, 3), upsample=2),
            marks=pytest.mark.wide,
        ),
    ],
    ids=lambda case: case.name,
)
def test_gradients_of_upsampled_images_on_a_gpu(case, monkeypatch):
    # cuDNN has none for convolutions that leave samples out by pads of less than zero.
    for module in (upsampling, xla):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    x, w, _, dy = arrays(case)

    def gradients(convolve, dy):
        return jax.vjp(partial(convolve, bias=None), x, w)[1](dy)

    found = partial(gradients, ours(case, "xla"))
    pads = re.findall(r"padding=(\(\(.*?\)\))", str(jax.make_jaxpr(found)(dy)))
    assert pads and "-" not in "".join(pads)
    chex.assert_trees_all_close(found(dy), gradients(plain(case), dy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # Three phases that differ, one phase alone, and four that are one convolution.
        (Case(1, 6, 7, 2, 2, 3, 3, (3, 1), 1, (1, 3), dtype="float16", upsample=2), "float32"),
        (Case(1, 5, 6, 2, 3, 3, 3, 2, "SAME", dtype="float16", upsample=2), "float16"),
        (Case(1, 5, 6, 2, 3, 3, 3, padding="reflect", dtype="float16", upsample=2), "float16"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_gradients_that_are_added_are_not_rounded_one_by_one_on_a_gpu(case, dtype, monkeypatch):
    monkeypatch.setattr(upsampling, "platform", lambda: "gpu")
    seen, weight_grad = set(), xla.weight_grad

    def recorded(x, dy, **how):
        seen.add((str(x.dtype), str(dy.dtype)))
        return weight_grad(x, dy, **how)

    monkeypatch.setattr(xla, "weight_grad", recorded)
    x, w, _, dy = arrays(case)
    dw = jax.vjp(lambda w: ours(case, "xla")(x, w, None), w)[1](dy)[0]
    assert seen == {(dtype, dtype)} and dw.dtype == "float16"


def test_phases_may_leave_out_more_samples_than_there_are_on_a_gpu(monkeypatch):
    case = Case(1, 1, 1, 2, 3, 3, 2, 5, ((0, 8), (0, 8)), upsample=2)
    x, w, _, dy = arrays(case)
    want = jax.vjp(partial(plain(case), bias=None), x, w)
    for module in (upsampling, xla):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    y, pullback = jax.vjp(partial(ours(case, "xla"), bias=None), x, w)
    chex.assert_trees_all_close((y, pullback(dy)), (want[0], want[1](dy)), rtol=1e-5, atol=1e-5)


def assert_transformed(name, case):
    """A transformation of ours is that of the same in plain JAX."""
    x, w, bias, _ = arrays(case)
    transform = TRANSFORMS[name]
    got, want = (jax.jit(transform(f))(x, w, bias) for f in (ours(case), plain(case)))
    chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.wide] * (i > 1))
        for i, case in enumerate(WHOLE_ROWS)
    ],
)
def test_rows_of_taps_are_multiplied_as_one(case, monkeypatch):
    assert_whole_rows(case, xla, monkeypatch)


def test_long_rows_of_taps_are_one_on_a_gpu_unasked(monkeypatch):
    first, last, short, many = (9, 9, 3, 32), (9, 9, 32, 3), (3, 3, 3, 32), (9, 9, 32, 32)
    which = [
        (filters, dtype, rounds)
        for filters in (first, last, short, many)
        for dtype in ("bfloat16", "float32")
        for rounds in (True, False)
    ]

    def taken():
        found = (whole_rows.unasked(Window(), filters, dt, rounds=r) for filters, dt, r in which)
        return {one for one, taken in zip(which, found, strict=True) if taken}

    assert taken() == set()
    monkeypatch.setattr(whole_rows, "platform", lambda: "gpu")
    # cuDNN writes 16 bits, which the sums of a row's taps are too many for.
    ends = {one for one in which if one[0] in (first, last)}
    assert taken() == ends - {(last, "bfloat16", True)}


def test_gradients_of_the_last_layer_take_rows_as_one_on_a_gpu(monkeypatch):
    """In 16 bits, too, where XLA's output does not."""
    monkeypatch.setattr(whole_rows, "platform", lambda: "gpu")
    x, w = jnp.ones((1, 9, 9, 32), "bfloat16"), jnp.ones((9, 9, 32, 3), "bfloat16")
    run = partial(conv2d, padding="reflect", implementation="xla")

    def taps(function):
        text = jax.jit(function).lower(x, w).as_text()
        return [name for name in ("9x9x", "9x1x") if f"tensor<{name}" in text]

    assert taps(run) == ["9x9x"]
    gradients = jax.jit(lambda x, w: jax.vjp(run, x, w)[1](jnp.ones((1, 9, 9, 3), "bfloat16")))
    assert taps(gradients)[-1] == "9x1x"


def test_rows_of_taps_are_multiplied_as_one_where_it_is_faster(monkeypatch):
    seen, form = [], whole_rows._Form
    monkeypatch.setattr(whole_rows, "_Form", lambda *args: seen.append(args) or form(*args))
    monkeypatch.setattr(xla, "search_space", lambda *_: [{"whole_rows": True}], raising=False)
    case = Case(1, 3, 4, 3, 2, 3, 2, bias=True, activation="relu")
    with tuning("search"):
        assert_oracle(case, "xla")
    assert len(seen) >= 3


@pytest.mark.parametrize("case", [WHOLE_ROWS[0], WHOLE_ROWS[3]], ids=["gathered", "added"])
def test_moments_of_rows_of_taps_are_the_outputs(case, monkeypatch):
    """Moments of outputs that are computed two as one, and strip by strip, are the whole's."""
    monkeypatch.setattr(whole_rows, "_CACHED", 1)
    x, w, _, _ = arrays(case)
    how = case.stride, case.padding, case.dilation, case.groups, case.upsample, case.layout
    window = api.checked_window(x.shape, w.shape, *how)
    plan = vjp.Plan(xla, None, window, None, None, None, whole_rows=True)
    y, tiles = jax.jit(partial(vjp.conv2d_with_moments, plan, None, x.dtype))(x, w, None)
    near, (count, mean, squares) = moments.combined(tiles)
    assert set(count.tolist()) == {y.shape[1] * y.shape[2]}
    np.testing.assert_allclose(near + mean, y.mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(squares / count[:, None], y.var((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.wide] * (i % 2))
        for i, case in enumerate(MOMENTS)
    ],
)
def test_moments_are_the_outputs(case):
    assert_moments(case, xla)


def test_moments_of_a_large_mean_lose_nothing():
    assert_moments(MOMENTS[0], xla, mean=1e4)
    assert_moments(MOMENTS[2]._replace(layout="nchw_fchw"), xla, mean=1e4)


@pytest.mark.parametrize("sizes", [(4,), (0, 0, 3), (9, 0, 2, 7, 0)], ids=str)
def test_moments_of_tiles_are_added(sizes):
    rng = np.random.default_rng(0)
    parts = [rng.normal(100, 1, (size, 3)) for size in sizes]
    mean, squares = (
        np.array([[f(part, axis=0) if len(part) else np.zeros(3) for part in parts]])
        for f in (np.mean, lambda part, axis: ((part - part.mean(axis)) ** 2).sum(axis))
    )
    near, got = moments.combined(moments.of_tiles(sizes, jnp.asarray(mean), jnp.asarray(squares)))
    whole = np.concatenate(parts)
    assert got.counts[0] == len(whole)
    np.testing.assert_allclose(near[0] + got.mean[0], whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.squares[0], whole.var(0) * len(whole), atol=1e-9)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_saved_are_x_and_w_and_one_more_for_an_activation(activation):
    x, w, bias, _ = arrays(Case(1, 5, 4, 3, 3, 3, 2, bias=True, dtype="bfloat16"))
    run = lambda x, w, bias: conv2d(x, w, bias=bias, activation=activation)  # noqa: E731
    saved = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], x, w, bias)
    y = jax.eval_shape(run, x, w, bias)
    want = [x, w] if activation is None else [x, w, y]
    types = [[(a.shape, a.dtype) for a in each] for each in (jax.tree.leaves(saved), want)]
    assert types[0] == types[1]


def test_of_upsampled_images_the_small_ones_are_saved_and_multiplied():
    x, w, _, _ = arrays(Case(1, 5, 4, 3, 3, 3, 2))
    run = partial(conv2d, upsample=2, padding="reflect")
    saved = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], x, w))
    assert [a.shape for a in saved] == [x.shape, w.shape]
    # Four convolutions of 2 x 2 folded taps, of 5 x 4 pixels each.
    program = jax.jit(run).lower(x, w).as_text()
    found = re.findall(r"stablehlo.convolution.*\((.*), (.*)\) -> (.*)", program)
    wanted = tuple(f"tensor<{s}xf32>" for s in ("1x7x6x3", "2x2x3x2", "1x5x4x2"))
    assert found == [wanted] * 4


def test_more_is_mirrored_than_keeps_the_size_or_less():
    x = jnp.arange(12.0).reshape(3, 4, 1)
    for side in (1, 2):
        got = conv2d(x, jnp.ones((1, 1, 1, 1)), padding=["reflect", [side, [0, 1]]])
        want = jnp.pad(x, [(side, side), (0, 1), (0, 0)], mode="reflect")
        np.testing.assert_array_equal(got, want)


def test_low_precision_is_differentiated_twice():
    case = Case(1, 5, 5, 2, 3, 3, 2, dtype="bfloat16", out_dtype="float32")
    x, w, _, _ = arrays(case)
    run = partial(conv2d, out_dtype="float32")
    slope = jax.grad(lambda x: (jax.grad(lambda w: (run(x, w) ** 2).sum())(w) ** 2).sum())(x)
    assert slope.dtype == x.dtype and jnp.isfinite(slope).all()


class Kernel:
    """Plain JAX as a kernel, which JAX cannot look into."""

    DIFFERENTIABLE = False
    unavailable, check = xla.unavailable, xla.check
    forward, input_grad, weight_grad = xla.forward, xla.input_grad, xla.weight_grad


@pytest.mark.core
@pytest.mark.parametrize(
    ("dtype", "module"),
    [("float32", xla), pytest.param("bfloat16", xla, marks=pytest.mark.wide), ("float32", Kernel)],
)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_slopes_at_kinks_are_those_of_jax(activation, dtype, module, monkeypatch):
    monkeypatch.setattr(Operator, "module", lambda self, name: module)
    x, w = jnp.zeros((1, 2, 1, 1), dtype), jnp.zeros((1, 1, 1, 5), dtype)
    bias = jnp.asarray([-1, -0.0, 0, 1, np.nan], dtype)
    run = partial(conv2d, x, w, activation=activation)
    got = jax.grad(lambda bias: run(bias=bias).astype("float64").sum())(bias)
    plain = {"relu": jax.nn.relu, "gelu": partial(jax.nn.gelu, approximate=False)}[activation]
    want = jax.vmap(jax.grad(plain))(bias.astype("float64"))
    np.testing.assert_allclose(got.astype("float64"), 2 * want, rtol=0.01)
    _, forward = jax.jvp(lambda bias: run(bias=bias)[0, 0, 0], (bias,), (jnp.ones_like(bias),))
    np.testing.assert_allclose(forward.astype("float64"), want, rtol=0.01)
    np.testing.assert_array_equal(np.isnan(run(bias=bias)[0, 0, 0]), np.isnan(bias))


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("xla", check_vma)


def test_filters_that_are_sharded_over_explicit_axes_have_such_gradients():
    mesh = jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Explicit,))
    filters = jax.NamedSharding(mesh, jax.P(None, None, None, "n"))
    w = jax.device_put(np.ones((2, 2, 3, 4), np.float32), filters)
    x = np.ones((1, 4, 4, 3), np.float32)
    gradient = jax.jit(jax.grad(lambda w: conv2d(x, w, activation="relu").sum()))(w)
    assert gradient.sharding == filters
    np.testing.assert_array_equal(gradient, np.full(w.shape, 9))


@pytest.mark.parametrize("of_the_program", [False, True])
def test_images_that_are_sharded_over_explicit_axes_have_such_gradients(of_the_program):
    mesh = jax.make_mesh((1, 1), ("n", "c"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    images = jax.NamedSharding(mesh, jax.P("n", None, None, None))
    x = jax.device_put(np.ones((1, 4, 4, 3), np.float32), images)
    w = jax.device_put(np.ones((2, 2, 3, 4), np.float32), jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh) if of_the_program else nullcontext():
        dx, dw = jax.jit(jax.grad(lambda x, w: conv2d(x, w).sum(), (0, 1)))(x, w)
        large = partial(conv2d, padding="reflect", upsample=2)
        of_large = jax.eval_shape(jax.grad(lambda x, w: large(x, w).sum()), x, w)
    assert jax.typeof(dx).sharding.spec == images.spec == of_large.sharding.spec
    np.testing.assert_array_equal(dx[0, :, :, 0], 4 * np.outer([1, 2, 2, 1], [1, 2, 2, 1]))
    np.testing.assert_array_equal(dw, np.full(w.shape, 9))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_unsharded_arrays_have_gradients_beside_a_mesh(kind):
    x, w = np.ones((1, 2, 2, 1), np.float32), np.ones((1, 1, 1, 1), np.float32)
    with jax.set_mesh(jax.make_mesh((1,), ("n",), axis_types=(kind,))):
        dx, dw = jax.jit(jax.grad(lambda x, w: conv2d(x, w).sum(), (0, 1)))(x, w)
    np.testing.assert_array_equal(dx, x)
    np.testing.assert_array_equal(dw, 4 * w)


def test_the_fastest_is_chosen_by_measurement():
    x, w, bias, _ = arrays(HARD[0])
    run = partial(conv2d, bias=bias, **HARD[0].arguments)
    got = jax.jit(partial(run, implementation="auto"))(x, w)
    np.testing.assert_array_equal(got, run(x, w))


def test_batch_dimensions():
    x, w = np.ones((2, 3, 5, 4, 6)), np.ones((2, 2, 6, 7))
    assert conv2d(x, w).shape == (2, 3, 4, 3, 7)
    assert conv2d(x[0, 0], w).shape == (4, 3, 7)
    first = conv2d(x.transpose(0, 1, 4, 2, 3), w.transpose(3, 2, 0, 1), layout="nchw_fchw")
    assert first.shape == (2, 3, 7, 4, 3)


def test_images_of_any_size_are_exported():
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, h, w, 3"), jnp.float32)
    w = np.ones((3, 3, 3, 2), np.float32)
    run = lambda x: conv2d(x, w, padding="SAME", activation="gelu")  # noqa: E731
    large = lambda x: conv2d(x, w, padding="reflect", upsample=2)  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(lambda x: run(x).sum() + large(x).sum()))
    ones = np.ones((3, 5, 4, 3), np.float32)
    got = jax.export.export(gradient)(x).call(ones)
    chex.assert_trees_all_close(got, gradient(ones), rtol=1e-5)


@pytest.mark.parametrize("layout", ["nhwc_hwcf", "nchw_fchw"])
def test_a_compiled_kernel_and_its_symbols(layout):
    case = Case(1, 17, 31, 7, 1, 5, 9, 2, layout=layout, dtype="float16", out_dtype="float32")
    kernel, symbols = get_igemm_conv2d(layout, *case[:8], "float16", "float32", padding=1)
    x, w, _, _ = arrays(case)
    want = oracle.conv2d(x, w, stride=2, padding=1, layout=layout)
    np.testing.assert_allclose(kernel(x, w), want, rtol=1e-3, atol=1e-3)
    sizes = {"N": 1, "C": 7, "H": 17, "W": 31, "NF": 9, "HF": 1, "WF": 5, "H_OUT": 10, "W_OUT": 15}
    tiles = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "ELEMS_PER_THREAD": 64}
    assert symbols == sizes | {"M": 150, "K": 35} | tiles
    with pytest.raises(TypeError):
        kernel(x[:, 1:], w)


X, W = np.ones((2, 8, 6, 4), np.float32), np.ones((3, 3, 4, 2), np.float32)
WRONG = {
    r"x: expected \[\*batch, H, W, C\] of at least one sample.*\(8, 6\)": {"x": X[0, :, :, 0]},
    r"x: expected a floating-point array .* got int32": {"x": X.astype(np.int32)},
    r"w: expected \[HF, WF, C / groups, NF\].*\(3, 3, 4\)": {"w": W[..., 0]},
    r"w: expected x's dtype, float32, got float16; cast": {"w": W.astype(np.float16)},
    r"w: expected filters of C / groups = 4 / 2 channels, got 4": {"groups": 2},
    r"w: expected filters of C / groups = 8 / 1 channels, got 3": {"layout": "nchw_fchw"},
    r"w: filters of 3x3 taps with dilation \(4, 4\) do not fit": {"dilation": 4},
    r"groups=4: expected a divisor of the 2 filters": {"w": W[:, :, :1], "groups": 4},
    r"groups=0: expected an integer >= 1": {"groups": 0},
    r"stride=0: expected an integer >= 1, or two of them": {"stride": 0},
    r"stride=\(1, 2, 3\): expected an integer": {"stride": (1, 2, 3)},
    r"stride=10+: expected an integer <= 2147483647, or two of them": {"stride": 10**30},
    r"padding=10+: expected integers >= 0 and <= 2147483647": {"padding": 10**30},
    r"padding=1000000000: makes an array of \(2, 2000000008, .*too large": {"padding": 10**9},
    r"dilation=1.5: expected an integer": {"dilation": 1.5},
    r"padding=-1: expected integers >= 0": {"padding": -1},
    r"padding=\(\(1, 1\), \(1, 2, 3\)\): expected": {"padding": ((1, 1), (1, 2, 3))},
    r"padding=\(1, 2, 3\): expected an int, one for H": {"padding": (1, 2, 3)},
    r"padding='same': the names are 'SAME', 'VALID' and 'reflect'": {"padding": "same"},
    r"padding='reflect': mirroring 6 samples along W": {"padding": "reflect", "dilation": 6},
    r"padding=\('reflect', 6\): mirroring 6 samples along W takes .* more than those, got 6": {
        "padding": ("reflect", 6)
    },
    r"padding=\('reflect', 12\): mirroring 12 .* along W .* got 12": {
        "padding": ("reflect", 12),
        "upsample": 2,
    },
    r"padding=\('reflect', -1\): expected integers >= 0": {"padding": ("reflect", -1)},
    r"padding=\('reflect', 'SAME'\): expected an int, one for H": {"padding": ("reflect", "SAME")},
    r"padding=\('mirror', 1\): expected .* or \('reflect', any of these\)": {
        "padding": ("mirror", 1)
    },
    r"upsample=3: expected 1 or 2": {"upsample": 3},
    r"upsample=True: expected an integer >= 1": {"upsample": True},
    r"bias: expected shape \(2,\), one a filter, got \(4,\)": {"bias": np.ones(4)},
    r"activation='tanh': expected None, 'relu' or 'gelu'": {"activation": "tanh"},
    r"layout='nhwc': expected one of nhwc_hwcf, nchw_fchw": {"layout": "nhwc"},
    r"out_dtype='int8': expected one of float16": {"out_dtype": "int8"},
    r"precision='best': expected None": {"precision": "best"},
    r"implementation names \['cudnn'\]": {"implementation": "cudnn"},
    r"config=\(64, 64\): expected None or a TileConfig": {"config": (64, 64)},
    r"config.block_m=48: expected a power of two from 16": {"config": TileConfig(48)},
    r"config.ratio_n=3: expected a power of two from 1": {"config": TileConfig(ratio_n=3)},
    r"expected at most 32 warps": {"config": TileConfig(ratio_m=8, ratio_n=8)},
}


@pytest.mark.core
@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    with pytest.raises(ValueError, match=message):
        conv2d(**{"x": X, "w": W} | WRONG[message])


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("nf=0: expected an integer >= 1", {"nf": 0}),
        ("layout='nhwc': expected one of", {"layout": "nhwc"}),
        ("mem_space='registers': expected 'shared' or 'global'", {"mem_space": "registers"}),
        ("input_dtype='float8': expected one of", {"input_dtype": "float8"}),
        ("config.block_n=100: expected a multiple of 16", {"block_n": 100}),
    ],
)
def test_what_is_wrong_of_a_compiled_kernel_says_so(message, wrong):
    given = dict(zip(("n", "h", "w", "c", "hf", "wf", "nf", "stride"), TABLE[0], strict=False))
    given |= {"layout": "nhwc_hwcf", "input_dtype": "float16", "output_dtype": "float32"}
    with pytest.raises(ValueError, match=message):
        get_igemm_conv2d(**given | wrong)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"stride": (1, 1)}, {"stride": (True, True)}),
        ({"padding": ((1, 1), (1, 1))}, {"padding": ((1.0, 1), (1, 1))}),
        ({"config": TileConfig(64)}, {"config": TileConfig(64.0)}),
    ],
)
def test_what_is_wrong_stays_wrong_after_what_equals_it(right, wrong):
    x, w = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 2))
    conv2d(x, w, **right)
    with pytest.raises(ValueError, match="expected"):
        conv2d(x, w, **wrong)
