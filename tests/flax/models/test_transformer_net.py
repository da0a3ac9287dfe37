"""TransformerNet: sizes, names, the function computed beside PyTorch's, how it is computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.mosaic_gpu import lowered

from flash_wtconv_jax import checkpoints
from flash_wtconv_jax.models import TransformerNet, weight_decay_mask
from pallas_kernels.conv2d import mosaic_gpu

pytestmark = pytest.mark.core

# Layers between input and residual blocks, and behind them: names, channels, size of the filters.
BEFORE = [("conv1", "in1", 3, 32, 9), ("conv2", "in2", 32, 64, 3), ("conv3", "in3", 64, 128, 3)]
AFTER = [("deconv1", "in4", 128, 64, 3), ("deconv2", "in5", 64, 32, 3)]
BLOCKS = [
    (f"res{b}.conv{i}", f"res{b}.in{i}", 128, 128, 3) for b in (1, 2, 3, 4, 5) for i in (1, 2)
]


def model_state_dict(seed=0):
    """The state dict of PyTorch's example, written down independently of the tables."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for conv, norm, before, after, k in [*BEFORE, *BLOCKS, *AFTER, ("deconv3", None, 32, 3, 9)]:
        taps = rng.standard_normal((after, before, k, k)) / np.sqrt(before * k * k)
        arrays |= {f"{conv}.conv2d.weight": taps, f"{conv}.conv2d.bias": rng.normal(size=after)}
        if norm:
            arrays |= {f"{norm}.{n}": rng.normal(0.8, 0.3, after) for n in ("weight", "bias")}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def running_statistics(value=0.5):
    """Adds the entries that PyTorch up to 0.3 saved with each instance normalisation."""
    layers = [*BEFORE, *BLOCKS, *AFTER]
    names = ("running_mean", "running_var")
    return {
        f"{layer[1]}.{n}": np.full(layer[3], value, np.float32) for layer in layers for n in names
    }


PLACES = {"in1": "conv1", "in2": "conv2", "in3": "conv3", "in4": "deconv1", "in5": "deconv2"}


def layered(names=("weight", "bias"), blocks="residual_blocks.{}", last="deconv3.1"):
    """The same state dict in the names of codes that have convolution and norm in one layer."""
    arrays = {}
    for name, array in model_state_dict().items():
        *path, leaf = name.split(".")
        own = names[leaf == "bias"]
        if path[0].startswith("res"):
            block = blocks.format(int(path[0][3:]) - 1)
            is_norm = path[1].startswith("in")
            layer = f"{block}.conv{path[1][2:]}.norm" if is_norm else f"{block}.{path[1]}.conv"
        else:
            is_norm = path[0] in PLACES
            layer = f"{PLACES[path[0]]}.norm" if is_norm else f"{path[0]}.conv"
        layer = last if path[0] == "deconv3" else layer
        arrays[f"{layer}.{own if is_norm else leaf}"] = array
    return arrays


def abstract(**options):
    """A model of shapes alone."""
    return nnx.eval_shape(lambda: TransformerNet(rngs=nnx.Rngs(0), **options))


def loaded(**options):
    """A model whose every parameter is far from its initial value."""
    model = abstract(**options)
    checkpoints.load_into(model, checkpoints.from_torch(model_state_dict()))
    return model


call = nnx.jit(lambda model, x: model(x))


