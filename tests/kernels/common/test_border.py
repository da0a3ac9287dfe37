"""Borders: the identity in every mode, which a CPU's compiler does not fuse across."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.border import border

pytestmark = pytest.mark.core

MODES = {
    "value": lambda function, x: function(x),
    "reverse": lambda function, x: jax.vjp(function, x)[1](x)[0],
    "forward": lambda function, x: jax.jvp(function, (x,), (x,))[1],
    "mapped": lambda function, x: jax.vmap(function)(x),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_border_is_the_identity(mode: str) -> None:
    """A border changes no number, of a value or of a derivative."""
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(MODES[mode](border, x), x)


@pytest.mark.parametrize("mode", ["value", "reverse"])
def test_a_cpu_keeps_loops_apart(mode: str) -> None:
    """A CPU's compiler makes two loops of the operations before and after a border."""

    def twice(between: object, x: jax.Array) -> jax.Array:
        return jnp.exp(between(jnp.exp(x)))

    def loops(between: object) -> int:
        run = jax.jit(partial(MODES[mode], partial(twice, between)))
        text = run.lower(jnp.ones((8, 8))).compile().as_text()
        return len(re.findall(r" fusion\(| exponential\(", text.partition("ENTRY")[2]))

    with jax.default_device(jax.devices("cpu")[0]):
        assert loops(border) > loops(lambda x: x)
