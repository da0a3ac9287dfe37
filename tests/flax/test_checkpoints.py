"""Names, files and folders of checkpoints; no test but those of `.pth` needs PyTorch."""

import argparse
import os
import pickle
import re
import sys
from functools import partial

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors import SafetensorError

from flash_wtconv_jax import WTConv2d, checkpoints
from flash_wtconv_jax import nnx as nnx_layers
from flash_wtconv_jax.models import convnext
from pallas_kernels import oracle
from pallas_kernels.common.files import replacing

SPATIAL = {1: (5,), 2: (5, 3), 3: (3, 2, 4)}


def random_array(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def layer_state_dict(layout, ndim=2, levels=2, channels=3, bias=True, dtype=np.float32, seed=0):
    """A state dict of a layer, written down independently of the tables; without filters."""
    rng = np.random.default_rng(seed)
    k, ones, bands = SPATIAL[ndim], (1,) * ndim, 2**ndim * channels
    if layout == "published":
        base, bias_name, scale = "base_conv.weight", "base_conv.bias", "base_scale.weight"
        names = ("wavelet_convs.{}.weight", "wavelet_scale.{}.weight")
    else:
        base, bias_name, scale = "base_weight", "base_bias", "base_scale"
        names = ("wt_weights.{}", "wt_scales.{}")
    shapes = {base: (channels, 1, *k), scale: (1, channels, *ones)}
    for i in range(levels):
        shapes[names[0].format(i)] = (bands, 1, *k)
        shapes[names[1].format(i)] = (1, bands, *ones)
    if bias:
        shapes[bias_name] = (channels,)
    return {name: random_array(rng, shape, dtype) for name, shape in shapes.items()}


def haar_filters(ndim, channels, dtype=np.float32):
    tap = np.float32(np.sqrt(0.5))
    filters = []
    for s in range(2**ndim):
        product = np.ones((), np.float32)
        for axis in range(ndim):
            high = s >> axis & 1
            product = np.multiply.outer(product, np.array([tap, -tap if high else tap]))
        filters.append(product)
    return np.tile(np.stack(filters)[:, None].astype(dtype), (channels, *(1,) * (ndim + 1)))


def published(**options):
    ndim, channels = options.get("ndim", 2), options.get("channels", 3)
    filters = haar_filters(ndim, channels, options.get("dtype", np.float32))
    return {
        **layer_state_dict("published", **options),
        "wt_filter": filters,
        "iwt_filter": filters,
    }


def assert_same(one, other):
    assert set(one) == set(other)
    for name, value in one.items():
        assert other[name].dtype == value.dtype, name
        assert other[name].shape == value.shape, name
        assert other[name].tobytes() == value.tobytes(), name


def flat(tree, prefix=""):
    result = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return result


@pytest.mark.parametrize("layout", ["published", "fast"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_layer_round_trip_is_bitwise(layout, ndim, dtype):
    make = published if layout == "published" else lambda **o: layer_state_dict("fast", **o)
    for levels, bias in ((0, True), (2, False)):
        state_dict = make(ndim=ndim, dtype=dtype, levels=levels, bias=bias)
        variables = checkpoints.from_torch(state_dict)
        assert_same(checkpoints.to_torch(variables, layout=layout), state_dict)
        again = checkpoints.from_torch(checkpoints.to_torch(variables, layout), layout)
        assert_same(flat(again), flat(variables))


def test_every_element_lands_where_it_should():
    state_dict = published()
    params = checkpoints.from_torch(state_dict)["params"]
    assert {name: value.shape for name, value in params.items()} == {
        "base_kernel": (5, 3, 1, 3),
        "base_bias": (3,),
        "base_scale": (3,),
        "wavelet_kernel_0": (5, 3, 4, 3),
        "wavelet_kernel_1": (5, 3, 4, 3),
        "wavelet_scale_0": (4, 3),
        "wavelet_scale_1": (4, 3),
    }
    for c in range(3):
        base = state_dict["base_conv.weight"][c, 0]
        np.testing.assert_array_equal(params["base_kernel"][:, :, 0, c], base)
        assert params["base_scale"][c] == state_dict["base_scale.weight"][0, c, 0, 0]
        for s in range(4):
            taps = state_dict["wavelet_convs.1.weight"][4 * c + s, 0]
            np.testing.assert_array_equal(params["wavelet_kernel_1"][:, :, s, c], taps)
            scale = state_dict["wavelet_scale.0.weight"][0, 4 * c + s, 0, 0]
            assert params["wavelet_scale_0"][s, c] == scale


def test_layouts_are_recognised_in_any_order():
    for layout in ("published", "fast"):
        for ndim in (1, 2, 3):
            make = published if layout == "published" else lambda **o: layer_state_dict("fast", **o)
            state_dict = make(ndim=ndim, levels=12, channels=2)
            names = np.random.default_rng(0).permutation(list(state_dict))
            shuffled = {str(name): state_dict[name] for name in names}
            assert checkpoints.recognise(shuffled) == (layout, ndim, "haar")
            ordered = checkpoints.from_torch(state_dict)
            assert_same(flat(checkpoints.from_torch(shuffled)), flat(ordered))
    assert checkpoints.recognise(model_state_dict()).layout == "wtconvnext"


def test_flax_layer_computes_what_the_state_dict_means():
    state_dict = published(levels=3)
    state_dict = {n: v[..., :3, :] if n.endswith("s.weight") else v for n, v in state_dict.items()}
    for name in list(state_dict):
        if "conv" in name and name.endswith("weight"):
            state_dict[name] = np.ascontiguousarray(state_dict[name][:, :, :3, :3])
    variables = checkpoints.from_torch(state_dict)
    x = random_array(np.random.default_rng(1), (2, 7, 10, 3))
    y = WTConv2d(channels=3, kernel_size=3, depth=3).apply(variables, x)
    reference = oracle.wtconv(x, variables["params"], 2)
    np.testing.assert_allclose(y, reference, atol=1e-5 * np.sqrt(np.mean(reference**2)))


def test_arrays_are_copies():
    state_dict = published()
    params = checkpoints.from_torch(state_dict)["params"]
    back = checkpoints.to_torch(params)
    for array in state_dict.values():
        array[...] = 7
    assert not np.any(params["base_bias"] == 7)
    for array in params.values():
        array[...] = 8
    assert not np.any(back["base_conv.bias"] == 8)
    assert not np.any(back["base_conv.weight"] == 8)


def test_every_misfit_is_in_one_error():
    state_dict = published()
    del state_dict["base_scale.weight"], state_dict["wavelet_scale.0.weight"]
    state_dict["running_mean"] = np.zeros(3)
    state_dict["wavelet_convs.01.weight"] = np.zeros(3)
    state_dict["base_conv.weight"] = state_dict["base_conv.weight"][:2]
    state_dict["wavelet_convs.1.weight"] = np.moveaxis(state_dict["wavelet_convs.1.weight"], 0, -1)
    state_dict["base_conv.bias"] = np.zeros(3, np.int64)
    state_dict["iwt_filter"] = -state_dict["iwt_filter"]
    with pytest.raises(ValueError) as info:
        checkpoints.from_torch(state_dict)
    lines = str(info.value).splitlines()
    assert lines[0] == (
        "the tensors of state_dict are not layout 'published' (2-D): 2 missing, 2 surplus, "
        "2 misshapen, 1 not floating, 1 filter"
    )
    assert lines[1:] == [
        "  missing: base_scale.weight (1, 3, 1, 1)",
        "  missing: wavelet_scale.0.weight (1, 12, 1, 1)",
        "  surplus: running_mean (3,)",
        "  surplus: wavelet_convs.01.weight (3,)",
        "  misshapen: base_conv.weight is (2, 1, 5, 3), expected (3, 1, 5, 3)",
        "  misshapen: wavelet_convs.1.weight is (1, 5, 3, 12), expected (12, 1, 5, 3)",
        "  not floating: base_conv.bias is int64",
        "  filter: iwt_filter does not hold the synthesis filters of 'haar', nor any other's",
    ]


@pytest.mark.parametrize("name", sorted(published()))
def test_no_missing_tensor_goes_unnoticed(name):
    state_dict = published()
    del state_dict[name]
    if name == "base_conv.bias":  # A layer without a bias is one too.
        assert "base_bias" not in checkpoints.from_torch(state_dict)["params"]
        return
    with pytest.raises(ValueError, match=rf"1 missing\n  missing: {name} \("):
        checkpoints.from_torch(state_dict)


def test_misfits_of_variables():
    params = checkpoints.from_torch(published())["params"]
    del params["wavelet_kernel_0"]
    params["pointwise"] = {"kernel": np.zeros((3, 4))}
    params["base_scale"] = np.ones((3, 1))
    with pytest.raises(ValueError) as info:
        checkpoints.to_torch({"params": params}, "published")
    assert str(info.value).splitlines() == [
        "the tensors of variables are not layout 'published' (2-D): 1 missing, 1 surplus, "
        "1 misshapen",
        "  missing: wavelet_kernel_0 (5, 3, 4, 3)",
        "  surplus: pointwise.kernel (3, 4)",
        "  misshapen: base_scale is (3, 1), expected (3,)",
    ]
    with pytest.raises(ValueError, match=r"collections \['batch_stats'\]"):
        checkpoints.to_torch({"params": params, "batch_stats": {}})


def test_layout_must_be_known():
    with pytest.raises(
        ValueError, match="layout is 'nope', expected one of published, fast, metal, wtc"
    ):
        checkpoints.from_torch(published(), "nope")
    with pytest.raises(ValueError, match="layout is 'nope'"):
        checkpoints.to_torch({}, layout="nope")
    with pytest.raises(ValueError, match=r"no layout recognised among 1 names \(fc.weight\)"):
        checkpoints.from_torch({"fc.weight": np.zeros((2, 2))})
    with pytest.raises(ValueError, match="no layout recognised among 0 names"):
        checkpoints.recognise({})
    # Named, the layout is what the tensors are held against.
    with pytest.raises(ValueError, match="not layout 'fast'.*\n(.*\n)*  missing: base_weight"):
        checkpoints.from_torch(published(), "fast")


def test_frozen_filters_are_those_of_the_wavelet():
    params = checkpoints.from_torch(published())["params"]
    state_dict = checkpoints.to_torch(params, wavelet="sym4")
    assert state_dict["wt_filter"].shape == (12, 1, 8, 8)
    assert checkpoints.recognise(state_dict) == ("published", 2, "sym4")
    assert_same(checkpoints.from_torch(state_dict, wavelet="sym4")["params"], params)
    with pytest.raises(ValueError, match="filters of 'haar', they are those of 'sym4': pass wav"):
        checkpoints.from_torch(state_dict)
    with pytest.raises(ValueError, match="wavelet='morl' is not a discrete wavelet"):
        checkpoints.to_torch(params, wavelet="morl")
    with pytest.raises(ValueError, match="layers of layout 'fast' are Haar"):
        checkpoints.to_torch(params, "fast", wavelet="db2")
    assert set(checkpoints.to_torch(params, "fast", wavelet="Haar")) == set(
        checkpoints.to_torch(params, "fast")
    )


def test_published_layers_with_a_stride():
    state_dict = {**published(), "stride_filter": np.ones((3, 1, 1, 1), np.float32)}
    assert_same(
        checkpoints.from_torch(state_dict)["params"], checkpoints.from_torch(published())["params"]
    )
    state_dict["stride_filter"][0] = 2
    with pytest.raises(ValueError, match="stride_filter is not all ones"):
        checkpoints.from_torch(state_dict)


# Whole models.


def make_config(**options):
    shared = {"depths": (1, 2), "dims": (4, 6), "kernel_size": 3, "num_classes": 5}
    return convnext.ConvNeXtConfig(**{**shared, "levels": (2, 0), **options})


def make_model(**options):
    return convnext.ConvNeXt(make_config(**options), rngs=nnx.Rngs(0))


def model_state_dict(levels=(2, 0), grn=False, seed=0):
    """A small WTConvNeXt (ConvNeXt if levels is None) in timm's names, written down by hand."""
    rng = np.random.default_rng(seed)
    shapes = {"stem.0.weight": (4, 3, 4, 4), "stem.0.bias": (4,)}
    shapes |= {f"stem.1.{n}": (4,) for n in ("weight", "bias")}
    frozen = {}
    for s, b, c in ((0, 0, 4), (1, 0, 6), (1, 1, 6)):
        block = f"stages.{s}.blocks.{b}"
        shapes |= {f"{block}.norm.weight": (c,), f"{block}.norm.bias": (c,), f"{block}.gamma": (c,)}
        shapes |= {f"{block}.mlp.fc1.weight": (4 * c, c), f"{block}.mlp.fc1.bias": (4 * c,)}
        shapes |= {f"{block}.mlp.fc2.weight": (c, 4 * c), f"{block}.mlp.fc2.bias": (c,)}
        if grn:
            shapes |= {f"{block}.mlp.grn.{n}": (4 * c,) for n in ("weight", "bias")}
        if levels is None:
            shapes |= {f"{block}.conv_dw.weight": (c, 1, 3, 3), f"{block}.conv_dw.bias": (c,)}
            continue
        conv = f"{block}.conv_dw"
        shapes |= {f"{conv}.base_conv.weight": (c, 1, 3, 3), f"{conv}.base_conv.bias": (c,)}
        shapes |= {f"{conv}.base_scale.weight": (1, c, 1, 1)}
        for i in range(levels[s]):
            shapes |= {f"{conv}.wavelet_convs.{i}.weight": (4 * c, 1, 3, 3)}
            shapes |= {f"{conv}.wavelet_scale.{i}.weight": (1, 4 * c, 1, 1)}
        frozen |= {f"{conv}.{n}": haar_filters(2, c) for n in ("wt_filter", "iwt_filter")}
    shapes |= {f"stages.1.downsample.0.{n}": (4,) for n in ("weight", "bias")}
    shapes |= {"stages.1.downsample.1.weight": (6, 4, 2, 2), "stages.1.downsample.1.bias": (6,)}
    shapes |= {"head.norm.weight": (6,), "head.norm.bias": (6,)}
    shapes |= {"head.fc.weight": (5, 6), "head.fc.bias": (5,)}
    return {name: random_array(rng, shape) for name, shape in shapes.items()} | frozen


@pytest.mark.parametrize(
    "options",
    [{}, {"use_grn": True}, {"levels": None}, {"layer_scale": None}, {"num_classes": 0}],
    ids=str,
)
def test_model_round_trip(options):
    model = nnx.eval_shape(lambda: make_model(**options))
    state_dict = model_state_dict(options.get("levels", (2, 0)), options.get("use_grn", False))
    dropped = {"layer_scale": ".gamma", "num_classes": "head.fc."}
    for option in options:
        part = dropped.get(option, "nothing")
        state_dict = {name: a for name, a in state_dict.items() if part not in name}
    variables = checkpoints.from_torch(state_dict)
    assert_same(checkpoints.to_torch(variables), state_dict)
    checkpoints.load_into(model, variables)
    assert_same(flat(checkpoints.variables_of(model)), flat(variables))


def torch_model(state_dict, x):
    """The forward pass of timm's ConvNeXt, with GRN and WTConv, on `[N, C, H, W]`."""
    import torch.nn.functional as F

    import torch_bridge

    p = {name: tensor.double() for name, tensor in checkpoints.to_tensors(state_dict).items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    def norm2d(x, name):
        return norm(x.permute(0, 2, 3, 1), name).permute(0, 3, 1, 2)

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def block(x, name, levels):
        conv = torch_bridge.WTConv2d(
            *(x.shape[1], x.shape[1]), kernel_size=3, wt_levels=levels, device="cpu", dtype=x.dtype
        )
        conv.load_state_dict(
            {n.split(".conv_dw.")[1]: t for n, t in p.items() if n.startswith(f"{name}.conv_dw.")}
        )
        y = norm(conv(x).permute(0, 2, 3, 1), f"{name}.norm")
        y = F.gelu(linear(y, f"{name}.mlp.fc1"))
        grn = y.norm(dim=(1, 2), keepdim=True)
        grn = grn / (grn.mean(dim=-1, keepdim=True) + 1e-6)
        y = y + p[f"{name}.mlp.grn.bias"] + p[f"{name}.mlp.grn.weight"] * y * grn
        return x + (linear(y, f"{name}.mlp.fc2") * p[f"{name}.gamma"]).permute(0, 3, 1, 2)

    x = norm2d(F.conv2d(x, p["stem.0.weight"], p["stem.0.bias"], stride=4), "stem.1")
    x = block(x, "stages.0.blocks.0", 2)
    down = "stages.1.downsample"
    x = F.conv2d(norm2d(x, f"{down}.0"), p[f"{down}.1.weight"], p[f"{down}.1.bias"], stride=2)
    x = block(block(x, "stages.1.blocks.0", 0), "stages.1.blocks.1", 0)
    return linear(norm(x.mean((2, 3)), "head.norm"), "head.fc")


def test_model_computes_what_the_state_dict_means():
    torch = pytest.importorskip("torch")
    state_dict = model_state_dict(grn=True)
    x = random_array(np.random.default_rng(2), (2, 12, 21, 3))
    with torch.no_grad():
        reference = torch_model(state_dict, torch.from_numpy(x).double().permute(0, 3, 1, 2))
    model = nnx.bridge.to_linen(convnext.ConvNeXt, make_config(use_grn=True))
    variables = checkpoints.for_bridge(checkpoints.from_torch(state_dict))
    y = jax.jit(lambda x: model.apply(variables, x, deterministic=True))(x)
    np.testing.assert_allclose(y, reference.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "size", ["tiny", *(pytest.param(s, marks=pytest.mark.slow) for s in ("small", "base"))]
)
def test_full_size_models_fit(size):
    """Names and shapes of the whole published models, without their memory."""
    make = getattr(convnext, f"wtconvnext_{size}")
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param)
    zero = np.zeros(1, np.float32)
    params = {
        ".".join(map(str, path)): np.broadcast_to(zero, leaf.shape)
        for path, leaf in nnx.to_flat_state(state)
    }
    state_dict = checkpoints.to_torch(params, "wtconvnext")
    counts = {"tiny": 30_595_624, "small": 54_448_936, "base": 94_225_128}
    assert sum(array.size for array in state_dict.values()) == counts[size]
    assert checkpoints.recognise(state_dict) == ("wtconvnext", 2, "haar")


# How the names of timm are spelt elsewhere, in the order of replacement.
SPELLINGS = {
    "original": {
        r"^stem": "downsample_layers.0",
        r"stages\.(\d)\.downsample": r"downsample_layers.\1",
        r"\.blocks": "",
        "conv_dw": "dwconv",
        r"mlp\.fc": "pwconv",
        r"mlp\.grn\.weight": "grn.gamma",
        r"mlp\.grn\.bias": "grn.beta",
        r"^head\.norm": "norm",
        r"^head\.fc": "head",
    },
    "mmseg": {
        r"^stem": "downsample_layers.0",
        r"stages\.(\d)\.downsample": r"downsample_layers.\1",
        r"\.blocks": "",
        "conv_dw": "depthwise_conv",
        r"mlp\.fc": "pointwise_conv",
        r"mlp\.grn\.weight": "grn.gamma",
        r"mlp\.grn\.bias": "grn.beta",
    },
    "features_only": {r"^stem\.": "stem_", r"^stages\.": "stages_"},
    "fast layers": {
        r"base_conv\.": "base_",
        r"base_scale\.weight": "base_scale",
        r"wavelet_convs\.(\d)\.weight": r"wt_weights.\1",
        r"wavelet_scale\.(\d)\.weight": r"wt_scales.\1",
    },
    "metal layers": {
        r"base_scale\.weight": "base_scale",
        r"wavelet_scale\.(\d)\.weight": r"wavelet_scales.\1",
    },
}


def spelt(state_dict, spelling):
    result = {}
    for name, array in state_dict.items():
        for pattern, replacement in SPELLINGS[spelling].items():
            name = re.sub(pattern, replacement, name)
        result[name] = array
    return result


@pytest.mark.parametrize("layout", ["original", "mmseg", "features_only"])
def test_whole_models_in_the_names_of_other_codes(layout):
    for levels, grn in ((None, True), ((2, 0), False)):
        state_dict = model_state_dict(levels, grn)
        if layout != "original":
            state_dict = {n: a for n, a in state_dict.items() if not n.startswith("head.")}
        if grn:
            state_dict = {n: a for n, a in state_dict.items() if "gamma" not in n}
        variables = checkpoints.from_torch(state_dict)
        other = spelt(state_dict, layout)
        if layout == "original":  # V2 has channels last.
            other = {n: a[None, None, None] if "grn" in n else a for n, a in other.items()}
        if layout == "mmseg":  # With a norm of each stage's map.
            norms = {
                str(s): {"scale": np.ones(c), "bias": np.zeros(c)} for s, c in ((0, 4), (1, 6))
            }
            variables["params"]["norms"] = norms
            other |= {f"norm{s}.weight": norm["scale"] for s, norm in norms.items()}
            other |= {f"norm{s}.bias": norm["bias"] for s, norm in norms.items()}
        assert checkpoints.recognise(other) == (layout, 2, "haar")
        assert_same(flat(checkpoints.from_torch(other)), flat(variables))
        assert_same(checkpoints.to_torch(variables, layout, like=other), other)
        if not (grn and layout == "original"):
            assert_same(checkpoints.to_torch(variables, layout), other)


def test_classifiers_of_mmpretrain():
    """Four stages, of which the last has a norm; the head stands beside the backbone."""
    names = {"stem.0.weight": (2, 3, 4, 4), "head.norm.weight": (2,), "head.norm.bias": (2,)}
    names |= {
        "head.fc.weight": (5, 2),
        "head.fc.bias": (5,),
        "stem.1.weight": (2,),
        "stem.1.bias": (2,),
    }
    for s in range(4):
        block = f"stages.{s}.blocks.0"
        names |= {f"{block}.norm.weight": (2,), f"{block}.norm.bias": (2,)}
        names |= {f"{block}.mlp.fc1.weight": (8, 2), f"{block}.mlp.fc1.bias": (8,)}
        names |= {f"{block}.mlp.fc2.weight": (2, 8), f"{block}.mlp.fc2.bias": (2,)}
        names |= {f"{block}.conv_dw.weight": (2, 1, 3, 3)}
        if s:
            down = f"stages.{s}.downsample"
            names |= {f"{down}.0.weight": (2,), f"{down}.0.bias": (2,)}
            names |= {f"{down}.1.weight": (2, 2, 2, 2)}
    rng = np.random.default_rng(0)
    state_dict = {name: random_array(rng, shape) for name, shape in names.items()}
    other = {
        name if "head.fc" in name else "backbone." + name.replace("head.norm", "norm3"): array
        for name, array in spelt(state_dict, "mmseg").items()
    }
    expected = checkpoints.from_torch(state_dict)
    assert_same(flat(checkpoints.from_torch(other)), flat(expected))
    assert_same(checkpoints.to_torch(expected, like=other), other)


@pytest.mark.parametrize("layers", ["fast layers", "metal layers"])
def test_whole_models_of_other_layers(layers):
    state_dict = model_state_dict((2, 1))
    expected = flat(checkpoints.from_torch(state_dict))
    other = spelt(state_dict, layers)
    other = {name: array for name, array in other.items() if not name.endswith("_filter")}
    assert checkpoints.recognise(other) == ("wtconvnext", 2, "haar")
    variables = checkpoints.from_torch(other)
    if layers == "metal layers":
        for name in [name for name in expected if name.endswith("base_bias")]:
            expected[name] = expected[name] / expected[name.replace("_bias", "_scale")]
    assert_same(flat(variables), expected)
    again = checkpoints.to_torch(variables, like=other)
    assert set(again) == set(other)
    for name, array in again.items():
        np.testing.assert_allclose(array, other[name], rtol=1e-6)
    # Whichever layers they come from, they are written as the published ones unless told otherwise.
    assert set(checkpoints.to_torch(variables)) == set(state_dict)
    with pytest.raises(ValueError, match="wavelet is 'db2', but layers of .* are Haar"):
        checkpoints.from_torch(other, wavelet="db2")


def test_layers_for_apple_gpus_do_not_scale_their_bias():
    rng = np.random.default_rng(0)
    state_dict = {
        name: a for name, a in spelt(published(), "metal layers").items() if "_filter" not in name
    }
    assert checkpoints.recognise(state_dict) == ("metal", 2, "haar")
    params = checkpoints.from_torch(state_dict)["params"]
    x = random_array(rng, (1, 6, 7, 3))
    unbiased = oracle.wtconv(x, {n: a for n, a in params.items() if n != "base_bias"}, 2)
    want = unbiased + state_dict["base_conv.bias"]
    np.testing.assert_allclose(oracle.wtconv(x, params, 2), want, atol=1e-5)
    np.testing.assert_allclose(
        checkpoints.to_torch(params, "metal")["base_conv.bias"],
        state_dict["base_conv.bias"],
        rtol=1e-6,
    )
    state_dict["base_scale"][0, 1] = 0
    with pytest.raises(ValueError, match=r"base_conv.bias is added after .* channels \[1\]"):
        checkpoints.from_torch(state_dict)
    state_dict["base_conv.bias"][1] = 0
    assert checkpoints.from_torch(state_dict)["params"]["base_bias"][1] == 0


def test_a_pattern_has_the_filters_of_the_wavelet():
    params = checkpoints.from_torch(published())["params"]
    with pytest.raises(ValueError, match="tensors of like .*\n.*they are those of 'haar'"):
        checkpoints.to_torch(params, wavelet="db2", like=published())


def test_linear_layers_may_be_written_as_convolutions():
    state_dict = model_state_dict(None, grn=True)
    other = {
        n: a[..., None, None] if ".fc" in n and a.ndim == 2 and "head" not in n else a
        for n, a in state_dict.items()
    }
    variables = checkpoints.from_torch(other)
    assert_same(flat(variables), flat(checkpoints.from_torch(state_dict)))
    assert_same(checkpoints.to_torch(variables, like=other), other)
    assert_same(checkpoints.to_torch(variables), state_dict)


@pytest.mark.parametrize(
    ("pattern", "beside"),
    [
        ("module.{}", {"n_averaged": np.array(3)}),
        ("_orig_mod.module._orig_mod.{}", {"_orig_mod.n_averaged": np.array(3)}),
        ("model.module.{}", {}),
        (
            "backbone.{}",
            {"decode_head.conv.weight": np.ones(3), "data_preprocessor.mean": np.ones(3)},
        ),
    ],
)
def test_what_wrappers_put_into_names_goes(pattern, beside):
    state_dict = model_state_dict()
    wrapped = {pattern.format(name): array for name, array in state_dict.items()} | beside
    variables = checkpoints.from_torch(wrapped)
    assert checkpoints.recognise(wrapped).layout == "wtconvnext"
    assert_same(flat(variables), flat(checkpoints.from_torch(state_dict)))
    again = checkpoints.to_torch(variables, like=wrapped)
    assert_same(again, {name: a for name, a in wrapped.items() if name not in beside})
    with pytest.raises(ValueError, match="state_dict has 'stem.0.weight' twice"):
        checkpoints.from_torch(wrapped | {pattern.format("_orig_mod.stem.0.weight"): np.ones(1)})
    # What stands inside of a network, and not around it, is no wrapper's.
    inner = {name.replace("blocks.", "blocks._orig_mod."): a for name, a in state_dict.items()}
    assert_same(flat(checkpoints.from_torch(inner)), flat(variables))


def test_misfits_of_a_model():
    state_dict = model_state_dict()
    # One bias of a convolution, one whole block, one filter; a level that calls for a lower one.
    state_dict = {n: a for n, a in state_dict.items() if not n.startswith("stages.1.blocks.0.")}
    del state_dict["stages.0.blocks.0.conv_dw.base_conv.bias"]
    conv = "stages.1.blocks.1.conv_dw"
    del state_dict[f"{conv}.iwt_filter"]
    state_dict[f"{conv}.wavelet_convs.1.weight"] = np.zeros((24, 1, 3, 3), np.float32)
    state_dict["stages.0.downsample.2.weight"] = np.zeros(4, np.float32)
    state_dict["head.fc.weight"] = state_dict["head.fc.weight"].T
    with pytest.raises(ValueError) as info:
        checkpoints.from_torch(state_dict)
    lines = [line.strip() for line in str(info.value).splitlines()]
    assert lines[0].endswith(": 17 missing, 1 surplus, 1 misshapen")
    assert "missing: stages.0.blocks.0.conv_dw.base_conv.bias (4,)" in lines
    assert f"missing: {conv}.iwt_filter (24, 1, 2, 2)" in lines
    assert f"missing: {conv}.wavelet_convs.0.weight (24, 1, 3, 3)" in lines
    assert f"missing: {conv}.wavelet_scale.1.weight (1, 24, 1, 1)" in lines
    assert "missing: stages.1.blocks.0.mlp.fc1.weight (24, 6)" in lines
    assert "surplus: stages.0.downsample.2.weight (4,)" in lines
    assert "misshapen: head.fc.weight is (6, 5), expected (5, 6)" in lines


def test_load_into_reports_every_misfit():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = checkpoints.variables_of(model)["params"]
    with pytest.raises(ValueError) as info:
        checkpoints.load_into(model, {"params": {"kernel": np.ones((3, 2)), "b": np.ones(3)}})
    assert str(info.value).splitlines() == [
        "variables do not fit Linear: 3 names differ",
        "  missing: bias (3,)",
        "  surplus: b (3,)",
        "  misshapen: kernel is (3, 2), expected (2, 3)",
    ]
    assert_same(checkpoints.variables_of(model)["params"], before)


def test_load_into_keeps_the_dtype_of_the_model():
    model = nnx.Linear(2, 3, param_dtype=jax.numpy.bfloat16, rngs=nnx.Rngs(0))
    checkpoints.load_into(model, {"params": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}})
    assert model.kernel.dtype == jax.numpy.bfloat16


class Frozen(nnx.Variable):
    """A weight that an optimizer of `nnx.Param` leaves alone."""


def test_load_into_keeps_types_placement_and_ties(tmp_path):
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    placement = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "m"))

    def make():
        first, second = (nnx.Linear(3, 3, rngs=nnx.Rngs(seed)) for seed in range(2))
        first.kernel = Frozen(jax.device_put(first.kernel[...], placement), tag="mine")
        second.kernel = first.kernel
        return nnx.List([first, second, nnx.BatchNorm(3, rngs=nnx.Rngs(0)), second])

    model, other = make(), make()
    variables = checkpoints.variables_of(model)
    assert sorted(flat(variables["params"])) == [
        "0.bias",
        "0.kernel",
        "1.bias",
        "2.bias",
        "2.scale",
    ]
    checkpoints.save(tmp_path / "a", jax.tree.map(lambda array: array + 1, variables))
    checkpoints.load_into(other, checkpoints.restore(tmp_path / "a"))
    assert other[1].kernel is other[0].kernel and type(other[0].kernel) is Frozen
    assert other[0].kernel.sharding == placement and other[0].kernel.get_metadata("tag") == "mine"
    # What was on no device in particular stays so: a mesh would refuse it otherwise.
    assert not other[0].bias.committed
    np.testing.assert_array_equal(other[1].kernel[...], model[0].kernel[...] + 1)
    # PyTorch's state dicts name a tied tensor in each of its places.
    params = variables["params"]
    params["1"]["kernel"], params["3"] = params["0"]["kernel"], params["1"]
    checkpoints.load_into(other, variables)
    np.testing.assert_array_equal(other[1].kernel[...], model[0].kernel[...])
    params["1"]["kernel"] = params["1"]["kernel"] + 1
    with pytest.raises(ValueError, match="differ: 1.kernel and 0.kernel, which are tied"):
        checkpoints.load_into(other, variables)


