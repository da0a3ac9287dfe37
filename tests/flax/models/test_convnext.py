"""WTConvNeXt and ConvNeXt: sizes, names, the function computed, training options."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flash_wtconv_jax import models, surgery
from flash_wtconv_jax.models import ConvNeXt, ConvNeXtConfig, weight_decay_mask
from flash_wtconv_jax.models.convnext import Block, GlobalResponseNorm, OverlappedStem, _patch_conv
from flash_wtconv_jax.nnx import WTConv2d
from pallas_kernels import oracle

TINY = ConvNeXtConfig(
    depths=(1, 1), dims=(4, 6), kernel_size=3, levels=(2, 1), patch_size=2, num_classes=5
)


def abstract(**changes):
    """A model of shapes alone."""
    config = dataclasses.replace(TINY, **changes)
    return nnx.eval_shape(lambda: ConvNeXt(config, rngs=nnx.Rngs(0)))


def initialised(**changes):
    """A model with its initial values, which one compilation draws."""
    config = dataclasses.replace(TINY, **changes)
    return nnx.jit(lambda: ConvNeXt(config, rngs=nnx.Rngs(0)))()


def randomise(model, seed=0):
    """Give every parameter a value far from its initial one."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, nnx.Param)
    nnx.update(
        model, jax.tree.map(lambda v: jnp.asarray(rng.normal(0.3, 0.5, v.shape), v.dtype), state)
    )
    return model


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(3), (2, 10, 8, 3))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("wtconvnext_tiny", 30_383_656),
        pytest.param("wtconvnext_small", 54_015_784, marks=pytest.mark.slow),
        pytest.param("wtconvnext_base", 93_647_592, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", 28_589_128, marks=pytest.mark.wide),
        pytest.param("convnext_small", 50_223_688, marks=pytest.mark.slow),
        pytest.param("convnext_base", 88_591_464, marks=pytest.mark.slow),
    ],
)
def test_parameter_counts(name, count):
    model = nnx.eval_shape(lambda: getattr(models, name)(rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    # Without dropout a model is its parameters: no random state is carried along.
    assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    assert model.config.levels == ((5, 4, 3, 2) if name.startswith("wt") else None)


def test_parameter_names():
    model = abstract(use_grn=True)
    names = {
        ".".join(map(str, path)): variable.shape
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    block = {
        "conv_dw.base_kernel": (3, 3, 1, 4),
        "conv_dw.base_bias": (4,),
        "conv_dw.base_scale": (4,),
        "conv_dw.wavelet_kernel_0": (3, 3, 4, 4),
        "conv_dw.wavelet_scale_0": (4, 4),
        "conv_dw.wavelet_kernel_1": (3, 3, 4, 4),
        "conv_dw.wavelet_scale_1": (4, 4),
        "norm.scale": (4,),
        "norm.bias": (4,),
        "mlp.fc1.kernel": (4, 16),
        "mlp.fc1.bias": (16,),
        "mlp.grn.scale": (16,),
        "mlp.grn.bias": (16,),
        "mlp.fc2.kernel": (16, 4),
        "mlp.fc2.bias": (4,),
        "gamma": (4,),
    }
    outside = {
        "stem.conv.kernel": (2, 2, 3, 4),
        "stem.conv.bias": (4,),
        "stem.norm.scale": (4,),
        "stem.norm.bias": (4,),
        "stages.1.downsample.norm.scale": (4,),
        "stages.1.downsample.norm.bias": (4,),
        "stages.1.downsample.conv.kernel": (2, 2, 4, 6),
        "stages.1.downsample.conv.bias": (6,),
        "head.norm.scale": (6,),
        "head.norm.bias": (6,),
        "head.fc.kernel": (6, 5),
        "head.fc.bias": (5,),
    }
    second = {name: shape for name, shape in names.items() if name.startswith("stages.1.blocks.0")}
    assert len(second) == len(block) - 2
    assert {k: v for k, v in names.items() if k not in second} == {
        **outside,
        **{f"stages.0.blocks.0.{name}": shape for name, shape in block.items()},
    }
    plain = abstract(levels=None)
    assert plain.stages[0].blocks[0].conv_dw.kernel.shape == (3, 3, 1, 4)


def test_initial_values():
    model = initialised(dims=(64, 128), head_init_scale=0.5)
    block = model.stages[0].blocks[0]
    for kernel in (
        model.stem.conv.kernel,
        block.conv_dw.base_kernel,
        block.conv_dw.wavelet_kernel_0,
        block.mlp.fc1.kernel,
        block.mlp.fc2.kernel,
        model.stages[1].downsample.conv.kernel,
    ):
        assert np.std(kernel[...]) == pytest.approx(0.02, rel=0.15)
    assert np.std(model.head.fc.kernel[...]) == pytest.approx(0.01, rel=0.15)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        values = np.unique(np.asarray(variable[...]))
        if path[-1] in ("bias", "base_bias"):
            np.testing.assert_array_equal(values, [0.0])
        if path[-1] in ("scale", "base_scale"):
            np.testing.assert_array_equal(values, [1.0])
        if path[-1].startswith("wavelet_scale"):
            np.testing.assert_array_equal(values, [np.float32(0.1)])
        if path[-1] == "gamma":
            np.testing.assert_array_equal(values, [np.float32(1e-6)])


def reference(params, x, levels):
    """The network in NumPy float64, from the papers' text and the oracle of the operator."""

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]
        )

    def patches(x, p):
        size = p["kernel"].shape[0]
        n, h, w, c = x.shape
        x = x[:, : h // size * size, : w // size * size]
        x = x.reshape(n, h // size, size, w // size, size, c)
        return np.einsum("nhiwjc,ijcd->nhwd", x, p["kernel"]) + p.get("bias", 0.0)

    def halved(x, p):
        """A 3x3 convolution of stride 2, zero-padded by one."""
        x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2]
        return np.einsum("nhwcij,ijcd->nhwd", windows, p["kernel"]) + p.get("bias", 0.0)

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))

    def depthwise(x, p):
        if levels is None:
            return oracle.depthwise(x, p["kernel"][..., 0, :], 2) + p.get("bias", 0.0)
        return oracle.wtconv(x, p, 2)

    def block(x, p):
        y = norm(depthwise(x, p["conv_dw"]), p["norm"])
        y = gelu(linear(y, p["mlp"]["fc1"]))
        if "grn" in p["mlp"]:
            length = np.sqrt((y**2).sum((1, 2), keepdims=True))
            share = length / (length.mean(-1, keepdims=True) + 1e-6)
            y = y + p["mlp"]["grn"]["scale"] * (y * share) + p["mlp"]["grn"]["bias"]
        y = linear(y, p["mlp"]["fc2"])
        return x + p.get("gamma", 1.0) * y

    stem = params["stem"]
    if "conv" in stem:
        x = patches(x, stem["conv"])
    elif "conv_2" in stem:
        x = halved(gelu(halved(x, stem["conv_0"])), stem["conv_2"])
    else:
        x = halved(halved(x, stem["conv_0"]), stem["conv_1"])
    x = norm(x, stem["norm"])
    maps = []
    for s in sorted(params["stages"]):
        stage = params["stages"][s]
        if "downsample" in stage:
            down = stage["downsample"]
            x = patches(norm(x, down["norm"]), down["conv"])
        for b in sorted(stage["blocks"]):
            x = block(x, stage["blocks"][b])
        maps.append(norm(x, params["norms"][s]) if "norms" in params else x)
    if "head" not in params:
        return maps, None, None
    head = params["head"]
    pooled = (norm(x, params["norm_pre"]) if "norm_pre" in params else x).mean((1, 2))
    pooled = norm(pooled, head["norm"]) if "norm" in head else pooled
    hidden = gelu(linear(pooled, head["pre_logits"])) if "pre_logits" in head else pooled
    return maps, pooled, linear(hidden, head["fc"])


