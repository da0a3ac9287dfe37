"""Parameters of linen layers: initialisers are traced once, shapes and names are still checked."""

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from flash_wtconv_jax import Conv2d, WTConv2d

pytestmark = pytest.mark.core

X = jnp.ones((1, 4, 4, 2))


@pytest.mark.parametrize("layer", [WTConv2d, Conv2d])
def test_an_initialiser_is_not_traced_when_the_layer_is_applied(layer):
    drawn = []

    def init(key, shape, dtype):
        drawn.append(shape)
        return jnp.ones(shape, dtype)

    model = layer(2, 3, kernel_init=nn.with_partitioning(init, (None, None, None, None)))
    variables = model.init(jax.random.key(0), X)
    shapes = list(drawn)
    y = model.apply(variables, X)
    assert shapes and drawn == shapes
    # The boxes of metadata are for those who place parameters.
    assert jnp.array_equal(y, model.apply(nn.unbox(variables), X))


def test_parameters_of_another_shape_or_name_are_refused():
    model = WTConv2d(2, 3)
    params = model.init(jax.random.key(0), X)["params"]
    wrong = {"params": params | {"base_scale": jnp.ones(3)}}
    with pytest.raises(flax.errors.ScopeParamShapeError, match="base_scale"):
        model.apply(wrong, X)
    del params["base_kernel"]
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="base_kernel"):
        model.apply({"params": params}, X)
