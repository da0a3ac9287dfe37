"""An eager call of an operator is one program, whatever its batch has of axes."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.conv2d import conv2d
from pallas_kernels.haar import wavedec2, waverec2
from pallas_kernels.wtconv import wtconv2d

pytestmark = pytest.mark.core

FILTERS = jnp.ones((1, 1, 2, 3))
PARAMS = {"base_kernel": jnp.ones((3, 3, 1, 2)), "base_scale": jnp.ones(2)}
CALLS = {
    "conv2d": lambda x: conv2d(x, FILTERS),
    "wtconv2d": lambda x: wtconv2d(x, PARAMS),
    "wavedec2": lambda x: wavedec2(x, level=2),
    "waverec2": lambda x: waverec2([x, (x, x, x)]),
}


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_an_eager_call_is_one_program(call, batch):
    """Any further operation takes the host as long as all checks of the arguments."""
    program = jax.make_jaxpr(CALLS[call])(jnp.ones((*batch, 4, 6, 2)))
    assert len(program.eqns) == 1, program
    assert program.out_avals[0].shape[: len(batch)] == batch
