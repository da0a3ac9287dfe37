"""Sparse convolution in plain JAX against the oracle; its derivatives, forms of call and errors."""

import dataclasses
import re
from functools import partial
from itertools import count, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.covering import covering
from helpers.sparse import assert_oracle, drawn_voxels
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import oracle
from pallas_kernels.dispatch import tuning
from pallas_kernels.dispatch.operator import Request
from pallas_kernels.sparse import (
    SPARSE_CONV_BWD_ALGO_MODE,
    SPARSE_CONV_FWD_ALGO_MODE,
    SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE,
    SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE,
    api,
    conformance,
    from_coords,
    kernel_map,
    sparse_maps,
    spatially_sparse_conv,
    spatially_sparse_depthwise_conv,
    triton,
    vjp,
)
from pallas_kernels.sparse.cases import CASES, Case
from pallas_kernels.sparse.depthwise import conformance as depthwise
from pallas_kernels.sparse.depthwise import triton as depthwise_triton
from pallas_kernels.sparse.problem import Problem, Window
from pallas_kernels.sparse.shapes import room
from pallas_kernels.sparse.voxels import Voxels

NARROW = (3, 8, 14)
"""One case of each path through the code; the others take the same paths with other numbers."""


def some(cases, narrow):
    """Those of the numbers for `make test`, of the others each fourth one for `make test-wide`."""
    params, others = [], count()
    for i, case in enumerate(cases):
        marks = []
        if i not in narrow:
            # Options in two dimensions stand together below.
            slow = case.ndim == 2 or next(others) % 4
            marks = [pytest.mark.slow if slow else pytest.mark.wide]
        params.append(pytest.param(case, id=case.name, marks=marks))
    return params


@pytest.mark.core
@pytest.mark.parametrize("case", some(CASES, NARROW))
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(conformance, case, "xla")


@pytest.mark.parametrize("case", some(depthwise.CASES, (1,)))
def test_depthwise_output_and_gradients_are_the_oracles(case):
    assert_oracle(depthwise, case, "xla")


REDUCED = {"stride_mode": "reduce_and_stride"}
# In this order 19 rows hold all pairs and 76 all triples, in others up to 95.
OPTIONS = {
    "stride": (1, 2, 3),
    "dilation": (1, 2, 3),
    "reduce": ({}, *(REDUCED | {"stride_reduce": name} for name in ("max", "mean", "sum"))),
    "rule": ({}, {"output_rule": "full"}, {"output_rule": "full", "padding": 2}),
    "kernel_size": (1, 2, 3, (5, 1)),
    "dtype": ("float32", "bfloat16", "float64"),
    "channels": (4, 2),
    "transposed": (False, True),
    "features": (2, 6),
    "bias": (False, True),
    "groups": (1, 2),
    "algorithms": (["explicit_gemm"], ["implicit_gemm", "xla"]),
    "generative": (False, True),
}


def may_be(row):
    """Whether the operator takes some options together."""
    if not row.get("transposed"):
        return True
    return not row.get("rule") and not (row.get("reduce") and row.get("stride", 1) > 1)


def together(strength):
    """Cases, and names of algorithms, in which so many options stand together, of any values."""
    cases = []
    for row in covering(OPTIONS, may_be, strength):
        names, rest = row.pop("algorithms"), row.pop("reduce") | row.pop("rule")
        case = Case((9, 0, 5), 7, row.pop("channels"), row.pop("features"), ndim=2, **rest, **row)
        cases.append(pytest.param(case, names, id="-".join([case.name, *names])))
    return cases


@pytest.mark.wide
@pytest.mark.parametrize(("case", "algorithms"), together(2))
def test_every_two_options_together(case, algorithms):
    assert_oracle(conformance, case, algorithms)


# What is compiled for a triple is compiled for its pairs, of which a fourth of the programs hold
# all.
@pytest.mark.slow
@pytest.mark.parametrize(("case", "algorithms"), together(3))
def test_every_three_options_together(case, algorithms):
    assert_oracle(conformance, case, algorithms)


def call(case, **rest):
    """The operator as a function of features, weights and bias of a case."""
    coords, x, *_ = case.drawn()
    voxels, onto = conformance.voxels(case, coords, x)

    def function(x, w, bias):
        out = spatially_sparse_conv(
            voxels.with_features(x), w, bias=bias, output_voxels=onto, **case.arguments, **rest
        )
        return out.features

    return function


