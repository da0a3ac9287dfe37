"""WTConv in float32, level by level: run on the CPU, planned, and run on a GPU."""

from itertools import product, starmap

import numpy as np
import pytest
from helpers.cuda import EMULATED, emulate, folder, plant
from helpers.wtconv import assert_oracle, assert_reproducible, misses_oracle

from pallas_kernels.common.cuda import Device
from pallas_kernels.common.on_cpu.cuda import HOPPER, Launcher
from pallas_kernels.wtconv import bands_launches as launches
from pallas_kernels.wtconv import cuda as cuda_jax
from pallas_kernels.wtconv import scaled_launches
from pallas_kernels.wtconv.cases import Case
from pallas_kernels.wtconv.gradients_launches import Parameters
from pallas_kernels.wtconv.problem import Problem

DEVICES = {
    "boxes": HOPPER._replace(multiprocessors=11),
    "pieces": Device(shared=66000, multiprocessors=14),
}
"""GPUs whose blocks begin and end within tiles, and that copy to shared memory in either way."""
ALWAYS = Case((9, 10), 2, 3, channels=20)
CASES = [
    # Three launches and more, columns in tiles; rows, columns and their halves are odd.
    Case((29, 69), 3, 5, channels=40),
    # The last level there may be, several images of a tile, single channels, many blocks.
    Case((57, 61), 5, 5, batch=(1,), channels=33),
    Case((7, 7), 2, 5, batch=(9,), channels=18),
    Case((13, 8), 1, 3, batch=(3,), channels=36, bias=False),
    # Smaller than the kernel.
    Case((2, 3), 5, 5, channels=16),
    Case((5, 18), 4, 3, batch=(2, 3), channels=24),
]

WIDE = ((CASES[1], "pieces"),)
"""The way that `ALWAYS` has not, five levels, and means that one level leaves for two others."""


def described(case):
    return case.name


@EMULATED
def test_float32_is_the_oracles_on_the_cpu(monkeypatch):
    emulate(monkeypatch, cuda_jax)
    assert_oracle(ALWAYS, "cuda")


@EMULATED
@pytest.mark.parametrize("scaled", [True, False])
def test_taps_are_scaled_in_one_launch(scaled):
    """Those of 260 channels, more than a block has threads, and the bias."""
    generator = np.random.default_rng(0)
    channels, bands = 260, (1, 4, 4)
    weights = [generator.standard_normal((channels, n, 3, 3), "float32") for n in bands]
    scales = [generator.standard_normal((channels, n), "float32") for n in bands]
    bias = generator.standard_normal(channels, "float32") if scaled else None
    given = Parameters(weights, scales if scaled else [], bias, "float32")
    got, offset = scaled_launches.scaled(
        given, channels, 3, Launcher(folder()).launch, channels_last=False
    )
    for tap, weight, scale in zip(got, weights, scales, strict=True):
        want = weight * scale[..., None, None] if scaled else weight
        np.testing.assert_array_equal(tap, want.transpose(2, 3, 1, 0))
    if bias is None:
        assert offset is None
    else:
        np.testing.assert_array_equal(offset, bias * scales[0][:, 0])


@EMULATED
@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(
            *(case, way),
            id=f"{case.name}-{way}",
            marks=pytest.mark.wide if (case, way) in WIDE else pytest.mark.slow,
        )
        for case, way in product(CASES, DEVICES)
    ],
)
def test_every_case_on_the_cpu(case, way, monkeypatch):
    emulate(monkeypatch, cuda_jax, DEVICES[way]).order = 2
    assert_oracle(case, "cuda")


