"""The dense convolution's Triton kernels: interpreted, compiled without a GPU, run where one is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.conv2d import (
    MOMENTS,
    ON_GPU,
    WHOLE_ROWS,
    arrays,
    assert_close,
    assert_igemm,
    assert_moments,
    assert_oracle,
    assert_sharded,
    assert_whole_rows,
    expected,
    plain,
    value_and_grads,
)
from helpers.triton import INTERPRETED, PARTS, compiled_resources, interpret

from flash_wtconv_jax import tuning
from pallas_kernels.conv2d import TileConfig, conv2d
from pallas_kernels.conv2d import triton as triton_jax
from pallas_kernels.conv2d.api import OPERATOR, _checked_config
from pallas_kernels.conv2d.cases import HARD, TABLE, UPSAMPLED, Case
from pallas_kernels.conv2d.problem import Problem, Window
from pallas_kernels.conv2d.shapes import SHAPES

EXTRA = (
    # Several tiles each way, the last of each in part; whole blocks of channels of one tap.
    Case(1, 5, 6, 32, 2, 2, 20, padding="SAME", dtype="float16", bias=True, activation="gelu"),
    Case(1, 9, 5, 64, 3, 1, 18, 2, 1, groups=2, layout="nchw_fchw", bias=True),
    # One dtype in, another out.
    *TABLE[:2],
)
TAKEN = [case for case in HARD + EXTRA + UPSAMPLED if case.n and case.dtype != "float64"]
# The interpreter multiplies the bits of bfloat16.
INTERPRETABLE = [case for case in TAKEN if case.dtype != "bfloat16"]
# Windows of odd rows begin where those of even ones do, then a sample later; zeros; both layouts.
PHASES = (
    Case(1, 3, 4, 3, 5, 3, 2, padding=((2, 2), (1, 1)), upsample=2),
    Case(2, 2, 5, 4, 3, 3, 6, padding="reflect", layout="nchw_fchw", upsample=2),
)
# What others have too: relu, another layout, mirrored edges, groups; and upsampling.
WIDE = {HARD[0], HARD[1], HARD[3], HARD[5], HARD[14], HARD[15], UPSAMPLED[0]}
# Of the rest of upsampling the kernels know nothing: it is plain convolutions around them.
SLOW = {*UPSAMPLED[1:]}
SMALL = TileConfig(16, 16, 32, 1, 1)
"""Tiles so small that there are several of these small cases."""


def marks(case):
    return [pytest.mark.slow] * (case in SLOW) + [pytest.mark.wide] * (case in WIDE)


@pytest.fixture
def interpreted(monkeypatch):
    """The implementation in Triton's interpreter."""
    interpret(monkeypatch, triton_jax)


def ours(case, config=None):
    def call(x, w, bias):
        return conv2d(
            x,
            w,
            bias=bias,
            out_dtype=case.out_dtype,
            implementation="triton",
            config=config,
            **case.arguments,
        )

    return call


@INTERPRETED
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=marks(case)) for case in INTERPRETABLE],
)
def test_interpreted_kernels_are_the_oracles(interpreted, case):
    assert_close(case, value_and_grads(ours(case, SMALL), case), expected(case))


@INTERPRETED
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.wide] * (i > 0))
        for i, case in enumerate(MOMENTS)
    ],
)
def test_interpreted_moments_are_the_outputs(interpreted, case):
    assert_moments(case, triton_jax, SMALL)


@INTERPRETED
@pytest.mark.wide
@pytest.mark.parametrize("case", PHASES, ids=lambda case: case.name)
def test_interpreted_phases_are_one_launch(interpreted, case, monkeypatch):
    monkeypatch.setattr(triton_jax, "forward", None)
    assert_moments(case, triton_jax, SMALL)


# What makes one of a row of taps is around the kernels, and plain JAX has it in every case.
@INTERPRETED
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, id=case.name, marks=pytest.mark.wide if i in (0, 4) else pytest.mark.slow
        )
        for i, case in enumerate(WHOLE_ROWS)
    ],
)
def test_interpreted_rows_of_taps_are_multiplied_as_one(interpreted, case, monkeypatch):
    assert_whole_rows(case, triton_jax, monkeypatch, SMALL)


@INTERPRETED
@pytest.mark.wide
def test_interpreted_moments_of_a_large_mean_lose_nothing(interpreted):
    assert_moments(MOMENTS[0]._replace(nf=4, groups=2), triton_jax, SMALL, mean=1e4)


