"""Tiles with the statistics of the whole picture give what the whole picture gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flash_wtconv_jax.models import TransformerNet
from flash_wtconv_jax.stylize import tiled


@pytest.fixture(scope="module")
def model():
    model = TransformerNet(rngs=nnx.Rngs(0))
    # Statistics matter where scales and biases do.
    rng = np.random.default_rng(1)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), state))
    return model


@pytest.mark.parametrize(
    "height, width", [(101, 131), pytest.param(160, 96, marks=pytest.mark.wide)]
)
def test_tiles_equal_the_whole(model, height, width):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    whole = np.asarray(nnx.jit(lambda m, x: m(x))(model, jnp.asarray(picture, jnp.float32)[None]))
    by_tiles = tiled.tiled(model, picture, 64)
    assert by_tiles.shape == picture.shape and by_tiles.dtype == np.float32
    scale = np.abs(whole).max()
    np.testing.assert_allclose(by_tiles / scale, whole[0, :height, :width] / scale, atol=2e-5)