@pytest.mark.core
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"levels": None, "use_grn": True, "layer_scale": None}, marks=pytest.mark.wide
        ),
    ],
    ids=["wt", "plain"],
)
def test_function_head_options_and_pyramid_against_numpy(changes, images):
    # The odd 5x4 map after the stem also loses a row to the downsampling.
    model = randomise(abstract(**changes))
    params = nnx.to_pure_dict(nnx.state(model))
    wide = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    maps, pooled, logits = reference(wide, np.asarray(images, np.float64), model.config.levels)
    np.testing.assert_allclose(model(images), logits, rtol=1e-3, atol=1e-3)

    pyramid = abstract(features_only=True, **changes)
    assert pyramid.head is None
    nnx.update(pyramid, {k: v for k, v in params.items() if k != "head"})
    for ours, expected in zip(pyramid(images), maps, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)
    assert [m.shape for m in maps] == [(2, 5, 4, 4), (2, 2, 2, 6)]

    headless = abstract(num_classes=0, **changes)
    assert headless.head.fc is None
    params["head"] = {"norm": params["head"]["norm"]}
    nnx.update(headless, params)
    np.testing.assert_allclose(headless(images), pooled, rtol=1e-3, atol=1e-3)
    # A head of one's own goes in its place.
    headless.head.fc = nnx.Linear(6, 2, rngs=nnx.Rngs(0))
    assert headless(images).shape == (2, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"stem_type": "overlap_act", "conv_bias": False, "head_hidden_size": 7, "levels": None}
        | {"kernel_size": (5, 3)},
        pytest.param(
            {"first_downsample": True, "head_norm_first": True, "kernel_size": (3, 1)},
            marks=pytest.mark.wide,
        ),
        pytest.param(
            {"stem_type": "overlap_tiered", "conv_bias": False, "dims": (32, 6)}
            | {"features_only": True, "feature_norms": True},
            marks=pytest.mark.wide,
        ),
    ],
    ids=["overlapped", "halved", "maps"],
)
def test_options_of_timm_against_numpy(changes, images):
    model = randomise(abstract(**changes))
    wide = jax.tree.map(lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(nnx.state(model)))
    maps, _, logits = reference(wide, np.asarray(images, np.float64), model.config.levels)
    expected = maps if model.config.features_only else [logits]
    for ours, theirs in zip(jax.tree.leaves(model(images)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_tiered_stems_round_their_width_as_timm_does():
    for dim, half in ((4, 8), (32, 16), (40, 24), (22, 16), (88, 48)):
        config = dataclasses.replace(TINY, stem_type="overlap_tiered", dims=(dim, 6))
        stem = nnx.eval_shape(lambda config=config: OverlappedStem(config, rngs=nnx.Rngs(0)))
        assert stem.conv_0.kernel.shape == (3, 3, 3, half)


@pytest.mark.wide
def test_published_pyramid_has_four_maps():
    model = nnx.eval_shape(lambda: models.wtconvnext_tiny(features_only=True, rngs=nnx.Rngs(0)))
    maps = nnx.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((1, 64, 96, 3), "float32"))
    assert [m.shape for m in maps] == [
        (1, 16, 24, 96),
        (1, 8, 12, 192),
        (1, 4, 6, 384),
        (1, 2, 3, 768),
    ]


@pytest.mark.wide
def test_remat_computes_the_same_gradients(images):
    # With drop path, so that the recomputation must also draw the same random numbers.
    @nnx.jit
    @nnx.value_and_grad
    def loss(model):
        return jnp.sum(model(images) ** 2)

    plain = randomise(
        initialised(depths=(2,), dims=(4,), levels=(1,), kernel_size=1, drop_path=0.5)
    )
    model = nnx.clone(plain)
    model.stages[0].remat = True
    results = [(*loss(m), nnx.state(m, nnx.RngCount)) for m in (plain, model)]
    (value, grads, counts), (remat_value, remat_grads, remat_counts) = results
    np.testing.assert_allclose(value, remat_value, rtol=1e-6)
    grads, remat_grads = nnx.to_pure_dict(grads), nnx.to_pure_dict(remat_grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, remat_grads
    )
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert any(np.any(g) for g in jax.tree.leaves(grads["stages"][0]["blocks"]))
    # Drop path has drawn once, inside the recomputed blocks too.
    assert jax.tree.leaves(counts) == jax.tree.leaves(remat_counts) == [1]
    text = str(jax.make_jaxpr(lambda x: model(x, deterministic=True))(images))
    assert "remat" in text or "checkpoint" in text


@pytest.mark.wide
def test_drop_path_grows_linearly_and_keeps_the_mean():
    model = abstract(depths=(2, 3), drop_path=0.4)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])

    plain = dataclasses.replace(TINY, levels=None)
    block = randomise(nnx.jit(lambda: Block(plain, 0, 0.25, rngs=nnx.Rngs(0)))())
    one = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
    full = block(one, deterministic=True)
    x = jnp.tile(one, (2000, 1, 1, 1))
    change = np.asarray(block(x) - x)
    dropped = np.all(change == 0, axis=(1, 2, 3))
    assert dropped.mean() == pytest.approx(0.25, abs=0.04)
    # Whole samples go, the others are raised so that the mean stays.
    np.testing.assert_allclose(
        change[~dropped], np.broadcast_to((full - one) / 0.75, change[~dropped].shape), atol=1e-4
    )


