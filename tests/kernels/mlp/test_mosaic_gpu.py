"""The MLP's Mosaic GPU kernels: lowered and interpreted without a GPU, run on one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mosaic_gpu_compiled
from helpers.mosaic_gpu import SHARED, lowered, recorded_launches, shapes, shared_bytes
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from pallas_kernels.common import conformance, device
from pallas_kernels.conv2d import TileConfig
from pallas_kernels.conv2d import mosaic_gpu as kernels
from pallas_kernels.mlp import conformance as room
from pallas_kernels.mlp import mlp, mosaic_gpu, mosaic_gpu_whole, xla
from pallas_kernels.mlp.api import OPERATOR
from pallas_kernels.mlp.cases import CASES
from pallas_kernels.mlp.problem import Problem
from pallas_kernels.mlp.shapes import SHAPES, Shape

TAKEN = [case for case in CASES if case.dtype in kernels.DTYPES]
RAGGED = {"ragged": Shape(131, 7), "pixel": Shape(1, 1)}


def launches(shape, transformed, config=None):
    """`transformed`, such as `lowered`, of the three products of an MLP."""
    rows, channels, hidden = shape.rows, shape.channels, shape.hidden
    x, kernel, bias, before = (
        jax.ShapeDtypeStruct(size, "bfloat16")
        for size in ((rows, channels), (channels, hidden), (hidden,), (rows, hidden))
    )
    back = jax.ShapeDtypeStruct((hidden, channels), "bfloat16")
    for kept in (False, True):
        yield transformed(kernels.mlp_product, x, kernel, bias, kept=kept, config=config)
    keys = {"transposed": True, "config": config}
    yield transformed(kernels.mlp_product, x, back, None, before, **keys)


@pytest.mark.parametrize(
    "name",
    [
        *RAGGED,
        # The fewest channels, and the most.
        *(
            pytest.param(
                name, marks=pytest.mark.slow if 0 < i < len(SHAPES) - 1 else pytest.mark.wide
            )
            for i, name in enumerate(SHAPES)
        ),
    ],
)
def test_kernels_lower_for_cuda(name):
    for text in launches((SHAPES | RAGGED)[name], lowered):
        assert "mosaic_gpu" in text


@pytest.mark.parametrize("name", [*SHAPES, *RAGGED])
def test_launches_fit_on_a_multiprocessor(name, monkeypatch):
    made = recorded_launches(monkeypatch)
    shape = (SHAPES | RAGGED)[name]
    for config in (None, *kernels.TILES):
        try:
            (one, *_), *_ = launches(shape, shapes, config)
        except NotImplementedError:
            assert config is not None
        else:
            assert one.shape == (shape.rows, shape.hidden)
    assert len(made) >= 3
    for scratch, _ in made:
        assert shared_bytes(scratch) <= SHARED and scratch[1].shape[0] >= 2


@pytest.fixture
def interpreted(gpu_interpreter, monkeypatch):
    """The implementation in Pallas' GPU interpreter, with few blocks."""
    monkeypatch.setattr(kernels, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(mosaic_gpu_whole, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)


def assert_oracle(case, run):
    """The output and all gradients are within twice the error of plain JAX in 16 bits."""
    got = run(room.computed(case, "mosaic_gpu"))(*case.drawn())
    bounds = conformance.bounds(case, lambda case: room.baseline(case)(*case.drawn()))
    for name, want in conformance.expected(case).items():
        assert conformance.worst(got[name], want) <= bounds[name], name


@pytest.mark.wide
@pytest.mark.parametrize("case", TAKEN[:2], ids=lambda case: case.name)
def test_interpreted_kernels_against_the_oracle(case, interpreted):
    assert_oracle(case, lambda function: function)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiles", [TileConfig(64, 64, 16, 4, 1, 3), TileConfig(128, 64, 16, 8, 1, 3)], ids=str
)
def test_interpreted_tiles_against_plain_jax(tiles, interpreted):
    """Consumers that take alternate tiles, and that share one; several stores a tile."""
    rng = np.random.default_rng(0)
    x, kernel, bias, before, dy = (
        jnp.asarray(rng.normal(size=size), "float16")
        for size in ((150, 24), (24, 72), (72,), (150, 72), (150, 24))
    )
    got = kernels.mlp_product(x, kernel, bias, kept=True, config=tiles)
    got += kernels.mlp_product(dy, kernel.T, None, before, transposed=True, config=tiles)
    back = {"kernel": kernel.T, "before": before, "precision": None}
    want = xla.widened(x, kernel, bias, kept=True, precision=None)
    want += xla.narrowed_grad(dy, **back)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)


