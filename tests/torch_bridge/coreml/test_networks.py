"""Packages of whole networks, against JAX; and what compression does to them."""

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch", reason="torch is not installed")

from flash_wtconv_jax import checkpoints, models  # noqa: E402
from torch_bridge.coreml import networks, weights  # noqa: E402
from torch_bridge.coreml.compress import Compression, change, compressed, example  # noqa: E402
from torch_bridge.coreml.inputs import formula  # noqa: E402
from torch_bridge.coreml.package import save  # noqa: E402

MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SMALL = {
    "depths": (1, 1),
    "dims": (8, 16),
    "levels": (2, 1),
    "num_classes": 10,
    "layer_scale": 1.0,
}


def filled(make, spread=0.1):
    """A model with random kernels, and other parameters about what training starts from."""
    rng = np.random.default_rng(0)
    starts = {"scale": 1.0, "gamma": 1.0, "base_scale": 1.0}

    def value(path, leaf):
        name = [str(key.key) for key in path if hasattr(key, "key")][-1]
        start = 0.1 if name.startswith("wavelet_scale") else starts.get(name, 0.0)
        return (start + spread * rng.normal(size=leaf.shape)).astype(np.float32)

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map_with_path(value, state))


def convnext(**options):
    config = models.ConvNeXtConfig(**{**SMALL, **options})
    return filled(lambda: models.ConvNeXt(config, rngs=nnx.Rngs(0)))


def params_of(model):
    return weights.flat(checkpoints.variables_of(model))


def image(height, width):
    return (formula(3, height, width) + 1) * np.float32(127.5)


def normalised(image):
    shape = 3, 1, 1
    x = (image / 255 - MEAN.reshape(shape)) / DEVIATION.reshape(shape)
    return x.transpose(0, 2, 3, 1).astype(np.float32)


@nnx.jit
def applied(model, x):
    return model(x)


def expected(model, x):
    """The result of JAX, maps with the channels first."""
    found = applied(model, x)
    several = found if isinstance(found, list) else [found]
    return [np.moveaxis(np.asarray(one), -1, 1) for one in several]


def assert_near(got, want, share):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= share * other.std()


def logits(package, x):
    (value,) = package.predict({"image": x}, package.results).values()
    return value.astype(np.float32)


