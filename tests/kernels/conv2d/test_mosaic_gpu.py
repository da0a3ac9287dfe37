"""The dense convolution's Mosaic GPU kernel: lowered and interpreted without a GPU, run on one."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.conv2d import (
    MOMENTS,
    NAMES,
    ON_GPU,
    WHOLE_ROWS,
    arrays,
    assert_igemm,
    assert_moments,
    assert_oracle,
    assert_sharded,
    assert_whole_rows,
    plain,
)
from helpers.mosaic_gpu import SHARED, lowered, recorded_launches, shapes, shared_bytes

from pallas_kernels.common import device
from pallas_kernels.conv2d import TileConfig, conv2d, mosaic_gpu
from pallas_kernels.conv2d.api import OPERATOR, _checked_config
from pallas_kernels.conv2d.cases import HARD, TABLE, UPSAMPLED, Case
from pallas_kernels.conv2d.problem import Problem, Window
from pallas_kernels.conv2d.shapes import SHAPES, Shape
from pallas_kernels.dispatch import table

DTYPES = ("bfloat16", "float16")
LAYER = Problem((2, 8, 8, 16), np.dtype("float16"), 3, 3, 16, Window(), np.dtype("float32"))
SMALL = {
    "pixel": Shape(1, 1, 1, 1, 1, 1, 1),
    "ragged": Shape(3, 17, 31, 7, 1, 5, 9),
    "row": Shape(2, 1, 40, 16, 3, 3, 24),
    "wide": Shape(1, 9, 9, 300, 7, 7, 300),
    "many": Shape(2**12, 3, 3, 8, 3, 3, 2000),
}


# One of 3 x 3 taps and the one of 1 x 1; the others differ from these in sizes alone.
WIDE_SHAPES = {"sd_unet_128_3x3", "sd_unet_64_1x1"}


def lowering_marks(name):
    if name in SMALL:
        return []
    return [pytest.mark.wide if name in WIDE_SHAPES else pytest.mark.slow]


def run(shape, dtype, transformed, window=None):
    """`transformed`, such as `lowered`, of the forward and of the gradient of x."""
    if window is None:
        pads = (((k - 1) // 2, k // 2) for k in shape.w[:2])
        window = Window(pads=tuple(pads))
    n, h, w, _ = shape.x
    y = (n, *window.output((h, w), shape.w[:2]), shape.features)
    x, w, y, bias = (
        jax.ShapeDtypeStruct(size, dtype) for size in (shape.x, shape.w, y, (shape.features,))
    )
    keys = {"window": window, "precision": None, "config": None}
    yield transformed(mosaic_gpu.forward, x, w, bias, activation="gelu", out_dtype=dtype, **keys)
    yield transformed(mosaic_gpu.input_grad, y, w, shape=shape.x[1:], dtype=dtype, **keys)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, DTYPES[i % 2], marks=lowering_marks(name))
        for i, name in enumerate(SHAPES | SMALL)
    ],
)
def test_kernels_lower_for_cuda(name, dtype):
    for text in run((SHAPES | SMALL)[name], dtype, lowered):
        assert "mosaic_gpu" in text


@pytest.mark.core
def test_kernels_lower_where_jax_counts_in_64_bits():
    window = Window((2, 3), ((1, 0), (5, 2)), (1, 2))
    with jax.enable_x64(True):
        for text in run(SMALL["ragged"], "float16", lowered, window):
            assert "mosaic_gpu" in text


@pytest.mark.parametrize("name", [*SHAPES, *SMALL])
def test_launches_fit_on_a_multiprocessor(name, monkeypatch):
    launches = recorded_launches(monkeypatch)
    shape = (SHAPES | SMALL)[name]
    y, dx = run(shape, "bfloat16", shapes)
    chex.assert_shape([y, dx], [(*shape.x[:3], shape.features), shape.x])
    assert len(launches) == 2
    for scratch, keys in launches:
        assert shared_bytes(scratch) <= SHARED
        # Of one stage its products and the next copy would wait for each other for ever.
        assert scratch[1].shape[0] >= 2
        assert keys["grid"][0] <= mosaic_gpu.MULTIPROCESSORS


@pytest.mark.parametrize("name", [*SHAPES, *SMALL])
def test_tiles_hold_every_pixel_once(name):
    shape = (SHAPES | SMALL)[name]
    for stride, flip in (((1, 1), False), ((1, 1), True), ((2, 3), False)):
        sizes = shape.batch, shape.height, shape.width, shape.channels, shape.features
        layer = mosaic_gpu._Layer(*sizes, shape.w[:2], stride, (1, 2), (0, 0), flip, None, 2)
        tiling = mosaic_gpu._tiling(layer, None)
        assert tiling.possible(layer)
        # So many parts, of so many elements each, and none of them beyond what there is.
        each = (1, tiling.height, tiling.width, tiling.features)
        whole = (*sizes[:3], shape.features)
        for parts, part, all_of in zip(tiling.counts(layer), each, whole, strict=True):
            assert (parts - 1) * part < all_of <= parts * part
        # And of each of these, all warpgroups.
        rows, columns = tiling.own
        assert rows * tiling.down == tiling.height * tiling.width
        assert columns * tiling.across == tiling.features
        assert tiling.box[0] * tiling.box[1] == rows and tiling.box[1] % 8 == 0
        assert shape.kernel_height % tiling.column == 0
        # Two rows of one warpgroup each, of an image of one row, would both be that row.
        assert shape.height > 1 or tiling.height == 1 or tiling.box[0] > 1


def test_the_search_space_has_tiles_that_the_kernel_takes():
    narrow = mosaic_gpu.search_space("fwd", LAYER._replace(features=3))
    assert narrow == [{}, {"whole_rows": True}, *mosaic_gpu.search_space("fwd", LAYER)[1:]]
    for name, layer in SHAPES.items():
        first, *others = mosaic_gpu.search_space("fwd", LAYER)
        assert first == {} and others
        sizes = *layer.x, layer.features, layer.w[:2]
        layer = mosaic_gpu._Layer(*sizes, (1, 1), (1, 1), (1, 1), False, None, 2)
        for tiles in others:
            config = _checked_config(TileConfig(**tiles))
            tiling = mosaic_gpu._tiling(layer, config)
            assert tiling.height * tiling.width == config.block_m, name
            assert (tiling.features, tiling.channels) == (config.block_n, config.block_k)
            assert tiling.down == config.ratio_m // 4


@pytest.fixture
def interpreted(gpu_interpreter, monkeypatch):
    """The implementation in Pallas' GPU interpreter, with few blocks."""
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)


