"""Triton kernels of sparse convolutions: interpreted, compiled without a GPU, run where one is."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sparse import assert_oracle, drawn_voxels
from helpers.triton import INTERPRETED, PARTS, compiled_resources, interpret, launch, tensor

from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.dispatch import tuning
from pallas_kernels.sparse import (
    conformance,
    from_coords,
    kernel_map,
    maps,
    spatially_sparse_conv,
    spatially_sparse_depthwise_conv,
    triton_launches,
)
from pallas_kernels.sparse import triton as triton_jax
from pallas_kernels.sparse.cases import CASES
from pallas_kernels.sparse.depthwise import conformance as depthwise
from pallas_kernels.sparse.depthwise import triton as depthwise_triton
from pallas_kernels.sparse.depthwise import triton_launches as depthwise_launches
from pallas_kernels.sparse.depthwise.problem import Problem as DepthwiseProblem
from pallas_kernels.sparse.maps import RowTable, row_table
from pallas_kernels.sparse.problem import Problem, Window
from pallas_kernels.sparse.shapes import room
from pallas_kernels.sparse.voxels import LIMIT

SMALL = TileConfig(16, 16, 32, 1, 1, 1)
"""Tiles so small that there are several of these small tables."""


def taken(cases):
    return [case for case in cases if case.dtype != "float64" and sum(case.voxels)]


def interpretable(cases):
    """The interpreter multiplies the bits of bfloat16."""
    return [case for case in taken(cases) if case.dtype != "bfloat16"]


def name(case):
    return case.name


@pytest.fixture
def interpreted(monkeypatch):
    """The implementations in Triton's interpreter."""
    interpret(monkeypatch, triton_jax)
    interpret(monkeypatch, depthwise_triton)


def drawn(taps, rows, read, *shapes):
    """A table of rows that lack different offsets, one of them none, and arrays of such shapes."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, read, (taps, rows), np.int32)
    table[rng.random((taps, rows)) < rng.random(rows)] = -1
    table[:, 3] = -1
    return table, *(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def on_torch(table):
    """The table, the order of its rows and the masks of their tiles, as tensors."""
    return RowTable(*map(tensor, row_table(jnp.asarray(table))))


def gathered(x, table):
    """The rows of x that each row reads through each offset, zeros where there is none."""
    return np.where((table >= 0)[..., None], x[table], 0).astype(float)


def assert_near(got, want):
    got = got.double().numpy()
    assert np.abs(got - want).max() <= 1e-5 * np.sqrt(np.mean(want**2))


@INTERPRETED
@pytest.mark.parametrize(
    ("taps", "splits", "pairs"),
    [
        (8, 1, 2),
        pytest.param(33, 3, 2, marks=pytest.mark.wide),
        pytest.param(33, 1, 0, marks=pytest.mark.slow),
        pytest.param(33, 1, 1, marks=pytest.mark.slow),
    ],
)
def test_kernels_are_numpys(taps, splits, pairs):
    """More offsets than a word has bits, and parts of everything: tiles, lists, channels."""
    count, groups, channels, features = 17, 2, 3, 9
    table, x, w, dy = drawn(
        *(taps, count, 12, (12, groups * channels)),
        (taps, groups, channels, features),
        (count, groups * features),
    )
    rows, rest = on_torch(table), ("ieee", SMALL)
    there = gathered(x, table).reshape(taps, count, groups, channels)
    y = triton_launches.forward(tensor(x), tensor(w), rows, *rest, splits, pairs > 0, launch)
    assert_near(y.sum(0), np.einsum("kmgc,kgcf->mgf", there, w).reshape(count, -1))
    # A row that reads nothing may hold anything.
    dy[3] = np.nan
    pieces = triton_launches.weight_grad(
        *(tensor(x), tensor(dy), rows, w.shape), *rest, pairs, launch
    )
    # Rows are listed for three offsets after the other, as more lists would not fit beside x.
    assert len(pieces) == {(33, 0): 1, (33, 1): 11, (33, 2): 12, (8, 2): 4}[taps, pairs]
    wanted = np.nan_to_num(dy).reshape(count, groups, features)
    dw = np.einsum("kmgc,mgf->kgcf", there, wanted)
    ends = np.cumsum([len(piece) for piece in pieces])
    for got, want in zip(pieces, np.split(dw, ends[:-1]), strict=True):
        assert_near(got, want)


@pytest.mark.wide
@INTERPRETED
def test_depthwise_kernels_are_numpys(monkeypatch):
    """A part of a gradient sums several tiles, one of rows that read nothing."""
    monkeypatch.setattr(depthwise_launches, "_PROGRAMS", 2)
    table, x, w, dy = drawn(33, 70, 12, (12, 5), (33, 5), (70, 5))
    unread = [3, *range(40, 60)]
    table[:, unread] = -1
    rows, there = on_torch(table), gathered(x, table)
    dy[unread] = np.nan
    for ordered in (0, 1):
        tiles = depthwise_launches.Tiles(16, 16, 1, ordered)
        y = depthwise_launches.forward(tensor(x), tensor(w), rows, tiles, launch)
        assert_near(y, np.einsum("kmc,kc->mc", there, w))
    parts = depthwise_launches.weight_grad(tensor(x), tensor(dy), rows, tiles, launch)
    assert_near(parts.sum(0), np.einsum("kmc,mc->kc", there, np.nan_to_num(dy)))


@INTERPRETED
def test_permuted_rows_are_permuted_results_bit_by_bit():
    table, x, w = drawn(9, 20, 20, (20, 5), (9, 1, 5, 4))
    moved = np.random.default_rng(1).permutation(20)

    def results(table):
        rest = "ieee", SMALL, 2, True, launch
        return triton_launches.forward(tensor(x), tensor(w), on_torch(table), *rest)

    np.testing.assert_array_equal(results(table)[:, moved], results(table[:, moved]))


def some(cases):
    """Every fifth case after the first and float16's are wide, but for those of 125 offsets."""

    def mark(number, case):
        few = number and number % 5 == 0 or case.dtype == "float16"
        return pytest.mark.wide if few and case.kernel_size not in (5, 7) else pytest.mark.slow

    return [
        pytest.param(case, id=case.name, marks=mark(i, case))
        for i, case in enumerate(interpretable(cases))
    ]