WIDE = {"wide": Shape(100, 200), "widest": Shape(100, 256)}


def whole_arrays(shape, dtype="bfloat16", hidden=None, features=None, scale=1.0):
    """x, kernels, biases and a residual of a whole MLP."""
    rows, channels = shape
    hidden, features = hidden or shape.hidden, features or channels
    rng = np.random.default_rng(0)

    def drawn(*size, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=size), dtype)

    kernels = drawn(channels, hidden, scale=scale * channels**-0.5), drawn(hidden, features)
    biases = drawn(hidden, scale=scale), drawn(features)
    return drawn(*shape), (kernels[0], kernels[1] / hidden**0.5), biases, drawn(rows, features)


def whole_shapes(shape):
    """The shapes of x, kernels, biases and a residual of a whole MLP in bfloat16."""
    rows, channels, hidden = *shape, shape.hidden
    sizes = (channels, hidden), (hidden, channels), (hidden,), (channels,), (rows, channels)
    x, *rest = (jax.ShapeDtypeStruct(size, "bfloat16") for size in (tuple(shape), *sizes))
    return x, tuple(rest[:2]), tuple(rest[2:4]), rest[4]


def cut_of(shape, **tile):
    """The tiling of a whole MLP of a named shape in bfloat16."""
    return mosaic_gpu_whole.tiling(
        Problem(tuple(shape), np.dtype("bfloat16"), shape.hidden, shape.channels), **tile
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.wide] * (name not in ("convnext_t_stage2", "pixel")))
        for name in [*list(SHAPES)[:2], *RAGGED, *WIDE]
    ],
)
def test_a_whole_mlp_lowers_for_cuda(name):
    shape = (SHAPES | RAGGED | WIDE)[name]
    assert "mosaic_gpu" in lowered(
        mosaic_gpu_whole.whole, *whole_shapes(shape), epsilon=1e-6, cut=cut_of(shape)
    )


def test_tiles_of_a_whole_mlp_fit_on_a_multiprocessor(monkeypatch):
    """They cover all rows and channels; what has too many sums for registers has none."""
    made = recorded_launches(monkeypatch)
    for shape in (SHAPES | RAGGED | WIDE).values():
        problem = Problem(tuple(shape), np.dtype("bfloat16"), shape.hidden, shape.channels)
        space = mosaic_gpu.search_space("whole", problem)
        assert space[0] == {}
        for tile in space:
            cut = cut_of(shape, **tile)
            if shape.channels > 256:
                assert cut is None and space == [{}]
                continue
            for parts, size in (cut.read, cut.written):
                assert 0 <= parts * size - shape.channels < 16
            assert cut.resident == (cut.stages >= math.ceil(shape.hidden / cut.chunk))
            assert (cut.tiles - 1) * 64 * cut.consumers < shape.rows
            y = shapes(mosaic_gpu_whole.whole, *whole_shapes(shape), epsilon=None, cut=cut)
            assert y.shape == (shape.rows, shape.channels)
            (scratch, _) = made[-1]
            assert shared_bytes(scratch) <= SHARED
    # ConvNeXt-T's first kernels stay in shared memory, those of its second stage go round.
    first, second, *_ = map(cut_of, SHAPES.values())
    assert first.resident and first.consumers == 3 and not second.resident
    # Mosaic has 32 mbarriers of one name.
    narrow = mosaic_gpu_whole.tiling(Problem((64, 16), np.dtype("bfloat16"), 4096, 16))
    assert narrow.chunks > 32 and not narrow.resident


