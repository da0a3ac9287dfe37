"""The TPU kernels of the Haar cascade in Pallas' TPU interpreter: races, bounds and poison."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import haar, oracle
from pallas_kernels.haar import mosaic_tpu
from pallas_kernels.haar.api import OPERATOR
from pallas_kernels.haar.cases import Case, inputs
from pallas_kernels.haar.problem import Problem

pytestmark = pytest.mark.usefixtures("tpu_interpreter")

CASES = (
    Case((8, 8), 3),
    Case((7, 9), 2, dtype="bfloat16"),
    Case((13, 6), 5, batch=(1,)),
    Case((1, 1), 2, batch=()),
    Case((3, 20), 1, batch=(2, 2), dtype="bfloat16"),
    # Two blocks of channels, the second in part.
    Case((5, 6), 2, batch=(1,), channels=130),
)
# What one of the others has too, on a smaller image.
WIDE = {
    "b1-13x6-c3-l5-haar-float32",
    "b16-3x5-c2-l2-haar-float32",
    "b2-8x8-c3-l3-haar-float32",
    "b2x2-3x20-c3-l1-haar-bfloat16",
    "b1-5x6-c130-l2-haar-float32",
    "b16-7x5-c2-l2-haar-float32",
    "b2x12-2x3-c130-l1-haar-float32",
    "b2x12-6x3-c130-l5-haar-float32",
    "b8-5x6-c130-l1-haar-bfloat16",
    "b-1x1-c3-l2-haar-float32",
}
# What the wide ones have too; and five levels, which take longest and which `xla` has.
LONG = {
    "b16-3x5-c2-l2-haar-float32",
    "b2-8x8-c3-l3-haar-float32",
    "b1-13x6-c3-l5-haar-float32",
    "b1-5x6-c130-l2-haar-float32",
    "b16-7x5-c2-l2-haar-float32",
    "b2x12-2x3-c130-l1-haar-float32",
    "b2x12-6x3-c130-l5-haar-float32",
}
# Tiles along rows alone, and along both axes, overhanging the image; and MiB of VMEM.
TILED = ((Case((21, 12), 2, batch=(1,)), 0.45), (Case((6, 50), 1, "haar", "bfloat16", (1,)), 0.2))
# Images side by side in registers: eight a step of sixteen; all of a batch, in bfloat16 too.
TOGETHER = (
    Case((3, 5), 2, batch=(16,), channels=2),
    Case((2, 3), 1, batch=(2, 12), channels=130),
    Case((7, 5), 2, batch=(16,), channels=2),
    Case((6, 3), 5, batch=(2, 12), channels=130),
    Case((5, 6), 1, dtype="bfloat16", batch=(8,), channels=130),
)


def some(cases):
    """Each of the cases, those of `WIDE` for `make test-wide`."""

    def marks(case):
        mark = pytest.mark.slow if case.name in LONG else pytest.mark.wide
        return [mark] * (case.name in WIDE)

    return [pytest.param(case, id=case.name, marks=marks(case)) for case in cases]


def assert_oracle(case):
    """Analysis, its transpose, synthesis and its transpose against the oracle in float64."""
    x = jnp.asarray(inputs(case)[0], case.dtype)
    dec = partial(haar.wavedec2, level=case.level, implementation="mosaic_tpu")
    rec = partial(haar.waverec2, shape=case.spatial, implementation="mosaic_tpu")

    @jax.jit
    def both(x):
        coeffs, transpose = jax.vjp(dec, x)
        back, of_rec = jax.vjp(rec, coeffs)
        return coeffs, transpose(coeffs)[0], back, of_rec(back)[0]

    coeffs, of_dec, back, of_rec = both(x)
    assert {leaf.dtype for leaf in jax.tree.leaves((coeffs, back))} == {jnp.dtype(case.dtype)}
    rounding = max(float(jnp.finfo(case.dtype).eps), 1e-6)
    low, want = np.asarray(x, np.float64), []
    for _ in range(case.level):
        bands = oracle.analysis(low, 2)
        low = bands[..., 0, :]
        want = [tuple(bands[..., s, :] for s in (1, 2, 3)), *want]
    largest = np.abs(np.asarray(x, np.float64)).max() * 2**case.level
    close = partial(np.testing.assert_allclose, rtol=0, atol=2 * rounding * largest)
    jax.tree.map(lambda a, b: close(np.asarray(a, np.float64), b), coeffs, [low, *want])
    # Orthonormal: there and back is x, and each transpose is the inverse.
    for again in (back, of_dec):
        close(np.asarray(again, np.float64), np.asarray(x, np.float64))
    jax.tree.map(lambda a, b: close(*(np.asarray(v, np.float64) for v in (a, b))), of_rec, coeffs)


@pytest.mark.parametrize("case", some(CASES))
def test_transforms_and_gradients_are_the_oracles(case):
    assert_oracle(case)


@pytest.mark.wide
def test_two_cores_do_not_race(races):
    assert_oracle(Case((2, 2), 1, batch=(1,), channels=130))


@pytest.mark.parametrize(
    ("case", "vmem"),
    # Along both axes there are tiles along rows, too.
    [
        pytest.param(*TILED[0], marks=pytest.mark.slow),
        pytest.param(*TILED[1], marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_tiles_are_the_oracles(case, vmem, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "tpu_vmem_bytes", lambda: int(vmem * 2**20))
    shape = (1, *case.spatial, case.channels)
    tiling, *_ = mosaic_tpu._tilings(shape, jnp.dtype(case.dtype), case.level)
    assert tiling.size != case.spatial
    assert_oracle(case)


@pytest.mark.parametrize("case", some(TOGETHER))
def test_images_together_are_the_oracles(case):
    shape = math.prod(case.batch), *case.spatial, case.channels
    tiling, *_ = mosaic_tpu._tilings(shape, jnp.dtype(case.dtype), case.level)
    assert tiling.images_per_register % 8 == 0
    assert_oracle(case)


def test_vmap_over_nothing():
    coeffs = jax.vmap(lambda x: haar.wavedec2(x, level=1, implementation="mosaic_tpu"))
    back = jax.vmap(lambda c: haar.waverec2(c, shape=(4, 6), implementation="mosaic_tpu"))
    x = jnp.ones((0, 2, 4, 6, 1))
    low, details = coeffs(x)
    chex.assert_shape([low, *details], (0, 2, 2, 3, 1))
    chex.assert_shape(back([low, details]), x.shape)


# What differentiates and maps kernels is one for all operators: the norm's is wide.
@pytest.mark.slow
def test_vmap_and_derivatives_of_gradients():
    x = jnp.asarray(inputs(Case((5, 6), 2))[0], "float32")

    def curved(x, implementation):
        coeffs = haar.wavedec2(x, level=2, implementation=implementation)
        bent = jax.tree.map(jnp.sin, coeffs)
        return haar.waverec2(bent, shape=(5, 6), implementation=implementation).sum()

    def second(implementation):
        slope = jax.grad(partial(curved, implementation=implementation))
        # Operation by operation: on the interpreter's program XLA's CPU compiler of JAX 0.11 and
        # 0.12 goes round in circles, and aborts the process.
        return jax.vmap(jax.grad(lambda x: (slope(x) ** 2).sum()))(x)

    want = second("xla")
    chex.assert_trees_all_close(
        second("mosaic_tpu"), want, rtol=1e-7, atol=1e-5 * np.abs(want).max()
    )


IMAGE = Problem((8, 56, 56, 96), jnp.dtype("float32"), 2, 3, "haar")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ndim": 1}, "1-D signals"),
        ({"dtype": jnp.dtype("float16")}, "float16"),
        ({"wavelet": "db2"}, "wavelet 'db2'"),
        ({"levels": 6}, "6 levels"),
        ({"shape": (0, 4, 4, 1)}, "an empty array"),
        ({"shape": (2, 8, *export.symbolic_shape("w, c"))}, "arrays of symbolic size"),
    ],
)
def test_what_is_not_done_says_so_and_falls_back(changes, reason):
    problem = IMAGE._replace(**changes)
    with pytest.raises(NotImplementedError, match=f"mosaic_tpu: does not take .*{reason}"):
        OPERATOR.pick("fwd", "mosaic_tpu", "tpu", problem)
    assert OPERATOR.pick("fwd", None, "tpu", problem) == "xla"


def test_none_picks_the_kernel_on_a_tpu():
    assert OPERATOR.pick("fwd", None, "tpu", IMAGE) == "mosaic_tpu"
    assert OPERATOR.pick("fwd", None, "cpu", IMAGE) == "xla"
    with pltpu.force_tpu_interpret_mode(None), pytest.raises(NotImplementedError, match="a TPU"):
        haar.dwt2(jnp.ones((4, 4, 1)), implementation="mosaic_tpu")