@INTERPRETED
@pytest.mark.parametrize("case", some(CASES))
def test_interpreted_kernels_are_the_oracles(interpreted, case):
    """Beside the contract's tests, which take the smallest case by every form of a choice."""
    assert_oracle(conformance, case, "triton")


@INTERPRETED
@pytest.mark.parametrize("case", some(depthwise.CASES))
def test_interpreted_depthwise_kernels_are_the_oracles(interpreted, case):
    assert_oracle(depthwise, case, "triton")


def made(case):
    """The map of a case, and the voxels of its output."""
    arguments = case.arguments
    names = "generative", "transposed", "output_rule", "padding"
    rest = {each: arguments[each] for each in names} | {"dilation": case.dilation}
    voxels, onto = conformance.voxels(case, *case.drawn()[:2])
    return kernel_map(voxels, case.kernel_size, case.stride, output_voxels=onto, **rest)


@INTERPRETED
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if i == 15 else [pytest.mark.slow])
        for i, case in enumerate(CASES)
    ],
)
def test_interpreted_searches_find_what_plain_jax_finds(case, interpreted, monkeypatch):
    want = made(case)
    monkeypatch.setattr(maps, "_searches", lambda *_: "triton")
    jax.tree.map(np.testing.assert_array_equal, made(case), want)


@INTERPRETED
@pytest.mark.parametrize(
    "dilation", [pytest.param(1, marks=pytest.mark.wide), pytest.param(6, marks=pytest.mark.slow)]
)
def test_searches_at_the_limits_sorted_and_mapped(dilation, interpreted, monkeypatch):
    """A key beyond the last axis is not that of the next column, and hides nothing before it."""
    places = [[0, -LIMIT, 5], [0, 0, LIMIT - 1], [0, 1, -LIMIT], [0, 1, 1 - LIMIT], [0, 1, 7]]
    places += [[3, LIMIT - 1, LIMIT - 1 - dilation], [3, LIMIT - 1, LIMIT - 1], [-1, -1, -1]]
    shuffled = [places[i] for i in (4, 1, 6, 0, 5, 3, 2, 7)]
    voxels = from_coords(places[:7], np.ones((7, 1), np.float32), capacity=8)

    @jax.vmap
    def tables(coords):
        own = dataclasses.replace(voxels, coords=coords)
        return kernel_map(own, 3, 1, dilation)[0].forward

    both = jnp.array([places, shuffled], jnp.int32)
    want = tables(both)
    monkeypatch.setattr(maps, "_searches", lambda *_: "triton")
    jax.tree.map(np.testing.assert_array_equal, tables(both), want)


@INTERPRETED
@pytest.mark.wide
def test_kernels_are_differentiated_twice_and_mapped(interpreted):
    voxels = drawn_voxels((9,), 6, 4)
    w = np.random.default_rng(1).normal(size=(9, 4, 2)).astype(np.float32)

    def second(**choice):
        def loss(x, w):
            out = spatially_sparse_conv(voxels.with_features(x), w, 3, 2, **choice)
            return jnp.sin(out.features).sum()

        squared = lambda *args: sum((g**2).sum() for g in jax.grad(loss, (0, 1))(*args))  # noqa: E731
        mapped = jax.vmap(jax.grad(squared, (0, 1)), (0, None))
        return jax.jit(mapped)(jnp.stack([voxels.features, 2 * voxels.features]), w)

    got = second(fwd_algo="triton", bwd_algo="triton")
    for one, want in zip(got, second(), strict=True):
        np.testing.assert_allclose(one, want, atol=1e-4 * np.abs(want).max())


