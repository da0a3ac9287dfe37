"""Sparse layers of linen and nnx: one set of parameters, and the oracle's results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.sparse import drawn_voxels

from flash_wtconv_jax import linen as linen_layers
from flash_wtconv_jax import nnx as nnx_layers
from pallas_kernels import oracle
from pallas_kernels.dispatch import tuning
from pallas_kernels.sparse import (
    SPARSE_CONV_BWD_ALGO_MODE,
    from_coords,
    global_pool,
    kernel_map,
    pool,
    sparse_maps,
    unpool,
)

pytestmark = pytest.mark.core

SOME = drawn_voxels((5, 0, 7), 5, 4)
COARSE = drawn_voxels((3, 0, 2), 2, 4, seed=1, capacity=8, tensor_stride=2)

FORMS = {
    "default": {},
    "strided": {"stride": 2, "kernel_size": (3, 1), "bias": False},
    "dilated": {
        "kernel_dilation": [2, 1],
        "fwd_algo": "explicit_gemm",
        "bwd_algo": "implicit_gemm",
    },
    "groups": {"groups": 2, "kernel_size": 2, "fwd_algo": ["triton", "xla"]},
    "generative": {"generative": True, "kernel_size": 2, "out_capacity": 64},
    "transposed": {"transposed": True, "stride": 2, "kernel_size": 2},
    "transposed and generative": {"transposed": True, "generative": True, "stride": 2},
    "full": {"output_rule": "full", "padding": 1, "stride": (2, 1)},
    "reduced": {"stride_mode": "reduce_and_stride", "stride": 2, "stride_reduce": "sum"},
    "auto": {"fwd_algo": "auto", "bwd_algo": SPARSE_CONV_BWD_ALGO_MODE.AUTO},
    "bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "precision": "highest"},
}
NARROW = {("dense", "groups"), ("depthwise", "reduced")}
# Of a depthwise convolution the others reach the operator as those of a dense one do.
DEPTHWISE = ("strided", "transposed", "auto", "bfloat16")


def wide(kind, name):
    few = kind == "dense" or name in DEPTHWISE
    marks = [] if (kind, name) in NARROW else [pytest.mark.wide if few else pytest.mark.slow]
    return pytest.param(kind, name, marks=marks)


def both(layer, twin, voxels, *args):
    """The results of both libraries' layers on voxels, by the same parameters, and these."""
    params = {name: value[...] for name, value in nnx.to_flat_state(nnx.state(twin, nnx.Param))}
    params = {name: value for (name,), value in params.items()}
    shapes = jax.eval_shape(layer.init, jax.random.key(0), voxels, *args)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), dict(shapes)) == {
        name: (value.shape, value.dtype) for name, value in params.items()
    }

    def call(params, voxels, *args):
        with sparse_maps(), tuning("off"):
            return layer.apply({"params": params}, voxels, *args), twin(voxels, *args)

    first, second = jax.jit(call)(params, voxels, *args)
    np.testing.assert_array_equal(first.features, second.features)
    np.testing.assert_array_equal(first.coords, second.coords)
    assert first.check().tensor_stride == second.tensor_stride
    return first, params


def assert_oracles(y, voxels, kernel, bias, *, low=False, **options):
    """Output is what the oracle makes of voxels at the output's voxels."""
    count, rows = int(voxels.num_valid), int(y.num_valid)
    want = oracle.sparse_conv(
        voxels.coords[:count], voxels.features[:count], kernel, y.coords[:rows], **options
    )
    got = np.asarray(y.features[:rows], np.float32)
    np.testing.assert_allclose(got, want + bias, atol=0.05 if low else 1e-5)
    assert not np.any(np.asarray(y.features[rows:], np.float32))