TAKEN = [
    case._replace(dtype="float16" if case.dtype in ("float32", "float64") else case.dtype)
    for case in HARD + UPSAMPLED
    if case.n and case.groups == 1
]
EXTRA = (
    # Products of pixels alone; images of one row, one column; a window outside of the image.
    Case(3, 7, 5, 6, 1, 1, 4, dtype="bfloat16", bias=True, activation="relu"),
    Case(2, 1, 9, 2, 3, 3, 3, padding=1, dtype="float16"),
    Case(2, 9, 1, 2, 3, 3, 3, padding=1, dtype="float16", layout="nchw_fchw"),
    Case(1, 3, 4, 3, 2, 2, 2, padding=5, dtype="float16"),
    # Strides and planes that do not fill up.
    Case(1, 7, 8, 3, 3, 4, 2, (2, 3), ((0, 1), (2, 0)), (1, 2), dtype="float16", bias=True),
)
LARGE = (
    # Several tiles along each axis, and several blocks of channels.
    Case(1, 9, 20, 40, 3, 3, 40, padding="SAME", dtype="bfloat16", bias=True, activation="gelu"),
    Case(1, 18, 34, 24, 5, 2, 300, padding="SAME", dtype="float16", out_dtype="float32"),
    Case(3, 17, 15, 40, 1, 1, 88, dtype="bfloat16", bias=True, activation="relu"),
    # Taps too far from each other to share what they read.
    Case(1, 40, 12, 16, 3, 3, 16, 1, (14, 3), (14, 3), dtype="bfloat16"),
    Case(1, 35, 36, 16, 3, 3, 16, 2, "reflect", dtype="float16", bias=True),
)


INTERPRETED = [*TAKEN, *EXTRA, *TABLE[:12:3], *TABLE[-3:]]


def marks(i):
    """Every fourth case is not slow, and the first and the third of these are not wide."""
    return [pytest.mark.slow] * (i % 4 > 0) + [pytest.mark.wide] * (i not in (0, 8))


@pytest.mark.core
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=marks(i)) for i, case in enumerate(INTERPRETED)],
)
def test_interpreted_kernels_are_the_oracles(interpreted, case):
    assert_oracle(case, "mosaic_gpu")


def with_tiles(case, config):
    def call(x, w, bias):
        return conv2d(
            x,
            w,
            bias=bias,
            out_dtype=case.out_dtype,
            implementation="mosaic_gpu",
            config=config,
            **case.arguments,
        )

    return call


