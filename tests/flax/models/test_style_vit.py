"""StyleViT: any size, styles of one colour, gradients of every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flash_wtconv_jax.models import StyleViT

RNG = np.random.default_rng(0)
CONTENT = RNG.uniform(0, 255, (2, 20, 27, 3)).astype(np.float32)
STYLE = RNG.uniform(0, 255, (2, 16, 24, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return StyleViT("nano", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def run(model):
    graphdef, state = nnx.split(model)
    apply = jax.jit(lambda state, *images: nnx.merge(graphdef, state)(*images))
    return lambda *images: np.asarray(apply(state, *images))


def test_the_style_counts_and_one_serves_a_batch(run):
    found = run(CONTENT, STYLE)
    assert found.shape == CONTENT.shape and np.isfinite(found).all()
    same = run(CONTENT, STYLE[:1])
    np.testing.assert_allclose(same[0], found[0], atol=1e-3)
    assert np.abs(same[1] - found[1]).max() > 1e-3


def test_a_style_of_one_colour_leaves_the_content(run):
    """Its deviations are 0; multiplied by them, nothing would be left of the content."""
    flat = np.full((1, 16, 24, 3), 90, np.float32)
    found = run(CONTENT, flat)
    assert np.isfinite(found).all()
    shown = [np.corrcoef(found[i].ravel(), CONTENT[i].ravel())[0, 1] for i in range(2)]
    assert min(shown) > 0.9


@pytest.mark.wide
def test_every_parameter_has_a_gradient(model):
    graphdef, state = nnx.split(model)
    flat = jnp.full(STYLE.shape, 90.0)

    @jax.jit
    def gradients(state, style):
        def loss(state):
            return jnp.square(nnx.merge(graphdef, state)(CONTENT, style)).mean()

        return jax.grad(loss)(state)

    for path, leaf in nnx.to_flat_state(gradients(state, STYLE)):
        # Softmax does not see what all keys have in common.
        some = leaf[...].reshape(3, -1)[::2] if path[-2:] == ("qkv", "bias") else leaf[...]
        assert np.abs(some).max() > 0, path
    for path, leaf in nnx.to_flat_state(gradients(state, flat)):
        assert np.isfinite(leaf[...]).all(), path


@pytest.mark.wide
def test_sizes_and_dtypes():
    def shape(size, content, dtype=None):
        model = nnx.eval_shape(lambda: StyleViT(size, dtype=dtype, rngs=nnx.Rngs(0)))
        images = [jax.ShapeDtypeStruct(each, "float32") for each in (content, (1, 8, 8, 3))]
        found = nnx.eval_shape(lambda model, *images: model(*images), model, *images)
        return found.shape, found.dtype

    assert shape("base", (1, 1, 1, 3)) == ((1, 1, 1, 3), jnp.float32)
    assert shape("small", (1, 64, 9, 3), jnp.bfloat16) == ((1, 64, 9, 3), jnp.bfloat16)


FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def lowered_for_a_gpu(model, *inputs, **rest):
    """The gradient of a module's parameters, lowered for a GPU or for that which is here."""
    graphdef, state = nnx.split(model)

    def loss(state, *inputs):
        return jnp.square(nnx.merge(graphdef, state)(*inputs).astype(jnp.float32)).mean()

    return jax.jit(jax.grad(loss)).trace(state, *inputs).lower(**rest)


def calls(text):
    """How often cuDNN attends forward and backward."""
    return text.count(f"@{FORWARD}("), text.count(f"@{BACKWARD}(")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU by name; what cuDNN's version is, no machine says here."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    from flash_wtconv_jax.models import style_vit

    monkeypatch.setattr(style_vit, "platform", lambda: "gpu")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    return {"lowering_platforms": ("cuda",)}


def images(*sizes):
    return [jax.ShapeDtypeStruct((1, *size, 3), "float32") for size in sizes]


def test_attention_of_16_bits_is_cudnns_on_a_gpu(gpu):
    """In the program that a GPU's compiler gets, for a block."""
    from flash_wtconv_jax.models.style_vit import _Block, _Dtypes

    for dtype, count in (("bfloat16", 1), ("float32", 0)):
        dtypes = _Dtypes(jnp.dtype(dtype), jnp.float32)
        block = nnx.eval_shape(lambda dtypes=dtypes: _Block(64, 2, dtypes, nnx.Rngs(0)))
        tokens = jax.ShapeDtypeStruct((1, 12, 64), dtype)
        assert calls(lowered_for_a_gpu(block, tokens, **gpu).as_text()) == (count, count)


@pytest.mark.wide
def test_all_blocks_attend_by_cudnn_on_a_gpu(gpu):
    model = nnx.eval_shape(lambda: StyleViT("nano", dtype=jnp.float16, rngs=nnx.Rngs(0)))
    text = lowered_for_a_gpu(model, *images((16, 24), (8, 16)), **gpu).as_text()
    assert calls(text) == (6, 6)


@pytest.mark.gpu
def test_attention_of_16_bits_is_cudnns_in_the_compiled_program():
    model = nnx.eval_shape(lambda: StyleViT("nano", dtype=jnp.float16, rngs=nnx.Rngs(0)))
    text = lowered_for_a_gpu(model, *images((16, 24), (8, 16))).compile().as_text()
    assert FORWARD in text and BACKWARD in text


def test_what_does_not_fit_is_said(model):
    with pytest.raises(ValueError, match="size is 'huge', expected one of nano, tiny, small, base"):
        StyleViT("huge", rngs=nnx.Rngs(0))
    for content, style, message in (
        ((8, 8, 3), (1, 8, 8, 3), r"content must have shape \(N, H, W, 3\), got \(8, 8, 3\)"),
        ((3, 8, 8, 3), (2, 8, 8, 3), "style must be 1 image or 3, as content is"),
        ((3, 8, 8, 3), (1, 8, 7, 3), "style must be at least 8 pixels high and wide"),
    ):
        with pytest.raises(ValueError, match=message):
            model(jnp.zeros(content), jnp.zeros(style))
