"""The TPU kernels of the instance normalisation in Pallas' TPU interpreter: bounds and poison."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stylize import assert_oracle, assert_sharded
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.stylize import baseline_jax, instance_norm, mosaic_tpu
from pallas_kernels.stylize.api import OPERATOR
from pallas_kernels.stylize.cases import CASES, Case
from pallas_kernels.stylize.problem import Problem
from pallas_kernels.stylize.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("tpu_interpreter")

TAKEN = [case for case in CASES if 0 not in case.batch and case.dtype in mosaic_tpu._DTYPES]
# Several tiles, the last of each in part; two blocks of channels, the second in part.
TILED = (
    Case(20, 9, 3, activation="relu", residual=True, styles=True),
    Case(13, 11, 2, (1,), dtype="bfloat16", mean=3.0),
    Case(9, 15, 130, (1,), mean=1e4),
)


# The contract test has the kernels on an image of one tile. Among those that are wide is each
# dtype, each activation, a residual, styles, a large mean, a pixel and many channels.
WIDE = (2, 4, 8, 10)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.wide if i in WIDE else pytest.mark.slow)
        for i, case in enumerate(TAKEN)
    ],
)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "mosaic_tpu")


@pytest.mark.wide
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_tiles_are_the_oracles(case, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_tile", lambda pixels, itemsize: 64)
    assert_oracle(case, "mosaic_tpu")


@pytest.mark.wide
def test_two_cores_do_not_race(races):
    assert_oracle(Case(1, 3, 4), "mosaic_tpu")


@pytest.mark.wide
def test_vmap_and_derivatives_of_gradients():
    x, scale, bias, _, _ = Case(3, 4, 2).drawn()

    def second(call, **rest):
        loss = lambda *args: jnp.sin(call(*args, activation="relu", **rest)).sum()  # noqa: E731
        squared = lambda *args: sum((g**2).sum() for g in jax.grad(loss, (0, 1))(*args))  # noqa: E731
        mapped = jax.vmap(jax.grad(squared, (0, 1)), (0, None, None))
        return jax.jit(mapped)(x[:, None], scale, bias)

    ours = second(instance_norm, implementation="mosaic_tpu")
    for got, want in zip(ours, second(baseline_jax.instance_norm), strict=True):
        chex.assert_trees_all_close(got, want, rtol=1e-7, atol=1e-4 * np.abs(want).max())


@pytest.mark.wide
def test_sharded_over_the_batch():
    assert_sharded("mosaic_tpu", check_vma=True)


CALL = Problem((2, 64, 64, 640), jnp.dtype("bfloat16"))
REFUSED = {
    "float16, float32, bfloat16 alone": {"dtype": jnp.dtype("float16")},
    "float64, float32, bfloat16 alone": {"dtype": jnp.dtype("float64")},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "arrays of symbolic size": {"shape": (*export.symbolic_shape("b"), 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so_and_falls_back(reason):
    problem = CALL._replace(**REFUSED[reason])
    for direction in OPERATOR.directions:
        with pytest.raises(NotImplementedError, match=f"mosaic_tpu: does not take .*{reason}"):
            OPERATOR.pick(direction, "mosaic_tpu", "tpu", problem)
        assert OPERATOR.pick(direction, ["mosaic_tpu", "xla"], "tpu", problem) == "xla"


def test_none_leaves_a_tpu_to_xla():
    assert OPERATOR.pick("fwd", None, "tpu", CALL) == "xla"
    with pltpu.force_tpu_interpret_mode(None), pytest.raises(NotImplementedError, match="a TPU"):
        instance_norm(jnp.ones((4, 4, 1)), implementation="mosaic_tpu")


def test_the_grid_offers_tiles_that_fit():
    for shape in SHAPES.values():
        first, *others = mosaic_tpu.search_space("fwd", CALL._replace(shape=tuple(shape)))
        assert first == {}
        assert all(one["pixels"] % 64 == 0 for one in others)