@pytest.mark.wide
def test_derivatives_of_every_order():
    """A sum of sines, in each argument twice, against finite differences of the gradient."""
    case = Case((9, 4), 5, 4, 2, (3, 2), (1, 2), groups=2, ndim=2, dtype="float64", bias=True)
    with jax.enable_x64(True), tuning("off"):
        _, x, w, bias, _ = case.drawn()
        x = np.where(np.isnan(x), 0, x)
        function = call(case)

        def slope(args):
            return jax.grad(lambda args: jnp.sin(function(*args)).sum())(args)

        step = jax.tree.map(lambda a: np.sin(np.arange(a.size).reshape(a.shape)), (x, w, bias))

        def moved(by):
            return jax.tree.map(lambda a, s: a + by * s, (x, w, bias), step)

        second = jax.jit(lambda args, step: jax.vjp(slope, args)[1](step)[0])(moved(0), step)
        up, down = (jax.jit(slope)(moved(by)) for by in (1e-5, -1e-5))
        want = jax.tree.map(lambda a, b: (a - b) / 2e-5, up, down)
        # The Hessian is symmetric: its rows are its columns.
        for got, numeric in zip(jax.tree.leaves(second), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, numeric, atol=1e-7)


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.wide), 2])
def test_what_does_not_count_never_leaks(stride):
    """NaN in rows that hold no voxel, of features and of gradients, and their coordinates."""
    voxels = drawn_voxels((5, 0, 4), 5, 2, capacity=16)
    w = np.ones((9, 2, 3), np.float32)
    poisoned = dataclasses.replace(
        voxels,
        coords=voxels.coords.at[9:].set(jnp.array([0, 1, 1])),
        features=voxels.features.at[9:].set(jnp.nan),
    )

    @jax.jit
    def run(of):
        def function(x, w):
            out = spatially_sparse_conv(of.with_features(x), w, 3, stride, bias=jnp.ones(3))
            return out.features, out.valid

        out, pullback, valid = jax.vjp(function, of.features, jnp.asarray(w), has_aux=True)
        dy = jnp.where(valid[:, None], jnp.ones_like(out), jnp.nan)
        return out, *pullback(dy), valid

    *results, valid = run(poisoned)
    for got, want in zip(results, run(voxels), strict=False):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, want)
    assert not results[0][~valid].any() and not results[1][9:].any()


@pytest.mark.wide
def test_permuted_rows_are_permuted_results():
    voxels = drawn_voxels((20,), 6, 3, capacity=20)
    w = np.random.default_rng(1).normal(size=(9, 3, 4)).astype(np.float32)
    order = np.random.default_rng(2).permutation(20)
    moved = from_coords(
        np.asarray(voxels.coords)[order], np.asarray(voxels.features)[order], capacity=20
    )

    def results(of):
        function = lambda x: spatially_sparse_conv(of.with_features(x), w, 3).features  # noqa: E731
        y, pullback = jax.vjp(function, of.features)
        return y, pullback(jnp.cos(y))[0]

    for one, other in zip(results(voxels), results(moved), strict=True):
        np.testing.assert_allclose(np.asarray(one)[order], other, atol=1e-5)


def test_a_sample_alone_is_what_it_is_in_a_batch():
    voxels = drawn_voxels((6, 0, 7), 5, 2)
    w = np.ones((9, 2, 2), np.float32)
    batched = spatially_sparse_conv(voxels, w, 3)
    own = np.asarray(voxels.coords)[:13, 0] == 2
    places = np.asarray(voxels.coords)[:13][own] * [0, 1, 1]
    alone = spatially_sparse_conv(
        from_coords(places, np.asarray(voxels.features)[:13][own], capacity=16), w, 3
    )
    np.testing.assert_array_equal(np.asarray(batched.features)[:13][own], alone.features[:7])


