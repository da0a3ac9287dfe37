"""Style networks over pixels: effects, dtypes that overflow, blends, films."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flash_wtconv_jax import checkpoints, models
from flash_wtconv_jax.models import TransformerNet
from flash_wtconv_jax.stylize.stylizer import Stylizer

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 21, 18, 3), np.uint8)


def variables(seed, gain=30.0):
    model = TransformerNet(rngs=nnx.Rngs(seed))
    model.deconv3.kernel[...] = model.deconv3.kernel[...] * gain
    model.deconv3.bias[...] = model.deconv3.bias[...] + 120
    return checkpoints.variables_of(model)


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("styles")
    for name, keys in (("a", (0,)), ("b", (1,)), ("large", (0, 3e5))):
        tensors = checkpoints.to_torch(variables(*keys))
        checkpoints.write_state_dict(folder / f"{name}.safetensors", tensors)
    checkpoints.save(folder / "folder", variables(0))
    return folder


@pytest.fixture(scope="module")
def expected():
    model = nnx.eval_shape(lambda: TransformerNet(rngs=nnx.Rngs(0)))
    checkpoints.load_into(model, variables(0))
    images = nnx.jit(lambda m, x: m(x))(model, jnp.asarray(PIXELS, jnp.float32))
    return np.clip(np.asarray(images)[:, :21, :18], 0, 255)


@pytest.mark.wide
def test_pixels_keep_their_size_and_depth(styles, expected):
    result = Stylizer([styles / "a.safetensors"]).start(PIXELS)()
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, np.rint(expected))
    deep = Stylizer([styles / "folder"]).start(PIXELS.astype(np.uint16) * 257)()
    assert deep.dtype == np.uint16
    np.testing.assert_allclose(deep, expected * 257, atol=2)


@pytest.mark.wide
def test_strength_and_colours(styles, expected):
    path = [styles / "a.safetensors"]
    half = Stylizer(path, strength=0.5).start(PIXELS)()
    np.testing.assert_allclose(half, (PIXELS + expected) / 2, atol=0.51)
    np.testing.assert_array_equal(Stylizer(path, strength=0).start(PIXELS)(), PIXELS)
    kept = Stylizer(path, keep_colour=True).start(PIXELS)().astype(float)
    luma = np.array([0.299, 0.587, 0.114])
    difference = kept - PIXELS
    inside = ((kept > 0) & (kept < 255)).all(-1)
    # The same was added to the three channels, and the brightness is that of the style.
    assert np.ptp(difference[inside], axis=-1).max() <= 1
    np.testing.assert_allclose((kept @ luma)[inside], (expected @ luma)[inside], atol=1)


@pytest.mark.wide
def test_what_overflows_float16_is_computed_in_float32(styles):
    path = [styles / "large.safetensors"]
    reduced = Stylizer(path, dtype=jnp.float16)
    result = reduced.start(PIXELS)()
    np.testing.assert_array_equal(result, Stylizer(path).start(PIXELS)())
    assert result.max() > 0


@pytest.mark.wide
def test_a_film_that_overflows_float16_goes_on_in_float32(styles):
    path = [styles / "large.safetensors"]
    frames = list(Stylizer(path, dtype=jnp.float16).film(PIXELS))
    for frame, same in zip(frames, Stylizer(path).film(PIXELS), strict=True):
        np.testing.assert_array_equal(frame, same)


def test_no_numbers_are_an_error(styles, tmp_path):
    broken = variables(0)
    broken["params"]["deconv3"]["bias"] = np.full(3, np.nan, np.float32)
    checkpoints.save(tmp_path / "broken", broken)
    stylizer = Stylizer([tmp_path / "broken"])
    with pytest.raises(ValueError, match="infinities or NaN for this picture, even in float32"):
        stylizer.start(PIXELS)()
    with pytest.raises(ValueError, match="infinities or NaN"):
        list(stylizer.film(PIXELS))


@pytest.mark.wide
def test_a_film_flickers_less(styles):
    """Things that come into the picture and go change the rest of it less."""
    still = np.random.default_rng(1).integers(0, 256, (12, 128, 3), np.uint8)
    other = still.copy()
    other[:, 96:] = 255
    frames = [still, other] * 2
    stylizer = Stylizer([styles / "a.safetensors"])
    apart = np.stack([stylizer.start(frame[None])()[0] for frame in frames]).astype(float)
    film = np.stack(list(stylizer.film(frames))).astype(float)
    # The first frame has no other before it.
    np.testing.assert_allclose(film[0], apart[0], atol=1)
    # Columns whose windows, of about 60 pixels to a side, end before the change.
    changes = [np.abs(np.diff(each[:, :, :24], axis=0)).mean() for each in (film, apart)]
    assert changes[0] < 0.5 * changes[1]


@pytest.mark.wide
def test_styles_blend(styles):
    both = [styles / "a.safetensors", styles / "b.safetensors"]
    one = Stylizer(both, (1.0, 0.0)).start(PIXELS)()
    np.testing.assert_array_equal(one, Stylizer(both[:1]).start(PIXELS)())
    trees = [{"params": {"conv1": variables(seed)["params"]["conv1"]}} for seed in (0, 1)]
    weights = jnp.array([[1.0, 0.0], [0.25, 0.75]])
    blended = jax.vmap(lambda w: models.blend_styles(trees, w))(weights)
    kernels = [tree["params"]["conv1"]["kernel"] for tree in trees]
    batch = blended["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(batch[0], kernels[0])
    np.testing.assert_allclose(batch[1], 0.25 * kernels[0] + 0.75 * kernels[1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"weights must have shape \(2,\), one for each"):
        models.blend_styles(trees, [1.0])
    with pytest.raises(ValueError, match=r"variables\[1\] has other names or shapes"):
        models.blend_styles([trees[0], {"params": {}}], [1.0, 1.0])
    with pytest.raises(ValueError, match="variables is empty"):
        models.blend_styles([], [])


def test_weights_of_something_else_are_refused(tmp_path):
    checkpoints.save(tmp_path / "other", {"params": {"kernel": np.zeros((3, 3, 1, 2))}})
    with pytest.raises(ValueError, match="missing: "):
        Stylizer([tmp_path / "other"])