def assert_like_wider(case, config=None):
    """Output and gradients are those of the same numbers in float32, to the last bit or two."""
    *given, dy = arrays(case)

    def all_of(call, x, w, bias, dy):
        y, pullback = jax.vjp(call, x, w, bias)
        return y, *pullback(dy)

    wide = [None if a is None else a.astype(jnp.float32) for a in (*given, dy)]
    want = jax.jit(partial(all_of, plain(case._replace(out_dtype="float32"))))(*wide)
    got = jax.jit(partial(all_of, with_tiles(case, config)))(*given, dy)
    eps = float(jnp.finfo(case.dtype).eps)
    for name, g, w in zip(NAMES, got, want, strict=True):
        if g is not None:
            g, w = (np.asarray(a, np.float64) for a in (g, w))
            assert np.abs(g - w).max() <= 4 * eps * np.abs(w).max(), name


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_interpreted_kernels_take_several_tiles(interpreted, case):
    assert_like_wider(case)


@pytest.mark.core
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (MOMENTS[0], TileConfig(64, 32, 16, 4, 1, 2)),
        *(
            pytest.param(case, TileConfig(*size), marks=pytest.mark.wide)
            for case, size in (
                (MOMENTS[0], (128, 32, 16, 8, 1, 2)),
                (MOMENTS[0], (64, 32, 16, 4, 2, 2)),
                (MOMENTS[1], (64, 32, 16, 4, 1, 2)),
            )
        ),
        *(pytest.param(case, None, marks=pytest.mark.wide) for case in MOMENTS[1:]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_interpreted_moments_are_the_outputs(interpreted, case, config):
    assert_moments(case, mosaic_gpu, config)


@pytest.mark.wide
@pytest.mark.parametrize("case", [WHOLE_ROWS[0], WHOLE_ROWS[-1]], ids=lambda case: case.name)
def test_interpreted_rows_of_taps_are_multiplied_as_one(interpreted, case, monkeypatch):
    assert_whole_rows(case._replace(dtype="float16"), mosaic_gpu, monkeypatch)


@pytest.mark.wide
def test_interpreted_moments_of_a_large_mean_lose_nothing(interpreted):
    assert_moments(MOMENTS[0], mosaic_gpu, mean=1e4)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("sd_unet_64_3x3", "bfloat16", marks=pytest.mark.wide),
        ("ragged", "float16"),
        pytest.param("pixel", "float16", marks=pytest.mark.wide),
    ],
)
def test_kernels_with_moments_lower_for_cuda_and_fit(name, dtype, monkeypatch):
    shape = (SHAPES | SMALL)[name]
    pads = tuple(((k - 1) // 2, k // 2) for k in shape.w[:2])
    x, w = (jax.ShapeDtypeStruct(size, dtype) for size in (shape.x, shape.w))
    keys = {"window": Window(pads=pads), "precision": None, "config": None, "moments": True}
    keys |= {"activation": None, "out_dtype": dtype}
    assert "mosaic_gpu" in lowered(mosaic_gpu.forward, x, w, None, **keys)
    launches = recorded_launches(monkeypatch)
    _, found = shapes(mosaic_gpu.forward, x, w, None, **keys)
    assert found.mean.shape[0] == shape.batch and found.mean.shape[2] == shape.features
    ((scratch, _),) = launches
    assert shared_bytes(scratch) <= SHARED


TILES = (
    # Cooperative one above the other, ping-pong, cooperative side by side; one stage, made two.
    TileConfig(128, 32, 16, 8, 1, 3),
    TileConfig(64, 32, 32, 2, 2, 1),
    TileConfig(64, 64, 32, 4, 2, 4),
    TileConfig(256, 160, 32, 8, 1, 8),
)


@pytest.mark.core
@pytest.mark.parametrize(
    "config", [pytest.param(TILES[0], marks=pytest.mark.wide), TILES[1]], ids=str
)
def test_interpreted_kernels_take_tiles(interpreted, config):
    assert_like_wider(LARGE[0], config)


REFUSED = {
    "float32, bfloat16 and float16 alone": {"dtype": np.dtype("float32")},
    "float64 as what is written": {"out_dtype": np.dtype("float64")},
    "2 groups, one alone": {"window": Window(groups=2)},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "the pixels of 1073741824 images": {"shape": (2**30, 8, 8, 4)},
    "symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason):
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        mosaic_gpu.check("fwd", LAYER._replace(**REFUSED[reason]))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TileConfig(128, 128, 128), "block_k of 16, 32 or 64, and 4 or 8 warps"),
        (TileConfig(128, 128, 64, 8, 2), "block_k of 16, 32 or 64, and 4 or 8 warps"),
        (TileConfig(32, 128, 32), "four warps together take a multiple of 64 pixels"),
        (TileConfig(64, 160, 64), "and of block_k features, up to 256"),
        (TileConfig(256, 256, 16, 8, 1), "and 160 sums a thread"),
    ],
)
def test_tiles_that_are_not_taken_say_so(config, reason):
    layer = mosaic_gpu._Layer(1, 8, 8, 64, 512, (3, 3), (1, 1), (1, 1), (1, 1), False, None, 2)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu._tiling(layer, config)


