"""Parts that the Mosaic GPU kernels of all operators share."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common.mosaic_gpu import when


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_condition_runs_its_part_and_is_not_converted(number):
    def doubled(x):
        ref = jax.new_ref(x)
        when(x > 1)(lambda: ref.__setitem__(..., 2 * x))
        return ref[...]

    assert jax.jit(doubled)(jnp.int32(number)) == (4 if number > 1 else number)
    equations = jax.make_jaxpr(doubled)(jnp.int32(number)).jaxpr.eqns
    assert [each for each in equations if each.primitive.name == "cond"]
    # Mosaic would start `ptxas` for it.
    converted = [each for each in equations if each.primitive.name == "convert_element_type"]
    assert not [each for each in converted if each.invars[0].aval.dtype == bool]
