"""WTConv in 16 bits on tensor cores: the fold of taps, and kernels run on the CPU and on a GPU."""

from itertools import product, starmap

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda import EMULATED, emulate, folder, plant
from helpers.wtconv import assert_oracle, assert_reproducible, misses_oracle, takes

from pallas_kernels.common.cuda import Box, Device
from pallas_kernels.common.on_cpu.cuda import HOPPER, Launcher
from pallas_kernels.oracle import wtconv
from pallas_kernels.wtconv import cuda as cuda_jax
from pallas_kernels.wtconv import folded_launches as launches
from pallas_kernels.wtconv import folding
from pallas_kernels.wtconv.cases import CASES, Case, inputs
from pallas_kernels.wtconv.gradients_launches import Parameters, gradients, numbers

TAKEN = [
    case
    for case in CASES
    if case.ndim == 2
    and takes(cuda_jax, case)
    and launches.takes((1, 1, 1, 1), case.dtype, case.kernel_size, HOPPER)
]
SMALL = Device(shared=66000, multiprocessors=6)
"""On which levels are launches of their own, but those of the smallest images."""
ALWAYS = Case((9, 10), 2, 3, "bfloat16")
STREAMED = [
    # Strips of rows, columns in tiles, a block's next tile another image's first, the last level of
    # small images; odd rows and columns.
    Case((29, 69), 3, 5, "bfloat16", channels=40),
    Case((31, 33), 3, 3, "float16", batch=(5,), channels=8),
    Case((18, 37), 3, 7, "float16", channels=18),
    Case((15, 33), 3, 3, "bfloat16", batch=(5,), channels=5),
    Case((21, 34), 2, 5, "float16", batch=(3,), channels=2),
    # The first on a smaller image, of one block of channels.
    Case((21, 37), 3, 5, "bfloat16", channels=8),
]


KERNELS = "base_kernel", "wavelet_kernel_0", "wavelet_kernel_1", "wavelet_kernel_2"


def described(case):
    return case.name


