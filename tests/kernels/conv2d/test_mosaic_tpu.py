"""The TPU kernels of the dense convolution in Pallas' TPU interpreter: races, bounds and poison."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.conv2d import (
    MOMENTS,
    arrays,
    assert_close,
    assert_moments,
    assert_oracle,
    assert_sharded,
    expected,
    ours,
    plain,
    value_and_grads,
)
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv2d import TileConfig, conv2d, mosaic_tpu
from pallas_kernels.conv2d.api import OPERATOR
from pallas_kernels.conv2d.cases import HARD, TABLE, UPSAMPLED, Case
from pallas_kernels.conv2d.problem import Problem, Window

pytestmark = pytest.mark.usefixtures("tpu_interpreter")


def taken(case):
    """Whether the kernels are made for a case; the others are refused, which has its own test."""
    dtypes = {case.dtype, case.out_dtype or case.dtype}
    return case.n and case.groups == 1 and dtypes <= {"float32", "bfloat16"}


EXTRA = (
    # Patches, whose few channels are folded; two planes that are read, and two that are not.
    Case(2, 8, 13, 3, 4, 4, 6, 4, bias=True, activation="gelu"),
    Case(1, 9, 7, 2, 2, 1, 3, (2, 3), 1, layout="nchw_fchw"),
    # More padding than the taps reach.
    Case(1, 3, 4, 3, 2, 2, 3, (4, 3), ((5, 1), (2, 6))),
    # Small images together; two blocks of channels, and of features, the second in part.
    Case(6, 3, 4, 3, 2, 2, 3, padding="SAME", dtype="bfloat16"),
    # Rectangular, where an exchange of H and W shows.
    TABLE[21]._replace(dtype="bfloat16"),
    Case(1, 3, 4, 130, 1, 2, 3, bias=True, activation="relu"),
    Case(1, 2, 3, 2, 2, 1, 130, bias=True),
)
# Several steps down and across an image, the last of each in part.
TILED = (
    Case(2, 9, 6, 3, 3, 2, 4, padding="SAME", bias=True, activation="gelu"),
    Case(1, 3, 37, 2, 2, 3, 3, padding=1, bias=True),
    Case(1, 4, 71, 2, 1, 4, 3, (1, 2), "SAME", dtype="bfloat16"),
    Case(4, 2, 5, 2, 3, 3, 2, padding=1),
)
SMALL = TileConfig(32, 16, 16)


# What others have too: layers of no edge but a bias (the contract's), mirrored edges, rectangles,
# two blocks of channels or of features, and tiles across an image; strides of planes, more padding
# than taps reach, one tap.
WIDE = {HARD[3], EXTRA[-3], EXTRA[-1], TILED[1], HARD[1], EXTRA[2], HARD[12]}
# Another dtype of the output, four taps by a stride of four, several images, dilation.
WIDE |= {HARD[9], EXTRA[0], TILED[3], HARD[4]}
# Their edges, their padding beyond what taps reach, and their strides of one axis, are those of
# others.
SLOW = {HARD[0], HARD[2], EXTRA[-2], HARD[-1], HARD[-2], EXTRA[1], HARD[11], TILED[2]}


def some(cases):
    """Each of the cases, those of `WIDE` for `make test-wide` and those of `SLOW` by hand.

    Of upsampling the kernels know nothing: it is plain convolutions around them.
    """

    def marks(case):
        if case in SLOW or case in UPSAMPLED:
            return [pytest.mark.slow]
        return [pytest.mark.wide] * (case in WIDE)

    return [pytest.param(case, id=case.name, marks=marks(case)) for case in cases]


@pytest.mark.parametrize("case", some(filter(taken, HARD + EXTRA + UPSAMPLED)))
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "mosaic_tpu")


@pytest.mark.wide
@pytest.mark.parametrize("case", [MOMENTS[0], MOMENTS[2]], ids=lambda case: case.name)
def test_moments_are_the_outputs(case):
    assert_moments(case._replace(dtype="float32"), mosaic_tpu)


@pytest.mark.wide
def test_two_cores_do_not_race(races):
    assert_oracle(Case(1, 1, 2, 130, 1, 1, 130, bias=True), "mosaic_tpu")


@pytest.mark.parametrize("case", some(TILED))
def test_tiles_are_the_oracles(case, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_BLOCK_PIXELS", 16)
    steps = []
    real = mosaic_tpu._steps
    monkeypatch.setattr(mosaic_tpu, "_steps", lambda *args: steps.append(real(*args)) or steps[-1])

    def call(x, w, bias):
        tiles = {"implementation": "mosaic_tpu", "config": SMALL}
        return conv2d(x, w, bias=bias, out_dtype=case.out_dtype, **case.arguments, **tiles)

    assert_close(case, value_and_grads(call, case), expected(case))
    assert max(map(max, steps)) > 1 or case.n == 4


# What differentiates and maps kernels is one for all operators: the norm's is wide.
@pytest.mark.slow
def test_vmap_and_derivatives_of_gradients():
    case = Case(2, 5, 4, 2, 3, 2, 3, (2, 1), "SAME", activation="relu")
    x, w, _, _ = arrays(case)

    def second(call):
        loss = lambda *args: jnp.sin(call(*args, None)).sum()  # noqa: E731
        squared = lambda *args: sum((g**2).sum() for g in jax.grad(loss, (0, 1))(*args))  # noqa: E731
        slope = jax.vmap(jax.grad(squared, (0, 1)), (0, None))
        return jax.jit(slope)(x[:, None], w)

    for got, want in zip(second(ours(case, "mosaic_tpu")), second(plain(case)), strict=True):
        chex.assert_trees_all_close(got, want, rtol=1e-7, atol=1e-5 * np.abs(want).max())


@pytest.mark.wide
def test_sharded_over_the_batch():
    assert_sharded("mosaic_tpu", check_vma=True)


LAYER = Problem((2, 64, 64, 640), jnp.dtype("bfloat16"), 3, 3, 640, Window(), jnp.dtype("bfloat16"))
REFUSED = {
    "float16, float32 and bfloat16 alone": {"dtype": jnp.dtype("float16")},
    "float64, float32 and bfloat16 alone": {"out_dtype": jnp.dtype("float64")},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "2 groups of channels": {"window": Window(groups=2)},
    "symbolic size": {"shape": (*export.symbolic_shape("b"), 8, 8, 4)},
    "9 taps over 60001 x 3 pixels with any tiles: they need more than 96.0 MiB": {
        "shape": (1, 70000, 4, 4),
        "window": Window(pads=((0, 0), (1, 1)), dilation=(30000, 1)),
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so_and_falls_back(reason):
    problem = LAYER._replace(**REFUSED[reason])
    for direction in ("fwd", "bwd"):
        with pytest.raises(NotImplementedError, match=f"mosaic_tpu: does not take .*{reason}"):
            OPERATOR.pick(direction, "mosaic_tpu", "tpu", problem)
        assert OPERATOR.pick(direction, ["mosaic_tpu", "xla"], "tpu", problem) == "xla"


def test_none_leaves_a_tpu_to_xla():
    assert OPERATOR.pick("fwd", None, "tpu", LAYER) == "xla"
    assert OPERATOR.pick("bwd", "mosaic_tpu", "tpu", LAYER) == "mosaic_tpu"
    with pltpu.force_tpu_interpret_mode(None), pytest.raises(NotImplementedError, match="a TPU"):
        conv2d(jnp.ones((4, 4, 1)), jnp.ones((1, 1, 1, 1)), implementation="mosaic_tpu")


def test_the_grid_offers_tiles_that_differ():
    for direction in ("fwd", "bwd"):
        first, *others = mosaic_tpu.search_space(direction, LAYER)
        assert first == {} and len(others) > 3
        found = [mosaic_tpu._tilings(direction, LAYER, TileConfig(**tiles)) for tiles in others]
        assert len(set(found)) == len(found)
    small = LAYER._replace(shape=(2, 8, 8, 4), features=8)
    assert mosaic_tpu.search_space("fwd", small) == [{}]