def torch_network(torch):
    """PyTorch's example, `fast_neural_style/neural_style/transformer_net.py`, in plain modules."""

    class ConvLayer(torch.nn.Module):
        def __init__(self, before, after, kernel_size, stride=1, upsample=None):
            super().__init__()
            self.upsample = upsample
            self.reflection_pad = torch.nn.ReflectionPad2d(kernel_size // 2)
            self.conv2d = torch.nn.Conv2d(before, after, kernel_size, stride)

        def forward(self, x):
            if self.upsample:
                x = torch.nn.functional.interpolate(x, mode="nearest", scale_factor=self.upsample)
            return self.conv2d(self.reflection_pad(x))

    class ResidualBlock(torch.nn.Module):
        def __init__(self, channels):
            super().__init__()
            for i in (1, 2):
                self.add_module(f"conv{i}", ConvLayer(channels, channels, 3))
                self.add_module(f"in{i}", torch.nn.InstanceNorm2d(channels, affine=True))

        def forward(self, x):
            y = torch.relu(self.in1(self.conv1(x)))
            return self.in2(self.conv2(y)) + x

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = ConvLayer(3, 32, 9)
            self.conv2 = ConvLayer(32, 64, 3, stride=2)
            self.conv3 = ConvLayer(64, 128, 3, stride=2)
            for i in (1, 2, 3, 4, 5):
                self.add_module(f"res{i}", ResidualBlock(128))
            self.deconv1 = ConvLayer(128, 64, 3, upsample=2)
            self.deconv2 = ConvLayer(64, 32, 3, upsample=2)
            self.deconv3 = ConvLayer(32, 3, 9)
            for i, channels in enumerate((32, 64, 128, 64, 32), start=1):
                self.add_module(f"in{i}", torch.nn.InstanceNorm2d(channels, affine=True))

        def forward(self, x):
            y = torch.relu(self.in1(self.conv1(x)))
            y = torch.relu(self.in2(self.conv2(y)))
            y = torch.relu(self.in3(self.conv3(y)))
            y = self.res5(self.res4(self.res3(self.res2(self.res1(y)))))
            y = torch.relu(self.in4(self.deconv1(y)))
            y = torch.relu(self.in5(self.deconv2(y)))
            return self.deconv3(y)

    return Network()


@pytest.mark.parametrize(
    ("size", "output"),
    [
        pytest.param((16, 24), (16, 24), marks=pytest.mark.wide),
        ((17, 22), (20, 24)),
        pytest.param((5, 7), (8, 8), marks=pytest.mark.wide),
        pytest.param((64, 64), (64, 64), marks=pytest.mark.slow),
        pytest.param((63, 65), (64, 68), marks=pytest.mark.slow),
        pytest.param((256, 384), (256, 384), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_computes_what_pytorch_computes(size, output):
    torch = pytest.importorskip("torch")
    network = torch_network(torch)
    network.load_state_dict(checkpoints.to_tensors(model_state_dict()))
    x = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        y = network.double()(torch.from_numpy(x).double().permute(0, 3, 1, 2))
    expected = y.permute(0, 2, 3, 1).numpy()
    assert expected.shape == (2, *output, 3)
    np.testing.assert_allclose(call(loaded(), x), expected, rtol=1e-4, atol=1e-4)


def test_weights_come_from_pytorch_and_go_back():
    state_dict = model_state_dict()
    assert checkpoints.recognise(state_dict) == ("transformer_net", 2, "haar")
    variables = checkpoints.from_torch(state_dict)
    back = checkpoints.to_torch(variables)
    assert set(back) == set(state_dict)
    for name, array in state_dict.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    # Each kernel's axes are turned, none is mirrored.
    np.testing.assert_array_equal(
        variables["params"]["res3"]["conv2"]["kernel"][2, 0],
        state_dict["res3.conv2.conv2d.weight"][:, :, 2, 0].T,
    )
    model = abstract()
    checkpoints.load_into(model, variables)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.variables_of(model), variables)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == 1_679_235


def test_running_statistics_of_old_files_are_dropped():
    new, old = model_state_dict(), model_state_dict() | running_statistics()
    jax.tree.map(
        np.testing.assert_array_equal, checkpoints.from_torch(old), checkpoints.from_torch(new)
    )
    del old["res2.in1.running_var"]
    with pytest.raises(ValueError, match=r"missing: res2.in1.running_var \(128,\)"):
        checkpoints.from_torch(old)
    del new["in4.bias"]
    with pytest.raises(ValueError, match=r"'transformer_net' .*\n  missing: in4.bias \(64,\)"):
        checkpoints.from_torch(new)


LAYERED = {
    "layers": {},
    "gamma and beta": {"names": ("gamma", "beta"), "last": "deconv3.conv"},
    "no sequence": {"blocks": "res{}", "last": "deconv3.conv"},
}


@pytest.mark.parametrize("name", LAYERED)
def test_names_of_layers_with_a_norm_inside(name):
    theirs = layered(**LAYERED[name])
    if name == "no sequence":
        # Counted from one.
        theirs = {
            re.sub(r"^res(\d)", lambda m: f"res{int(m[1]) + 1}", n): a for n, a in theirs.items()
        }
    assert checkpoints.recognise(theirs) == ("transformer_net", 2, "haar")
    variables = checkpoints.from_torch(theirs)
    want = checkpoints.from_torch(model_state_dict())
    jax.tree.map(np.testing.assert_array_equal, variables, want)
    back = checkpoints.to_torch(variables, like=theirs)
    assert set(back) == set(theirs)
    jax.tree.map(np.testing.assert_array_equal, back, theirs)
    kept = {
        f"{n.rpartition('.')[0]}.{statistic}": np.asarray(3)
        if statistic == "num_batches_tracked"
        else a
        for n, a in theirs.items()
        if n.endswith(("norm.weight", "norm.gamma"))
        for statistic in ("running_mean", "running_var", "num_batches_tracked")
    }
    jax.tree.map(np.testing.assert_array_equal, checkpoints.from_torch(theirs | kept), want)


def test_all_that_is_wrong_with_names_is_one_error():
    theirs = layered(("gamma", "beta"))
    del theirs["residual_blocks.2.conv1.norm.gamma"]
    theirs |= {"conv2.conv.weight": np.ones((64, 31, 3, 3)), "conv9.norm.gamma": np.ones(3)}
    with pytest.raises(ValueError) as caught:
        checkpoints.from_torch(theirs)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: residual_blocks.2.conv1.norm.gamma (128,)",
        "  surplus: conv9.norm.gamma (3,)",
        "  misshapen: conv2.conv.weight is (64, 31, 3, 3), expected (64, 32, 3, 3)",
    ]


def test_initial_values():
    def drawn():
        model = TransformerNet(rngs=nnx.Rngs(0))
        return model.conv1, model.deconv1

    for conv, fan_in in zip(nnx.jit(drawn)(), (9 * 9 * 3, 3 * 3 * 128), strict=True):
        bound = fan_in**-0.5
        assert 0.99 * bound < np.max(np.abs(conv.kernel[...])) <= bound
        assert not np.any(conv.bias[...])
    mask = nnx.to_pure_dict(weight_decay_mask(nnx.state(abstract())))
    assert mask["res1"]["conv1"] == {"kernel": True, "bias": False}
    assert mask["in1"] == {"scale": False, "bias": False}


@pytest.mark.wide
def test_gradients_are_finite_and_reach_every_layer():
    x = jax.random.normal(jax.random.key(0), (1, 9, 12, 3))
    # A constant image, whose variance is 0 in every layer, is no exception.
    x = jnp.concatenate([x, jnp.ones_like(x)])

    @nnx.jit
    @nnx.grad
    def gradient(model):
        return jnp.mean(model(x) ** 2)

    grads = nnx.to_pure_dict(gradient(loaded(conv_implementation="xla")))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert all(np.any(g["scale"]) for name, g in grads.items() if name.startswith("in"))
    assert all(np.any(g["conv1"]["kernel"]) for n, g in grads.items() if n.startswith("res"))
    # A bias before a norm cancels; the last convolution has none behind.
    assert all(not np.any(g["bias"]) for n, g in grads.items() if n in PLACES.values())
    assert np.any(grads["deconv3"]["bias"])


def test_dtypes():
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    model = abstract(dtype=jnp.bfloat16)
    assert nnx.eval_shape(lambda m, x: m(x), model, images).dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    narrow = abstract(param_dtype=jnp.bfloat16)
    assert {v.dtype for v in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype(jnp.bfloat16)}


def test_statistics_are_float32_in_float16():
    # Their sum over an image, and the square of each, are beyond what float16 holds.
    norm = abstract(dtype=jnp.float16).in1
    nnx.update(norm, {"scale": jnp.ones(32), "bias": jnp.zeros(32)})
    x = 300 * jax.random.normal(jax.random.key(0), (1, 16, 16, 32)) + 500
    y = norm(x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, (x - x.mean((1, 2))) / x.std((1, 2)), atol=4e-3)


def test_conv_implementation_reaches_every_convolution():
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    model = abstract(conv_implementation=["triton", "xla"])
    convs = [model.conv1, model.res4.conv2, model.deconv1, model.deconv3]
    assert [conv.implementation for conv in convs] == [("triton", "xla")] * 4
    assert nnx.eval_shape(lambda m, x: m(x), model, images).shape == (1, 8, 8, 3)
    with pytest.raises(NotImplementedError, match="conv2d .* triton: needs a GPU"):
        nnx.eval_shape(lambda m, x: m(x), abstract(conv_implementation="triton"), images)


def test_norm_implementation_reaches_every_norm():
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    model = abstract(norm_implementation=["triton", "xla"])
    norms = [model.in1, model.res4.in2, model.in5]
    assert [norm.implementation for norm in norms] == [("triton", "xla")] * 3
    assert nnx.eval_shape(lambda m, x: m(x), model, images).shape == (1, 8, 8, 3)
    with pytest.raises(NotImplementedError, match="instance_norm .* triton: needs a GPU"):
        nnx.eval_shape(lambda m, x: m(x), abstract(norm_implementation="triton"), images)


def test_cropped_images_have_the_inputs_size():
    x = jax.ShapeDtypeStruct((1, 63, 65, 3), jnp.float32)
    shapes = [
        nnx.eval_shape(lambda m, x: m(x), abstract(crop=crop), x).shape for crop in (False, True)
    ]
    assert shapes == [(1, 64, 68, 3), (1, 63, 65, 3)]


# Even sizes, which need no padding, are lowered by the tests of the convolution too.
@pytest.mark.parametrize("size", [(9, 14), pytest.param((16, 16), marks=pytest.mark.slow)], ids=str)
def test_every_convolution_is_a_kernel_where_one_is_named(size, monkeypatch):
    # With 3 channels and with 3 features too, and with a stride: none is left to XLA.
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)
    model = abstract(dtype=jnp.bfloat16, conv_implementation="mosaic_gpu")
    graph, state = nnx.split(model)
    network = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    text = lowered(network, state, jax.ShapeDtypeStruct((1, *size, 3), jnp.bfloat16))
    assert "mosaic_gpu" in text and "stablehlo.convolution" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_kernels_are_as_accurate_as_xla(implementation):
    x = jax.random.normal(jax.random.key(0), (2, 33, 46, 3))
    exact = call(loaded(precision="highest", conv_implementation="xla"), x)
    y, plain = (
        call(loaded(dtype=jnp.bfloat16, conv_implementation=name), x)
        for name in (implementation, "xla")
    )
    assert jnp.max(jnp.abs(y - exact)) <= 2 * jnp.max(jnp.abs(plain - exact))


def test_linen_bridge():
    model = nnx.bridge.to_linen(TransformerNet, conv_implementation="xla")
    x = jax.random.normal(jax.random.key(0), (1, 8, 9, 3))
    variables = checkpoints.from_torch(model_state_dict())
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables["params"])
    assert jax.eval_shape(model.apply, variables, x).shape == (1, 8, 12, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"conv_implementation": "cudnn"},
            r"conv_implementation names \['cudnn'\], but conv2d has",
        ),
        (
            {"norm_implementation": "cudnn"},
            r"norm_implementation names \['cudnn'\], but instance_norm has",
        ),
        ({"param_dtype": "int32"}, "param_dtype='int32': expected one of float16"),
        ({"rngs": 0}, "rngs: expected an nnx.Rngs"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerNet(**{"rngs": nnx.Rngs(0), **options})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((8, 8, 3), np.float32), r"x must have shape \(N, H, W, 3\), got \(8, 8, 3\)"),
        (np.ones((1, 8, 8, 4), np.float32), r"x must have shape .*got \(1, 8, 8, 4\)"),
        (np.ones((1, 8, 4, 3), np.float32), "x must be at least 5 pixels high and wide"),
        (np.ones((1, 8, 8, 3), np.uint8), "x: expected a floating-point array .*got uint8"),
    ],
    ids=["no batch", "channels", "too small", "integers"],
)
def test_bad_inputs(x, message):
    with pytest.raises(ValueError, match=message):
        abstract()(x)
