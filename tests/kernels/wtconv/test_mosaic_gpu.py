"""The Mosaic GPU kernels of WTConv: lowered and interpreted without a GPU, run where one is."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.mosaic_gpu import SHARED, lowered, recorded_launches, shapes, shared_bytes
from helpers.wtconv import (
    assert_oracle,
    assert_reproducible,
    assert_sharded,
    assert_transformed,
    takes,
)
from jax.experimental import pallas as pl

from pallas_kernels import oracle
from pallas_kernels.common import device
from pallas_kernels.common._compat import vary_over
from pallas_kernels.common.conformance import worst
from pallas_kernels.wtconv import mosaic_gpu, wtconv2d
from pallas_kernels.wtconv.api import OPERATOR
from pallas_kernels.wtconv.cases import CASES, Case
from pallas_kernels.wtconv.mosaic_gpu import fused_levels, level2
from pallas_kernels.wtconv.mosaic_gpu import tiles as mosaic_gpu_tiles
from pallas_kernels.wtconv.mosaic_gpu import weights as mosaic_gpu_weights
from pallas_kernels.wtconv.problem import Problem
from pallas_kernels.wtconv.shapes import GPU_SHAPES, Shape

SMALL = {
    "tiny": Shape(1, 1, 1, 1, 1, 1),
    "odd": Shape(3, 9, 11, 33, 3, 3),
    "padded": Shape(1, 9, 9, 3, 2),
    "one_channel_block": Shape(2, 7, 61, 32, 1),
    "flat": Shape(9, 1, 40, 32, 1, 3),
    "narrow": Shape(5, 70, 1, 8, 1),
    # A launch for level 2 alone, and one for those from the third on or none.
    "three_launches": Shape(1, 66, 66, 4, 3, 3),
    "two_launches": Shape(1, 233, 131, 4, 2, 3),
}
# The next test has "padded"; "narrow" is "flat" on its side, and "odd" has blocks of channels too.
COVERED = {"padded", "narrow", "one_channel_block"}
# In `make test-wide`: of the shapes of networks the one of the fewest pixels, and launches of which
# "three_launches" has each.
WIDE_SHAPES = {"convnext_t_stage4", "two_launches"}


def marks(name):
    return [pytest.mark.slow] * (name in COVERED) + [pytest.mark.wide] * (name in WIDE_SHAPES)


EXTREME = {
    "large": Shape(1, 4096, 4096, 144, 5),
    "long": Shape(1, 1, 2**20, 32, 1),
    "high": Shape(1, 2**13, 1, 32, 1),
    "deep": Shape(2, 3, 5, 4096, 1, 3),
    "many": Shape(2**20, 2, 2, 4, 1, 1),
}
DTYPES = ("float32", "bfloat16", "float16")


def some(cases, kept):
    """Each of the cases; those that are not at the places `kept` are for `make test-wide`."""
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.wide] * (i not in kept))
        for i, case in enumerate(cases)
    ]


def run(shape, dtype, transformed):
    """`transformed`, such as `lowered`, of the forward and of the weight gradient."""
    k, c = shape.kernel_size, shape.channels
    kernels = ((k, k, 1, c), *[(k, k, 4, c)] * shape.levels)
    x = jax.ShapeDtypeStruct(shape.x, dtype)
    taps = tuple(jax.ShapeDtypeStruct(kernel, "float32") for kernel in kernels)
    bias = jax.ShapeDtypeStruct((c,), "float32")
    keys = {"wavelet": "haar", "precision": None}
    yield transformed(mosaic_gpu.forward, x, taps, bias, transpose=False, **keys)
    yield transformed(mosaic_gpu.weight_grad, x, x, kernel_shapes=(*kernels, (c,)), **keys)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(name, DTYPES[i % 3], marks=marks(name)) for i, name in enumerate(SMALL)),
        *(
            pytest.param(name, DTYPES[i % 2], marks=marks(name) or pytest.mark.slow)
            for i, name in enumerate((*GPU_SHAPES, "large"))
        ),
    ],
)
def test_kernels_lower_for_cuda(name, dtype):
    shape = (GPU_SHAPES | SMALL | EXTREME)[name]
    for text in run(shape, dtype, lowered):
        assert text.count("mosaic_gpu") >= shape.levels


@pytest.mark.core
def test_kernels_lower_where_jax_counts_in_64_bits():
    with jax.enable_x64(True):
        for text in run(SMALL["padded"], "float32", lowered):
            assert "mosaic_gpu" in text


@pytest.mark.core
@pytest.mark.parametrize("name", ["padded", pytest.param("image_224", marks=pytest.mark.slow)])
def test_kernels_are_traced_for_arrays_that_are_sharded(name):
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))

    def traced(function, *args, **keys):
        # Parameters vary too, as they do where the operator's derivative begins.
        local = lambda *args: function(*vary_over(frozenset("n"), args), **keys)  # noqa: E731
        specs = spec("n"), *[spec()] * (len(args) - 1)
        return jax.eval_shape(
            jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec("n")), *args
        )

    shape = (GPU_SHAPES | SMALL | EXTREME)[name]
    y, sums = run(shape, "float32", traced)
    chex.assert_shape(y, shape.x)
    assert len(sums) == shape.levels + 2


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", [*GPU_SHAPES, *SMALL, *EXTREME])
def test_launches_fit_on_a_multiprocessor(name, dtype, monkeypatch):
    launches = recorded_launches(monkeypatch)
    shape = (GPU_SHAPES | SMALL | EXTREME)[name]
    x = jax.ShapeDtypeStruct(shape.x, dtype)
    low = (shape.batch, -(-shape.height // 4), -(-shape.width // 4), shape.channels)
    low = jax.ShapeDtypeStruct(low, dtype)
    forward = shape.levels
    if fused_levels.fits(x, shape.levels, shape.kernel_size):
        forward = 2
    elif fused_levels.fits(low, shape.levels, shape.kernel_size, 3):
        forward = 3
    backward = shape.levels
    if shape.levels > 1:
        backward *= len(mosaic_gpu_weights._parts(shape.x))
    assert [len(jax.tree.leaves(out)) for out in run(shape, dtype, shapes)] == [1, 2 + shape.levels]
    assert len(launches) == forward + backward
    for scratch, keys in launches:
        assert shared_bytes(scratch) <= SHARED
        # A pipeline with fewer rows than are in flight would be a deadlock.
        stages, _, rows, *_ = scratch[0].shape
        assert stages * rows >= 6
        # Pallas has CUDA's first axis last; its second takes no more blocks.
        *others, last = keys["grid"]
        assert last < 2**31 and all(blocks < 2**16 for blocks in others)


@pytest.mark.parametrize("name", [*GPU_SHAPES, *SMALL, *EXTREME])
def test_tiles_hold_every_pixel_once(name):
    n, h, w, c = (GPU_SHAPES | SMALL | EXTREME)[name].x
    for kernel_size in (1, 3, 5):
        level = mosaic_gpu_tiles.tiling_of((n, h, w, c), kernel_size)
        second = level2._tiling((n, h, w, c), jnp.dtype("f4"), kernel_size)
        for tiling, pixels in ((level, 2), (second, 4)):
            assert tiling.radius == kernel_size // 2
            assert tiling.images * tiling.strips == mosaic_gpu.STRIPS
            taken = np.zeros(tiling.tiles, int)
            for split in range(tiling.splits):
                taken[split :: tiling.splits] += 1
            assert (taken == 1).all()
            groups, rest = divmod(tiling.tiles, tiling.row_blocks)
            assert rest == 0
            # So many parts, of so many elements each, and none of them beyond what there is.
            for parts, each, whole in (
                (groups, tiling.images, n),
                (tiling.row_blocks, tiling.rows, -(-h // pixels)),
                (tiling.column_blocks, tiling.width, -(-w // pixels)),
                (tiling.channel_blocks, mosaic_gpu.CHANNELS, c),
            ):
                assert (parts - 1) * each < whole <= parts * each


@pytest.mark.parametrize("first", [2, 3])
@pytest.mark.parametrize("name", [*GPU_SHAPES, *SMALL, *EXTREME])
def test_fused_levels_lie_side_by_side_in_shared_memory(name, first):
    (n, h, w, c), levels = (GPU_SHAPES | SMALL | EXTREME)[name].x, 4
    h, w = (h, w) if first == 2 else (-(-h // 4), -(-w // 4))
    for kernel_size, images in itertools.product((1, 3, 5), (1, 2, 4)):
        radius = kernel_size // 2
        asked = (n, h, w, c), jnp.dtype("f4"), levels, radius, first
        tiling = fused_levels._of_images(images, *asked)
        if tiling is None:
            continue
        assert len(tiling.levels) == levels - first + 1
        assert (tiling.groups - 1) * images < n <= tiling.groups * images
        blocks = tiling.channel_blocks
        assert (blocks - 1) * mosaic_gpu.CHANNELS < c <= blocks * mosaic_gpu.CHANNELS
        # A row takes two stages, or one, which are filled again once all warpgroups have read them.
        assert tiling.stages >= 3 and tiling.loads == (4 - first) * tiling.levels[0].height
        for i, level in enumerate(tiling.levels):
            halvings = i + 4 - first
            assert (level.height, level.width) == (-(-h >> halvings), -(-w >> halvings))
            width = tiling.strips * level.columns
            assert level.width <= width <= level.pitch
            # The only strip of an image is a whole row, and nothing beside it is read.
            if tiling.strips == 1:
                assert level.halo == 0 and width == level.width
            else:
                assert level.halo == radius and level.width + radius <= level.pitch
                # Warps filter a row, and write the one `radius` above, at the same time.
                left_of_next_row = range(level.pitch - radius, level.pitch)
                assert radius != 1 or not set(left_of_next_row) & set(range(width))
            # The last window that filtering takes columns from, of the halo's last column.
            last = (level.height - 1) * level.pitch + level.columns - 1 + 2 * level.halo + width
            assert last <= level.size
            if i:
                above = tiling.levels[i - 1]
                assert 2 * width <= above.pitch
                last = (2 * level.height - 1) * above.pitch + above.halo + 2 * width
                assert last <= above.size


def test_fused_levels_are_one_launch_where_they_fit():
    fitting = {
        (name, dtype)
        for name, dtype in itertools.product(GPU_SHAPES, DTYPES)
        if fused_levels.fits(
            jax.ShapeDtypeStruct(GPU_SHAPES[name].x, dtype), GPU_SHAPES[name].levels, 5
        )
    }
    stages = [name for name in GPU_SHAPES if name.startswith("convnext")]
    assert fitting == set(itertools.product(stages, DTYPES))
    assert not fused_levels.fits(jax.ShapeDtypeStruct((1, 8, 8, 1), "float32"), 1, 5)
    # The second low band of images of 56² pixels: whole rows of four a task, in a single wave.
    for dtype in DTYPES[:2]:
        tiling = fused_levels._tiling((128, 14, 14, 96), jnp.dtype(dtype), 5, 5, 3)
        assert tiling.images == 4 and tiling.tasks == tiling.blocks


@pytest.mark.core
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(Shape(128, 14, 14, 96, 5), "float32", marks=pytest.mark.wide),
        # The next has the dtype, the one before the shape.
        pytest.param(Shape(128, 14, 14, 96, 5), "bfloat16", marks=pytest.mark.slow),
        (Shape(3, 5, 9, 40, 4, 3), "bfloat16"),
        (Shape(1, 9, 5, 32, 3, 1), "float32"),
    ],
)
def test_levels_from_the_third_on_lower_for_cuda(shape, dtype):
    x = jax.ShapeDtypeStruct(shape.x, dtype)
    rows = shape.kernel_size**2 * (1 + 4 * shape.levels)
    channel_blocks = -(-shape.channels // mosaic_gpu.CHANNELS)
    taps = jax.ShapeDtypeStruct((channel_blocks, rows, 4, mosaic_gpu.CHANNELS), "float32")
    keys = {"levels": shape.levels, "kernel_size": shape.kernel_size, "dtype": x.dtype, "first": 3}
    assert fused_levels.fits(x, shape.levels, shape.kernel_size, 3)
    launch = jax.jit(fused_levels.fused_levels, static_argnames=keys)
    assert "mosaic_gpu" in lowered(launch, x, taps, **keys)
    n, h, w, c = shapes(launch, x, taps, **keys).shape
    assert n >= shape.batch and h >= shape.height and w >= 2 * shape.width and c >= shape.channels
    assert not fused_levels.fits(x, 2, shape.kernel_size, 3)


# For the interpreter; together they have tilings of every kind.
INTERPRETED = (
    Case((6, 9), 1, 5, channels=32),
    # Rows and columns beyond the image, in windows of all channels: Mosaic would copy them.
    Case((5, 14), 1, 1, batch=(3,), channels=32),
    # Weight gradients of one half of the images after the other.
    Case((4, 5), 2, 3, "bfloat16", batch=(8,), channels=40),
    Case((1, 1), 1, 1, batch=(9,)),
    Case((11, 2), 1, 5, "float16", batch=(1,), channels=2, bias=False),
    Case((3, 12), 1, 3, batch=(1,), channels=4),
    # Weight gradients of two levels at their least.
    Case((3, 2), 2, 1, batch=(2,), channels=2),
)

# Of the levels from the second on: one, two and four images a task, all levels, odd sizes.
FROM_LEVEL2 = (
    Case((17, 9), 3, 5, batch=(1,), channels=4),
    Case((9, 14), 3, 3, "bfloat16", batch=(3,), channels=40),
    Case((9, 20), 2, 5, batch=(2,), channels=4),
    Case((5, 10), 5, 1, "float16", batch=(5,), channels=8),
)
# Of those from the third on, of level 2's low band.
FROM_LEVEL3 = (
    Case((5, 7), 5, 5, batch=(3,), channels=4),
    Case((3, 9), 4, 3, "bfloat16", batch=(2,), channels=40),
    Case((9, 10), 3, 1, batch=(1,), channels=4),
    Case((6, 3), 3, 5, batch=(5,), channels=8),
)

# Of level 2 alone: one, two and four images a tile, tiles above and beside each other, odd sizes.
LEVEL2 = (
    Case((33, 30), 2, 5, batch=(1,), channels=4),
    Case((9, 14), 2, 3, "bfloat16", batch=(3,), channels=40),
    Case((18, 7), 2, 5, "float16", batch=(5,), channels=8),
    Case((21, 13), 2, 1, batch=(1,), channels=4),
)


@pytest.fixture
def few_blocks(monkeypatch):
    """Small images in several tiles and a block with several of them, so that little is run."""
    monkeypatch.setattr(mosaic_gpu_tiles, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(mosaic_gpu_weights, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(fused_levels, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(fused_levels, "_MAX_STAGES", 3)
    monkeypatch.setattr(mosaic_gpu_tiles, "MIN_ROWS", 2)
    monkeypatch.setattr(mosaic_gpu_tiles, "MAX_COLUMNS", 2)
    caches = mosaic_gpu_tiles.tiling_of, fused_levels._tiling, level2._tiling
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.core
@pytest.mark.usefixtures("gpu_interpreter", "few_blocks")
@pytest.mark.parametrize("case", some(INTERPRETED, (3, 5, 6)))
def test_interpreted_kernels_are_the_oracles(case, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)
    assert_oracle(case, "mosaic_gpu")


def fused_levels_tiling(case, first):
    shape = math.prod(case.batch), *case.spatial, case.channels
    dtype = jnp.dtype(case.dtype)
    return fused_levels._tiling(shape, dtype, case.levels, case.kernel_size, first)


def taps_of(params, levels, first):
    """Taps with their scales, as the operator folds them; and zeros for what is above a level."""
    scales = ["base_scale", *(f"wavelet_scale_{i}" for i in range(levels))]
    kernels = ["base_kernel", *(f"wavelet_kernel_{i}" for i in range(levels))]
    taps = tuple(
        jnp.asarray(np.float32(params[scale]) * np.float32(params[kernel]))
        for scale, kernel in zip(scales, kernels, strict=True)
    )
    return taps, params | {name: 0 * params[name] for name in scales[:first]}


def assert_fused_levels_oracle(case, first):
    x, params, _ = case.drawn()
    taps, params = taps_of(params, case.levels, first)
    # The image that x is the second low band of has the same in 4 x 4 pixels.
    image = x if first == 2 else np.repeat(np.repeat(np.float32(x) / 4, 4, 1), 4, 2)
    want = oracle.wtconv(image, params, case.ndim)[:, :: 2 * (first - 1), ::2]
    packed = mosaic_gpu._packed(taps, None)
    arguments = case.levels, case.kernel_size, jnp.dtype("float32"), first
    got = fused_levels.fused_levels(jnp.asarray(x), packed, *arguments)
    assert worst(got[tuple(map(slice, want.shape))], want) <= 1e-5


@pytest.mark.core
@pytest.mark.usefixtures("gpu_interpreter", "few_blocks")
@pytest.mark.parametrize("case", some(FROM_LEVEL2, (3,)))
def test_interpreted_levels_from_the_second_on_are_the_oracles(case):
    assert_fused_levels_oracle(case, 2)


@pytest.mark.core
@pytest.mark.usefixtures("gpu_interpreter", "few_blocks")
@pytest.mark.parametrize("case", some(FROM_LEVEL3, (3,)))
def test_interpreted_levels_from_the_third_on_are_the_oracles(case):
    assert_fused_levels_oracle(case, 3)


@pytest.mark.core
@pytest.mark.usefixtures("gpu_interpreter", "few_blocks")
@pytest.mark.parametrize("case", some(LEVEL2, (2,)))
def test_interpreted_level2_is_the_oracles(case):
    assert_level2_oracle(case)


@pytest.mark.core
@pytest.mark.wide
@pytest.mark.usefixtures("gpu_interpreter", "few_blocks")
@pytest.mark.parametrize("launch", [level2.level2, fused_levels.fused_levels])
def test_interpreted_images_have_nothing_to_do_with_each_other(launch):
    case = Case((18, 9), 2, 5, batch=(6,), channels=4)
    x, params, _ = case.drawn()
    packed = mosaic_gpu._packed(taps_of(params, case.levels, 0)[0], None)
    levels = () if launch is level2.level2 else (case.levels,)
    spoilt = np.array(x)
    spoilt[1], spoilt[4] = np.nan, np.inf
    got = [
        launch(jnp.asarray(images), packed, *levels, case.kernel_size, jnp.dtype("float32"))
        for images in (x, spoilt)
    ]
    clean, other = (
        np.asarray(jax.tree.leaves(results)[0])[:6, : 2 * -(-18 // 4), : 2 * -(-9 // 4), :4]
        for results in got
    )
    same = [np.array_equal(*pair) for pair in zip(clean, other, strict=True)]
    assert same == [True, False, True, True, False, True]


def assert_level2_oracle(case):
    x, params, _ = case.drawn()
    taps, params = taps_of(params, case.levels, 2)
    want = oracle.wtconv(x, params, case.ndim)[:, ::2, ::2]
    packed = mosaic_gpu._packed(taps, None)
    got, low = level2.level2(jnp.asarray(x), packed, case.kernel_size, jnp.dtype("float32"))
    assert worst(got[tuple(map(slice, want.shape))], want) <= 1e-5
    n, h, w, c = x.shape
    squares = np.zeros((n, -(-h // 4), 4, -(-w // 4), 4, c))
    squares.reshape(n, *(4 * size for size in squares.shape[1:4:2]), c)[:, :h, :w] = np.float64(x)
    want = squares.sum((2, 4)) / 4
    assert low.shape[:3] == want.shape[:3] and not low[..., c:].any()
    assert worst(low[..., :c], want) <= 1e-5


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.usefixtures("gpu_interpreter", "few_blocks")
def test_interpreted_levels_of_large_images_are_the_oracles(monkeypatch):
    monkeypatch.setattr(fused_levels, "fits", lambda *args: False)
    case = Case((6, 9), 4, 3, batch=(1,), channels=4)
    x, params, _ = case.drawn()
    taps, _ = taps_of(params, case.levels, 0)
    keys = {"wavelet": "haar", "transpose": False, "precision": None}
    bias = jnp.asarray(params["base_bias"] * params["base_scale"])
    # Not the jitted one, which might have traced this before.
    got = mosaic_gpu.forward.__wrapped__(jnp.asarray(x), taps, bias, **keys)
    assert worst(got, oracle.wtconv(x, params, case.ndim)) <= 1e-5


@pytest.mark.core
@pytest.mark.usefixtures("few_blocks")
def test_interpreted_kernels_have_tilings_of_every_kind():
    for cases, first, counts in (FROM_LEVEL2, 2, {1, 2, 4}), (FROM_LEVEL3, 3, {1, 2, 3}):
        fused = [fused_levels_tiling(case, first) for case in cases]
        assert {tiling.images for tiling in fused} == {1, 2, 4}
        assert {len(tiling.levels) for tiling in fused} == counts
        assert any(tiling.tasks > tiling.blocks for tiling in fused)
    tilings = [
        mosaic_gpu_tiles.tiling_of(
            (math.prod(case.batch), *case.spatial, case.channels), case.kernel_size
        )
        for case in INTERPRETED
    ]
    assert {tiling.images for tiling in tilings} == {1, 4}
    for several in ("row_blocks", "column_blocks", "channel_blocks", "columns"):
        assert any(getattr(tiling, several) > 1 for tiling in tilings), several
    assert any(tiling.tiles > tiling.splits for tiling in tilings)
    of_level2 = [
        level2._tiling(
            (math.prod(case.batch), *case.spatial, case.channels),
            jnp.dtype(case.dtype),
            case.kernel_size,
        )
        for case in LEVEL2
    ]
    assert {tiling.images for tiling in of_level2} == {1, 2, 4}
    for several in ("row_blocks", "column_blocks", "channel_blocks", "columns"):
        assert any(getattr(tiling, several) > 1 for tiling in of_level2), several
    assert any(tiling.tiles > tiling.splits for tiling in of_level2)
    parts = {
        len(mosaic_gpu_weights._parts((math.prod(case.batch), *case.spatial, case.channels)))
        for case in INTERPRETED
        if case.levels > 1
    }
    assert 2 in parts


REFUSED = {
    "1-D signals": {"shape": (2, 8, 4)},
    "float64": {"dtype": np.dtype("float64")},
    "'db2'": {"wavelet": "db2"},
    "kernels of 4": {"kernel_size": 4},
    "kernels of 7": {"kernel_size": 7},
    "0 levels": {"levels": 0},
    "6 levels": {"levels": 6},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason):
    problem = Problem((2, 8, 8, 4), np.dtype("float32"), 5, 2, "haar")._replace(**REFUSED[reason])
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        mosaic_gpu.check("fwd", problem)


def test_without_a_gpu_it_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="mosaic_gpu: needs a GPU, this is a cpu"):
        wtconv2d(
            np.ones((4, 4, 1), np.float32),
            {"base_kernel": np.ones((3, 3, 1, 1)), "base_scale": np.ones(1)},
            implementation="mosaic_gpu",
        )
    assert OPERATOR.rule["gpu"] == ("mosaic_gpu", "triton", "cuda", "xla")


@pytest.mark.parametrize(
    ("capability", "shared", "reason"),
    [
        ("8.9", None, "needs compute capability 9.0 or newer, this has 8.9"),
        ("gfx942", None, "needs compute capability 9.0 or newer, this has gfx942"),
        ("12.0", None, "needs 227 KiB of shared memory a block, capability 12.0 has less"),
        ("12.1", 101376, "needs 227 KiB of shared memory a block, capability 12.1 has less"),
        ("9.0", None, None),
        ("10.0", 232448, None),
    ],
)
def test_gpus_that_can_run_them(capability, shared, reason, monkeypatch):
    gpu = SimpleNamespace(compute_capability=capability)
    if shared is not None:
        gpu.shared_memory_per_block_optin = shared
    monkeypatch.setattr(device, "current", lambda: gpu)
    assert mosaic_gpu.unavailable("gpu") == reason


class Indexed(np.ndarray):
    """Indexed by `.at` and by Pallas' slices, as references are."""

    def __new__(cls, array):
        return np.asarray(array).view(cls)

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        plain = tuple(
            slice(i.start, i.start + i.size) if isinstance(i, pl.Slice) else i
            for i in (index if isinstance(index, tuple) else (index,))
        )
        return super().__getitem__(plain)