@pytest.mark.slow
def test_whole_mlps_compile_without_a_gpu_and_keep_their_sums_in_registers(tmp_path):
    found = mosaic_gpu_compiled.report("mlp", tmp_path)
    assert len(found) >= 5
    for name, (registers, spilled, shared) in found.items():
        threads = 512 if "consumers=3" in name else 384
        assert registers * threads <= 65536 and spilled == 0 and shared <= SHARED, name


WHOLE = (
    # Chunks that go round through two stages, several tiles; large arguments of GELU.
    (Shape(450, 72), "float16", 300, 40, {"consumers": 3, "chunk": 64}, 96, 4.0),
    (Shape(300, 24), "bfloat16", 72, 24, {}, None, 1.0),
    (Shape(67, 7), "float16", 20, 9, {"consumers": 2, "chunk": 32}, None, 30.0),
    (Shape(1, 1), "bfloat16", 1, 1, {}, None, 1.0),
    (Shape(200, 64), "bfloat16", 256, 64, {"consumers": 2, "chunk": 128}, None, 1.0),
)


WHOLE_ARGUMENTS = "shape", "dtype", "hidden", "features", "tile", "memory", "scale"


def assert_whole(shape, dtype, hidden, features, tile, memory, scale, monkeypatch):
    """With a residual and without one, a norm and none, to the rounding of rows and output."""
    if memory is not None:
        monkeypatch.setattr(mosaic_gpu_whole, "SHARED", memory * 1024)
    arrays = whole_arrays(shape, dtype, hidden, features, scale)
    problem = Problem(tuple(shape), np.dtype(jnp.dtype(dtype)), hidden, features)
    cut = mosaic_gpu_whole.tiling(problem, **tile)
    *given, residual = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
    eps = float(jnp.finfo(dtype).eps)
    for epsilon in (1e-6, None)[: 1 + (memory is None)]:
        added = None if epsilon is None else residual
        want = xla.whole(*given, added, epsilon=epsilon, precision="highest")
        own = None if added is None else arrays[3]
        got = mosaic_gpu_whole.whole(*arrays[:3], own, epsilon=epsilon, cut=cut)
        error = float(jnp.abs(got.astype(jnp.float32) - want).max())
        assert error <= 2 * eps * float(jnp.abs(want).max())
    return cut


@pytest.mark.parametrize(
    WHOLE_ARGUMENTS,
    [pytest.param(*one, marks=[pytest.mark.wide] * (i > 0)) for i, one in enumerate(WHOLE)],
)
def test_interpreted_whole_mlps_are_float32s(
    shape, dtype, hidden, features, tile, memory, scale, interpreted, monkeypatch
):
    cut = assert_whole(shape, dtype, hidden, features, tile, memory, scale, monkeypatch)
    assert cut.resident == (memory is None)


