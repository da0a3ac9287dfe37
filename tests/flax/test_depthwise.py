"""DepthwiseConv2d of linen and nnx: the parameters and the results of Flax's own Conv."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flash_wtconv_jax.nnx as nnx_layers
from flash_wtconv_jax import DepthwiseConv2d

WIDE, SLOW = pytest.mark.wide, pytest.mark.slow
OPTIONS = {
    "default": {},
    "stride": {"strides": (2, 2), "kernel_size": (7, 7), "use_bias": False},
    "sides": {"padding": ((0, 1), (2, 0)), "kernel_dilation": (1, 2)},
    "circular": {"padding": "CIRCULAR", "kernel_size": (2, 5), "strides": None},
    "reflect": {"padding": "REFLECT", "kernel_size": (4, 4)},
    "transposed": {"input_dilation": (2, 3), "padding": ((1, 2), (2, 2))},
    "mask": {"mask": np.tri(3)[:, :, None, None] * np.ones((3, 3, 1, 4), np.float32)},
    "bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
}


@pytest.mark.parametrize(
    "name",
    [
        # Padding and dilation are those of Conv2d, whose tests have them.
        pytest.param(name, marks=[(SLOW if name in ("sides", "reflect") else WIDE)] * (i > 1))
        for i, name in enumerate(OPTIONS)
    ],
)
def test_parameters_and_results_are_flaxs(name):
    options = {"kernel_size": (3, 3), "bias_init": nn.initializers.normal()} | OPTIONS[name]
    x = jax.random.normal(jax.random.key(1), (2, 9, 8, 4))
    key = jax.random.key(0)
    theirs = nn.Conv(4, feature_group_count=4, **options)
    want, variables = theirs.init_with_output(key, x)
    got, ours = DepthwiseConv2d(4, **options).init_with_output(key, x)
    jax.tree.map(np.testing.assert_array_equal, ours, variables)
    assert got.dtype == want.dtype
    tolerance = 0.03 if got.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got, want)), atol=tolerance)

    layer = nnx_layers.DepthwiseConv2d(4, **options, rngs=nnx.Rngs(0))
    twin = nnx.Conv(4, 4, feature_group_count=4, **options, rngs=nnx.Rngs(0))
    states = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (layer, twin))
    jax.tree.map(np.testing.assert_array_equal, *states)
    layer.kernel[...] = variables["params"]["kernel"]
    if layer.bias is not None:
        layer.bias[...] = variables["params"]["bias"]
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(layer, x), got)


WRONG = {
    "features=0: expected an integer >= 1": {"features": 0},
    "kernel_size=(3, 3, 3): expected an integer >= 1, or two of them": {"kernel_size": (3, 3, 3)},
    "strides=0: expected": {"strides": 0},
    "padding='same': the names are SAME, VALID, REFLECT": {"padding": "same"},
    "kernel_dilation=0.5: expected": {"kernel_dilation": 0.5},
    "kernel_init=0.0: expected an initialiser": {"kernel_init": 0.0},
    "param_dtype='int8': expected": {"param_dtype": "int8"},
    "precision='best': expected": {"precision": "best"},
    "implementation names ['cudnn']": {"implementation": "cudnn"},
    "mask: expected the kernel's shape, (3, 3, 1, 4), got (3, 3)": {"mask": np.ones((3, 3))},
    "x: expected features=5 channels, which come last, got shape (9, 8, 4)": {"features": 5},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    options = {"features": 4, "kernel_size": 3} | WRONG[message]
    x = jnp.ones((9, 8, 4))
    with pytest.raises(ValueError) as error:
        jax.eval_shape(DepthwiseConv2d(**options).init, jax.random.key(0), x)
    assert message in str(error.value)
    with pytest.raises(ValueError) as error:
        layer = nnx_layers.DepthwiseConv2d(**options, rngs=nnx.Rngs(0))
        nnx.eval_shape(lambda m, x: m(x), layer, x)
    assert message in str(error.value)


@pytest.mark.parametrize("rngs", [None, 0])
def test_keys_have_a_source(rngs):
    with pytest.raises(ValueError, match="rngs: expected an nnx.Rngs"):
        nnx_layers.DepthwiseConv2d(4, 3, rngs=rngs)
