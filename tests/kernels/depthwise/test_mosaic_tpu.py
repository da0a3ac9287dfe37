"""The TPU kernels of the depthwise convolution in Pallas' TPU interpreter.

They are those of the wavelet convolution at 0 levels, whose tests look for races.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.conformance import expected, worst
from pallas_kernels.depthwise import conformance
from pallas_kernels.depthwise.cases import Case

pytestmark = [pytest.mark.usefixtures("tpu_interpreter"), pytest.mark.slow]

CASES = (
    Case(1, 7, 9, 3, 5),
    Case(8, 3, 4, 2, 7),
    Case(1, 5, 6, 2, 4),
    Case(2, 4, 5, 130, 3, bias=False),
    Case(1, 10, 11, 2, 9),
)
"""Odd and even kernels, images that share registers, two blocks of channels."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients_are_the_oracles(case):
    run = jax.jit(conformance.computed(case, "mosaic_tpu"))
    got, want = run(*jax.tree.map(jnp.asarray, case.drawn())), expected(case)
    chex.assert_trees_all_equal_shapes(got, want)
    errors = {name: worst(np.asarray(got[name]), want[name]) for name in want}
    assert {n: e for n, e in errors.items() if not e <= case.tolerance(n)} == {}