def test_load_into_shapes_alone_places_as_they_say():
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel_init = nnx.with_partitioning(nnx.initializers.ones, (None, "m"))
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: nnx.Linear(2, 3, kernel_init=kernel_init, rngs=nnx.Rngs(0)))
        checkpoints.load_into(model, {"kernel": np.ones((2, 3)), "bias": np.ones(3)})
    assert model.kernel.sharding.spec == jax.sharding.PartitionSpec(None, "m")
    assert model.kernel.sharding.mesh == mesh


# Files and folders.


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_files_round_trip(tmp_path, suffix, dtype):
    if suffix == ".pth":
        pytest.importorskip("torch")
    state_dict = published(dtype=dtype)
    # Strides of every kind must not reach the file.
    state_dict["base_conv.weight"] = state_dict["base_conv.weight"][:, :, ::-1]
    path = tmp_path / f"layer{suffix}"
    checkpoints.write_state_dict(path, state_dict)
    assert_same(checkpoints.read_state_dict(path), state_dict)
    assert_same(checkpoints.load(path)["params"], checkpoints.from_torch(state_dict)["params"])
    assert os.listdir(tmp_path) == [path.name]
    # By the umask, as every new file.
    (tmp_path / "new").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    import torch_bridge

    state_dict = published(dtype=ml_dtypes.bfloat16)
    state_dict = {n: a[..., :3, :3] if a.shape[-2:] == (5, 3) else a for n, a in state_dict.items()}
    layer = torch_bridge.WTConv2d(3, 3, kernel_size=3, wt_levels=2, dtype=torch.bfloat16)
    for name, read in (("a.pth", torch.load), ("a.safetensors", load_file)):
        checkpoints.write_state_dict(tmp_path / name, state_dict)
        layer.load_state_dict(read(tmp_path / name))
        assert_same(
            checkpoints.from_torch(layer.state_dict())["params"],
            checkpoints.from_torch(state_dict)["params"],
        )