@pytest.mark.wide
@INTERPRETED
def test_kernels_are_differentiated_twice_and_mapped(interpreted):
    case = Case(2, 4, 4, 2, 3, 2, 2, (2, 1), "reflect", groups=2, bias=True, activation="relu")
    x, w, bias, _ = arrays(case)

    def second(call):
        loss = lambda *args: jnp.sin(call(*args)).sum()  # noqa: E731
        squared = lambda *args: sum(  # noqa: E731
            (g**2).sum() for g in jax.grad(loss, (0, 1))(*args)
        )
        mapped = jax.vmap(jax.grad(squared, (0, 1)), (0, None, None))
        return jax.jit(mapped)(x[:, None], w, bias)

    for got, want in zip(second(ours(case, SMALL)), second(plain(case)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@INTERPRETED
def test_tiles_are_measured(interpreted, monkeypatch):
    """Where Triton is named, its tiles are timed, and those taken are right."""
    seen = []
    real = triton_jax.forward

    def forward(*args, config, **kwargs):
        seen.append(config)
        return real(*args, config=config, **kwargs)

    monkeypatch.setattr(triton_jax, "forward", forward)
    monkeypatch.setattr(triton_jax, "search_space", lambda *_: [SMALL._asdict()])
    case = Case(1, 4, 4, 2, 2, 2, 3, bias=True, activation="gelu")
    with tuning("search"):
        assert_close(case, value_and_grads(ours(case), case), expected(case))
        # What is given is not measured.
        conv2d(*arrays(case)[:2], implementation="triton", config=TileConfig(32, 16, 16, 1, 1))
    assert set(seen) == {SMALL, TileConfig(32, 16, 16, 1, 1)}


def test_the_grid_offers_tiles_that_the_kernels_take():
    for dtype in ("float32", "bfloat16"):
        for direction in ("fwd", "bwd"):
            first, rows, *others = triton_jax.search_space(
                direction, LAYER._replace(dtype=np.dtype(dtype))
            )
            assert first == {} and rows == {"whole_rows": True} and others
            assert all(_checked_config(TileConfig(**tiles)) for tiles in others)


@INTERPRETED
def test_not_a_number_stays_one(interpreted):
    x, w = jnp.full((1, 2, 2, 1), jnp.nan), jnp.ones((1, 1, 1, 1))
    y = conv2d(x, w, activation="relu", implementation="triton", config=SMALL)
    assert jnp.isnan(y).all()


@pytest.mark.wide
@PARTS
def test_kernels_compile_and_keep_their_sums_in_registers(part, tmp_path):
    resources = compiled_resources("conv2d", part, tmp_path)
    assert len(resources) == {"some": 4, "rest": 16}[part]
    for name, (registers, spilled) in resources.items():
        assert registers <= 255 and spilled <= 16, (name, registers, spilled)


LAYER = Problem((2, 8, 8, 4), np.dtype("float32"), 3, 3, 8, Window(), np.dtype("float32"))
REFUSED = {
    "float64, float32, bfloat16, float16 alone": {"out_dtype": np.dtype("float64")},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "images of 65536x65536x4, which are too many": {"shape": (1, 2**16, 2**16, 4)},
    "the pixels of 1073741824 images": {"shape": (2**30, 8, 8, 4)},
    "1073741824 filters of 4 channels": {"features": 2**30},
    "65536 groups": {"window": Window(groups=2**16)},
    "symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason):
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        triton_jax.check("fwd", LAYER._replace(**REFUSED[reason]))


def test_without_a_gpu_it_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="triton: needs a GPU, this is a cpu"):
        conv2d(np.ones((4, 4, 1)), np.ones((1, 1, 1, 1)), implementation="triton")
    assert OPERATOR.pick("fwd", None, "cpu", None) == "xla"


@pytest.mark.gpu
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU)
def test_the_table(case):
    assert_igemm(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layers_of_a_network_are_xlas(name, dtype):
    layer = SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, bias = map(jax.random.normal, keys, (layer.x, layer.w, (layer.features,)))
    arrays = [a.astype(dtype) for a in (x, w / np.sqrt(w[..., 0].size), bias)]

    def run(implementation):
        def call(x, w, bias):
            rest = {"padding": "reflect", "activation": "gelu", "implementation": implementation}
            return conv2d(x, w, bias=bias, **rest)

        y, pullback = jax.vjp(call, *arrays)
        return y, *pullback(jnp.cos(y))

    # The last bit of a bfloat16 is 1/128 of a value, and some are five times the rest.
    allowed = 0.08 if dtype == "bfloat16" else 5e-4
    for got, want in zip(run("triton"), run("xla"), strict=True):
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        assert np.abs(got - want).max() <= allowed * np.sqrt(np.mean(want**2))


@pytest.mark.gpu
@pytest.mark.parametrize("case", WHOLE_ROWS, ids=lambda case: case.name)
def test_rows_of_taps_are_multiplied_as_one(case, monkeypatch):
    assert_whole_rows(case, triton_jax, monkeypatch)


@pytest.mark.gpu
def test_moments():
    for case in MOMENTS:
        assert_moments(case, triton_jax)
    layer = Case(2, 65, 96, 64, 3, 3, 136, padding="reflect", dtype="bfloat16")
    assert_moments(layer, triton_jax)
    for case in PHASES:
        assert_moments(case, triton_jax)
    upsampled = Case(2, 33, 40, 64, 3, 3, 32, padding="reflect", dtype="bfloat16", upsample=2)
    assert_moments(upsampled, triton_jax)


@pytest.mark.gpu
def test_gradients_are_bitwise_reproducible():
    case = Case(8, 33, 31, 24, 3, 3, 40, padding="SAME", dtype="bfloat16")
    first, again = (value_and_grads(ours(case), case) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("triton", check_vma)
