"""Weights of sparse convolutions of other libraries, by a dense one in each one's own order."""

from functools import cache
from itertools import product

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.sparse import drawn_voxels

from flash_wtconv_jax import checkpoints
from flash_wtconv_jax.checkpoints.sparse import LIBRARIES
from flash_wtconv_jax.models import SparseUNet, load_sparse_unet
from flash_wtconv_jax.nnx import SparseConv3d
from pallas_kernels import oracle

COUNT, INSIDE, OUTSIDE = 12, 2, 3
VOXELS = drawn_voxels((COUNT,), 4, INSIDE, ndim=3)
PLACES = np.asarray(VOXELS.coords[:COUNT, 1:])


def placed(library, sizes, index, weight):
    """The matrix `[C_in, C_out]` of the offset with an index along each axis, as a library has it.

    Written out from what each library documents, not from our reader.
    """
    (a, b, c), (k0, k1, k2) = index, sizes
    if library in ("spconv2", "flexgemm"):
        return weight[:, a, b, c, :].T
    if library == "spconv1":
        return weight[a, b, c]
    if k0 * k1 * k2 == 1 and library != "warpconvnet":
        return weight
    first_fastest = library == "minkowski" or (library == "torchsparse" and k0 * k1 * k2 % 2)
    return weight[a + k0 * (b + k1 * c)] if first_fastest else weight[(a * k1 + b) * k2 + c]