def test_training_checkpoints_give_their_weights(tmp_path):
    torch = pytest.importorskip("torch")
    state_dict = published()
    tensors = checkpoints.to_tensors(state_dict)
    for prefix in ("module.", "module._orig_mod.", "_orig_mod.module."):
        wrapped = {"epoch": 3, "state_dict": {prefix + n: t for n, t in tensors.items()}}
        torch.save(wrapped, tmp_path / "a.pt")
        assert_same(checkpoints.read_state_dict(tmp_path / "a.pt"), state_dict)
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds a list, expected a state dict"):
        checkpoints.read_state_dict(tmp_path / "b.pt")


def test_training_checkpoints_of_timm(tmp_path):
    """Its saver adds the arguments of the script, a metric of NumPy and the optimizer's state."""
    torch = pytest.importorskip("torch")
    tensors = checkpoints.to_tensors(layer_state_dict("fast"))
    content = {
        "state_dict": tensors,
        "state_dict_ema": {name: tensor + 1 for name, tensor in tensors.items()},
        "args": argparse.Namespace(model="wtconvnext_tiny", lr=1e-3, out=tmp_path),
        "metric": np.float64(81.2),
        "optimizer": {"state": {0: {"step": np.int64(3)}}, "random": np.arange(3)},
    }
    torch.save(content, tmp_path / "a.pth.tar")
    assert_same(
        checkpoints.read_state_dict(tmp_path / "a.pth.tar"),
        {name: tensor.numpy() + 1 for name, tensor in tensors.items()},
    )
    checkpoints.write_state_dict(tmp_path / "b.pth.tar", tensors)
    assert set(torch.load(tmp_path / "b.pth.tar")) == set(tensors)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_tensors_that_are_no_weights_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {"base_weight": torch.ones(2, 1, 3, 3), "base_scale": torch.ones(1, 2, 1, 1)}
    path = tmp_path / "a.pth"
    kernel = tensors["base_weight"]
    for other, message in (
        (kernel.to(torch.float8_e4m3fn), "it is torch.float8_e4m3fn: "),
        (torch.quantize_per_tensor(kernel, 0.1, 0, torch.qint8), "it is quantized .torch.qint8"),
        (kernel.to_sparse(), "it is sparse .torch.sparse_coo"),
        (kernel.to("meta"), "it is on the meta device"),
    ):
        torch.save({**tensors, "base_weight": other}, path)
        with pytest.raises(ValueError, match=rf"a.pth: state_dict\['base_weight'\]: .*{message}"):
            checkpoints.read_state_dict(path)
    torch.save(dict(enumerate(tensors.values())), path)
    with pytest.raises(ValueError, match="a.pth: state_dict has the key 0, expected names"):
        checkpoints.read_state_dict(path)
    save_file({"base_weight": kernel.to(torch.float8_e5m2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors holds tensors of F8_E5M2, expected"):
        checkpoints.read_state_dict(tmp_path / "a.safetensors")


def test_arrays_of_the_other_order_of_bytes():
    state_dict = layer_state_dict("fast")
    other = {name: array.astype(">f4") for name, array in state_dict.items()}
    assert_same(
        checkpoints.from_torch(other)["params"], checkpoints.from_torch(state_dict)["params"]
    )


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("plain", [True, False])
def test_pickles_are_never_run(tmp_path, plain):
    torch = pytest.importorskip("torch")
    attack = Malicious()
    attack.path = str(tmp_path / "harm")
    path = tmp_path / "a.pth"
    if plain:
        path.write_bytes(pickle.dumps(attack))
    else:
        torch.save({"base_conv.weight": attack}, path)
    with pytest.raises(ValueError, match="a.pth holds more than tensors, or is damaged"):
        checkpoints.read_state_dict(path)
    assert not (tmp_path / "harm").exists()


def test_pth_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flash-wtconv\[torch\]'"):
        checkpoints.read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 20, 400])
def test_damaged_files(tmp_path, suffix, keep):
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"a{suffix}"
    checkpoints.write_state_dict(path, published())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"a{suffix} (is not a whole|holds more than tensors)"):
        checkpoints.read_state_dict(path)


