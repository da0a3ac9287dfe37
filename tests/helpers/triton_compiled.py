"""Compiles an operator's Triton kernels for several GPUs and prints what each takes, as JSON.

`python -m helpers.triton_compiled wtconv some` compiles each kernel for one GPU, `rest` what that
leaves of `all`. A process of its own, because Triton's interpreter, which the tests use, cannot be
turned off.
"""

import json
import re
import sys
from importlib import import_module
from types import SimpleNamespace

import triton
from helpers import cubins
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.common.triton import contiguous
from pallas_kernels.conv2d import triton_launches as conv2d_launches
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.conv2d.shapes import SHAPES
from pallas_kernels.conv2d.upsampling import joint
from pallas_kernels.haar import triton_launches as haar_launches
from pallas_kernels.sparse import triton_launches as sparse_launches
from pallas_kernels.sparse.depthwise import triton_launches as depthwise_launches
from pallas_kernels.sparse.problem import Window as VoxelWindow
from pallas_kernels.sparse.shapes import SHAPES as VOXELS
from pallas_kernels.stylize import triton_launches as stylize_launches
from pallas_kernels.stylize.shapes import SHAPES as PICTURES

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
BLOCK = {"P": 4, "BC": 32, "X_W": 96, "X_C": 1}
BOTH = BLOCK | {"Y_W": 96, "Y_C": 1, "K": 5}
FLAGS = {"BELOW": True, "BASE": True, "BIAS": True, "INNER": True}
WTCONV = {
    "low_bands": BLOCK | {"LEVELS": 3},
    "level_forward": BOTH | FLAGS | {"C": 96, "C_TAPS": 96, "TW": 4},
    "base_weights": BOTH | {"BLOCKS": 2, "TW": 8, "R": 14},
    "level_weights": BOTH | {"FIRST": 0, "BANDS": 4, "BLOCKS": 2, "TW": 2, "R": 14},
}
TWO, WIDE, MANY = {"TW": 2}, {"TW": 8, "K": 3}, {"P": 8, "num_warps": 8}
SIZES = {
    f"{name} {sizes}": WTCONV[name] | constants
    for name, variants in {
        "level_forward": {"columns=2": TWO, "columns=8": WIDE, "strips=8": MANY},
        "base_weights": {"columns=8": {"TW": 16, "K": 3}, "strips=8": MANY},
        "level_weights": {"columns=2": {"TW": 1}, "columns=8": WIDE | {"TW": 4}, "strips=8": MANY},
    }.items()
    for sizes, constants in variants.items()
}
BANDS = [f"{band}{level}" for level in (1, 2, 3) for band in ("low", "lh", "hl", "hh")]
IMAGES = ("x", "w", "below", "y", "dy", "dw", "low", *BANDS, "residual", "dx", "dresidual")
TAPS = ("taps", "base", "bias", "sums", "parts", "mean", "squares")
TAPS += ("scale", "statistics", "dscale", "dbias", "pixels")
ROWS = ("table", "order", "tiles", "listed", "counts", "pairs", "totals")
ROWS += ("stood", "places", "steps")
UNSIGNED = ("masks", "high", "low", "asked_high", "asked_low")


def conv2d(dtype):
    """Constants of the launches of a 3x3 layer, forward and backward."""
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    layer, found = SHAPES["sd_unet_64_3x3"], []

    def launch(kernel, arguments, outputs, grid, **constants):
        found.append(constants)
        return [None] * len(outputs)

    x, w, y = (
        SimpleNamespace(shape=shape, dtype=dtype)
        for shape in (layer.x, layer.w, (*layer.x[:3], layer.features))
    )
    window = Window(pads=((1, 1), (1, 1)), reflect=True)
    rest = "ieee", None, launch
    conv2d_launches.forward(x, w, x, window, "gelu", dtype, *rest)
    conv2d_launches.input_grad(y, w, x.shape, window._replace(stride=(2, 2)), dtype, *rest)
    conv2d_launches.weight_grad(x, y, w.shape, window, *rest)
    conv2d_launches.forward_with_moments(x, w, x, window, None, dtype, *rest)
    up = joint(Window(pads=((1, 1), (1, 1)), reflect=True, upsample=2), layer.x, layer.w)
    filters = SimpleNamespace(shape=(2, 2, layer.channels, 4 * layer.features), dtype=dtype)
    conv2d_launches.upsampled_with_moments(x, filters, up, dtype, *rest)
    names = "conv", "conv transposed", "weights", "conv moments", "conv phases"
    return dict(zip(names, found, strict=True))


class Array(SimpleNamespace):
    """The shape and the dtype of an array; some of it has the same."""

    def __getitem__(self, index):
        return self


