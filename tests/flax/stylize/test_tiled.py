"""Tiles with the statistics of the whole picture give what the whole picture gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flash_wtconv_jax.models import TransformerNet
from flash_wtconv_jax.stylize import tiled
from flash_wtconv_jax.stylize.network import Moments, tail, trunk
from flash_wtconv_jax.stylize.stained_glass import drawn
from flash_wtconv_jax.stylize.stylizer import STAINED_GLASS, Stylizer


@pytest.fixture(scope="module")
def model():
    model = TransformerNet(rngs=nnx.Rngs(0))
    # Statistics matter where scales and biases do.
    rng = np.random.default_rng(1)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), state))
    return model


@pytest.mark.wide
@pytest.mark.parametrize("height, width", [(61, 75), pytest.param(160, 96, marks=pytest.mark.slow)])
def test_tiles_equal_the_whole(model, height, width):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    whole = np.asarray(nnx.jit(lambda m, x: m(x))(model, jnp.asarray(picture, jnp.float32)[None]))
    by_tiles = tiled.tiled(model, picture, 64)
    assert by_tiles.shape == picture.shape and by_tiles.dtype == np.float32
    scale = np.abs(whole).max()
    np.testing.assert_allclose(by_tiles / scale, whole[0, :height, :width] / scale, atol=2e-5)


def test_what_cannot_be_tiled_is_said(model):
    for size, tile, message in (
        ((3, 100), 64, "100 x 3 pixels, expected at least 5 each way"),
        ((100, 100), 66, "tile is 66, expected a multiple of 4 from 64 on"),
    ):
        with pytest.raises(ValueError, match=message):
            tiled.tiled(model, np.zeros((*size, 3), np.uint8), tile)


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_tiles_of_16_bits_are_the_whole_but_for_one_of_255(dtype):
    """They round where the whole does; in bfloat16 that is ten off float32 in places."""
    picture = drawn(128)[None, :101]
    whole, by_tiles = (
        Stylizer([STAINED_GLASS], dtype=dtype, tile=tile).start(picture)().astype(int)
        for tile in (None, 64)
    )
    assert np.ptp(whole) > 200
    assert np.abs(by_tiles - whole).max() <= 1


@pytest.mark.wide
def test_memory_of_12000_x_9000_pixels():
    """Two images of the trunk, the picture on the host, and what one tile needs: below 8 GB."""
    like = jax.ShapeDtypeStruct
    network = nnx.eval_shape(lambda: TransformerNet(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def bytes_of(compiled):
        sizes = compiled.memory_analysis()
        kept = sizes.argument_size_in_bytes - sizes.alias_size_in_bytes
        return kept + sizes.output_size_in_bytes + sizes.temp_size_in_bytes

    def moments(features):
        return Moments(*[like((1, 1, 1, features), jnp.float32)] * 2)

    small = like((1, 2250, 3000, 128), jnp.bfloat16)
    trunk_bytes = small.size * 2
    stages = trunk(network)[0]
    normalised = tiled._normalised.lower(*nnx.split(stages[1]), small, moments(128), small)
    assert bytes_of(normalised.compile()) < 2.01 * trunk_bytes
    index = like((), jnp.int32)
    windows = [
        (stages, (260, 260, 128), [moments(128)], (256, 256), 1),
        (tail(network), (260, 260, 128), [moments(64), moments(32)], (1024, 1024), 4),
    ]
    for each, shape, known, kept, factor in windows:
        x = like((1, *shape), jnp.bfloat16)
        state = nnx.split(list(each))
        lowered = tiled._tile.lower(*state, x, known, [index] * 2, [index] * 2, kept, factor, True)
        assert bytes_of(lowered.compile()) + 2 * trunk_bytes < 8e9 / 1.5