def test_without_a_gpu_it_says_what_is_missing():
    x = np.ones((4, 4, 1), np.float16)
    with pytest.raises(NotImplementedError, match="mosaic_gpu: needs a GPU, this is a cpu"):
        conv2d(x, np.ones((1, 1, 1, 1), np.float16), implementation="mosaic_gpu")
    assert "mosaic_gpu" in OPERATOR.rule["gpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", TAKEN + [*EXTRA], ids=lambda case: case.name)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_several_tiles(case):
    assert_like_wider(case)


@pytest.mark.gpu
@pytest.mark.parametrize("config", TILES, ids=lambda config: "-".join(map(str, config)))
def test_tiles(config):
    assert_like_wider(LARGE[0], config)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU)
def test_the_table(case):
    assert_igemm(case, "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles", mosaic_gpu.search_space("fwd", LAYER), ids=lambda t: str([*t.values()])
)
@pytest.mark.parametrize("name", SHAPES)
def test_layers_of_a_network_are_xlas(name, tiles):
    layer = SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, bias = map(jax.random.normal, keys, (layer.x, layer.w, (layer.features,)))
    given = [a.astype("bfloat16") for a in (x, w / np.sqrt(w[..., 0].size), bias)]
    arguments = {"padding": "SAME", "activation": "gelu"}

    def run(**rest):
        call = partial(conv2d, bias=given[2], **arguments, **rest)
        y, pullback = jax.vjp(call, *given[:2])
        return y, pullback(jnp.cos(y))[0]

    want = run(implementation="xla")
    # Where results will lie is nothing but NaN.
    jax.block_until_ready([jnp.full(a.shape, jnp.nan, a.dtype) for a in want])
    got = run(implementation="mosaic_gpu", config=TileConfig(**tiles) if tiles else None)
    # The last bit of a bfloat16 is 1/128 of a value, and some are five times the rest.
    for g, w in zip(got, want, strict=True):
        g, w = (np.asarray(a, np.float32) for a in (g, w))
        assert np.abs(g - w).max() <= 0.08 * np.sqrt(np.mean(w**2))


@pytest.mark.gpu
@pytest.mark.parametrize("case", WHOLE_ROWS, ids=lambda case: case.name)
def test_rows_of_taps_are_multiplied_as_one(case, monkeypatch):
    assert_whole_rows(case._replace(dtype="float16"), mosaic_gpu, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", mosaic_gpu.search_space("fwd", LAYER), ids=str)
def test_moments(tiles):
    config = TileConfig(**tiles) if tiles else None
    for case in MOMENTS:
        assert_moments(case, mosaic_gpu, config)
    layer = Case(2, 65, 96, 64, 3, 3, 136, padding="reflect", dtype="bfloat16")
    assert_moments(layer, mosaic_gpu, config)


@pytest.mark.gpu
def test_a_layer_that_it_was_the_fastest_for_takes_it_unasked():
    if not table.entries(device.kind()):
        pytest.skip(f"nothing was measured on a {device.kind()}")
    layer = SHAPES["sd_unet_32_3x3"]
    x, w = (jax.ShapeDtypeStruct(size, "bfloat16") for size in (layer.x, layer.w))
    for stride, taken in ((1, True), (2, False)):
        call = partial(conv2d, stride=stride, padding="SAME")
        assert ("mosaic_gpu" in jax.jit(call).lower(x, w).as_text()) == taken


@pytest.mark.gpu
def test_not_a_number_stays_one():
    x, w = jnp.full((1, 2, 2, 1), jnp.nan, "float16"), jnp.ones((1, 1, 1, 1), "float16")
    assert jnp.isnan(conv2d(x, w, activation="relu", implementation="mosaic_gpu")).all()


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("mosaic_gpu", check_vma, dtype="float16")
