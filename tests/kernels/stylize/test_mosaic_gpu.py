"""The Mosaic GPU kernels of the instance normalisation: lowered and interpreted, run on a GPU."""

from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mosaic_gpu_compiled
from helpers.mosaic_gpu import SHARED, lowered, recorded_launches, shapes, shared_bytes
from helpers.stylize import assert_oracle, assert_sharded

from pallas_kernels.stylize import instance_norm, mosaic_gpu, xla
from pallas_kernels.stylize.api import OPERATOR
from pallas_kernels.stylize.cases import CASES, Case
from pallas_kernels.stylize.conformance import problem
from pallas_kernels.stylize.problem import Problem
from pallas_kernels.stylize.shapes import SHAPES

DIRECTIONS = ("fwd", "bwd")


def takes(case):
    try:
        mosaic_gpu.check("bwd", problem(case))
    except NotImplementedError:
        return False
    return True


TAKEN = [case for case in CASES if takes(case)]


def traced(direction, shape, dtype, residual, transformed, activation="relu", **sizes):
    """`transformed`, such as `lowered`, of one direction."""
    n, *_, c = shape
    x, each, known = (
        jax.ShapeDtypeStruct(size, kind)
        for size, kind in ((shape, dtype), ((n, c), "float32"), ((n, 3, c), "float32"))
    )
    added, keys = x if residual else None, {"activation": activation, **sizes}
    if direction == "fwd":
        return transformed(mosaic_gpu.forward, x, each, each, added, eps=1e-5, **keys)
    return transformed(mosaic_gpu.backward, x, known, each, each, added, x, **keys)


def launched(monkeypatch, direction, shape, dtype, **sizes):
    """The plan of a launch, its scratch types and its keywords; results have the right shapes."""
    launches = recorded_launches(monkeypatch)
    found = traced(direction, shape, dtype, False, shapes, **sizes)
    n, *_, c = shape
    chex.assert_shape(found[0], shape)
    assert found[0].dtype == dtype
    if direction == "fwd":
        chex.assert_shape(found[1], (n, 3, c))
    else:
        chex.assert_shape(found[1:3], (n, c))
    ((scratch, keys),) = launches
    call = mosaic_gpu._call(direction, Problem(shape, jnp.dtype(dtype)))
    return mosaic_gpu._plan(call, sizes), scratch, keys


# A single block, a cluster whose last block is not full, blocks that wait for each other.
LOWERED = (
    ((2, 7, 5, 16), "float32", True, {}),
    ((20, 17, 15, 64), "float16", False, dict(channels=16, members=2, pixels=32)),
    ((3, 33, 32, 64), "bfloat16", True, dict(channels=32, members=33, pixels=16)),
)