def test_paths_that_cannot_be(tmp_path):
    with pytest.raises(
        ValueError, match="extension '.bin', expected .safetensors, .pth, .pt or .pth.tar"
    ):
        checkpoints.read_state_dict(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="extension '.bin'"):
        checkpoints.write_state_dict(tmp_path / "a.bin", {})
    with pytest.raises(FileNotFoundError, match="no file"):
        checkpoints.read_state_dict(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder .*missing to write a.safetensors into"):
        checkpoints.write_state_dict(tmp_path / "missing" / "a.safetensors", {})
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        checkpoints.write_state_dict(tmp_path / "b.safetensors", {}, force=True)
    with (
        pytest.raises(IsADirectoryError, match="is a folder, expected the name of a file"),
        replacing(tmp_path / "b.safetensors", force=True) as temporary,
    ):
        temporary.write_text("")
    assert (tmp_path / "b.safetensors").is_dir()


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoints.write_state_dict(path, {"a": np.zeros(3)})
    with pytest.raises(FileExistsError, match="a.safetensors exists already"):
        checkpoints.write_state_dict(path, {"a": np.ones(3)})

    def full(arrays, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(OSError, match="a.safetensors cannot be written: .*No space left"):
            checkpoints.write_state_dict(path, {"a": np.ones(3)}, force=True)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert checkpoints.read_state_dict(path)["a"].sum() == 0
    checkpoints.write_state_dict(path, {"a": np.ones(3)}, force=True)
    assert checkpoints.read_state_dict(path)["a"].sum() == 3


@pytest.mark.parametrize(
    ("suffix", "writer"),
    [
        (".safetensors", "safetensors.numpy.save_file"),
        (".pth", "torch.save"),
        ("", "orbax.checkpoint.PyTreeCheckpointer.save"),
    ],
)
def test_whatever_a_writer_raises_is_one_line_about_the_file(tmp_path, monkeypatch, suffix, writer):
    if suffix == ".pth":
        pytest.importorskip("torch")

    def full(*args, **options):
        raise SafetensorError("No space left on device\nand a long story")

    monkeypatch.setattr(writer, full)
    path = tmp_path / f"a{suffix}"
    with pytest.raises(OSError, match=f"a{suffix} cannot be written: No space left on device$"):
        if suffix:
            checkpoints.write_state_dict(path, {"a": np.ones(3)})
        else:
            checkpoints.save(path, {"params": {"a": np.ones(3)}})
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_named_where_pytorch_tells_of_positions(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")

    def full(*args):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="a.pth cannot be written: .* No space left on device$"):
        checkpoints.write_state_dict(tmp_path / "a.pth", {"a": np.ones(3)})


def test_whatever_pytorch_raises_of_a_damaged_file_is_an_error_about_the_file(
    tmp_path, monkeypatch
):
    torch = pytest.importorskip("torch")

    def stumble(*args, **options):
        raise AttributeError("no attribute 'storage'\nand a long story")

    (tmp_path / "a.pth").touch()
    monkeypatch.setattr(torch, "load", stumble)
    with pytest.raises(ValueError, match="a.pth is not a whole PyTorch file: no attribute 's.*'$"):
        checkpoints.read_state_dict(tmp_path / "a.pth")


def test_orbax_round_trip(tmp_path):
    variables = checkpoints.from_torch(model_state_dict())
    variables["params"]["stages"]["0"]["blocks"]["0"]["gamma"] = np.ones(4, ml_dtypes.bfloat16)
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, variables)
    assert_same(flat(checkpoints.restore(folder)), flat(variables))
    assert_same(flat(checkpoints.load(folder)), flat(variables))
    with pytest.raises(FileExistsError, match="checkpoint exists already"):
        checkpoints.save(folder, variables)
    fewer = {"params": {"a": jax.numpy.arange(3.0), 1: {"b": np.float32(2)}}}
    checkpoints.save(folder, fewer, force=True)
    back = checkpoints.restore(folder)["params"]
    assert type(back["a"]) is np.ndarray
    assert back["1"]["b"] == 2
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_nnx_states_of_other_orbax_writers(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx_layers.WTConv2d(2, 3, rngs=nnx.Rngs(0))])
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    net = Net()
    expected = flat(checkpoints.variables_of(net)["params"])
    state = nnx.state(net)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.save(tmp_path / "pure", nnx.to_pure_dict(state))
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        for step in (3, 10):
            manager.save(step, args=ocp.args.StandardSave(state))
    with ocp.CheckpointManager(tmp_path / "items") as manager:
        items = {name: ocp.args.StandardSave(state) for name in ("model", "ema")}
        manager.save(1, args=ocp.args.Composite(**items))
    for folder in ("state", "pure", "steps/3", "items/1/ema"):
        assert_same(flat(checkpoints.restore(tmp_path / folder)), expected)
    for folder, message in (("steps", "several .*, 3, 10: .*steps/10"), ("items/1", "ema, model:")):
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(tmp_path / folder)