@INTERPRETED
@pytest.mark.wide
def test_parameters_are_measured(interpreted, searches, monkeypatch):
    """Where Triton is named, its parameters are timed, and those taken are right."""
    two = [SMALL._asdict(), {"splits": 2, "ordered": 0}]
    monkeypatch.setattr(triton_jax, "search_space", lambda *_: two)
    with tuning("search"):
        assert_oracle(conformance, CASES[1], "triton")


@pytest.mark.wide
@PARTS
def test_kernels_compile_and_keep_their_sums_in_registers(part, tmp_path):
    resources = compiled_resources("sparse", part, tmp_path)
    assert len(resources) == {"some": 4, "rest": 40}[part]
    for kernel, (registers, spilled) in resources.items():
        # One warp of 32 rows was the fastest on an H200 for all that it spills.
        most = 64 if kernel.startswith("depthwise_weights") else 16
        assert registers <= 255 and spilled <= most, (kernel, registers, spilled)


WINDOW = Window((3, 3, 3), (1, 1, 1), (1, 1, 1))
LAYER = Problem((2, 1000, 8), np.dtype("float32"), 4, WINDOW)


def test_the_grid_offers_parameters_that_the_kernels_take():
    for dtype in ("float32", "bfloat16"):
        for direction in ("fwd", "bwd"):
            layer = LAYER._replace(dtype=np.dtype(dtype))
            first, *others = triton_jax.search_space(direction, layer)
            assert first == {} and {"splits": 8} in others
            assert ({"pairs": 1} in others) == (direction == "bwd")
            first, *others = depthwise_triton.search_space(
                direction, DepthwiseProblem(*layer._replace(features=8))
            )
            orders = {one["ordered"] for one in others}
            assert first == {} and orders == ({0, 1} if direction == "fwd" else {1})


REFUSED = {
    "float64, float32, bfloat16, float16 alone": {"dtype": np.dtype("float64")},
    "an empty array": {"shape": (1, 0, 8)},
    "symbolic size": {"shape": (1, *jax.export.symbolic_shape("n"), 8)},
    "65536 groups": {"window": WINDOW._replace(groups=2**16), "shape": (1, 9, 2**16)},
    "1073741824 features of 8 channels": {"features": 2**30},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason):
    layer = LAYER._replace(**REFUSED[reason])
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        triton_jax.check("fwd", layer)
    if "features" in reason or "float64" in reason:
        with pytest.raises(NotImplementedError, match=f"does not take {reason.split()[0]}"):
            depthwise_triton.check("fwd", DepthwiseProblem(*layer))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", [c for c in taken(CASES) if c.dtype == "float32"], ids=name)
def test_output_and_gradients_are_the_oracles(case, dtype):
    assert_oracle(conformance, case._replace(dtype=dtype), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "case", [c for c in taken(depthwise.CASES) if c.dtype == "float32"], ids=name
)
def test_depthwise_output_and_gradients_are_the_oracles(case, dtype):
    assert_oracle(depthwise, case._replace(dtype=dtype), "triton")