@pytest.mark.parametrize("kernel_size", launches.KERNEL_SIZES)
def test_folded_taps_are_the_oracles_answer_to_one_pixel(kernel_size):
    """A pixel at each place of a square: the base and one level, each scale from 1 away."""
    _, params, _ = inputs(Case((4, 4), 1, kernel_size, bias=False, channels=2))
    reach, middle = 2 * (kernel_size // 2), 2 * kernel_size
    base = params["base_kernel"] * params["base_scale"]
    bands = params["wavelet_kernel_0"] * params["wavelet_scale_0"]
    folded = np.asarray(cuda_jax.folded((jnp.asarray(base), jnp.asarray(bands))))[0]
    for row in range(2):
        for column in range(2):
            x = np.zeros((4 * kernel_size, 4 * kernel_size, 2))
            x[middle + row, middle + column] = 1
            y = wtconv(x, params, 2)
            for i in range(row, 2 * kernel_size, 2):
                for j in range(column, 2 * kernel_size, 2):
                    # The square whose tap (i, j) is of this pixel.
                    top, left = middle + row - i + reach, middle + column - j + reach
                    want = y[top : top + 2, left : left + 2].transpose(2, 1, 0)
                    got = np.moveaxis(folded[i % 2, i // 2, j], -1, 0)
                    np.testing.assert_allclose(got, want, atol=1e-6)


def parameters(kernel_size, dtype, biased, scaled=True):
    """Those of two levels of five channels, and their taps and scaled bias in float32."""
    generator = np.random.default_rng(0)

    def drawn(*shape):
        return generator.standard_normal(shape).astype(dtype)

    weights = [drawn(5, n, kernel_size, kernel_size) for n in (1, 4, 4)]
    scales = [drawn(1, 5 * n, 1, 1) for n in (1, 4, 4)]
    bias = drawn(5) if biased else None
    given = Parameters(weights, scales if scaled else [], bias, dtype)
    factors = [
        scale.astype("float32").reshape(5, -1, 1, 1) if scaled else np.float32(1)
        for scale in scales
    ]
    taps = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
    return given, taps, None if bias is None else bias * np.ravel(factors[0])


@EMULATED
@pytest.mark.parametrize(
    ("kernel_size", "dtype", "own", "transpose"),
    [
        (5, "bfloat16", "bfloat16", True),
        pytest.param(3, "float16", "float32", False, marks=pytest.mark.wide),
        pytest.param(7, "bfloat16", "float32", False, marks=pytest.mark.slow),
    ],
)
def test_taps_are_scaled_and_folded_as_jax_does(kernel_size, dtype, own, transpose):
    launch = Launcher(folder()).launch
    for scaled in (True, False):
        given, taps, bias = parameters(kernel_size, jnp.dtype(own), not transpose, scaled)
        given = given._replace(dtype=own)
        got = launches.folded(given, 5, dtype, kernel_size, launch, transpose)
        own_taps = [tap[..., ::-1, ::-1] if transpose else tap for tap in taps]
        folded = cuda_jax.folded(tuple(jnp.asarray(tap.transpose(2, 3, 1, 0)) for tap in own_taps))
        np.testing.assert_array_equal(got, cuda_jax.packed(folded, bias, jnp.dtype(dtype)))


@EMULATED
@pytest.mark.parametrize(
    ("kernel_size", "dtype", "biased"),
    [
        (3, "bfloat16", True),
        pytest.param(5, "float32", False, marks=pytest.mark.wide),
        pytest.param(7, "float16", True, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_kernels_and_scales_follow_from_those_of_taps(kernel_size, dtype, biased):
    """Partial sums of 11 channels, a block and a part of one, of two levels in one array."""
    generator = np.random.default_rng(0)
    channels, programs, side = 11, (3, 2), (kernel_size, kernel_size)
    counts = [numbers(kernel_size, base=level == 0) for level in range(2)]
    sums = generator.standard_normal((3 * counts[0] + 2 * counts[1], channels)).astype("float32")
    found = [(sums, 0, programs[0]), (sums, 3 * counts[0], programs[1])]
    launch, own = Launcher(folder()).launch, jnp.dtype(dtype)
    *taps, offset = gradients(found, channels, kernel_size, launch, False)
    weights = [generator.standard_normal((channels, n, *side)).astype(own) for n in (1, 4, 4)]
    scales = [generator.standard_normal((channels, n)).astype(own) for n in (1, 4, 4)]
    bias = generator.standard_normal(channels).astype(own) if biased else None
    given = Parameters(weights, scales, bias, dtype)
    got = gradients(found, channels, kernel_size, launch, False, given)
    assert {each.dtype for each in got} == {own}
    want = [tap * scale[..., None, None] for tap, scale in zip(taps, scales, strict=True)]
    want += [(tap * weight).sum((2, 3)) for tap, weight in zip(taps, weights, strict=True)]
    want[3][:, 0] += 0 if bias is None else offset * bias
    want.append(offset * scales[0][:, 0])
    for one, other in zip(got, want, strict=True):
        rounding = max(float(jnp.finfo(own).eps), 1e-6)
        np.testing.assert_allclose(
            one.astype("float64").ravel(), other.astype("float64").ravel(), rounding, 1e-5
        )


@EMULATED
@pytest.mark.parametrize(
    ("kernel_size", "channels_last"),
    [
        (5, True),
        pytest.param(7, True, marks=pytest.mark.wide),
        # Taps of 3, and PyTorch's layout, have the cases of the oracle below and of `torch_bridge`.
        pytest.param(3, True, marks=pytest.mark.slow),
        pytest.param(5, False, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_taps_are_the_transpose_of_folding(kernel_size, channels_last):
    """Taps times their gradients are dy times what the taps make of x, in either layout."""
    generator = np.random.default_rng(0)
    shape, levels = (1, 5, 6, 3), 2
    x, dy = (generator.integers(-8, 8, shape).astype("float16") for _ in range(2))
    names = "base_kernel", "wavelet_kernel_0", "wavelet_kernel_1"
    taps = [generator.standard_normal((kernel_size, kernel_size, n, 3)) for n in (1, 4, 4)]
    table = folding.products(kernel_size)
    about = table, shape, "float16", kernel_size, levels, SMALL, Launcher(folder()).launch
    *got, bias = launches.weight_grad(x, dy, *about, channels_last=channels_last)
    if not channels_last:
        got = [each.transpose(2, 3, 1, 0) for each in got]
    products = sum((a * b).sum() for a, b in zip(taps, got, strict=True))
    params = dict(zip(names, taps, strict=True))
    params |= {"base_scale": np.ones(3)} | {f"wavelet_scale_{i}": np.ones((4, 3)) for i in (0, 1)}
    want = (dy.astype(float) * wtconv(x.astype(float), params, 2)).sum()
    np.testing.assert_allclose(products, want, rtol=1e-4)
    np.testing.assert_array_equal(bias, dy.astype(float).sum((0, 1, 2)))


@EMULATED
@pytest.mark.parametrize("shape", [(3, 13, 9, 6), (1, 5, 2, 2), (2, 6, 9, 8)])
def test_means_of_two_levels_are_one_launch(shape):
    x = np.random.default_rng(0).integers(-64, 64, shape).astype("float16")
    sizes = [(shape[0], -(-shape[1] // 2**i), -(-shape[2] // 2**i), shape[3]) for i in range(4)]
    launched = []

    def launch(kernel, arguments, outputs, blocks):
        launched.append(len(outputs))
        return Launcher(folder()).launch(kernel, arguments, outputs, blocks)

    means = launches.means([x], sizes, "float16", launch)
    assert launched == [2, 1]
    for got in means:
        x = np.pad(x, [(0, 0), *((0, side % 2) for side in x.shape[1:3]), (0, 0)])
        x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
        np.testing.assert_array_equal(got, x)


@EMULATED
def test_means_of_two_arrays_are_one_array():
    """Those of the second array behind those of the first in each pixel, at every level."""
    sizes = [(3, 13, 9, 6), (3, 7, 5, 6), (3, 4, 3, 6), (3, 2, 2, 6)]
    generator = np.random.default_rng(0)
    arrays = [generator.integers(-64, 64, sizes[0]).astype("float16") for _ in range(2)]
    launch = Launcher(folder()).launch
    each = [launches.means([one], sizes, "float16", launch) for one in arrays]
    for got, *want in zip(launches.means(arrays, sizes, "float16", launch), *each, strict=True):
        np.testing.assert_array_equal(got, np.concatenate(want, -1))


@EMULATED
def test_16_bits_are_the_oracles_on_the_cpu(monkeypatch):
    emulate(monkeypatch, cuda_jax)
    assert_oracle(ALWAYS, "cuda")


@EMULATED
@pytest.mark.parametrize(
    ("kernel_size", "boxes"), [(3, False), pytest.param(5, True, marks=pytest.mark.wide)]
)
def test_a_launch_a_level_on_the_cpu(kernel_size, boxes, monkeypatch):
    """More blocks than multiprocessors; in reverse, so that none reads what another has written."""
    emulate(monkeypatch, cuda_jax, SMALL._replace(multiprocessors=1, boxes=boxes)).order = 1
    assert_oracle(ALWAYS._replace(kernel_size=kernel_size, channels=40), "cuda")


@pytest.mark.parametrize("boxes", [True, False])
def test_levels_write_in_the_memory_of_deeper_ones(boxes):
    launched = []

    def launch(kernel, arguments, outputs, blocks):
        place = kernel.in_place
        launched.append((kernel.name, place))
        return [object() for _ in outputs] if place is None else [arguments[place]]

    about = (1, 29, 69, 40), "bfloat16", 5, 3, SMALL._replace(boxes=boxes), launch
    launches.forward("x", "taps", *about, together=1)
    launches.weight_grad("x", "dy", "table", *about, channels_last=True)
    assert [place for name, place in launched if name == "folded_forward"] == [None, 2, 2]
    assert [place for name, place in launched if name == "folded_weights"] == [None, 3, 3]


def test_levels_whose_means_are_one_array_have_sums_of_their_own():
    """The third level's means are dead when the sums of those above begin."""
    launched = []

    def launch(kernel, arguments, outputs, blocks):
        launched.append((kernel.name, arguments, kernel.in_place))
        return [object() for _ in outputs]

    about = (1, 29, 69, 40), "bfloat16", 5, 3, SMALL, launch
    launches.weight_grad("x", "dy", "table", *about, channels_last=True, together=18)
    *_, joined = [arguments for name, arguments, _ in launched if name == "folded_means"]
    deepest, second, first = [each for each in launched if each[0] == "folded_weights"]
    assert joined[:2] == second[1][:2]
    assert deepest[1][0] is deepest[1][1]
    assert first[1][:2] == ["x", "dy"]
    assert [place for _, _, place in (deepest, second, first)] == [None, None, 3]


@pytest.mark.parametrize(
    ("shape", "levels", "reads"),
    [
        ((128, 56, 56, 96), 5, True),
        ((128, 14, 14, 384), 3, True),
        ((128, 7, 7, 768), 2, False),
        ((1, 64, 64, 8), 1, False),
        ((1, 9, 10, 8), 2, False),
    ],
)
def test_which_means_both_directions_read(shape, levels, reads):
    launched = []

    def launch(kernel, arguments, outputs, blocks):
        launched.append((kernel.name, dict(kernel.macros).get("JOINED")))
        return [object() for _ in outputs]

    about = shape, "bfloat16", 5, levels, Device(shared=232448, multiprocessors=132)
    assert launches.reads_means(*about) is reads
    launches.forward("x", "taps", *about, launch)
    assert (("folded_means", 0) in launched) is reads
    launched.clear()
    launches.weight_grad("x", "dy", "table", *about, launch, channels_last=True)
    assert (("folded_means", 0) in launched) is reads


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("case", TAKEN, ids=described)
def test_every_case_on_the_cpu(case, order, monkeypatch):
    emulate(monkeypatch, cuda_jax).order = order
    assert_oracle(case, "cuda")


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "boxes"),
    [
        pytest.param(
            *(case, boxes),
            id=f"{case.name}-{'boxes' if boxes else 'pieces'}",
        )
        for case, boxes in product(STREAMED, (True, False))
        if not boxes or case.channels % 8 == 0
    ],
)
def test_levels_of_their_own_on_the_cpu(case, boxes, monkeypatch):
    emulate(monkeypatch, cuda_jax, SMALL._replace(boxes=boxes)).order = 2
    assert_oracle(case, "cuda")


HALVES = Case((26, 25), 3, 5, "bfloat16", channels=8)
"""Its halves, and all below, are one launch."""
FAULTS = {
    "a barrier": ("    __syncthreads();\n    store", "    store"),
    "a wait": ("wait<STAGES - 2>();", ""),
    "results before they are read": ("(R + DOWN - 1) / DOWN", "0"),
    "a pair below the image": ("other >= 0 && other < Here::PAIRS", "other >= 0"),
    "another pair's squares": ("r = 2 * row + k / 2", "r = 2 * row"),
    "a wait for too few": ("wait<STAGES - 2>();", "wait<STAGES - 1>();"),
    "a bound of the columns": ("at >= 0 && at < images.width", "at > 0 && at < images.width"),
    "a bound of the rows": ("2 * pair + 1 < images.height ?", "2 * pair + 3 < images.height ?"),
    "the other channel": ("0x7632 : 0x5410", "0x5410 : 0x7632"),
    "another pair's taps": ("(REACHED - 1 - i) * PARTS", "i * PARTS"),
    "one buffer of results": ("results + step % 2 * Outputs::BYTES;", "results;"),
    "sums of the tile before": ("      clear(sums);\n", ""),
    "a level below of another pair": (
        "const int done = loading.pair - R;",
        "const int done = loading.pair;",
    ),
    "another pixel of a square below": (
        "whole.pixel(image, 0, 2 * column, stride)",
        "whole.pixel(image, 0, 2 * column + 1, stride)",
    ),
    "a level's pixels beside each other": ("stride = 1 << level", "stride = 1"),
    "whole images beside each other": ("STEP = 1 << FIRST", "STEP = 1"),
    "means of dy over those of x": (" * stride + first + channel", " * stride + channel"),
    "means of x in place of dy's": ("JOINED ? channels : 0", "0"),
    "sums over another level's": ("numbers + row) * channels", "numbers) * channels"),
    "pairs of dy": ("ring[c][i][f] = ring[c][i - 1][f];", "ring[c][i][f] = ring[c][0][f];"),
    "the last pair of x": ("bottom(images) + R, pairs + MIXED)", "bottom(images) + R, pairs)"),
}


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    launcher = emulate(monkeypatch, cuda_jax, SMALL)
    found = plant(monkeypatch, *FAULTS[fault])

    def caught(case, order):
        launcher.order = order
        return misses_oracle(case, "cuda")

    assert any(starmap(caught, product((STREAMED[0], HALVES), (0, 1, 2)))) and any(found)


@EMULATED
@pytest.mark.slow
def test_maps_of_neighbouring_pixels_are_caught(monkeypatch):
    emulate(monkeypatch, cuda_jax, SMALL._replace(boxes=True))
    mapped = Box.mapped
    monkeypatch.setattr(Box, "mapped", lambda box, shape: mapped(box._replace(step=1), shape))
    assert misses_oracle(STREAMED[-1], "cuda")


@EMULATED
@pytest.mark.slow
def test_an_infinite_pixel_reaches_no_further_than_its_blocks():
    """It reaches the pairs of rows and blocks of columns of its own, every pixel at most."""
    shape = 1, 32, 40, 4
    generator = np.random.default_rng(0)
    x = generator.standard_normal(shape).astype("float16")
    x[0, 16, 20, 1] = np.inf
    taps = tuple(
        jnp.asarray(generator.standard_normal((5, 5, bands, 4)), "float32") for bands in (1, 4)
    )
    matrices = np.asarray(cuda_jax.packed(cuda_jax.folded(taps), None, jnp.float16))
    launcher = Launcher(folder())
    y = launches.forward(x, matrices, shape, "float16", 5, 1, SMALL, launcher.launch)
    rows, columns, channels = np.nonzero(~np.isfinite(y.astype(np.float32)))[1:]
    assert set(channels) == {1}
    # Two squares to each side by itself.
    assert {*range(12, 22)} <= set(rows) <= {*range(12, 22)}
    assert {*range(16, 26)} <= set(columns) <= {*range(16, 28)}


def test_small_images_are_one_launch_and_large_ones_streams():
    h200 = Device(shared=232448, multiprocessors=132)
    small = (128, 7, 7, 192), "bfloat16", 5, 2, h200
    one = launches.whole(*small)
    assert (one.images, one.resident, one.blocks(small[0])) == (12, 4, h200.multiprocessors)
    # More blocks than multiprocessors are not alone on one.
    small = (128, 7, 7, 768), *small[1:]
    assert launches.whole(*small) is None
    # All blocks at once, three of a multiprocessor, where more would take two turns.
    one = launches.whole(*small, together=7)
    assert (one.images, one.resident, one.blocks(small[0])) == (16, 3, 8 * 48)
    assert launches.whole((128, 14, 14, 192), "bfloat16", 5, 3, h200) is None
    assert launches.whole((8192, 3, 5, 32), "bfloat16", 3, 5, h200) is None
    halves = (128, 28, 28, 96), "bfloat16", 5, 4, h200, (128, 56, 56, 96)
    below = launches.whole(*halves, together=28)
    assert (below.halved, below.images, below.high, below.wide) == (True, 1, 56, 28)
    assert launches.whole((128, 56, 56, 96), "bfloat16", 5, 5, h200, together=64) is None
    variant = launches.planned("forward", (128, 56, 56, 96), "bfloat16", 5, h200)
    assert (variant.across, variant.images, variant.pairs) == (14, 1, 28)
    assert variant.programs((128, 56, 56, 96), h200) == 43


# A launch a level, whose steps are longer than the image is high.
STEPS = Case((3, 5), 5, 3, "bfloat16", batch=(8192,), channels=32)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*TAKEN, *STREAMED, STEPS], ids=described)
def test_16_bits_are_the_oracles_on_a_gpu(case):
    assert_oracle(case, "cuda")


def assert_whole_images_are_their_levels():
    """Whole images in one launch, x and halves of it, differ from a launch a level by roundings."""
    case = Case((19, 17), 3, 5, "bfloat16", batch=(2,), channels=12)
    x, params, dy = case.drawn()
    taps = tuple(jnp.asarray(params[name], jnp.float32) for name in KERNELS)
    rest = {"wavelet": "haar", "precision": None}
    shapes = tuple(tap.shape for tap in taps)

    def computed(together):
        y = cuda_jax.forward(x, taps, None, transpose=False, together=together, **rest)
        gradients = cuda_jax.weight_grad(x, dy, kernel_shapes=shapes, together=together, **rest)
        return [np.asarray(each, np.float64) for each in (y, *gradients)]

    streamed, *whole = (computed(together) for together in (3, 19, 10))
    for got in whole:
        for one, want in zip(got, streamed, strict=True):
            assert np.abs(one - want).max() <= 0.02 * np.abs(want).max()


@EMULATED
@pytest.mark.wide
def test_whole_images_are_their_levels_on_the_cpu(monkeypatch):
    emulate(monkeypatch, cuda_jax)
    assert_whole_images_are_their_levels()


@pytest.mark.gpu
def test_whole_images_are_their_levels_on_a_gpu():
    assert_whole_images_are_their_levels()


@pytest.mark.gpu
def test_gradients_in_16_bits_are_bitwise_reproducible():
    assert_reproducible("cuda", STREAMED[0])