@pytest.mark.core
@pytest.mark.parametrize(
    ("call", "direction"),
    [
        pytest.param(
            *(call, direction),
            id=f"{call[0]}-{direction}",
            marks={(2, "bwd"): [], (1, "fwd"): pytest.mark.wide}.get(
                (i, direction), pytest.mark.slow
            ),
        )
        for (i, call), direction in product(enumerate(LOWERED), DIRECTIONS)
    ],
)
def test_kernels_lower_for_cuda(call, direction):
    shape, dtype, residual, sizes = call
    text = traced(direction, shape, dtype, residual, lowered, **sizes)
    assert "mosaic_gpu" in text
    # A semaphore for each item, the same one for all blocks: more of them would never be reached.
    items = shape[0] * shape[-1] // sizes.get("channels", shape[-1])
    assert (f"tensor<{items}xi32>" in text) == (sizes.get("members", 1) > 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_of_a_networks_layers_lower_for_cuda(name, dtype):
    assert "mosaic_gpu" in traced("fwd", tuple(SHAPES[name]), dtype, False, lowered)


@pytest.mark.core
@pytest.mark.wide
def test_kernels_lower_where_jax_counts_in_64_bits():
    with jax.enable_x64(True):
        for direction in DIRECTIONS:
            shape, dtype, residual, sizes = LOWERED[1]
            assert "mosaic_gpu" in traced(direction, shape, dtype, residual, lowered, **sizes)


@pytest.mark.slow
def test_kernels_compile_without_a_gpu_and_keep_what_they_hold_in_registers(tmp_path):
    found = mosaic_gpu_compiled.report("stylize", tmp_path)
    assert len(found) == 5
    for name, (registers, spilled, shared) in found.items():
        # Four warpgroups share 65536 registers.
        assert registers <= 128 and spilled == 0 and shared <= SHARED, name


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_division_that_is_offered_fits(name, direction, monkeypatch):
    shape = tuple(SHAPES[name])
    for dtype in ("bfloat16", "float32"):
        first, *others = mosaic_gpu.search_space(direction, Problem(shape, jnp.dtype(dtype)))
        assert first == {} and 3 <= len(others) < mosaic_gpu._OFFERED
        for sizes in (first, *others):
            plan, scratch, keys = launched(monkeypatch, direction, shape, dtype, **sizes)
            assert (
                shared_bytes([part for part in scratch if hasattr(part, "shape")]) <= SHARED - 1024
            )
            # Mosaic takes 32 mbarriers in an array, TMA 256 elements along an axis.
            assert 4 * plan.stages <= 32 and max(plan.pixels, plan.channels) <= 256
            blocks = plan.groups * plan.members
            # Blocks that wait for each other have a multiprocessor each.
            assert blocks <= mosaic_gpu.MULTIPROCESSORS
            if "cluster" in keys:
                assert keys["cluster"] == (plan.members,) and plan.members <= 8
            else:
                assert keys["grid"] == (blocks,)


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_hold_every_pixel_once(name):
    n, h, w, c = SHAPES[name]
    call = mosaic_gpu._call("fwd", Problem((n, h, w, c), jnp.dtype("bfloat16")))
    for plan in mosaic_gpu._plans(call, 132):
        assert (plan.members - 1) * plan.block < h * w <= plan.members * plan.block
        assert plan.items * plan.channels == n * c
        assert plan.rows * plan.channels == 128 * 4 and plan.pixels % plan.rows == 0
        # What is kept is there until it is written; of what is not, a stage is filled meanwhile.
        assert plan.chunks <= plan.stages if plan.kept else plan.stages >= 2


def test_what_was_measured_for_another_shape_may_not_be_possible():
    call = mosaic_gpu._call("fwd", Problem((1, 4, 4, 16), jnp.dtype("float32")))
    asked = {"channels": 64, "members": 132, "pixels": 64}
    for changes in ({}, {"channels": 128}, {"channels": 8, "members": 200}):
        assert mosaic_gpu._plan(call, asked | changes) == mosaic_gpu._plan(call, {})


def test_fewer_multiprocessors_have_fewer_blocks(monkeypatch):
    class Gpu:
        platform, device_kind, core_count = "gpu", "NVIDIA H100 PCIe MIG", 30

    monkeypatch.setattr(mosaic_gpu.device, "current", Gpu)
    shape = tuple(SHAPES["style_512_half"])
    plan, _, keys = launched(monkeypatch, "fwd", shape, "bfloat16")
    assert plan.groups * plan.members <= 30


@pytest.fixture
def interpreted(gpu_interpreter, monkeypatch):
    """The implementation in Pallas' GPU interpreter, with few blocks.

    It knows no semaphores: there all groups are clusters.
    """
    monkeypatch.setattr(mosaic_gpu, "_CLUSTER", 64)
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)
    yield
    mosaic_gpu._plans.cache_clear()


def planned(monkeypatch, **sizes):
    """Has the kernels take these sizes unasked."""
    plan = mosaic_gpu._plan
    monkeypatch.setattr(mosaic_gpu, "_plan", lambda call, asked: plan(call, asked or sizes))


INTERPRETED = {
    # Two blocks of a cluster, the second with three pixels; two items.
    "cluster": (
        Case(9, 15, 16, (1,), "relu", residual=True),
        dict(channels=8, members=2, pixels=64),
    ),
    "far mean": (
        Case(5, 7, 16, (2,), mean=1e4),
        dict(channels=8, members=1, pixels=64),
    ),
    "bfloat16": (
        Case(16, 8, 64, (1,), "relu", styles=True, dtype="bfloat16"),
        dict(channels=32, members=2, pixels=16),
    ),
    # Several chunks of a warpgroup, in as many stages.
    "kept": (Case(19, 33, 16, (1,)), dict(channels=8, members=1, pixels=64)),
}


@pytest.mark.core
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.wide if name == "cluster" else pytest.mark.slow])
        for name in INTERPRETED
    ],
)
def test_interpreted_kernels_are_the_oracles(interpreted, name, monkeypatch):
    case, sizes = INTERPRETED[name]
    planned(monkeypatch, **sizes)
    assert_oracle(case, "mosaic_gpu")