def sparse(dtype):
    """Constants of the launches of both operators over a room, forward and backward."""
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    layer, found = VOXELS["room_1000000_64_128_s1"], {}

    def array(*shape):
        return Array(shape=shape, dtype=dtype)

    def launch(kernel, arguments, outputs, grid, **constants):
        listed = "twins" if constants.get("TWINS") else "pairs"
        found[kernel.fn.__name__ + f" {listed}" * (constants.get("TILE") == 1)] = constants
        return [array(*shape) for shape, _ in outputs]

    rows = SimpleNamespace(table=array(27, layer.voxels), order=None, tile_masks=None)
    x, y = array(layer.voxels, layer.channels), array(layer.voxels, layer.features)
    w = array(27, 1, layer.channels, layer.features)
    keys = SimpleNamespace(high=array(layer.voxels), low=None, rows=None)
    offsets = VoxelWindow((3, 3, 3), (2, 2, 2), (1, 1, 1))
    sparse_launches.search(keys, keys, None, offsets, launch)
    for pairs in (2, 1, 0):
        sparse_launches.weight_grad(x, y, rows, w.shape, "ieee", None, pairs, launch)
    sparse_launches.forward(x, w, rows, "ieee", None, None, True, launch)
    depthwise_launches.forward(x, array(27, layer.channels), rows, None, launch)
    depthwise_launches.weight_grad(x, x, rows, None, launch)
    order = ["tile_lists", "conv", "weights", "depthwise", "depthwise_weights", "sum_parts"]
    order += ["search", "pair_counts", "pair_lists", "weights pairs", "weights twins"]
    return {name: found[name] for name in order}


def stylize(dtype):
    """Constants of the launches of a norm whose pixels programs share, and of those that do not.

    And of one whose convolution has left its moments.
    """
    dtype, found = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype], {}

    def launch(kernel, arguments, outputs, grid, **constants):
        found[kernel.fn.__name__] = constants
        return [None for _ in outputs]

    alone = stylize_launches.Tiles(1024, 16, 1, 16), stylize_launches.Tiles(512, 16, 1, 8)
    for name, tiles in (("style_512_half", None), *(("unet_32", each) for each in alone)):
        x = SimpleNamespace(shape=PICTURES[name], dtype=dtype)
        stylize_launches.forward(x, x, x, x, 1e-5, "relu", tiles, launch)
        stylize_launches.backward(x, x, x, x, x, x, "relu", tiles, launch)
        moments = (SimpleNamespace(shape=(8, 512, 64)),) * 3
        stylize_launches.normalise(x, moments, x, x, x, 1e-5, "relu", launch)
    return found


def kernels(operator, dtype):
    """Constants of each kernel of an operator."""
    if operator.startswith("wtconv"):
        return SIZES if operator.endswith("sizes") else WTCONV
    if operator == "sparse torch":
        names = "tile_lists", "conv", "depthwise", "search"
        return {name: sparse(dtype)[name] for name in names}
    if operator in ("conv2d", "sparse", "stylize"):
        return {"conv2d": conv2d, "sparse": sparse, "stylize": stylize}[operator](dtype)
    read = SimpleNamespace(dtype=SimpleNamespace(itemsize=4 if dtype == "fp32" else 2))
    steps = [contiguous((128, 56 >> level, 56 >> level, 96)) for level in (0, 3, 1, 2, 3)]
    _, _, constants = haar_launches._layout(read, (128, 56, 56, 96), steps, 4)
    return dict.fromkeys(("analysis", "synthesis"), constants)


def compiled(operator, name, target, dtype):
    module = import_module(f"pallas_kernels.{operator.split()[0]}.triton_kernels")
    kernel = getattr(module, name.split()[0])
    constants = {"num_warps": 4} | kernels(operator, dtype)[name]
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    types = dict.fromkeys(IMAGES, f"*{dtype}") | dict.fromkeys(TAPS, "*fp32")
    # PyTorch has hardly any operation of numbers without a sign.
    unsigned = "*i32" if operator.endswith("torch") else "*u32"
    types |= dict.fromkeys(ROWS, "*i32")
    if operator.startswith("sparse"):
        types |= dict.fromkeys(UNSIGNED, unsigned)
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    # As frameworks promise of arrays.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if argument in types and argument not in constants
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def resources(binary):
    """Registers of a thread, and what does not fit in them: bytes, on AMD registers."""
    if "amdgcn" in binary.asm:
        code = binary.asm["amdgcn"]
        return [int(re.search(rf"\.vgpr_{n}:\s*(\d+)", code)[1]) for n in ("count", "spill_count")]
    return list(cubins.usage(binary.asm["cubin"]))


def chosen(operator, part):
    """Lists "some", the "rest" or "all" of an operator's kernels, GPUs and dtypes."""
    dtypes = "fp32", "fp16", "bf16", "fp32"
    for i, (target, dtype) in enumerate(zip(TARGETS, dtypes, strict=True)):
        for j, name in enumerate(kernels(operator, dtype)):
            if part == "all" or (part == "some") == (i == j):
                yield name, target, dtype


if __name__ == "__main__":
    operator, part = sys.argv[1:]
    found = {
        " ".join(which): resources(compiled(operator, *which)) for which in chosen(operator, part)
    }
    json.dump(found, sys.stdout)