@pytest.mark.parametrize(
    ("kind", "name"), [wide(kind, name) for kind in ("dense", "depthwise") for name in FORMS]
)
def test_every_form_of_a_convolution(kind, name):
    options = {"kernel_size": 3, "bias_init": nn.initializers.normal()} | FORMS[name]
    if kind == "dense":
        layer = linen_layers.SparseConv2d(4, 6, **options)
        twin = nnx_layers.SparseConv2d(4, 6, **options, rngs=nnx.Rngs(0))
    else:
        options = {n: v for n, v in options.items() if n not in ("groups", "precision")}
        options["num_spatial_dims"] = 2
        layer = linen_layers.SparseDepthwiseConv(4, **options)
        twin = nnx_layers.SparseDepthwiseConv(4, **options, rngs=nnx.Rngs(0))
    voxels = COARSE if "transposed" in options else SOME
    y, params = both(layer, twin, voxels, *([SOME] if name == "transposed" else []))
    assert y.features.dtype == options.get("dtype", jnp.float32)

    seen = {
        n: options[n] for n in ("kernel_size", "stride", "padding", "transposed") if n in options
    }
    seen["dilation"] = options.get("kernel_dilation", 1)
    coords, rows = (each[: int(voxels.num_valid)] for each in (voxels.coords, voxels.features))
    if "stride_mode" in options:
        cells = oracle.sparse_outputs(coords, 2, 2)
        coords, rows = cells, oracle.sparse_pool(coords, rows, cells, 2, 2, reduce="sum")
        seen["stride"] = 1
    kernel = np.asarray(params["kernel"], np.float64)
    grouped = {"dense": kernel if kernel.ndim == 4 else kernel[:, None]}
    grouped["depthwise"] = kernel[:, :, None, None]
    valid = int(y.num_valid)
    want = oracle.sparse_conv(coords, rows, grouped[kind], y.coords[:valid], **seen)
    want += np.asarray(params.get("bias", 0), np.float64)
    got = np.asarray(y.features, np.float64)
    tolerance = 0.05 if name == "bfloat16" else 1e-5
    np.testing.assert_allclose(got[:valid], want, atol=tolerance)
    assert not got[valid:].any()


@pytest.mark.wide
@pytest.mark.parametrize("ndim", [1, 3])
def test_lines_and_space_and_a_map_that_is_ready(ndim):
    voxels = drawn_voxels((3, 2), 4, 2, ndim=ndim)
    for layers in (linen_layers, nnx_layers):
        named, general = getattr(layers, f"SparseConv{ndim}d"), layers.SpatiallySparseConv
        options = {"num_spatial_dims": ndim} | (
            {"rngs": nnx.Rngs(0)} if layers is nnx_layers else {}
        )
        made = general(2, 2, (2,) * ndim, 2, **options)
        options.pop("num_spatial_dims")
        assert isinstance(made, general)
        assert named(2, 2, 2, **options).num_spatial_dims == made.num_spatial_dims == ndim
    found, out = kernel_map(voxels, 2, 2)
    y = made(voxels)
    np.testing.assert_array_equal(made(voxels, out, found).features, y.features)
    depthwise = nnx_layers.SparseDepthwiseConv(2, 2, 2, num_spatial_dims=ndim, rngs=nnx.Rngs(0))
    ready = depthwise(voxels, out, found)
    np.testing.assert_array_equal(depthwise(voxels).features, ready.features)
    for layer in (made, depthwise):
        with pytest.raises(ValueError, match="output_voxels=None: with kernel_map="):
            layer(voxels, None, found)


NORMS = {"SparseBatchNorm": set(), "SparseLayerNorm": {"bias"}, "SparseInstanceNorm": {"scale"}}