def test_a_block_calls_what_somebody_has_put_into_it():
    config = dataclasses.replace(TINY, levels=None)
    block = randomise(nnx.jit(lambda: Block(config, 0, 0.0, rngs=nnx.Rngs(0)))())
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
    want = block(x)
    plain, norm = block.mlp.fc1, block.norm

    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    block.mlp.fc1 = Doubled(4, 16, rngs=nnx.Rngs(0))
    nnx.update(block.mlp.fc1, jax.tree.map(lambda v: v / 2, nnx.state(plain)))
    np.testing.assert_allclose(block(x), want, rtol=1e-4, atol=1e-5)
    block.mlp.fc1, block.norm = plain, lambda x: norm(x)
    np.testing.assert_allclose(block(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.wide
def test_train_and_eval_switch_dropout(images):
    model = randomise(initialised(depths=(2,), dims=(4,), levels=None, dropout=0.5, drop_path=0.3))
    model.eval()
    still = model(images)
    np.testing.assert_array_equal(model(images), still)
    model.train()
    assert np.any(np.asarray(model(images) != model(images)))
    np.testing.assert_array_equal(model(images, deterministic=True), still)


def test_bfloat16(images):
    model = abstract(dtype=jnp.bfloat16, use_grn=True)
    logits = nnx.eval_shape(lambda m, x: m(x), model, images)
    assert logits.dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    maps = nnx.eval_shape(lambda m, x: m.features(x), model, images)
    assert {m.dtype for m in maps} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.wide
def test_linen_bridge(images):
    config = dataclasses.replace(TINY, dropout=0.5)
    linen_model = nnx.bridge.to_linen(ConvNeXt, config)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    linen_params = jax.eval_shape(linen_model.init, keys, images)["params"]
    model = randomise(initialised(dropout=0.5))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.map(jnp.shape, linen_params) == jax.tree.map(jnp.shape, params)

    @jax.jit
    def both(params):
        quiet = linen_model.apply({"params": params}, images, deterministic=True)
        key = {"dropout": jax.random.key(2)}
        return quiet, linen_model.apply({"params": params}, images, rngs=key)

    quiet, noisy = both(params)
    np.testing.assert_allclose(quiet, model(images, deterministic=True), rtol=1e-4, atol=1e-5)
    assert np.any(np.asarray(noisy != quiet))

    by_name = nnx.bridge.to_linen(models.wtconvnext_tiny, num_classes=7)
    shape = jax.eval_shape(by_name.init_with_output, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    assert shape[0].shape == (1, 7)


@pytest.mark.core
def test_weight_decay_goes_to_kernels_alone():
    model = randomise(abstract(use_grn=True))
    params = nnx.state(model, nnx.Param)
    flat_mask = nnx.to_flat_state(weight_decay_mask(params))
    flags = {".".join(map(str, path)): variable.get_value() for path, variable in flat_mask}
    for name, flag in flags.items():
        assert flag == ("kernel" in name.split(".")[-1]), name
    assert flags == {
        ".".join(map(str, path)): flag
        for path, flag in nnx.traversals.flatten_mapping(
            weight_decay_mask(nnx.to_pure_dict(params))
        ).items()
    }
    assert weight_decay_mask({"kernel": {"bias": 1}}) == {"kernel": {"bias": False}}
    assert weight_decay_mask({"kernel": [1, 2], "scale": [1]}) == {
        "kernel": [True, True],
        "scale": [False],
    }
    # One step without a gradient is the decay alone.
    before = nnx.to_pure_dict(params)
    decay = optax.add_decayed_weights(-0.05, mask=weight_decay_mask)
    optimizer = nnx.Optimizer(model, decay, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, params))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    block, old = after["stages"][0]["blocks"][0], before["stages"][0]["blocks"][0]
    for name in ("base_kernel", "wavelet_kernel_1"):
        np.testing.assert_allclose(block["conv_dw"][name], old["conv_dw"][name] * 0.95, rtol=1e-5)
    for name in ("base_scale", "wavelet_scale_0"):
        np.testing.assert_array_equal(block["conv_dw"][name], old["conv_dw"][name])
    np.testing.assert_array_equal(block["gamma"], old["gamma"])
    np.testing.assert_array_equal(after["stem"]["norm"]["scale"], before["stem"]["norm"]["scale"])


@pytest.mark.core
def test_response_norm_of_zeros_has_a_gradient():
    norm = GlobalResponseNorm(3)
    norm.scale[...] += 1.0
    x = jnp.ones((1, 2, 2, 3)).at[..., 0].set(0.0)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(norm(x) ** 2))(x)))


