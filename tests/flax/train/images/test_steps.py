"""Augmentation, optimizers and steps: what each does to arrays of a few numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from flax import nnx
from PIL import Image

from flash_wtconv_jax.train import loop
from flash_wtconv_jax.train.images import augment, decoding, optimizers, scaling
from flash_wtconv_jax.train.images.settings import Augment, Optimizer
from flash_wtconv_jax.train.images.vectors import Vectors

IMAGES = np.random.default_rng(0).normal(size=(6, 8, 10, 3)).astype(np.float32)
TARGETS = np.eye(3, dtype=np.float32)[np.arange(6) % 3]


def changed(seed=0, **settings):
    key = jax.random.key(seed)
    return augment.augmented(key, IMAGES, TARGETS, Augment(**{"flip": 0.0, **settings}))


@pytest.mark.parametrize(("size", "most", "channels"), [(6, 12, 3), (12, 12, 1)])
def test_crops_are_scaled_as_pillow_scales_them(size, most, channels):
    rng = np.random.default_rng(0)
    # Of every height and width, so that some shrink, some grow, and some have a single pixel.
    extents = np.array([(high, wide) for high in range(1, most + 1) for wide in (1, 5, size, most)])
    # What is outside a crop is not to be seen.
    crops = rng.integers(0, 256, (len(extents), most, most, channels), np.uint8)
    found = np.asarray(jax.jit(scaling.scaled, static_argnums=2)(crops, extents, size))
    for crop, (high, wide), one in zip(crops, extents, found, strict=True):
        image = decoding.decoded(crop[:high, :wide])
        for shape in ((size, high), (size, size)):
            image = image.resize(shape, Image.Resampling.BICUBIC)
        wanted = np.asarray(image, np.float32).reshape(one.shape)
        assert abs(one - wanted).max() <= ((high, wide) != (size, size)), (high, wide)


def test_nothing_asked_for_is_nothing_done():
    images, targets = changed()
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(targets, TARGETS)


def test_flips_mirror_some_images():
    images, _ = changed(flip=0.5)
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(images, IMAGES, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(images, IMAGES, strict=True)]
    assert 0 < sum(mirrored) < 6 and sum(mirrored) + sum(kept) == 6


@pytest.mark.wide
def test_erasing_puts_noise_into_one_rectangle():
    images, targets = changed(erasing=1.0)
    np.testing.assert_array_equal(targets, TARGETS)
    for one, other in zip(np.asarray(images), np.asarray(IMAGES), strict=True):
        erased = (one != other).all(-1)
        rows, columns = np.nonzero(erased)
        assert 1 <= erased.sum() <= 0.5 * erased.size
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert erased.sum() == height * width
    # All are windows into the same noise.
    erased = np.asarray(images != IMAGES)
    noise = np.where(erased, images, -np.inf).max(0)
    assert (erased.sum(0) > 1).any()
    np.testing.assert_array_equal(images, np.where(erased, noise, IMAGES))


def test_mixup_blends_images_and_targets_alike():
    images, targets = changed(mixup=0.8)
    share = float((targets[0, 0] - TARGETS[5, 0]) / (TARGETS[0, 0] - TARGETS[5, 0]))
    assert 0 < share < 1
    wanted = share * IMAGES + (1 - share) * IMAGES[::-1]
    np.testing.assert_allclose(images, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)


def test_cutmix_pastes_one_rectangle_and_counts_it():
    for seed in range(3):
        images, targets = changed(seed, cutmix=1.0)
        pasted = np.asarray((images != IMAGES).all((0, 3)))
        np.testing.assert_allclose(targets[0, 0], 1 - pasted.mean(), rtol=1e-5)
        others = np.asarray(IMAGES[::-1])[:, pasted]
        np.testing.assert_array_equal(np.asarray(images)[:, pasted], others)


@pytest.mark.parametrize("parameter", [0.2, 0.8, 1.0, 100.0])
def test_shares_are_of_the_beta_distribution(parameter):
    keys = jax.random.split(jax.random.key(0), 20000)
    shares = np.asarray(jax.vmap(lambda key: augment._beta(key, parameter))(keys))
    assert shares.min() >= 0 and shares.max() <= 1
    np.testing.assert_allclose(shares.mean(), 0.5, atol=0.01)
    np.testing.assert_allclose(shares.var(), 1 / (8 * parameter + 4), rtol=0.03)
    below = scipy.special.betainc(parameter, parameter, 0.45)
    np.testing.assert_allclose((shares < 0.45).mean(), below, atol=0.01)


def test_no_loop_of_augmentation_waits_for_the_host():
    every = Augment(flip=0.5, erasing=0.25, mixup=0.8, cutmix=1.0)
    program = jax.make_jaxpr(lambda key: augment.augmented(key, IMAGES, TARGETS, every))
    assert "while" not in str(program(jax.random.key(0)))


PARAMS = {
    "stem": {"conv": {"kernel": np.ones((2, 2))}},
    "stages": [
        {"blocks": [{"norm": {"scale": np.ones(2)}}, {"norm": {"scale": np.ones(2)}}]},
        {"downsample": {"norm": {"bias": np.ones(2)}}, "blocks": [{"gamma": np.ones(2)}]},
    ],
    "head": {"fc": {"kernel": np.ones((2, 2))}},
}


def test_rates_decay_from_the_head_to_the_stem():
    scales = optimizers.layer_scales(PARAMS, 0.5)
    assert scales == {
        "head.fc.kernel": 1.0,
        "stages.1.blocks.0.gamma": 0.5,
        "stages.1.downsample.norm.bias": 0.5,
        "stages.0.blocks.1.norm.scale": 0.25,
        "stages.0.blocks.0.norm.scale": 0.125,
        "stem.conv.kernel": 0.0625,
    }


def updates(settings, freeze=()):
    optimizer = optimizers.made(settings, optax.constant_schedule(0.1), PARAMS, freeze)
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    found, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    names = jax.tree.leaves(optimizers.names_of(PARAMS))
    return dict(zip(names, (float(one.mean()) for one in jax.tree.leaves(found)), strict=True))


def test_decay_is_of_kernels_and_frozen_parameters_stay():
    found = updates(Optimizer(weight_decay=0.5, layer_decay=0.5), ["stem", "stages.0.blocks.1"])
    assert found["stem.conv.kernel"] == found["stages.0.blocks.1.norm.scale"] == 0.0
    np.testing.assert_allclose(found["head.fc.kernel"], -0.15, rtol=1e-5)
    np.testing.assert_allclose(found["stages.1.blocks.0.gamma"], -0.05, rtol=1e-5)
    np.testing.assert_allclose(found["stages.0.blocks.0.norm.scale"], -0.0125, rtol=1e-5)


def test_the_backbone_is_all_but_the_head():
    found = updates(Optimizer(), ["backbone"])
    assert [name for name, update in found.items() if update] == ["head.fc.kernel"]


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["stage"], "'stage', but no parameter's name begins so; there are head, stages, stem"),
        (["backbone", "head"], "leaves nothing to train"),
    ],
)
def test_a_wrong_freeze_is_told_of(freeze, message):
    with pytest.raises(ValueError, match=message):
        optimizers.made(Optimizer(), optax.constant_schedule(0.1), PARAMS, freeze)


@pytest.mark.parametrize("freeze", [(), ("stages.1",)])
def test_vectors_are_updated_as_their_parameters(freeze):
    settings = Optimizer(weight_decay=0.5, layer_decay=0.5, clip=1.0)
    stages = {
        place: stage | {"blocks": dict(enumerate(stage["blocks"]))}
        for place, stage in enumerate(PARAMS["stages"])
    }
    params = nnx.State(PARAMS | {"stages": stages})
    vectors = Vectors(params, optimizers.kinds(settings, params, freeze))
    optimizer = optimizers.made(settings, optax.constant_schedule(0.1), params, freeze)
    gradients = jax.tree.map(lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) / 9, params)
    joined = vectors.joined(params)
    assert len(jax.tree.leaves(joined)) == 5 and len(jax.tree.leaves(params)) == 6
    wanted = optimizer.update(gradients, optimizer.init(params), params)
    memory = optimizer.init(joined)
    found = vectors.cut(optimizer.update(vectors.joined(gradients), memory, joined))
    chex.assert_trees_all_equal_structs(found, wanted)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    chex.assert_trees_all_equal(vectors.cut(vectors.joined(wanted)), wanted)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_gradients_of_vectors_are_those_of_their_parameters(monkeypatch, on_cpu):
    monkeypatch.setattr("flash_wtconv_jax.train.images.vectors.on_cpu", lambda: on_cpu)
    params = nnx.State({"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2), "c": jnp.ones(1)})
    vectors = Vectors(params, ["one", "other", "one"])

    def loss(params):
        return (params["a"] ** 2).sum() * params["b"][1] + params["c"][0] ** 3

    found = jax.grad(lambda joined: loss(vectors.parameters(joined)))(vectors.joined(params))
    np.testing.assert_array_equal(found["a"], [0, 2, 4, 6, 8, 10, 3])
    np.testing.assert_array_equal(found["b"], [0, 55])


def test_a_batch_in_parts_is_one_step():
    def loss(params, part, key):
        images, labels = part
        errors = jnp.square(images @ params["w"] - labels)
        return loop.Sums(errors.sum(), jnp.asarray(len(labels)), jnp.asarray(len(labels)))

    rng = np.random.default_rng(0)
    batch = rng.normal(size=(8, 3)).astype("float32"), rng.normal(size=8).astype("float32")
    optimizer = optax.sgd(0.1)
    state = loop.begun(optimizer, {"w": jnp.ones(3)}, averaging=True)
    found = [
        loop.step(loss, optimizer, state, batch, jax.random.key(0), parts=parts, ema=0.9)
        for parts in (1, 4)
    ]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert int(found[1][1].images) == 8


@pytest.mark.parametrize("parts", [1, 4])
def test_gradients_of_float16_survive_a_mean_over_many_terms(parts):
    terms = 10**8

    def loss(params, part, key):
        products = (part * params["w"]).astype("float16") * jnp.float16(2)
        count = jnp.asarray(terms // parts)
        return loop.Sums(products.astype("float32").sum(), count, count)

    state = loop.begun(optax.sgd(1.0), {"w": jnp.ones(3)})
    batch = jnp.ones((8, 3))
    _, metrics = loop.step(loss, optax.sgd(1.0), state, batch, jax.random.key(0), parts=parts)
    np.testing.assert_allclose(metrics.norm, 16 * 3**0.5 / terms, rtol=1e-3)


def test_averages_begin_with_the_parameters_of_the_first_steps():
    ema = params = {"a": jnp.zeros(1)}
    for step in range(3):
        params = {"a": params["a"] + 1}
        ema = loop.averaged(ema, params, jnp.asarray(step), 0.9999)
    means = 0.0
    for step in range(3):
        kept = (1 + step) / (10 + step)
        means = kept * means + (1 - kept) * (step + 1)
    np.testing.assert_allclose(ema["a"], means, rtol=1e-6)


def test_a_cpu_keeps_large_parameters_by_themselves(monkeypatch):
    params = nnx.State(
        {"a": jnp.ones((2, 3)), "b": jnp.ones(2), "c": jnp.ones(6), "d": jnp.ones(3)}
    )
    monkeypatch.setattr("flash_wtconv_jax.train.images.vectors._LARGE", 6)
    vectors = Vectors(params, ["one"] * 4)
    joined = vectors.joined(params)
    assert jax.tree.map(jnp.shape, dict(joined)) == {"a": (6,), "b": (5,), "c": (6,)}
    chex.assert_trees_all_equal(vectors.cut(joined), params)


@pytest.mark.usefixtures("optimised")
def test_a_cpu_compiles_the_cut_of_a_shape_once():
    """Where a cut knows its begin, those of a shape are as many kernels."""
    params = nnx.State({name: jnp.ones((2, 3)) for name in "abc"})
    vectors = Vectors(params, ["one"] * 3)
    compiled = jax.jit(lambda joined: jax.tree.map(jnp.sin, vectors.cut(joined)))
    text = compiled.lower(vectors.joined(params)).compile().as_text()
    assert " slice(" not in text and text.count(" dynamic-slice(") == 3
