"""The Triton kernels of the instance normalisation: interpreted, compiled, run where a GPU is."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stylize import assert_close, assert_oracle, assert_sharded
from helpers.triton import INTERPRETED, PARTS, compiled_resources, interpret

from pallas_kernels.dispatch import tuning
from pallas_kernels.stylize import baseline_jax, conformance, instance_norm
from pallas_kernels.stylize import triton as triton_jax
from pallas_kernels.stylize.api import OPERATOR
from pallas_kernels.stylize.cases import CASES, HARD, Case
from pallas_kernels.stylize.problem import Problem
from pallas_kernels.stylize.shapes import SHAPES
from pallas_kernels.stylize.triton_launches import Tiles, search_space

TAKEN = [case for case in CASES if 0 not in case.batch and case.dtype != "float64"]
# Slices of several rounds, the last of each in part; two blocks of channels, the second in part.
SLICED = (
    Case(7, 9, 3, activation="relu", residual=True, styles=True),
    Case(9, 5, 6, (1,), mean=1e4),
    Case(8, 8, 4, dtype="float16", activation="relu"),
    Case(1, 1, 5, residual=True),
)
SMALL = Tiles(4, 4, 3, 1)
"""Tiles so small that there are several of these small cases."""


@pytest.fixture
def interpreted(monkeypatch):
    """The implementation in Triton's interpreter."""
    interpret(monkeypatch, triton_jax)


@pytest.fixture
def small(monkeypatch):
    """Small tiles, for those that are taken unasked."""
    from pallas_kernels.stylize import triton_launches

    monkeypatch.setattr(triton_launches, "tiles", lambda *_: SMALL)


@INTERPRETED
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.wide] * (case not in HARD[1:4]))
        for case in TAKEN
        # The interpreter rounds to bfloat16 in its own way.
        if case.dtype != "bfloat16"
    ],
)
def test_interpreted_kernels_are_the_oracles(case):
    assert_oracle(case, "triton")


@INTERPRETED
@pytest.mark.usefixtures("interpreted", "small")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.wide] * (case != SLICED[0]))
        for case in SLICED
    ],
)
def test_slices_of_several_rounds_are_the_oracles(case):
    assert_oracle(case, "triton")


@INTERPRETED
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.wide] * (case != SLICED[0]))
        for case in SLICED[:3]
    ],
)
def test_a_program_that_reads_twice_is_the_oracles(case, monkeypatch):
    from pallas_kernels.stylize import triton_launches

    monkeypatch.setattr(triton_launches, "tiles", lambda *_: SMALL._replace(slices=1))
    assert_oracle(case, "triton")