def test_surgery_turns_convnext_into_wtconvnext(images):
    model = randomise(abstract(levels=None))
    before = model(images)
    paths = surgery.replace_depthwise(
        model, depth=2, rngs=nnx.Rngs(0), scale_init=nnx.initializers.zeros
    )
    assert paths == ["stages.0.blocks.0.conv_dw", "stages.1.blocks.0.conv_dw"]
    assert isinstance(model.stages[1].blocks[0].conv_dw, WTConv2d)
    np.testing.assert_allclose(model(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.wide
def test_stem_and_downsampling_are_flaxs_convolutions(images):
    """With our kernels, names, initial values and results are those of `nnx.Conv`."""
    drawn, theirs_drawn = nnx.Rngs(0), nnx.Rngs(0)
    for before, after in ((3, 4), (4, 6)):
        conv = _patch_conv(TINY, before, after, 2, rngs=drawn)
        init = nnx.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)
        options = {"strides": 2, "padding": "VALID", "kernel_init": init}
        theirs = nnx.Conv(before, after, (2, 2), **options, rngs=theirs_drawn)
        states = [nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (conv, theirs)]
        jax.tree.map(np.testing.assert_array_equal, *states)
        x = images if before == 3 else images[..., :1] * jnp.ones(4)
        conv.bias[...] = theirs.bias[...] = jnp.arange(after) / 8
        np.testing.assert_allclose(conv(x), theirs(x), rtol=1e-5, atol=1e-6)
    # All that is drawn after them is drawn alike.
    assert drawn.params() == theirs_drawn.params()


def test_convolutions_and_wavelets_have_filters_of_their_own(images):
    model = abstract(conv_implementation=["triton", "xla"], implementation="xla")
    convs = model.stem.conv, model.stages[1].downsample.conv
    assert [conv.implementation for conv in convs] == [("triton", "xla")] * 2
    assert model.stages[0].blocks[0].conv_dw.implementation == "xla"
    assert nnx.eval_shape(lambda m, x: m(x), model, images).shape == (2, 5)
    with pytest.raises(NotImplementedError, match="conv2d .* triton: needs a GPU"):
        nnx.eval_shape(lambda m, x: m(x), abstract(conv_implementation="triton"), images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "depths must"),
        ({"depths": (1, 0)}, r"each entry of depths=\(1, 0\) must be an integer >= 1"),
        ({"dims": (4,)}, "dims must have one entry for each of the 2 stages"),
        ({"levels": (1, 2, 3)}, "levels must have one entry"),
        ({"levels": (1, -1)}, "each entry of levels=.* must be an integer >= 0"),
        ({"kernel_size": (5, 5, 5)}, "kernel_size must have one entry for each of the 2 stages"),
        ({"kernel_size": (5, 0)}, r"each entry of kernel_size=\(5, 0\) must be an integer >= 1"),
        ({"stem_type": "conv"}, "stem_type must be one of 'patch', 'overlap', .*, got 'conv'"),
        ({"head_hidden_size": 0}, "head_hidden_size=0: expected an integer >= 1"),
        ({"head_hidden_size": 3, "head_norm_first": True}, "head_hidden_size must be None with"),
        ({"feature_norms": True}, "feature_norms=True needs features_only=True"),
        ({"num_classes": -1}, "num_classes=-1: expected an integer >= 0"),
        ({"patch_size": 0}, "patch_size=0: expected an integer >= 1"),
        ({"drop_path": 1.0}, r"drop_path must be a number in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\)"),
        ({"dropout": None}, "dropout must be a number, got None"),
        ({"drop_path": True}, "drop_path must be a number, got True"),
        ({"layer_scale": "x"}, "layer_scale must be a number, got 'x'"),
        ({"layer_scale": float("nan")}, "layer_scale must be a finite number, got nan"),
        ({"layer_scale": 10**400}, "layer_scale must be a finite number, got 10"),
        ({"levels": (1, 64)}, "each entry of levels=.* must be an integer >= 0 and <= 63"),
        ({"depths": 3}, "depths must hold one int for each stage, got 3"),
        ({"wavelet": "nope"}, "wavelet='nope'"),
        (
            {"conv_implementation": "cudnn"},
            r"conv_implementation names \['cudnn'\], but conv2d has",
        ),
        ({"param_dtype": "int32"}, "param_dtype='int32': expected one of float16"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_config_from_lists_hashes():
    config = ConvNeXtConfig(depths=[1, 1], dims=[4, 6], levels=[2, 1], implementation=["xla"])
    assert config.levels == (2, 1)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(TypeError, match="nosuch"):
        models.wtconvnext_tiny(nosuch=1, rngs=nnx.Rngs(0))


def test_numbers_of_numpy_become_python_s():
    config = ConvNeXtConfig(
        depths=(np.int64(1),), dims=(np.int32(4),), levels=(np.int64(1),), drop_path=np.float32(0.5)
    )
    assert json.dumps(dataclasses.asdict(config)["dims"]) == "[4]"
    assert type(config.drop_path) is float
    assert config == ConvNeXtConfig(depths=(1,), dims=(4,), levels=(1,), drop_path=0.5)


def test_integer_images_and_missing_rngs_are_named():
    with pytest.raises(ValueError, match="x: expected a floating-point array .*got uint8; cast"):
        abstract()(jnp.ones((1, 8, 8, 3), jnp.uint8))
    with pytest.raises(ValueError, match="rngs: expected an nnx.Rngs"):
        ConvNeXt(TINY, rngs=0)


@pytest.mark.parametrize("shape", [(2, 8, 8, 4), (8, 8, 3), (1, 3, 8, 3)])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match="x must"):
        abstract()(jnp.ones(shape))


def test_a_stage_that_does_not_split_evenly_is_named():
    model = abstract(depths=(1, 1), dims=(4, 8), levels=(1, 1), num_classes=2)
    mesh = jax.sharding.AbstractMesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.NamedSharding(mesh, jax.P(None, None, "rows"))
    for width, place in (
        (12, "the stem maps 12 samples to 6"),
        (24, "stage 1 maps 12 samples to 6"),
    ):
        x = jax.ShapeDtypeStruct((1, 8, width, 3), "float32", sharding=split)
        match = f"x .* is split into 4 shards along W, but .*{place}.*a multiple of 16"
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(lambda x: model(x), x)
