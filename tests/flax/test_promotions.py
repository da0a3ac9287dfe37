"""JAX's strict modes, which find ranks and dtypes that are promoted unawares, find none of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flash_wtconv_jax.linen as linen_layers
import flash_wtconv_jax.nnx as nnx_layers
from flash_wtconv_jax.models.convnext import Block, ConvNeXt, ConvNeXtConfig, GlobalResponseNorm
from flash_wtconv_jax.models.transformer_net import TransformerNet
from pallas_kernels import haar
from pallas_kernels.conv2d import conv2d
from pallas_kernels.wtconv import wtconv1d, wtconv2d, wtconv3d

pytestmark = pytest.mark.core

HALF = jnp.bfloat16
CONFIG = ConvNeXtConfig(depths=(1,), dims=(4,), levels=(1,), num_classes=3)


def drawn(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def weights(ndim, dtype=jnp.float32):
    taps, bands = (3,) * ndim, 2**ndim
    shapes = {"base_kernel": (*taps, 1, 2), "base_scale": (2,), "base_bias": (2,)}
    shapes |= {"wavelet_kernel_0": (*taps, bands, 2), "wavelet_scale_0": (bands, 2)}
    return {name: drawn(*shape, dtype=dtype) for name, shape in shapes.items()}


def linen(name, *args, x, **options):
    layer = getattr(linen_layers, name)(*args, **options)
    return layer.apply, jax.eval_shape(layer.init, jax.random.key(0), x), x


def module(make, x):
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return lambda state, x: nnx.merge(graph, state)(x), state, x


X1, X2, X3 = drawn(1, 5, 2), drawn(1, 5, 4, 2), drawn(1, 5, 4, 3, 2)
MASKED = {"mask": np.ones((3, 3, 2, 3), np.float32)}
CASES = {
    "wtconv1d": lambda: (wtconv1d, X1, weights(1)),
    "wtconv2d": lambda: (lambda x, p: wtconv2d(x, p, stride=2, wavelet="db2"), X2, weights(2)),
    "wtconv2d bfloat16": lambda: (wtconv2d, drawn(1, 5, 4, 2, dtype=HALF), weights(2)),
    "wtconv3d": lambda: (wtconv3d, X3, weights(3, HALF)),
    "conv2d": lambda: (
        lambda x, w, b: conv2d(x, w, bias=b, activation="relu", padding="reflect"),
        *(X2, drawn(3, 3, 2, 3), drawn(3)),
    ),
    "conv2d bfloat16": lambda: (
        lambda x, w, b: conv2d(x, w, bias=b, activation="gelu", layout="nchw_fchw"),
        *(drawn(1, 2, 5, 4, dtype=HALF), drawn(3, 2, 3, 3, dtype=HALF), drawn(3)),
    ),
    "wavedec2": lambda: (lambda x: haar.waverec2(haar.wavedec2(x, "db2", 2), "db2"), X2),
    "wavedec3 bfloat16": lambda: (
        lambda x: haar.wavedec3(x, level=2),
        drawn(5, 4, 3, 2, dtype=HALF),
    ),
    "linen WTConv2d": lambda: linen("WTConv2d", 2, 3, x=X2),
    "linen SeparableWTConv2d": lambda: linen("SeparableWTConv2d", 2, 3, dtype=HALF, x=X2),
    "linen Conv2d": lambda: linen("Conv2d", 3, 3, dtype=HALF, activation="gelu", x=X2, **MASKED),
    "nnx WTConv1d": lambda: module(lambda r: nnx_layers.WTConv1d(2, dtype=HALF, rngs=r), X1),
    "nnx WTConv3d": lambda: module(lambda r: nnx_layers.WTConv3d(2, rngs=r), X3),
    "nnx Conv2d": lambda: module(
        lambda r: nnx_layers.Conv2d(2, 3, 3, padding="CIRCULAR", input_dilation=2, rngs=r), X2
    ),
    "GRN": lambda: module(lambda r: GlobalResponseNorm(2), drawn(1, 5, 4, 2, dtype=HALF)),
    "Block": lambda: module(lambda r: Block(CONFIG, 0, 0.0, rngs=r), drawn(1, 5, 4, 4)),
    "ConvNeXt": lambda: module(lambda r: ConvNeXt(CONFIG, rngs=r), drawn(1, 8, 8, 3)),
    "TransformerNet": lambda: module(lambda r: TransformerNet(rngs=r), drawn(1, 8, 8, 3)),
}


@pytest.mark.parametrize(
    "name",
    [
        # Their parts are in the table.
        pytest.param(name, marks=[pytest.mark.wide] * (name in ("ConvNeXt", "TransformerNet")))
        for name in CASES
    ],
)
def test_nothing_is_promoted_unawares(name):
    call, *arrays = CASES[name]()

    def both(*arrays):
        y, pullback = jax.vjp(call, *arrays)
        return jax.jvp(call, arrays, arrays), pullback(y)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        (y, tangent), gradients = jax.eval_shape(both, *arrays)
    types = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((gradients, tangent))]
    assert types == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((tuple(arrays), y))]
