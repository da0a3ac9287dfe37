"""Conv2d of linen and nnx: the parameters and the results of Flax's own Conv."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flash_wtconv_jax.nnx as nnx_layers
from flash_wtconv_jax import Conv2d

pytestmark = pytest.mark.core

OPTIONS = {
    "default": {},
    "stride": {"strides": (2, 1), "kernel_size": (3, 2), "use_bias": False},
    "reflect": {"padding": "REFLECT", "kernel_size": (4, 3), "kernel_dilation": (1, 2)},
    "circular": {"padding": "CIRCULAR", "kernel_size": (2, 5), "strides": 2},
    "sides": {"padding": ((0, 1), (2, 0)), "feature_group_count": 2},
    "one a side": {"padding": [1, (0, 2)], "strides": None, "kernel_dilation": None},
    "transposed": {"input_dilation": (2, 3), "padding": ((1, 2), (2, 2))},
    "mask": {"mask": np.tri(3)[:, :, None, None] * np.ones((3, 3, 4, 6), np.float32)},
    "bfloat16": {"dtype": jnp.bfloat16},
    "parameters": {"param_dtype": jnp.bfloat16, "precision": "highest"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_and_results_are_flaxs(name):
    options = {"kernel_size": (3, 3)} | OPTIONS[name]
    x = jax.random.normal(jax.random.key(1), (2, 9, 8, 4))
    key = jax.random.key(0)
    biased = {"bias_init": nn.initializers.normal()}
    want, variables = nn.Conv(6, **options, **biased).init_with_output(key, x)
    got, ours = Conv2d(6, **options, **biased).init_with_output(key, x)
    jax.tree.map(np.testing.assert_array_equal, ours, variables)
    assert got.dtype == want.dtype
    tolerance = 0.03 if got.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got, want)), atol=tolerance)

    layer = nnx_layers.Conv2d(4, 6, **options, **biased, rngs=nnx.Rngs(0))
    theirs = nnx.Conv(4, 6, **options, **biased, rngs=nnx.Rngs(0))
    states = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (layer, theirs))
    jax.tree.map(np.testing.assert_array_equal, *states)
    layer.kernel[...] = variables["params"]["kernel"]
    if layer.bias is not None:
        layer.bias[...] = variables["params"]["bias"]
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(layer, x), got)


@pytest.mark.parametrize("padding", [("reflect", 4), ["reflect", ((1, 0), (3, 2))]], ids=str)
def test_so_many_samples_are_mirrored(padding):
    x = jax.random.normal(jax.random.key(1), (2, 9, 8, 4))
    layer = Conv2d(6, 3, padding=padding)
    got, variables = layer.init_with_output(jax.random.key(0), x)
    sides = ((4, 4), (4, 4)) if padding[1] == 4 else padding[1]
    mirrored = np.pad(x, [(0, 0), *sides, (0, 0)], mode="reflect")
    want = nn.Conv(6, (3, 3), padding="VALID").apply(variables, mirrored)
    np.testing.assert_allclose(got, want, atol=1e-5)
    twin = nnx_layers.Conv2d(4, 6, 3, padding=padding, rngs=nnx.Rngs(0))
    twin.kernel[...] = variables["params"]["kernel"]
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(twin, x), got)


def test_an_activation_in_the_same_kernel():
    x = jax.random.normal(jax.random.key(1), (9, 8, 4))
    layer = Conv2d(6, 3, activation="gelu")
    got, variables = layer.init_with_output(jax.random.key(0), x)
    want = nn.gelu(nn.Conv(6, (3, 3)).apply(variables, x), approximate=False)
    np.testing.assert_allclose(got, want, atol=1e-5)


WRONG = {
    "features=0: expected an integer >= 1": {"features": 0},
    "kernel_size=(3, 3, 3): expected an integer >= 1, or two of them": {"kernel_size": (3, 3, 3)},
    "strides=0: expected": {"strides": 0},
    "padding='reflect': the names are SAME, VALID, REFLECT": {"padding": "reflect"},
    "kernel_dilation=0.5: expected": {"kernel_dilation": 0.5},
    "kernel_init=0.0: expected an initialiser": {"kernel_init": 0.0},
    "bias_init=1: expected an initialiser": {"bias_init": 1},
    "param_dtype='int8': expected": {"param_dtype": "int8"},
    "precision='best': expected": {"precision": "best"},
    "implementation names ['cudnn']": {"implementation": "cudnn"},
    "feature_group_count=4: expected a divisor of the 4 channels": {"feature_group_count": 4},
    "mask: expected the kernel's shape, (3, 3, 4, 6), got (3, 3)": {"mask": np.ones((3, 3))},
    "padding=(-1, 1): expected integers >= 0": {"padding": (-1, 1)},
    "padding=('reflect', (8, 8)): mirroring 8 samples along W takes an image of more than those, "
    "got 8": {"padding": ("reflect", (8, 8))},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    options = {"features": 6, "kernel_size": 3} | WRONG[message]
    with pytest.raises(ValueError) as error:
        Conv2d(**options).init(jax.random.key(0), jnp.ones((9, 8, 4)))
    assert message in str(error.value)
    with pytest.raises(ValueError) as error:
        features = options.pop("features")
        nnx_layers.Conv2d(4, features, **options, rngs=nnx.Rngs(0))(jnp.ones((9, 8, 4)))
    assert message in str(error.value)


def test_parameters_of_an_unnamed_layer_keep_the_name_that_it_is_made_by():
    with pytest.warns(DeprecationWarning):
        from flash_wtconv_jax.linen import Conv2D
    x = jnp.ones((9, 8, 4))
    for layer, name in ((Conv2D, "Conv2D_0"), (Conv2d, "Conv2d_0")):
        variables = jax.eval_shape(_Unnamed(layer).init, jax.random.key(0), x)
        assert list(variables["params"]) == [name]


class _Unnamed(nn.Module):
    layer: type

    @nn.compact
    def __call__(self, x):
        return self.layer(6, 3)(x)