FAULTS = {
    "a wait for a box": ("      wait_for(full + slot, phase);\n", ""),
    "a wait for a stage": ("      wait_for(empty + slot, phase);\n", ""),
    "a wait for pieces": ("wait<STAGES - 2>();", "wait<STAGES - 1>();"),
    "a barrier": ("      __syncthreads();\n      load", "      load"),
    "sums of the tile before": ("    sums.clear(offset);\n", ""),
    "the first pair of a tile": ("pair = max(top - R, 0)", "pair = max(top - R + 1, 0)"),
    "pieces of another pair": ("loading.pair - R, loading.left", "loading.pair, loading.left"),
    "a box of another pair": ("walk.left / 2, over, walk", "walk.left / 2, over + 1, walk"),
    "a level far below": ("walk.left / 4, over / 2, walk", "walk.left / 4, (over + 1) / 2, walk"),
    "means of another pair": ("      low += squares * channels;\n", ""),
    "a bound of the columns": ("column >= 0 &&", "column > 0 &&"),
    "another row of the base": ("base[r + 3 * R - t]", "base[r + R + t]"),
    "taps turned around": ("transpose ? K * K - 1 - i : i", "i"),
    "gradients: a wait for a stage": ("    wait_for(empty + slot, phase);\n        ", "    "),
    "gradients: a barrier": ("    __syncthreads();\n#pragma unroll 1\n", "#pragma unroll 1\n"),
    "gradients: a barrier before": ("    __syncthreads();\n#pragma unroll\n", "#pragma unroll\n"),
    "gradients: what waits of the tile before": ("    gradients.clear();\n", ""),
    "gradients: pairs of another block": ("walk.pair < walk.bottom ? stage", "true ? stage"),
    "gradients: the last pairs of a tile": ("min(bottom + 2 * R, pairs + R)", "bottom + R"),
    "gradients: another pair of x": ("2 * (walk.pair - R), walk", "2 * walk.pair, walk"),
    "gradients: another row of the base": ("base[r + 2 * R - t]", "base[r + t]"),
    "gradients: means that are sums": ("0.25f * squares_of[s]", "squares_of[s]"),
    "gradients: a warp": ("w < WARPS", "w < WARPS - 1"),
    "gradients: dy's half of the means": ("first_of_dy + chunk", "chunk"),
    "gradients: the factor of a level": ("float(1 << 2 * level)", "float(1 << level)"),
}  # fmt: skip


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    found = plant(monkeypatch, *FAULTS[fault])

    def caught(way, order):
        emulate(monkeypatch, cuda_jax, DEVICES[way]).order = order
        return misses_oracle(CASES[0], "cuda")

    assert any(starmap(caught, product(DEVICES, (0, 2)))) and any(found)


def test_tiles_are_shared_evenly_and_waste_no_columns():
    h200 = Device(shared=232448, multiprocessors=132, boxes=True)
    shape = 128, 56, 56, 96
    first = launches.planned((shape,), 5, h200, base=True, below=2)
    # 14 strips are two of each of four images, for eight warps.
    assert (first.across, first.images, first.boxed) == (2, 4, True)
    assert first.programs(shape, h200) == 44
    halves = 128, 28, 28, 96
    second = launches.planned((halves,), 5, h200, halved=True, lows=2)
    assert (second.across, second.images) == (7, 1) and second.shared() <= h200.shared
    assert launches.planned((shape,), 5, h200._replace(capability=80)).boxed is False


def test_tiles_of_gradients_are_those_that_a_gpu_is_fastest_with():
    h200 = Device(shared=232448, multiprocessors=132, boxes=True)
    shapes = [(128, side, side, 96) for side in (56, 28, 14, 7, 4)]
    first = launches.planned_gradients(tuple(shapes[:1]), 5, h200, base=True, lows=True)
    deeper = launches.planned_gradients(tuple(shapes[1:]), 5, h200, lows=True)
    assert (first.across, first.images) == (deeper.across, deeper.images) == (2, 4)
    # An edge is copied twice less where a tile is as wide as can be.
    large = launches.planned_gradients(((8, 512, 512, 64),), 5, h200, base=True, lows=True)
    assert (large.across, large.images, large.boxed) == (8, 1, True)
    assert large.programs((8, 512, 512, 64), h200) == 66 and large.shared() <= h200.shared


@pytest.mark.parametrize(
    ("shape", "dtype", "kernel_size", "capability", "taken"),
    [
        ((2, 9, 9, 16), "float32", 5, 90, True),
        ((2, 9, 9, 33), "float32", 3, 80, True),
        ((2, 9, 9, 15), "float32", 5, 90, False),
        ((2, 9, 9, 32), "float32", 7, 90, False),
        ((2, 9, 9, 32), "float16", 5, 90, False),
        ((2, 9, 9, 32), "float32", 5, 75, False),
    ],
)
def test_what_is_not_taken_other_kernels_do(shape, dtype, kernel_size, capability, taken):
    device = HOPPER._replace(capability=capability)
    assert launches.takes(shape, dtype, kernel_size, device) is taken


def test_other_kernels_in_float32_are_not_what_tables_measured(monkeypatch):
    monkeypatch.setattr(cuda_jax, "device_properties", lambda: HOPPER)
    images = Problem((128, 28, 28, 192), "float32", 5, 3, "haar")
    assert cuda_jax.as_measured("bwd", images)
    shapes = ({"shape": shape} for shape in ((1, 28, 28, 192), (128, 224, 224, 16)))
    for other in ({"kernel_size": 7}, {"dtype": "float64"}, *shapes):
        assert not cuda_jax.as_measured("bwd", images._replace(**other))
    assert cuda_jax.as_measured("fwd", images._replace(dtype="bfloat16", kernel_size=7))
    assert cuda_jax.as_measured("fwd", images._replace(shape=(2, 4096, 8)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [ALWAYS, *CASES], ids=described)
def test_float32_is_the_oracles_on_a_gpu(case):
    assert_oracle(case, "cuda")


@pytest.mark.gpu
def test_float32_is_bitwise_reproducible():
    assert_reproducible("cuda", CASES[0])