@pytest.mark.core
@pytest.mark.slow
def test_what_does_not_fit_is_read_again(interpreted, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_STAGES", 2)
    planned(monkeypatch, channels=8, members=1, pixels=64)
    # Three items of each block, whose last chunks stay in two stages.
    case = Case(20, 37, 16, (3,), "relu")
    for direction in DIRECTIONS:
        plan = mosaic_gpu._plan(mosaic_gpu._call(direction, problem(case)), {})
        assert (plan.chunks, plan.stages, plan.rounds) == (3, 2, 3)
    assert_oracle(case, "mosaic_gpu")


@pytest.mark.core
@pytest.mark.slow
def test_more_blocks_than_a_warpgroup_reads_at_once(interpreted, monkeypatch):
    """Blocks of one warpgroup, since the interpreter waits for as many threads as it has alone."""
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 8)
    monkeypatch.setattr(mosaic_gpu, "_WARPGROUPS", 1)
    monkeypatch.setattr(mosaic_gpu, "_ENTRIES", 2)
    planned(monkeypatch, channels=64, members=8, pixels=16)
    case = Case(20, 37, 128, (1,), "relu")
    got = mosaic_gpu.forward(*given(case), None, eps=1e-5, activation="relu")
    want = xla.forward(*given(case), None, eps=1e-5, activation="relu")
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.core
@pytest.mark.slow
def test_what_is_not_a_number_stays_in_its_channel_and_image(interpreted):
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 16)).astype(np.float32)
    x[1, 2, 1, 0] = np.nan
    y = instance_norm(x, activation="relu", implementation="mosaic_gpu")
    assert np.isnan(y[1, :, :, 0]).all()
    assert np.isfinite(y[0]).all() and np.isfinite(y[1, :, :, 1:]).all()


def given(case):
    """x, scale and bias of each image, as implementations take them."""
    x, scale, bias, _, _ = case.drawn()
    each = (x.shape[0], case.c)
    return jnp.asarray(x), jnp.broadcast_to(scale, each), jnp.broadcast_to(bias, each)


CALL = Problem((2, 8, 8, 16), np.dtype("float32"))
REFUSED = {
    "float64, float32, bfloat16, float16 alone": {"dtype": np.dtype("float64")},
    "an empty array": {"shape": (0, 8, 8, 16)},
    "12 channels, multiples of 8 alone": {"shape": (2, 8, 8, 12)},
    "x .*, of which no division fits shared memory and TMA's boxes": {"shape": (2, 1023, 1023, 8)},
    "images of 65536x65536 pixels, which are too many": {"shape": (1, 2**16, 2**16, 8)},
    "1073741824 images of 8 channels, which are too many": {"shape": (2**30, 8, 8, 8)},
    "arrays of symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 8, 8)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so_and_falls_back(reason):
    for direction in DIRECTIONS:
        with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
            mosaic_gpu.check(direction, CALL._replace(**REFUSED[reason]))


def test_without_a_gpu_it_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="mosaic_gpu: needs a GPU, this is a cpu"):
        instance_norm(np.ones((4, 4, 8), np.float32), implementation="mosaic_gpu")
    assert OPERATOR.rule["gpu"] == ("mosaic_gpu", "triton", "xla")


@pytest.mark.gpu
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", INTERPRETED)
def test_groups_of_every_kind_are_the_oracles(name, monkeypatch):
    case, sizes = INTERPRETED[name]
    planned(monkeypatch, **sizes)
    assert_oracle(case, "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_divisions_of_a_networks_layers_are_xlas_and_bitwise_reproducible(name, dtype):
    shape = tuple(SHAPES[name])
    x, residual, dy = (
        jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3)
    )
    ones = jnp.ones((shape[0], shape[-1]))
    keys = {"eps": 1e-5, "activation": "relu"}
    want, statistics = xla.forward(x, ones, ones, residual, **keys)
    known = x, statistics, ones, ones, residual, dy
    slopes = xla.backward(*known, activation="relu")
    rtol = 0.02 if dtype == "bfloat16" else 1e-4
    call = Problem(shape, jnp.dtype(dtype), "relu", True)
    for sizes in mosaic_gpu.search_space("fwd", call):
        runs = [mosaic_gpu.forward(x, ones, ones, residual, **keys, **sizes) for _ in range(3)]
        chex.assert_trees_all_close(runs[0], (want, statistics), rtol=rtol, atol=rtol)
        chex.assert_trees_all_equal(*runs)
    for sizes in mosaic_gpu.search_space("bwd", call):
        runs = [mosaic_gpu.backward(*known, activation="relu", **sizes) for _ in range(3)]
        chex.assert_trees_all_close(runs[0], slopes, rtol=rtol, atol=0.05)
        chex.assert_trees_all_equal(*runs)


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("mosaic_gpu", check_vma)