@pytest.mark.parametrize("images", [1, 4])
def test_views_are_columns_of_each_strip(images):
    """In NumPy; the interpreter has a stand-in for them."""

    for columns, reach, each in itertools.product((1, 2, 7), (0, 1, 2), (1, 2)):
        strips = 4 // images
        halo = 2 * reach if each == 2 else 0
        size = each * strips * columns + 2 * halo
        shape = (images, size, mosaic_gpu_tiles.CHANNELS)
        row = np.arange(math.prod(shape)).reshape(shape)
        tiling = SimpleNamespace(images=images, strips=strips, columns=columns)
        block = SimpleNamespace(tiling=tiling)
        for j in range(each * columns + 2 * halo):
            found = mosaic_gpu_tiles.Block.view(block, Indexed(row), j, each)
            want = row[:, j] if strips == 1 else row[0, j :: each * columns][:strips]
            assert np.array_equal(found, want), (columns, reach, each, j)


EXTRA = (
    *INTERPRETED,
    # Several blocks of channels, of columns and of rows; all levels.
    Case((56, 56), 5, 5, batch=(3,), channels=96),
    Case((30, 70), 3, 5, "bfloat16", channels=48),
    Case((130, 9), 2, 3, "float16", channels=100),
    # Windows that are contiguous in memory, cut by hand at each border.
    Case((7, 61), 1, 5, channels=32),
    Case((1, 40), 1, 3, batch=(9,), channels=32),
    Case((40, 1), 1, 5, batch=(9,), channels=32),
    Case((2, 7), 1, 5, "bfloat16", batch=(6,), channels=32),
    # Four images a block, and not a multiple of four.
    Case((7, 7), 2, 5, "bfloat16", batch=(131,), channels=64),
    # Deep levels of one, two and four images a task, several tasks a block, and beyond their room.
    Case((56, 56), 5, 5, "bfloat16", batch=(140,)),
    Case((55, 57), 5, 3, batch=(2,), channels=130),
    Case((28, 28), 4, 5, batch=(301,), channels=33),
    Case((27, 29), 4, 1, "float16", batch=(3,), channels=40),
    Case((14, 14), 3, 5, batch=(203,), channels=96),
    Case((7, 7), 5, 3, batch=(2,), channels=768),
    Case((70, 70), 3, 5, channels=33),
    # Level 2 alone: the rest in one launch, in one for each level, and none.
    Case((112, 110), 5, 5, batch=(1,), channels=40),
    Case((233, 131), 4, 5, "bfloat16", batch=(1,), channels=100),
    Case((300, 65), 2, 3, "float16", batch=(5,), channels=36),
    Case((300, 260), 5, 3, batch=(1,), channels=8),
    # Weight gradients of one half of the images after the other.
    Case((20, 21), 3, 5, batch=(104,), channels=70),
    Case((20, 22), 3, 3, "bfloat16", batch=(104,), channels=70),
)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [case for case in CASES + EXTRA if takes(mosaic_gpu, case)],
    ids=lambda case: case.name,
)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "mosaic_gpu")