def test_orbax_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        checkpoints.restore(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no Orbax checkpoint"):
        checkpoints.restore(tmp_path)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no checkpoint and is not replaced"):
        checkpoints.save(tmp_path, {"params": {"a": np.ones(3)}}, force=True)
    with pytest.raises(ValueError, match=r"variables.params.a has shape \(0, 2\)"):
        checkpoints.save(tmp_path / "a", {"params": {"a": np.ones((0, 2))}})
    with pytest.raises(ValueError, match=r"variables.params is empty"):
        checkpoints.save(tmp_path / "a", {"params": {}})


@pytest.mark.parametrize("part", ["_METADATA", "manifest.ocdbt", "d"])
def test_damaged_orbax_folders(tmp_path, part):
    folder = tmp_path / "checkpoint"
    checkpoints.save(folder, {"params": {"a": np.ones(3)}})
    for path in [folder / part, *(folder / part).rglob("*")]:
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is a damaged Orbax checkpoint"):
        checkpoints.restore(folder)


def test_models_and_paths_in_place_of_variables_are_told_what_to_do(tmp_path):
    layer = nnx_layers.WTConv2d(2, 3, rngs=nnx.Rngs(0))
    write = partial(checkpoints.write_state_dict, tmp_path / "a.safetensors")
    for call in (checkpoints.from_torch, checkpoints.recognise, write):
        with pytest.raises(TypeError, match="state_dict is a str, .*read_state_dict"):
            call("weights.pth")
    save = partial(checkpoints.save, tmp_path / "folder")
    for call in (checkpoints.to_torch, checkpoints.for_bridge, save):
        with pytest.raises(TypeError, match="variables: .*, got WTConv2d; .*variables_of"):
            call(layer)
    with pytest.raises(TypeError, match="expected an nnx module; a linen module takes"):
        checkpoints.load_into(WTConv2d(2), {})
    with pytest.raises(TypeError, match="expected an nnx module; a linen module holds no"):
        checkpoints.variables_of(WTConv2d(2))


def test_a_training_checkpoint_in_place_of_its_weights_is_named():
    with pytest.raises(ValueError, match=r"state_dict\['ema'\] is of type dict, expected a tensor"):
        checkpoints.from_torch({"ema": published(), "epoch": 3})


def test_a_wrong_layout_is_told_the_right_one():
    state_dict = checkpoints.to_torch(
        checkpoints.variables_of(nnx_layers.WTConv2d(2, 3, rngs=nnx.Rngs(0)))
    )
    with pytest.raises(ValueError, match="hint: these are the names of layout 'published'"):
        checkpoints.from_torch(state_dict, "fast")


def test_a_stray_number_does_not_fill_the_screen():
    stray = {"base_conv.weight": np.ones((2, 1, 3, 3)), "wavelet_convs.999.weight": np.ones(1)}
    with pytest.raises(ValueError) as caught:
        checkpoints.from_torch(stray)
    assert str(caught.value).splitlines() == [
        "the tensors of state_dict are not layout 'published' (2-D): 2002 missing, 1 misshapen",
        "  missing: base_scale.weight (1, 2, 1, 1)",
        "  missing: wavelet_convs.{0…998}.weight (8, 1, 3, 3)",
        "  missing: wavelet_scale.{0…999}.weight (1, 8, 1, 1)",
        "  missing: wt_filter (8, 1, f_0, f_1)",
        "  missing: iwt_filter (8, 1, f_0, f_1)",
        "  misshapen: wavelet_convs.999.weight is (1,), expected (8, 1, 3, 3)",
    ]
    # Blocks are counted within their stage, and what does not count up stays as it is.
    with pytest.raises(ValueError) as caught:
        checkpoints.from_torch({f"stages.0.blocks.{b}.gamma": np.ones(2) for b in range(9)})
    assert "\n  missing: stages.0.blocks.{0…8}.norm.bias (2,)\n" in str(caught.value)
    assert "\n  missing: stem.1.bias (2,)\n" in str(caught.value)
    # Thousands of stages differ in their sizes.
    with pytest.raises(ValueError, match="more$"):
        checkpoints.from_torch({"stages.999.blocks.0.gamma": np.ones(2)})


def test_a_damaged_note_of_the_wavelet_is_named(tmp_path):
    checkpoints.save(tmp_path / "a", {"params": {"base_scale": np.ones(2)}}, wavelet="db2")
    assert checkpoints.wavelet_of(tmp_path / "a") == "db2"
    with pytest.raises(ValueError, match="wavelet='nope' is not a discrete wavelet"):
        checkpoints.save(tmp_path / "b", {"params": {"base_scale": np.ones(2)}}, wavelet="nope")
    (tmp_path / "a" / "flash_wtconv.json").write_text("[]")
    with pytest.raises(ValueError, match="flash_wtconv.json is damaged"):
        checkpoints.wavelet_of(tmp_path / "a")


def test_a_folder_is_held_against_the_wavelet_and_layout_that_it_is_loaded_with(tmp_path):
    variables = checkpoints.from_torch(published())
    checkpoints.save(tmp_path / "a", variables, wavelet="db2")
    assert_same(flat(checkpoints.load(tmp_path / "a", wavelet="db2")), flat(variables))
    with pytest.raises(ValueError, match=r"wavelet is 'haar', but .*a names 'db2'"):
        checkpoints.load(tmp_path / "a")
    with pytest.raises(ValueError, match="layout is 'fast', but .*a is a folder of variables"):
        checkpoints.load(tmp_path / "a", "fast", wavelet="db2")
    checkpoints.save(tmp_path / "b", variables)
    assert_same(flat(checkpoints.load(tmp_path / "b", wavelet="db3")), flat(variables))


def test_torch_files_that_are_something_else(tmp_path):
    torch = pytest.importorskip("torch")
    state_dict = {"base_weight": torch.ones(2, 1, 3, 3), "base_scale": torch.ones(1, 2, 1, 1)}
    torch.save({"epoch": 3, "model_state_dict": state_dict}, tmp_path / "training.PTH")
    assert set(checkpoints.read_state_dict(tmp_path / "training.PTH")) == set(state_dict)
    torch.save(state_dict, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.pth is not a whole PyTorch file"):
        checkpoints.read_state_dict(tmp_path / "cut.pth")
    torch.save({"ema": state_dict, "epoch": 3}, tmp_path / "wrapped.pth")
    with pytest.raises(ValueError, match=r"wrapped.pth: state_dict\['ema'\] is of type"):
        checkpoints.read_state_dict(tmp_path / "wrapped.pth")