def test_a_call_is_whole_unless_it_is_differentiated(monkeypatch):
    """And by what its own variable names; too wide a one is what the other kernels compute."""
    made = []

    def found(name):
        def run(x, *arrays, **keys):
            made.append(name)
            return getattr(xla, name)(x, *arrays, **keys)

        return run

    for name in ("whole", "widened", "narrowed_grad"):
        monkeypatch.setattr(mosaic_gpu, name, found(name))
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)
    x, kernels, biases, residual = whole_arrays(Shape(8, 16))

    def call(x, **keys):
        y = mlp(x, kernels, biases, residual=residual, epsilon=1e-6, **keys)
        return jnp.sin(y.astype(jnp.float32)).sum()

    call(x, implementation="mosaic_gpu")
    assert made == ["whole"]
    made.clear()

    def one(x, residual):
        return mlp(x, kernels, biases, residual=residual, implementation="mosaic_gpu")

    mapped = jax.vmap(one, (0, None))(jnp.stack([x, 2 * x]), residual)
    np.testing.assert_array_equal(mapped[1], one(2 * x, residual))
    assert {*made} == {"whole"}
    made.clear()
    gradient = jax.grad(call)(x, implementation="mosaic_gpu")
    np.testing.assert_array_equal(gradient, jax.grad(call)(x, implementation="xla"))
    assert made[-2:] == ["widened", "narrowed_grad"]
    made.clear()
    monkeypatch.setenv("FLASH_WTCONV_MLP_WHOLE", "mosaic_gpu")
    call(x)
    assert made == ["whole"]
    made.clear()
    jax.grad(call)(x)
    assert "widened" not in made and "narrowed_grad" not in made
    assert OPERATOR.directions["whole"] == ("whole",)


@pytest.mark.parametrize("name", ["xla", "mosaic_gpu"])
def test_arrays_may_be_split_in_other_ways_than_x(name, monkeypatch):
    """On Explicit axes: the residual, and the second layer by features; so are their gradients."""
    for function in ("whole", "widened", "narrowed_grad"):
        monkeypatch.setattr(mosaic_gpu, function, getattr(xla, function))
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)
    mesh = AbstractMesh((2, 2), ("n", "c"), axis_types=(AxisType.Explicit,) * 2)

    def loss(x, second, outer, residual):
        kernels, biases = (jnp.ones((4, 8), x.dtype), second), (jnp.ones(8), outer)
        y = mlp(x, kernels, biases, residual=residual, epsilon=1e-6, implementation=name)
        return y.astype(jnp.float32).sum()

    whole, rows, channels = jax.P(None, None, None), jax.P("n", None, None), jax.P("n", None, "c")
    cases = (whole, None, rows), (channels, None, channels), (rows, "c", rows)
    for x, features, residual in cases:
        specs = x, jax.P(None, features), jax.P(features), residual
        arrays = [
            jax.ShapeDtypeStruct(shape, "float16", sharding=NamedSharding(mesh, spec))
            for shape, spec in zip(((4, 4, 4), (8, 4), (4,), (4, 4, 4)), specs, strict=True)
        ]
        with jax.sharding.use_abstract_mesh(mesh):
            found = jax.eval_shape(jax.grad(loss, range(4)), *arrays)
        assert [one.sharding for one in found] == [one.sharding for one in arrays]


def test_a_whole_mlp_that_is_too_wide_has_its_hidden_rows_in_memory(monkeypatch):
    made = recorded_launches(monkeypatch)
    y = jax.eval_shape(
        lambda *arrays: mosaic_gpu.whole(*arrays, epsilon=1e-6, precision=None),
        *whole_shapes(Shape(64, 384)),
    )
    assert y.shape == (64, 384) and len(made) == 1


@pytest.mark.gpu
@pytest.mark.skipif(device.platform() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_kernels_on_a_gpu(case):
    reason = mosaic_gpu.unavailable("gpu")
    if reason:
        pytest.skip(reason)
    assert_oracle(case, jax.jit)


@pytest.mark.gpu
@pytest.mark.skipif(device.platform() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    WHOLE_ARGUMENTS,
    [
        *WHOLE,
        # Many tiles a block, the last one not whole: chunks that stay, and chunks that go round.
        (Shape(100001, 96), "bfloat16", 384, 96, {}, None, 1.0),
        (Shape(100001, 192), "float16", 768, 192, {}, None, 1.0),
    ],
)
def test_whole_mlps_on_a_gpu(shape, dtype, hidden, features, tile, memory, scale, monkeypatch):
    """The oracle's cases have no norm inside the launch."""
    reason = mosaic_gpu.unavailable("gpu")
    if reason:
        pytest.skip(reason)
    assert_whole(shape, dtype, hidden, features, tile, memory, scale, monkeypatch)
