"""InstanceNorm, ConvNormAct and ResidualBlock of linen and nnx beside Flax's own layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flash_wtconv_jax.nnx as nnx_layers
from flash_wtconv_jax import ConvNormAct, InstanceNorm, ResidualBlock

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
X = 3 + jax.random.normal(jax.random.key(1), (2, 9, 8, 4))
DRAWN = {"bias_init": nn.initializers.normal(), "scale_init": nn.initializers.normal()}
OPTIONS = {
    "default": {},
    "epsilon": {"epsilon": 0.1, "use_bias": False},
    "no scale": {"use_scale": False},
    "bfloat16": {"dtype": jnp.bfloat16},
    "parameters": {"param_dtype": jnp.bfloat16},
}


def some(names, *others):
    """The names, of which the others only widen the table."""
    return [pytest.param(n, marks=[pytest.mark.wide] * (n in others)) for n in names]


def params(layer):
    """The parameters of an nnx layer."""
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def applied(layer, variables, *arguments):
    """An nnx layer with the parameters of its twin."""
    graph, state = nnx.split(layer)
    nnx.replace_by_pure_dict(state, variables["params"])
    return jax.jit(lambda state, *args: nnx.merge(graph, state)(*args))(state, *arguments)


@pytest.mark.parametrize("name", some(OPTIONS, "epsilon", "parameters"))
def test_parameters_and_results_are_flaxs(name):
    options = OPTIONS[name] | DRAWN
    want, variables = nn.InstanceNorm(**options, use_fast_variance=False).init_with_output(KEY, X)
    got, ours = InstanceNorm(**options).init_with_output(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, ours, variables)
    assert got.dtype == want.dtype
    tolerance = 1e-3 if got.dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got, want)), atol=tolerance)
    layer = nnx_layers.InstanceNorm(4, **options, rngs=nnx.Rngs(0))
    theirs = nnx.InstanceNorm(4, **options, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, params(layer), params(theirs))
    np.testing.assert_array_equal(applied(layer, variables, X), got)


def test_activation_and_residual_in_the_same_kernel():
    residual = jax.random.normal(jax.random.key(2), X.shape)
    layer = InstanceNorm(activation="relu", **DRAWN)
    got, variables = layer.init_with_output(KEY, X, residual)
    want = nn.relu(nn.InstanceNorm(use_fast_variance=False).apply(variables, X) + residual)
    np.testing.assert_allclose(got, want, atol=1e-6)


BLOCKS = {
    "default": {},
    "strided": {"strides": (2, 1), "padding": "REFLECT", "activation": None},
    "mirrored": {"padding": ("reflect", 3), "kernel_size": (3, 5)},
    "bfloat16": {"dtype": jnp.bfloat16, "padding": "VALID"},
}


@pytest.mark.parametrize("name", some(BLOCKS, "default", "mirrored", "strided"))
def test_a_convolution_its_norm_and_an_activation_are_flaxs(name):
    options = {"kernel_size": 3} | BLOCKS[name]
    layer = ConvNormAct(6, **options, **DRAWN)
    got, variables = layer.init_with_output(KEY, X)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "kernel": (*np.broadcast_to(options["kernel_size"], 2), 4, 6),
        "scale": (6,),
        "bias": (6,),
    }
    own = dict(variables["params"])
    x, padding = X, options.get("padding", "SAME")
    if padding not in ("SAME", "VALID"):
        halo = {"REFLECT": (1, 1), ("reflect", 3): (3, 3)}[padding]
        x, padding = jnp.pad(x, [(0, 0), halo, halo, (0, 0)], mode="reflect"), "VALID"
    kernel, dtype = own.pop("kernel"), options.get("dtype")
    conv = nn.Conv(6, kernel.shape[:2], options.get("strides", 1), padding, use_bias=False)
    norm = nn.InstanceNorm(epsilon=1e-5, use_fast_variance=False)
    want = norm.apply({"params": own}, conv.apply({"params": {"kernel": kernel}}, x))
    want = nn.relu(want) if options.get("activation", "relu") else want
    assert got.dtype == (dtype or jnp.float32)
    tolerance = 5e-3 if dtype else 2e-5
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got, want)), atol=tolerance)
    twin = nnx_layers.ConvNormAct(4, 6, **options, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(applied(twin, variables, X), got)


def test_upsampling_comes_before_the_convolution():
    layer = ConvNormAct(6, 3, upsample=2, padding="REFLECT")
    got, variables = layer.init_with_output(KEY, X)
    large = jnp.repeat(jnp.repeat(X, 2, 1), 2, 2)
    want = ConvNormAct(6, 3, padding="REFLECT").apply(variables, large)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_residual_block_is_two_of_them():
    block = ResidualBlock(**DRAWN)
    got, variables = block.init_with_output(KEY, X)
    first, second = variables["params"]["conv1"], variables["params"]["conv2"]
    options = {"kernel_size": 3, "padding": "REFLECT"}
    inner = ConvNormAct(4, **options).apply({"params": first}, X)
    want = ConvNormAct(4, activation=None, **options).apply({"params": second}, inner, X)
    np.testing.assert_allclose(got, want, atol=1e-6)
    twin = nnx_layers.ResidualBlock(4, rngs=nnx.Rngs(0))
    assert jax.tree.map(jnp.shape, params(twin)) == jax.tree.map(jnp.shape, variables["params"])
    np.testing.assert_array_equal(applied(twin, variables, X), got)


NORM, BLOCK, RESIDUAL = InstanceNorm, ConvNormAct, ResidualBlock
WRONG = {
    "epsilon=0: expected a number greater than 0": (NORM, {"epsilon": 0}),
    "activation='gelu': expected None or 'relu'": (NORM, {"activation": "gelu"}),
    "dtype='int8': expected one of": (NORM, {"dtype": "int8"}),
    "scale_init=1.0: expected an initialiser": (NORM, {"scale_init": 1.0}),
    r"implementation names \['cudnn'\]": (NORM, {"implementation": "cudnn"}),
    "features=0: expected an integer >= 1": (BLOCK, {"features": 0}),
    "upsample=3: expected 1 or 2": (BLOCK, {"upsample": 3}),
    "strides=0: expected": (BLOCK, {"strides": 0}),
    "padding='CIRCULAR': the names are SAME, VALID, REFLECT": (BLOCK, {"padding": "CIRCULAR"}),
    r"conv_implementation names \['torch'\]": (BLOCK, {"conv_implementation": "torch"}),
    "kernel_size=0: expected": (RESIDUAL, {"kernel_size": 0}),
    r"norm_implementation names \['torch'\]": (RESIDUAL, {"norm_implementation": "torch"}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    layer, wrong = WRONG[message]
    known = {"features": 6, "kernel_size": 3} if layer is BLOCK else {}
    with pytest.raises(ValueError, match=message):
        layer(**known | wrong)
    twin = getattr(nnx_layers, layer.__name__)
    names = {"features": "out_features"} if layer is BLOCK else {}
    given = {names.get(name, name): value for name, value in (known | wrong).items()}
    given |= {"in_features": 4} if layer is BLOCK else {}
    first = {NORM: {"num_features": 4}, RESIDUAL: {"features": 4}}.get(layer, {})
    with pytest.raises(ValueError, match=message):
        twin(**first | given, rngs=nnx.Rngs(0))