@pytest.mark.wide
@INTERPRETED
@pytest.mark.usefixtures("interpreted", "small")
def test_kernels_are_differentiated_twice_and_mapped():
    x, scale, bias, _, _ = Case(3, 4, 2).drawn()

    def second(call):
        loss = lambda *args: jnp.sin(call(*args, activation="relu")).sum()  # noqa: E731
        squared = lambda *args: sum((g**2).sum() for g in jax.grad(loss, (0, 1))(*args))  # noqa: E731
        mapped = jax.vmap(jax.grad(squared, (0, 1)), (0, None, None))
        return jax.jit(mapped)(x[:, None], scale, bias)

    ours = partial(instance_norm, implementation="triton")
    for got, want in zip(second(ours), second(baseline_jax.instance_norm), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.wide
@INTERPRETED
@pytest.mark.usefixtures("interpreted")
def test_tiles_are_measured(monkeypatch):
    """Where Triton is named, its tiles are timed, and those taken are right."""
    seen = []
    real = triton_jax.forward

    def forward(*args, **kwargs):
        seen.append({name: kwargs[name] for name in SMALL._fields if name in kwargs})
        return real(*args, **kwargs)

    monkeypatch.setattr(triton_jax, "forward", forward)
    monkeypatch.setattr(triton_jax, "search_space", lambda *_: [{}, SMALL._asdict()])
    case = Case(5, 4, 3, activation="relu", residual=True)
    with tuning("search"):
        assert_close(case, conformance.computed(case, "triton")(*case.drawn()))
    assert {} in seen and SMALL._asdict() in seen


def test_the_grid_offers_tiles_that_the_kernels_take():
    for shape in SHAPES.values():
        for direction in ("fwd", "bwd"):
            first, *others = search_space(direction, Problem(tuple(shape), np.dtype("float32")))
            assert first == {} and others
            for one in others:
                tiles = Tiles(**one)
                assert tiles.pixels * tiles.channels <= 1024 * tiles.warps
                assert all(value & (value - 1) == 0 for value in (tiles.pixels, tiles.channels))


def test_small_images_are_offered_a_single_launch():
    for name in ("style_256_trunk", "unet_32"):
        offered = search_space("fwd", Problem(tuple(SHAPES[name]), np.dtype("float32")))
        assert any(one["slices"] == 1 for one in offered[1:]), name


@INTERPRETED
@pytest.mark.usefixtures("interpreted", "small")
def test_what_is_not_a_number_stays_in_its_channel_and_image():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 2)).astype(np.float32)
    x[1, 2, 1, 0] = np.nan
    y = instance_norm(x, activation="relu", implementation="triton")
    assert np.isnan(y[1, :, :, 0]).all()
    assert np.isfinite(y[0]).all() and np.isfinite(y[1, :, :, 1]).all()


@PARTS
def test_kernels_compile_and_keep_their_tiles_in_registers(part, tmp_path):
    resources = compiled_resources("stylize", part, tmp_path)
    assert len(resources) == {"some": 4, "rest": 36}[part]
    for name, (registers, spilled) in resources.items():
        assert registers <= 255 and spilled == 0, (name, registers, spilled)


CALL = Problem((2, 8, 8, 4), np.dtype("float32"))
REFUSED = {
    "float64, float32, bfloat16, float16 alone": {"dtype": np.dtype("float64")},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "images of 65536x65536 pixels, which are too many": {"shape": (1, 2**16, 2**16, 4)},
    "1073741824 images of 4 channels, which are too many": {"shape": (2**30, 8, 8, 4)},
    "arrays of symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so_and_falls_back(reason):
    problem = CALL._replace(**REFUSED[reason])
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        triton_jax.check("fwd", problem)


def test_without_a_gpu_it_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="triton: needs a GPU, this is a cpu"):
        instance_norm(np.ones((4, 4, 1)), implementation="triton")
    assert OPERATOR.pick("fwd", None, "cpu", CALL) == "xla"


@pytest.mark.gpu
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_tiles_of_a_networks_layers_are_xlas_and_bitwise_reproducible(name, dtype):
    shape = tuple(SHAPES[name])
    x, residual, dy = (
        jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3)
    )
    ones = jnp.ones((shape[0], shape[-1]))
    want, statistics = OPERATOR.module("xla").forward(
        x, ones, ones, residual, eps=1e-5, activation="relu"
    )
    known = x, statistics, ones, ones, residual, dy
    slopes = OPERATOR.module("xla").backward(*known, activation="relu")
    rtol = 0.02 if dtype == "bfloat16" else 1e-4
    for sizes in search_space("bwd", Problem(shape, jnp.dtype(dtype))):
        for _ in range(2):
            y, _ = triton_jax.forward(x, ones, ones, residual, eps=1e-5, activation="relu", **sizes)
            chex.assert_trees_all_close(y, want, rtol=rtol, atol=rtol)
            got = triton_jax.backward(*known, activation="relu", **sizes)
            chex.assert_trees_all_close(got, slopes, rtol=rtol, atol=0.05)
        again = triton_jax.backward(*known, activation="relu", **sizes)
        assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, got, again)))


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("triton", check_vma)