# Of level 2 alone: several tiles a block, one, two and four images, and sizes of networks.
EXTRA_LEVEL2 = (
    *LEVEL2,
    Case((28, 28), 2, 5, batch=(301,), channels=36),
    Case((14, 14), 2, 5, batch=(403,), channels=96),
    Case((100, 224), 2, 5, batch=(3,), channels=40),
    Case((40, 60), 2, 1, "bfloat16", batch=(35,), channels=96),
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EXTRA_LEVEL2, ids=lambda case: case.name)
def test_level2_is_the_oracles(case):
    assert_level2_oracle(case)


# Of level 2's low band, as `FROM_LEVEL3`: several tasks a block, and sizes as networks have them.
EXTRA_FROM_LEVEL3 = (
    *FROM_LEVEL3,
    Case((14, 14), 5, 5, batch=(140,), channels=96),
    Case((13, 15), 5, 5, "bfloat16", batch=(203,), channels=40),
    Case((7, 28), 4, 3, batch=(2,), channels=132),
    Case((28, 27), 3, 5, "bfloat16", batch=(67,), channels=64),
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EXTRA_FROM_LEVEL3, ids=lambda case: case.name)
def test_levels_from_the_third_on_are_the_oracles(case):
    assert_fused_levels_oracle(case, 3)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    case = Case((1024, 1000), 3, 5, batch=(1,), channels=64)
    x, params, dy = jax.tree.map(partial(jnp.asarray, dtype="bfloat16"), case.drawn())
    batch = -(-(2**31) // x.size) + 1

    def results(x, dy):
        y, pullback = jax.vjp(partial(wtconv2d, implementation="mosaic_gpu"), x, params)
        dx, dparams = pullback(dy)
        return y[-1:], dx[-1:], dparams

    # All images but the last are zero, and so is what they add to the sums.
    many = jax.jit(
        lambda *ones: results(*(jnp.pad(a, [(batch - 1, 0), *[(0, 0)] * 3]) for a in ones))
    )
    for got, want in zip(*map(jax.tree.leaves, (many(x, dy), results(x, dy))), strict=True):
        got, want = np.float32(got), np.float32(want)
        np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())


@pytest.mark.gpu
def test_gradients_are_bitwise_reproducible():
    assert_reproducible("mosaic_gpu", Case((57, 60), 3, 5, batch=(64,), channels=40))


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("mosaic_gpu", check_vma)


@pytest.mark.gpu
def test_transformations():
    assert_transformed("mosaic_gpu")