OPTIONS = [
    {},
    *(
        pytest.param(options, marks=pytest.mark.wide)
        for options in (
            {"stem_type": "overlap_act", "kernel_size": (4, 3), "head_hidden_size": 7},
            {
                "stem_type": "overlap_tiered",
                "levels": None,
                "use_grn": True,
                "head_norm_first": True,
                "conv_bias": False,
                "first_downsample": True,
            },
            {"features_only": True, "feature_norms": True, "patch_size": 2},
        )
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_networks_of_every_option_are_jaxs(written, options):
    model = convnext(**options)
    size = networks.Size(37, 45, False)
    params = params_of(model)
    package = written(networks.convnext("a_network", params, model.config, size, precision="fp32"))
    x = image(37, 45)
    assert package.inputs == {"image": x.shape}
    assert package.metadata["flash_wtconv.kind"] == "a_network"
    assert_near(package.predict({"image": x}).values(), expected(model, normalised(x)), 1e-5)
    if options:
        return
    maps = networks.convnext("maps", params, model.config, size, precision="fp32", features=True)
    found = written(maps, "maps").predict({"image": x})
    assert list(found) == ["features_0", "features_1"]
    assert [value.shape for value in found.values()] == [(1, 8, 9, 11), (1, 16, 4, 5)]


@pytest.mark.wide
def test_a_flexible_classifier_in_float16(written):
    model = convnext(use_grn=True)
    labels = [f"label {i}" for i in range(10)]
    size = networks.Size(32, 32, True)
    network = networks.convnext(
        "small", params_of(model), model.config, size, precision="fp16", labels=labels
    )
    package = written(network)
    # Of every operation of a network; on weights this small it changes nothing.
    assert written(compressed(network, Compression.INT8), "compressed").operations
    for spatial in ((32, 32), (64, 16), (16, 48), (48, 64)):
        x = image(*spatial)
        want = applied(model, normalised(x))
        assert np.abs(logits(package, x) - want).max() < 2e-2
        found = package.predict({"image": x})
        likeliest = int(found["classLabel_probs"].argmax())
        assert str(found["classLabel"]) == labels[likeliest]
        np.testing.assert_allclose(found["classLabel_probs"], jax.nn.softmax(want[0]), atol=5e-3)


@pytest.mark.wide
def test_transformer_net_from_image_to_image(written):
    model = filled(lambda: models.TransformerNet(rngs=nnx.Rngs(0)), 0.05)
    size = networks.Size(24, 36, True)
    images = [image(*spatial) for spatial in ((24, 36), (48, 12))]
    wants = [np.clip(*expected(model, x.transpose(0, 2, 3, 1)), 0, 255) for x in images]
    half = jax.tree.map(lambda leaf: leaf.astype(np.float16), model)
    (plain,) = expected(half, images[0].transpose(0, 2, 3, 1).astype(np.float16))
    rounding = float(np.abs(np.clip(plain, 0, 255) - wants[0]).max())
    for precision in ("fp32", "fp16"):
        network = networks.transformer_net(params_of(model), size, precision=precision)
        package = written(network, precision)
        for x, want in zip(images, wants, strict=True):
            found = package.predict({"image": x})["stylized"]
            bound = 1e-4 * want.std() if precision == "fp32" else 2 * rounding
            assert np.abs(found - want).max() < bound
    odd = networks.transformer_net(params_of(model), networks.Size(29, 35, False), precision="fp16")
    assert written(odd, "odd").outputs == {"stylized": (1, 3, 32, 36)}


@pytest.mark.parametrize("compression", Compression)
def test_compression_keeps_what_the_network_computes(tmp_path, written, compression):
    params = {"head.fc.kernel": np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)}
    from torch_bridge.coreml.package import About, Input, converted

    def build(x):
        return {"y": networks.linear(x, params_with_bias, name="y")}

    params_with_bias = {"kernel": params["head.fc.kernel"], "bias": np.ones(64, np.float32)}
    about = About("test", (64, 2, 2), "fp16", "", 0, 1, "A test.")
    model = converted({"x": Input((1, 64, 2, 2))}, build, about)
    small = compressed(model, compression)
    save(tmp_path / "before.mlpackage", model, force=False)
    package = written(small, "after")
    found = change(tmp_path / "before.mlpackage", tmp_path / "after.mlpackage")
    assert found.after < found.before and found.what == "outputs"
    # The step between neighbouring weights, and what rounding to float16 adds.
    bits = 8 if compression is Compression.INT8 else int(compression[-1])
    assert 0 < found.most < 64 * 2**-bits + 0.02
    assert package.metadata["flash_wtconv.kind"] == "test"
    assert list(example(package)) == ["x"]


@pytest.mark.slow
def test_wtconvnext_on_photographs(written):
    datasets = pytest.importorskip("sklearn.datasets")
    model = filled(lambda: models.wtconvnext_tiny(layer_scale=1.0, rngs=nnx.Rngs(0)), 0.02)
    labels = [f"class {i}" for i in range(1000)]
    package = written(
        networks.convnext(
            "wtconvnext_tiny",
            params_of(model),
            model.config,
            networks.Size(224, 224, False),
            precision="fp16",
            labels=labels,
        )
    )
    qualified = 0
    for photograph in datasets.load_sample_images().images:
        x = photograph[100:324, 200:424].transpose(2, 0, 1)[None].astype(np.float32)
        want = np.asarray(applied(model, normalised(x)))[0]
        got = logits(package, x)[0]
        assert np.abs(got - want).max() < 2e-2
        second, first = np.sort(want)[-2:]
        if first - second > 4e-2:
            qualified += 1
            assert got.argmax() == want.argmax()
    assert qualified


@pytest.mark.parametrize(
    ("change_of", "message"),
    [
        ({"labels": ["one"]}, "there are 1 labels, but the output is of 10 classes"),
        ({"size": networks.Size(5, 40, False)}, "expected at least 8"),
        ({"size": networks.Size(24, 32, True)}, "multiple of 16"),
    ],
)
def test_what_networks_do_not_take(change_of, message):
    model = nnx.eval_shape(
        lambda: models.ConvNeXt(models.ConvNeXtConfig(**SMALL), rngs=nnx.Rngs(0))
    )
    options = {"size": networks.Size(32, 32, False), "precision": "fp16", **change_of}
    with pytest.raises(ValueError, match=message):
        networks.convnext("small", {}, model.config, **options)