def first_offset(library, size):
    """The sample that the first index along an axis reads."""
    if library == "torchsparse":
        return -size // 2 + 1 if size % 2 == 0 else -(size // 2)
    return -(size // 2) if size % 2 else 0


def shape_of(library, sizes, inside=INSIDE, outside=OUTSIDE):
    taps = int(np.prod(sizes))
    if library in ("spconv2", "flexgemm"):
        return (outside, *sizes, inside)
    if library == "spconv1":
        return (*sizes, inside, outside)
    one = taps == 1 and library != "warpconvnet"
    return (inside, outside) if one else (taps, inside, outside)


def dense(library, sizes, weight):
    """A dense convolution at the voxels of a 4 x 4 x 4 grid, zeros around it."""
    grid = np.zeros((12, 12, 12, INSIDE))
    grid[tuple(PLACES.T + 4)] = VOXELS.features[:COUNT]
    y = np.zeros((COUNT, OUTSIDE))
    for index in product(*map(range, sizes)):
        step = [i + first_offset(library, k) for i, k in zip(index, sizes, strict=True)]
        y += grid[tuple((PLACES + 4 + step).T)] @ placed(library, sizes, index, weight)
    return y


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_kernel_of_every_library(library):
    for sizes in ((3, 3, 3), (2, 2, 2), (1, 1, 1), (3, 1, 3), (3, 2, 1), (4, 4, 4)):
        weight = np.random.default_rng(0).normal(size=shape_of(library, sizes))
        kernel = checkpoints.sparse_kernel(weight, library, sizes)
        padding = 1 if library == "torchsparse" and sizes == (4, 4, 4) else None
        coords = VOXELS.coords[:COUNT]
        got = oracle.sparse_conv(
            coords, VOXELS.features[:COUNT], kernel[:, None], coords, sizes, padding=padding
        )
        np.testing.assert_allclose(got, dense(library, sizes, weight), atol=1e-12)


@pytest.mark.wide
def test_strided_and_inverse_layers_of_spconv():
    weight = np.random.default_rng(0).normal(size=(OUTSIDE, 3, 3, 3, INSIDE)).astype(np.float32)
    kernel = checkpoints.sparse_kernel(weight, "spconv2", 3)
    options = {"output_rule": "full", "padding": 1, "bias": False}
    layer = SparseConv3d(INSIDE, OUTSIDE, 3, 2, **options, rngs=nnx.Rngs(0))
    layer.kernel[...] = kernel
    y = layer(VOXELS)
    back = SparseConv3d(
        OUTSIDE, INSIDE, 3, 2, transposed=True, padding=1, bias=False, rngs=nnx.Rngs(0)
    )
    other = np.random.default_rng(1).normal(size=(INSIDE, 3, 3, 3, OUTSIDE)).astype(np.float32)
    back.kernel[...] = checkpoints.sparse_kernel(other, "spconv2", 3)
    x = back(y, VOXELS)
    want, inverse = {}, np.zeros((COUNT, INSIDE))
    reads = [
        (out, row, index)
        for row, place in enumerate(PLACES)
        for index in product(range(3), repeat=3)
        for out in [tuple((place + 1 - index) // 2)]
        if not ((place + 1 - index) % 2).any()
    ]
    for out, row, (a, b, c) in reads:
        want[out] = want.get(out, 0) + weight[:, a, b, c] @ np.asarray(VOXELS.features[row])
    for out, row, (a, b, c) in reads:
        inverse[row] += other[:, a, b, c] @ want[out]
    count = int(y.num_valid)
    assert [tuple(place) for place in y.coords[:count, 1:].tolist()] == sorted(want)
    np.testing.assert_allclose(y.features[:count], [want[o] for o in sorted(want)], atol=1e-5)
    np.testing.assert_allclose(x.features[:COUNT], inverse, atol=1e-4)


def test_weights_that_do_not_fit_say_so():
    wrong = {
        "library='me': expected one of flexgemm, minkowski": (np.zeros((27, 2, 3)), "me", 3),
        "(3, 3, 3, C_in, C_out) of spconv1": (np.zeros((3, 3, 2, 3)), "spconv1", 3),
        "kernel_size=(3, 3): expected an int, or 3": (np.zeros((9, 2, 3)), "minkowski", (3, 3)),
        "cross-shaped kernels have no dense offsets": (np.zeros((7, 2, 3)), "minkowski", 3),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError) as error:
            checkpoints.sparse_kernel(*arguments)
        assert message in str(error.value)


MINKOWSKI = """
stem.0 conv0p1s1 bn0.bn
down.0 conv1p1s2 bn1.bn
down.1 conv2p2s2 bn2.bn
down.2 conv3p4s2 bn3.bn
down.3 conv4p8s2 bn4.bn
up.0 convtr4p16s2 bntr4.bn
up.1 convtr5p8s2 bntr5.bn
up.2 convtr6p4s2 bntr6.bn
up.3 convtr7p2s2 bntr7.bn
encoder.0.0 block1.0
encoder.1.0 block2.0
encoder.1.1 block2.1
encoder.2.0 block3.0
encoder.3.0 block4.0
decoder.0.0 block5.0
decoder.1.0 block6.0
decoder.2.0 block7.0
decoder.3.0 block8.0
first conv1 norm1.bn
second conv2 norm2.bn
shortcut downsample.0 downsample.1.bn
head final
"""
SPCONV = """
stem.0 conv_input.0 conv_input.1
down.0 down.0.0 down.0.1
down.1 down.1.0 down.1.1
down.2 down.2.0 down.2.1
down.3 down.3.0 down.3.1
up.0 up.3.0 up.3.1
up.1 up.2.0 up.2.1
up.2 up.1.0 up.1.1
up.3 up.0.0 up.0.1
encoder.0.0 enc.0.block0
encoder.1.0 enc.1.block0
encoder.1.1 enc.1.block1
encoder.2.0 enc.2.block0
encoder.3.0 enc.3.block0
decoder.0.0 dec.3.block0
decoder.1.0 dec.2.block0
decoder.2.0 dec.1.block0
decoder.3.0 dec.0.block0
first conv1 bn1
second conv2 bn2
shortcut proj.0 proj.1
head final
"""
TORCHSPARSE = """
stem.0 stem.0 stem.1
stem.1 stem.3 stem.4
down.0 stage1.0.net.0 stage1.0.net.1
down.1 stage2.0.net.0 stage2.0.net.1
down.2 stage3.0.net.0 stage3.0.net.1
down.3 stage4.0.net.0 stage4.0.net.1
up.0 up1.0.net.0 up1.0.net.1
up.1 up2.0.net.0 up2.0.net.1
up.2 up3.0.net.0 up3.0.net.1
up.3 up4.0.net.0 up4.0.net.1
encoder.0.0 stage1.1
encoder.1.0 stage2.1
encoder.1.1 stage2.2
encoder.2.0 stage3.1
encoder.3.0 stage4.1
decoder.0.0 up1.1.0
decoder.1.0 up2.1.0
decoder.2.0 up3.1.0
decoder.3.0 up4.1.0
first net.0 net.1
second net.3 net.4
shortcut downsample.0 downsample.1
head classifier.0
"""
NAMES = {"minkowski": MINKOWSKI, "spconv1": SPCONV, "spconv2": SPCONV, "torchsparse": TORCHSPARSE}
SMALL = {"stem_dim": 2, "dims": (3, 2, 4, 2, 3, 2, 2, 4), "depths": (1, 2, 1, 1, 1, 1, 1, 1)}


@cache
def network(library):
    """Variables of a small SparseUNet, and its state dict as a library names and orders it."""
    options = SMALL | {
        "widening_downsamples": library.startswith("spconv"),
        "stem_kernel_sizes": (3, 3) if library == "torchsparse" else (5,),
        "conv_bias": library == "minkowski",
    }
    model = nnx.eval_shape(lambda: SparseUNet(5, 3, **options, rngs=nnx.Rngs(0)))
    names = {ours: rest for ours, *rest in map(str.split, NAMES[library].strip().splitlines())}
    rng = np.random.default_rng(0)
    variables, state_dict = {"params": {}, "batch_stats": {}}, {}
    for collection, kind in (("params", nnx.Param), ("batch_stats", nnx.BatchStat)):
        for path, leaf in nnx.to_flat_state(nnx.state(model, kind)):
            array = rng.normal(size=leaf.shape).astype(np.float32)
            node = variables[collection]
            for part in path[:-1]:
                node = node.setdefault(str(part), {})
            node[path[-1]] = array
            *ours, leaf_name = map(str, path)
            before = ""
            if ours[0] in ("encoder", "decoder"):
                before, ours = names[".".join(ours[:3])][0] + ".", ours[3:]
            norm = ours[-1] == "norm"
            module = before + names[".".join(o for o in ours if o not in ("conv", "norm"))][norm]
            if leaf_name == "kernel":
                side = round(array.shape[0] ** (1 / 3))
                linear = module == "classifier.0"
                name = "weight" if linear or library.startswith("spconv") else "kernel"
                array = array[0].T if linear else stored(library, (side,) * 3, array)
            else:
                name = {"scale": "weight", "mean": "running_mean", "var": "running_var"}.get(
                    leaf_name, leaf_name
                )
                if library == "minkowski" and not norm:
                    array = array[None]
            state_dict[f"module.{module}.{name}"] = array
            if norm:
                state_dict[f"module.{module}.num_batches_tracked"] = np.array(7)
    return variables, state_dict, options


def stored(library, sizes, kernel):
    """A kernel of ours as a library has it."""
    inside, outside = kernel.shape[1:]
    places = np.arange(kernel.size).reshape(shape_of(library, sizes, inside, outside))
    result = np.zeros(kernel.size, kernel.dtype)
    for index, matrix in zip(product(*map(range, sizes)), kernel, strict=True):
        result[placed(library, sizes, index, places)] = matrix
    return result.reshape(places.shape)


@pytest.mark.parametrize(
    "library", [pytest.param(n, marks=[pytest.mark.wide] * (n == "spconv1")) for n in NAMES]
)
def test_whole_minkunets_by_their_names(library):
    variables, state_dict, options = network(library)
    got = checkpoints.sparse_unet_from_torch(state_dict)
    jax.tree.map(np.testing.assert_array_equal, got.variables, variables)
    epsilon = 1e-3 if library.startswith("spconv") else 1e-5
    assert got.options == options | {"in_channels": 5, "num_classes": 3, "epsilon": epsilon}


def test_a_minkunet_from_a_file(tmp_path):
    variables, state_dict, _ = network("minkowski")
    checkpoints.write_state_dict(tmp_path / "unet.safetensors", state_dict)
    model = load_sparse_unet(tmp_path / "unet.safetensors", momentum=0.5)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.variables_of(model), variables)
    assert model.stem[0].norm.momentum == 0.5


def test_all_misses_of_a_minkunet_at_once():
    _, state_dict, _ = network("spconv2")
    state_dict = {name.removeprefix("module."): array for name, array in state_dict.items()}
    del state_dict["enc.1.block1.conv2.weight"], state_dict["up.2.1.running_var"]
    state_dict["down.0.0.weight"] = state_dict["down.0.0.weight"][:, :1]
    state_dict["cls_head.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError) as error:
        checkpoints.sparse_unet_from_torch(state_dict)
    for line in (
        "no whole MinkUNet of spconv2: 1 misshapen, 2 missing, 1 surplus",
        "missing: enc.1.block1.conv2.weight (2, 3, 3, 3, 2)",
        "missing: up.2.1.running_var (2,)",
        "misshapen: down.0.0.weight is (3, 1, 2, 2, 2), expected (3, 2, 2, 2, 2)",
        "surplus: cls_head.weight (2, 2)",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match=r"no MinkUNet recognised among 1 names \(a\)"):
        checkpoints.sparse_unet_from_torch({"a": np.zeros(2)})
    with pytest.raises(ValueError, match="library='me': expected one of minkowski"):
        checkpoints.sparse_unet_from_torch({}, "me")