def test_norms_are_over_the_voxels_that_count():
    def normed(x, axis):
        return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)

    @jax.jit
    def call(voxels):
        results = {}
        for name, absent in NORMS.items():
            options = {"epsilon": 1e-5} | {f"use_{each}": False for each in absent}
            layer = getattr(linen_layers, name)(4, **options)
            flag = {"use_running_average": False} if name == "SparseBatchNorm" else {}
            variables = layer.init(jax.random.key(0), voxels, **flag)
            y, state = layer.apply(variables, voxels, **flag, mutable="batch_stats")
            twin = getattr(nnx_layers, name)(4, **options, rngs=nnx.Rngs(0))
            ours = y, variables.get("params", {}), state.get("batch_stats", {})
            theirs = twin(voxels), nnx.state(twin, nnx.Param), nnx.state(twin, nnx.BatchStat)
            results[name] = ours, (theirs[0], *map(nnx.to_pure_dict, theirs[1:]))
            if flag:
                twin.eval()
                running = layer.apply(variables | state, voxels, use_running_average=True)
                results["running"] = (running, twin(voxels))
        return results

    results = call(SOME.with_features(SOME.features.at[12:].set(jnp.nan)))
    rows, samples = np.asarray(SOME.features[:12], np.float64), np.asarray(SOME.coords[:12, 0])
    each = np.zeros_like(rows)
    for sample in (0, 2):
        each[samples == sample] = normed(rows[samples == sample], 0)
    want = dict(zip(NORMS, (normed(rows, 0), normed(rows, 1), each), strict=True))
    for name, absent in NORMS.items():
        ours, theirs = results[name]
        np.testing.assert_allclose(ours[0].features[:12], want[name], atol=1e-5)
        assert not ours[0].features[12:].any()
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert ours[1].keys() == {"scale", "bias"} - absent
    stats = results["SparseBatchNorm"][0][2]
    np.testing.assert_allclose(stats["mean"], 0.01 * rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.99 + 0.01 * rows.var(0), atol=1e-6)
    moved = (rows - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(results["running"][0].features[:12], moved, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, *results["running"])


def test_a_batch_norm_weighs_devices_by_their_voxels_and_none_leaves_no_trace():
    first, second = (
        from_coords(SOME.coords[part], SOME.features[part], batch_size=3, capacity=16)
        for part in (slice(0, 9), slice(9, 12))
    )
    layer = linen_layers.SparseBatchNorm(4, use_running_average=False, axis_name="devices")
    stats = {"mean": jnp.full(4, 2.0), "var": jnp.full(4, 3.0)}
    variables = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "batch_stats": stats}

    def apply(voxels):
        return layer.apply(variables, voxels, mutable="batch_stats")[1]["batch_stats"]

    mapped = jax.jit(jax.vmap(apply, axis_name="devices"))
    state = mapped(jax.tree.map(lambda *each: jnp.stack(each), first, second))
    rows = np.asarray(SOME.features[:12], np.float64)
    np.testing.assert_allclose(state["mean"], [1.98 + 0.01 * rows.mean(0)] * 2, atol=1e-6)
    np.testing.assert_allclose(state["var"], [2.97 + 0.01 * rows.var(0)] * 2, atol=1e-6)
    none = dataclasses.replace(first, num_valid=jnp.int32(0))
    state = mapped(jax.tree.map(lambda *each: jnp.stack(each), none, none))
    jax.tree.map(
        np.testing.assert_array_equal, state, {n: jnp.stack([v, v]) for n, v in stats.items()}
    )


@pytest.mark.wide
def test_pools_take_their_arguments_along():
    pooled = pool(SOME, 3, 2, padding=1, reduce="mean", out_capacity=32)
    again = unpool(pooled, SOME, 3, 2, padding=1)
    for layers, bind in ((linen_layers, lambda layer: layer.bind({})), (nnx_layers, lambda x: x)):
        got = bind(layers.SparsePool(3, 2, padding=1, reduce="mean", out_capacity=32))(SOME)
        np.testing.assert_array_equal(got.features, pooled.features)
        got = bind(layers.SparseUnpool(3, 2, padding=1))(pooled, SOME)
        np.testing.assert_array_equal(got.features, again.features)
        got = bind(layers.SparseGlobalPool("sum"))(SOME)
        np.testing.assert_array_equal(got, global_pool(SOME, reduce="sum"))


WRONG = {
    "in_channels=0: expected an integer >= 1": {"in_channels": 0},
    "groups=3: expected a divisor of in_channels=4": {"groups": 3},
    "kernel_size=(3, 3, 3): expected an integer >= 1, or 2 of them": {"kernel_size": (3, 3, 3)},
    "kernel_init=1: expected an initialiser": {"kernel_init": 1},
    "param_dtype='int8': expected": {"param_dtype": "int8"},
    "precision='best': expected": {"precision": "best"},
    "fwd_algo names ['cudnn']": {"fwd_algo": "cudnn"},
    "bwd_algo names ['cudnn']": {"bwd_algo": ["cudnn"]},
    "stride_mode='reduce': expected one of stride_only": {"stride_mode": "reduce"},
    "num_spatial_dims=4: expected": {"num_spatial_dims": 4},
    "voxels: expected 1 axes": {"num_spatial_dims": 1},
    "voxels: expected features [capacity, 5]": {"in_channels": 5},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "num_spatial_dims": 2}
    options |= WRONG[message]
    with pytest.raises(ValueError) as error:
        linen_layers.SpatiallySparseConv(**options).init(jax.random.key(0), SOME)
    assert message in str(error.value)
    with pytest.raises(ValueError) as error:
        nnx_layers.SpatiallySparseConv(**options, rngs=nnx.Rngs(0))(SOME)
    assert message in str(error.value)


def test_what_is_no_voxels_says_what_makes_them():
    with pytest.raises(ValueError, match="from_coords"):
        nnx_layers.SparseConv2d(4, 6, 3, rngs=nnx.Rngs(0))(jnp.ones((3, 4)))