@pytest.mark.wide
def test_forms_of_call():
    """A map that is passed, one that is kept, a compute dtype, an output that is given."""
    voxels = drawn_voxels((9,), 6, 4)
    w = np.random.default_rng(1).normal(size=(9, 4, 2)).astype(np.float32)
    want = spatially_sparse_conv(voxels, w, 3, 2)
    found, out = kernel_map(voxels, 3, 2)
    again = spatially_sparse_conv(voxels, w, 3, 2, kernel_map=found, output_voxels=out)
    np.testing.assert_array_equal(want.features, again.features)
    assert want.tensor_stride == again.tensor_stride == (2, 2)
    onto = spatially_sparse_conv(voxels, w, 3, 2, output_voxels=out)
    np.testing.assert_array_equal(want.features, onto.features)
    low = spatially_sparse_conv(voxels, w, 3, 2, compute_dtype="bfloat16")
    assert low.features.dtype == jnp.float32
    np.testing.assert_allclose(low.features, want.features, atol=0.1)
    assert (low.features != want.features).any()
    y = spatially_sparse_depthwise_conv(voxels.features, w[:, :, 0], found, out.capacity)
    want = oracle.sparse_conv(
        voxels.coords[:9],
        voxels.features[:9],
        np.asarray(w)[:, :, :1, None],
        out.coords[: out.num_valid],
        3,
        2,
    )
    np.testing.assert_allclose(y[: len(want)], want, atol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize("transform", ["vmap", "remat"])
def test_transformations(transform):
    voxels = drawn_voxels((9,), 6, 4)
    w = np.random.default_rng(1).normal(size=(9, 4, 2)).astype(np.float32)

    def loss(x, w):
        y = spatially_sparse_conv(voxels.with_features(x), w, 3, 2).features
        return (y**2).sum()

    slope = jax.grad(loss, (0, 1))
    want = slope(voxels.features, w)
    if transform == "vmap":
        twice = jnp.stack([voxels.features, 2 * voxels.features])
        dx, dw = jax.vmap(slope, (0, None))(twice, w)
        got = dx[0], dw[0]
        np.testing.assert_allclose(dx[1], 2 * dx[0], rtol=1e-5, atol=1e-5)
    else:
        got = jax.grad(jax.remat(loss), (0, 1))(voxels.features, w)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.wide
def test_sharded_over_samples():
    """A device makes the maps of its own samples; arrays vary over the mesh."""
    voxels = drawn_voxels((9,), 6, 4)
    w = np.random.default_rng(1).normal(size=(9, 4, 2)).astype(np.float32)
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def loss(coords, x, w):
        own = dataclasses.replace(voxels, coords=coords[0], features=x[0])
        out = spatially_sparse_conv(own, w, 3, 2)
        return jax.lax.psum((out.features**2).sum(), "batch")

    sharded = jax.shard_map(
        jax.grad(loss, 2),
        mesh=mesh,
        in_specs=(spec("batch"), spec("batch"), spec()),
        out_specs=spec(),
    )
    got = jax.jit(sharded)(voxels.coords[None], voxels.features[None], w)
    want = jax.grad(lambda w: (spatially_sparse_conv(voxels, w, 3, 2).features ** 2).sum())(w)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def exportable(n, **options):
    """A convolution as a function of a capacity's arrays, and their shapes."""
    shapes = [((n, 3), "int32"), ((n, 4), "float32"), ((), "int32"), ((9, 4, 2), "float32")]

    def function(coords, x, count, w):
        voxels = Voxels(coords, x, count, jnp.zeros((), jnp.int32), 2, (1, 1))
        out = spatially_sparse_conv(voxels, w, 3, **options)
        return out.coords, out.features, out.num_valid

    return function, [jax.ShapeDtypeStruct(*shape) for shape in shapes]


@pytest.mark.parametrize(
    "stride",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.wide)],
)
def test_export_with_a_symbolic_capacity(stride):
    """One program serves voxels of every capacity, and makes their maps."""
    (n,) = jax.export.symbolic_shape("n")
    function, shapes = exportable(n, stride=stride)
    exported = jax.export.export(jax.jit(function))(*shapes)
    w = np.random.default_rng(1).normal(size=(9, 4, 2)).astype(np.float32)
    for capacity in (8, 13):
        voxels = drawn_voxels((5, 2), 4, 4, capacity=capacity)
        given = voxels.coords, voxels.features, voxels.num_valid, w
        for got, want in zip(exported.call(*given), jax.jit(function)(*given), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_symbolic_capacity_does_not_say_how_many_voxels_are_new():
    (n,) = jax.export.symbolic_shape("n")
    function, shapes = exportable(n, generative=True)
    with pytest.raises(ValueError, match="out_capacity=None: expected a number.* is symbolic"):
        jax.export.export(jax.jit(function))(*shapes)
    function, shapes = exportable(n, generative=True, out_capacity=32)
    assert jax.export.export(jax.jit(function))(*shapes).out_avals[1].shape == (32, 2)


def equations(jaxpr):
    """Every equation of a program, those of its parts too."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.wide
def test_rows_times_channels_may_be_beyond_32_bits():
    """Rows alone are counted in 32 bits: no index is that of a number in a flattened array."""
    rows, channels = 1 << 25, 128
    function, shapes = exportable(rows)
    shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in shapes]
    shapes[1] = jax.ShapeDtypeStruct((rows, channels), "float32")
    shapes[3] = jax.ShapeDtypeStruct((9, channels, channels), "float32")

    def loss(coords, x, count, w):
        return function(coords, x, count, w)[1].sum()

    traced = jax.make_jaxpr(jax.grad(loss, (1, 3)))(*shapes)
    moved = 0
    for equation in equations(traced.jaxpr):
        arrays = [one.aval for one in (*equation.invars, *equation.outvars)]
        assert all(max(getattr(one, "shape", ()), default=0) <= rows * 9 for one in arrays)
        if equation.primitive.name in ("gather", "scatter"):
            operand, indices, *_ = arrays
            assert max(operand.shape) <= rows and indices.shape[-1] == 1
            moved += operand.shape[-1] == channels
    assert moved >= 3


FORMS = [
    (None, 0),
    ("explicit", 2),
    (SPARSE_CONV_FWD_ALGO_MODE.CUTLASS_IMPLICIT_GEMM, 2),
    (["explicit_gemm", SPARSE_CONV_BWD_ALGO_MODE.IMPLICIT_GEMM, "xla"], 2),
    ("auto", 2),
    # Their names are among those above, or the contract's.
    *(
        pytest.param(form, 2, marks=pytest.mark.slow)
        for form in (
            "xla",
            "explicit_gemm",
            "implicit",
            SPARSE_CONV_BWD_ALGO_MODE.IMPLICIT_GEMM,
            SPARSE_CONV_FWD_ALGO_MODE.AUTO,
        )
    ),
]


# The contract test has the forms that every operator knows.
@pytest.mark.wide
@pytest.mark.parametrize(("form", "count"), FORMS)
def test_what_each_form_of_a_choice_measures(form, count, searches, monkeypatch):
    """Both directions, once; nothing without a name, and nothing where tuning is off."""
    monkeypatch.setattr(
        "pallas_kernels.common.measurement.JaxMeasurement.milliseconds", lambda *_: 1.0
    )
    voxels = drawn_voxels((3,), 4, 1, ndim=1)
    w = jnp.ones((2, 1, 1))

    def run(**choice):
        loss = lambda w: spatially_sparse_conv(voxels, w, 2, **choice).features.sum()  # noqa: E731
        return jax.grad(loss)(w)

    want = run()
    for _ in range(2):
        np.testing.assert_array_equal(run(fwd_algo=form, bwd_algo=form), want)
    assert len(searches) == count
    if form is not None:
        with tuning("off"):
            run(fwd_algo=form)
        words = [str(one) for one in ([form] if isinstance(form, str) else form)]
        monkeypatch.setenv("FLASH_WTCONV_SPARSE_CONV_FWD", f"[{', '.join(words)}]")
        run()
    assert len(searches) == count


def abroad(kind):
    """A block in which calls are traced for a device that is not here."""
    device = jax.sharding.AbstractDevice(kind, 1, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.fixture(params=["off", "TPU interpreter", "Triton's interpreter", "ahead of time"])
def unmeasured(request, monkeypatch):
    """The name that a call is given, in each place where one name measures nothing."""
    if request.param == "Triton's interpreter":
        from helpers.triton import interpret

        for room in (triton, depthwise_triton):
            interpret(monkeypatch, room)
        yield "triton"
    elif request.param == "off":
        monkeypatch.setenv("FLASH_WTCONV_TUNING", "off")
        yield "explicit_gemm"
    else:
        interpreter = pltpu.force_tpu_interpret_mode()
        with interpreter if request.param == "TPU interpreter" else abroad("TPU v5e"):
            yield "explicit_gemm"


@pytest.mark.parametrize("by_variable", [False, True])
def test_one_name_measures_nothing_where_times_say_nothing(
    unmeasured, by_variable, searches, monkeypatch
):
    """It takes the first of its parameters, in both directions and of both operators."""
    chosen, choose = [], Request.choose

    def seen(request, *rest):
        chosen.append(choose(request, *rest))
        return chosen[-1]

    monkeypatch.setattr(Request, "choose", seen)
    choice = {"fwd_algo": unmeasured, "bwd_algo": unmeasured}
    if by_variable:
        for name, way in product(("SPARSE_CONV", "SPARSE_DEPTHWISE_CONV"), ("FWD", "BWD")):
            monkeypatch.setenv(f"FLASH_WTCONV_{name}_{way}", unmeasured)
        choice = {}
    voxels = drawn_voxels((3,), 4, 1, ndim=1)

    def loss(w):
        regular = spatially_sparse_conv(voxels, w[..., None], 3, **choice)
        found, _ = kernel_map(voxels, 3)
        depthwise = spatially_sparse_depthwise_conv(
            regular.features, w, found, voxels.capacity, **choice
        )
        return depthwise.sum()

    # Traced, and not run: nobody has all of these devices.
    jax.eval_shape(jax.grad(loss), jnp.ones((3, 1)))
    name = "xla" if unmeasured == "explicit_gemm" else unmeasured
    assert {(one.implementation, one.config) for one in chosen} == {(name, ())}
    assert len(chosen) >= 4 and not searches


@pytest.mark.parametrize(
    "choice",
    [
        SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE.EXPLICIT,
        SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE.IMPLICIT,
        SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE.AUTO,
        ["explicit_gemm", "implicit"],
    ],
)
def test_names_of_depthwise_algorithms(choice):
    voxels = drawn_voxels((3,), 4, 1, ndim=1)
    found, out = kernel_map(voxels, 2)
    run = partial(spatially_sparse_depthwise_conv, voxels.features, jnp.ones((2, 1)), found)
    got = run(out.capacity, fwd_algo=choice, bwd_algo=choice)
    np.testing.assert_array_equal(got, run(out.capacity))


@pytest.mark.parametrize("at_once", [2, *(pytest.param(n, marks=pytest.mark.wide) for n in (8, 9))])
def test_offsets_at_once_change_nothing(at_once):
    """The last step is filled up where they do not divide the offsets."""
    from pallas_kernels.sparse import xla

    voxels = drawn_voxels((9,), 5, 4)
    found, _ = kernel_map(voxels, 3)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(9, 2, 2, 3)), jnp.float32)
    x, dy = voxels.features, jnp.ones((16, 6))
    for name, arrays in (("forward", (x, w)), ("input_grad", (dy, w)), ("weight_grad", (x, dy))):
        run = partial(getattr(xla, name), *arrays, found.forward, precision=None)
        static = {"shape": w.shape} if name == "weight_grad" else {}
        got, want = run(**static, at_once=at_once), run(**static)
        np.testing.assert_allclose(got, want, atol=1e-5)


VOXELS = from_coords([[0, 1, 1], [0, 2, 2]], np.ones((2, 4), np.float32))
W = np.ones((9, 4, 2), np.float32)
SINGLE, _ = kernel_map(VOXELS, 1)
WRONG = {
    r"weight: expected \[K, C_in, C_out\] = \[9, 4, C_out\], got shape \(8, 4, 2\)": {
        "weight": W[:8]
    },
    r"weight: expected \[K, G, C_in / G, C_out / G\] = \[9, 2, 2, C_out / G\], got": {"groups": 2},
    "groups=3: expected a divisor of the 4 channels": {"groups": 3},
    "weight: expected the features' dtype, float32, got bfloat16": {},
    r"bias: expected shape \(2,\), got \(3,\)": {"bias": np.ones(3, np.float32)},
    r"kernel_size=\(3, 3, 3\): expected an integer >= 1, or 2 of them": {"kernel_size": (3, 3, 3)},
    "stride=0: expected an integer": {"stride": 0},
    r"stride=\(9999, 9999\).*strides up to 8192": {"stride": 9999},
    "stride_mode='pool': expected one of stride_only": {"stride_mode": "pool"},
    "stride_reduce='min': expected one of max, mean, sum": {"stride_reduce": "min"},
    "output_rule='most': expected one of floor, full": {"output_rule": "most"},
    "padding=1: belongs to output_rule='full'": {"padding": 1},
    "padding=-1: expected an integer >= 0": {"padding": -1, "output_rule": "full"},
    "output_voxels=None: a transposed convolution needs": {"transposed": True},
    r"stride=\(2, 2\): a transposed convolution divides": {
        "transposed": True,
        "generative": True,
        "stride": 2,
    },
    "transposed=True: stride_mode='reduce_and_stride' pools": {
        "transposed": True,
        "stride": 2,
        "stride_mode": "reduce_and_stride",
    },
    "output_voxels: generative=True makes its own": {
        "generative": True,
        "output_voxels": VOXELS,
    },
    r"output_voxels: expected the tensor_stride \(2, 2\)": {"stride": 2, "output_voxels": VOXELS},
    "out_capacity=4: stride 1 keeps the input's 2": {"out_capacity": 4},
    "fwd_algo names \\['cudnn'\\], but sparse_conv has .*also called \\['explicit_gemm'": {
        "fwd_algo": "cudnn"
    },
    "bwd_algo names \\['cudnn'\\]": {"bwd_algo": ["cudnn"]},
    "kernel_map: is that of": {"kernel_map": SINGLE},
    "output_voxels=None: with kernel_map= give": {"kernel_map": SINGLE, "generative": True},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message):
    given = {"voxels": VOXELS, "weight": W, "kernel_size": 3} | WRONG[message]
    if "bfloat16" in message:
        given["weight"] = jnp.asarray(W, "bfloat16")
    with pytest.raises(ValueError, match=message):
        spatially_sparse_conv(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
def test_a_hundred_backward_passes_are_the_same_bits(stride):
    """Maps, output and gradients, by what a GPU takes unasked."""
    rows = room(20_000)
    keys = jax.random.split(jax.random.key(0))
    voxels = from_coords(rows, jax.random.normal(keys[0], (len(rows), 32)))
    w = jax.random.normal(keys[1], (27, 32, 48))

    @jax.jit
    def run(voxels, w):
        def function(x, w):
            return spatially_sparse_conv(voxels.with_features(x), w, 3, stride).features

        y, pullback = jax.vjp(function, voxels.features, w)
        return y, *pullback(jnp.sin(y))

    want = jax.tree.map(np.asarray, run(voxels, w))
    for _ in range(100):
        for got, first in zip(run(voxels, w), want, strict=True):
            np.testing.assert_array_equal(got, first)


def test_what_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match=re.escape("with fwd_algo='triton' for x (1, 2")):
        spatially_sparse_conv(VOXELS, W, 3, fwd_algo="triton")


@pytest.mark.wide
def test_a_program_is_exported():
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), VOXELS)
    run = jax.jit(lambda voxels: spatially_sparse_conv(voxels, W, 3, 2).features)
    exported = jax.export.export(run)(spec)
    want = spatially_sparse_conv(VOXELS, W, 3, 2).features
    np.testing.assert_array_equal(exported.call(VOXELS), want)


@pytest.mark.wide
def test_times_are_measured_on_a_room():
    """The arrays that a call is timed on: a map of exactly as many voxels, and drawn ones."""
    window = Window((3, 3, 3), (1, 1, 1), (1, 1, 1))
    problem = Problem((1, 100, 4), np.dtype("float32"), 8, window)
    timed = vjp.measurement(api.OPERATOR, "bwd", problem, None)
    x, w, found, dy = timed._arrays
    assert (x.shape, w.shape, dy.shape) == ((64, 4), (27, 1, 4, 8), (64, 8))
    assert (found.table >= 0).any(0).all() and (found.table[13] == np.arange(64)).all()
    call = timed.prepared(api.OPERATOR.module("xla"), (("at_once", 27),))
    for got, want in zip(timed.arrays(call()), timed.reference(), strict=True):
        np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_a_network_keeps_its_maps():
    """Down and up again: the way up reads the map that led down."""
    with sparse_maps():
        down = spatially_sparse_conv(VOXELS, W, 3, 2)
        made, _ = kernel_map(VOXELS, 3, 2, output_voxels=down)
        up, sites = kernel_map(down, 3, 2, transposed=True, output_voxels=VOXELS)
        assert up.forward is made.backward and sites.coords is VOXELS.coords