def layer_of_a_room(dtype, groups, stride, rows=20_000):
    """The function of x and w of a layer over a room, by implementation, and its arrays."""
    voxels = from_coords(room(rows), jnp.zeros((rows, 0)), capacity=rows)
    found, out = kernel_map(voxels, 3, stride)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (rows, 64)).astype(dtype)
    w = jax.random.normal(keys[1], (27, groups, 64 // groups, 128 // groups)) / 24
    w = w.astype(dtype)

    def run(implementation, x, w):
        algorithms = {"fwd_algo": implementation, "bwd_algo": implementation}
        if groups == 64:
            return spatially_sparse_depthwise_conv(x, w[:, :, 0, 0], found, rows, **algorithms)
        return spatially_sparse_conv(
            dataclasses.replace(voxels, features=x),
            w if groups > 1 else w[:, 0],
            *(3, stride),
            groups=groups,
            kernel_map=found,
            output_voxels=out,
            **algorithms,
        ).features

    return run, x, w


def with_gradients(run):
    """The program of a function of x and w with its gradients, by default parameters."""

    def both(x, w):
        with tuning("off"):
            y, pullback = jax.vjp(run, x, w)
            return y, *pullback(jnp.cos(y))

    return jax.jit(both)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_layers_of_a_room_are_xlas(dtype, groups, stride):
    run, x, w = layer_of_a_room(dtype, groups, stride)
    # The last bit of a bfloat16 is 1/128 of a value, and some are five times the rest.
    allowed = {"bfloat16": 0.08, "float16": 0.01, "float32": 5e-4}[dtype]
    results = (with_gradients(partial(run, each))(x, w) for each in ("triton", "xla"))
    for got, want in zip(*results, strict=True):
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        assert np.abs(got - want).max() <= allowed * np.sqrt(np.mean(want**2))


@pytest.mark.gpu
def test_a_hundred_depthwise_backward_passes_are_the_same_bits():
    run, x, w = layer_of_a_room("bfloat16", 64, 1)
    both = with_gradients(partial(run, "triton"))
    first = jax.tree.map(np.asarray, both(x, w))
    for _ in range(100):
        jax.tree.map(np.testing.assert_array_equal, both(x, w), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(
    "operator",
    [conformance.api.OPERATOR, depthwise.api.OPERATOR],
    ids=["regular", "depthwise"],
)
def test_everything_that_is_offered_is_xlas(operator, direction, dtype):
    rows, channels = 4096, 64
    voxels = from_coords(room(rows), jnp.zeros((rows, 0)), capacity=rows)
    found = kernel_map(voxels, 3)[0].forward
    sizes, problem = (27, 1, channels, channels), LAYER._replace(dtype=jnp.dtype(dtype))
    if operator is depthwise.api.OPERATOR:
        sizes, problem = (27, channels), DepthwiseProblem(*problem._replace(features=8))
    x, dy, w = (
        jax.random.normal(key, size).astype(dtype)
        for key, size in zip(
            jax.random.split(jax.random.key(0), 3), (*[(rows, channels)] * 2, sizes), strict=True
        )
    )
    arrays = {"forward": (x, w), "input_grad": (dy, w), "weight_grad": (x, dy)}
    allowed = {"bfloat16": 0.08, "float32": 5e-4}[dtype]
    for function in operator.directions[direction]:
        static = {"precision": None} | ({"shape": sizes} if function == "weight_grad" else {})

        def run(name, offered, function=function, static=static):
            computed = getattr(operator.module(name), function)
            return computed(*arrays[function], found, **static, **offered).astype(jnp.float32)

        want = run("xla", {})
        for offered in operator.module("triton").search_space(direction, problem):
            off = jnp.abs(run("triton", offered) - want).max()
            assert off <= allowed * jnp.sqrt((want**2).mean()), (function, offered)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=name)
def test_searches_find_what_plain_jax_finds(case, monkeypatch):
    got = made(case)
    monkeypatch.setattr(maps, "_searches", lambda *_: "xla")
    jax.tree.map(np.testing.assert_array_equal, got, made(case))


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
def test_maps_of_shuffled_rooms_are_plain_jaxs(stride, monkeypatch):
    """Under `jax.jit`, where the device decides whether keys are sorted."""
    coords = np.random.default_rng(0).permutation(room(100_000))

    def tables():
        make = lambda coords: kernel_map(from_coords(coords, none, batch_size=1), 3, stride)  # noqa: E731
        none = jnp.zeros((len(coords), 0))
        return [jax.jit(make)(each) for each in (coords, room(100_000))]

    got = tables()
    monkeypatch.setattr(maps, "_searches", lambda *_: "xla")
    jax.tree.map(np.testing.assert_array_equal, got, tables())


@pytest.mark.gpu
def test_rows_beyond_32_bits():
    """More elements than 2^31: the last rows are right, in every result."""
    count, channels = (1 << 24) + 16, 128
    rows = row_table(jnp.arange(count, dtype=jnp.int32)[None])
    x = jnp.zeros((count, channels), jnp.bfloat16).at[-1].set(1)
    w = jnp.eye(channels, dtype=jnp.bfloat16)[None, None]
    y = triton_jax.forward(x, w, rows, precision=None)
    assert (y[-1] == 1).all() and not y[:-1].any()
    for pairs in (0, 1, 2):
        dw = triton_jax.weight_grad(x, x, rows, shape=w.shape, precision=None, pairs=pairs)
        assert (dw == 1).all()
    y = depthwise_triton.forward(x, w[:, 0, 0] + 1, rows, precision=None)
    assert y[-1].sum() == channels + 1 and not y[:-1].any()
    dw = depthwise_triton.weight_grad(x, x, rows, shape=(1, channels), precision=None)
    assert (dw == 1).all()


def test_the_rule_takes_triton_on_a_gpu_alone():
    operator = conformance.api.OPERATOR
    assert operator.pick("fwd", None, "cpu", None) == "xla"
    assert operator.rule["gpu"][0] == "triton"
