"""The depthwise convolution on tensor cores: run on the CPU, with faults planted, and compiled."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda import EMULATED, emulate, folder, gpu_of

from pallas_kernels.common import cuda_call, nvrtc
from pallas_kernels.common.conformance import bounds, expected, worst
from pallas_kernels.common.cuda import Device, source_text
from pallas_kernels.common.on_cpu.cuda import HOPPER, Launcher
from pallas_kernels.depthwise import conformance, cuda, depthwise_conv2d
from pallas_kernels.depthwise import cuda_launches as launches
from pallas_kernels.depthwise.cases import Case

SOURCE = source_text(launches.SOURCE)
AMPERE = HOPPER._replace(shared=166912, capability=80, boxes=False)
CASES = {
    # Sizes and channels that are no multiples of anything; boxes need eight channels.
    "boxes": (Case(3, 9, 10, 8, 5, "bfloat16"), HOPPER),
    "a large kernel": (Case(5, 6, 9, 40, 9, "float16"), HOPPER),
    "an even kernel": (Case(2, 11, 13, 16, 4, "bfloat16"), HOPPER),
    "one pixel": (Case(3, 1, 1, 8, 3, "bfloat16", bias=False), HOPPER),
    "two tiles beside each other": (Case(1, 7, 70, 8, 7, "float16"), HOPPER),
    "tiles one after the other": (
        Case(20, 10, 12, 8, 5, "bfloat16"),
        HOPPER._replace(multiprocessors=1),
    ),
    "pieces": (Case(2, 7, 14, 40, 3, "float16"), AMPERE),
    "pieces of four": (Case(1, 6, 13, 36, 7, "bfloat16"), AMPERE),
    "pieces of two": (Case(2, 9, 5, 34, 6, "float16"), AMPERE),
    "single channels": (Case(1, 6, 66, 5, 5, "bfloat16"), AMPERE),
    "tiles of pieces": (Case(20, 10, 12, 8, 8, "bfloat16"), AMPERE._replace(multiprocessors=1)),
    "Turing": (Case(1, 9, 9, 8, 5, "float16"), Device(65536, 2, 75)),
}
# PyTorch's tests always launch the kernels that read boxes.
ALWAYS = ("single channels",)
WIDE = ("Turing",)


def marks(name):
    """Those of a case: by hand alone runs what others have too."""
    if name in ALWAYS:
        return []
    return [pytest.mark.wide if name in WIDE else pytest.mark.slow]


def results(function, case):
    return jax.jit(function(case))(*jax.tree.map(jnp.asarray, case.drawn()))


def assert_oracle(case):
    """Output and gradients, in dtype, shape and value."""
    got, want = results(partial(conformance.computed, implementation="cuda"), case), expected(case)
    chex.assert_trees_all_equal_shapes(got, want)
    allowed = bounds(case, partial(results, conformance.baseline))
    errors = {name: worst(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {n: e for n, e in errors.items() if not e <= allowed[n]} == {}


@EMULATED
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in CASES])
def test_output_and_gradients_are_the_oracles(name, monkeypatch):
    case, device = CASES[name]
    emulate(monkeypatch, cuda, device)
    assert_oracle(case)


def on_the_cpu(launcher, case, device):
    """Output, gradient of x and gradient of the taps by a launcher of NumPy's arrays."""
    x, kernel, bias, dy = case.drawn()
    taps = np.ascontiguousarray(kernel[:, :, 0])
    about, where = (x.shape, case.dtype, case.k), (device, launcher.launch)
    offsets = None if bias is None else bias.astype("float32")
    y = launches.forward(x, taps, offsets, *about, False, *where)
    dx = launches.forward(dy, taps, None, *about, True, *where)
    sums = launches.weight_grad(x, dy, *about, True, *where)
    dkernel = sums[:, :-1].T.reshape(kernel.shape)
    return {"y": y, "dx": dx, "dkernel": dkernel, "dbias": sums[:, -1]}


def error(found, case):
    """The largest error, as a part of what rounding the exact result may cause."""
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[case.dtype]
    return max(
        (np.abs(array.astype(np.float64) - want) / (rounding * np.abs(want) + 1e-4)).max()
        for array, want in ((found[name], case.expected()[name]) for name in found)
    )


TILES = {
    "boxes": (Case(2, 21, 12, 8, 5, "bfloat16"), HOPPER._replace(multiprocessors=1)),
    "large": (Case(2, 21, 12, 8, 7, "bfloat16"), HOPPER._replace(multiprocessors=1)),
    "pieces": (Case(2, 21, 12, 8, 5, "bfloat16"), AMPERE._replace(multiprocessors=1)),
}
"""Several tiles for a thread block, and more pairs of rows than stages."""


def few_stages(monkeypatch):
    """Small tiles in three stages."""
    planned = launches.planned

    def small(*given, **named):
        return planned(*given, **named)._replace(pairs=4, stages=3, resident=1)

    monkeypatch.setattr(launches, "planned", small)


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("way", TILES)
def test_results_are_exact_but_for_their_rounding_in_every_order_of_threads(way, monkeypatch):
    few_stages(monkeypatch)
    case, device = TILES[way]
    launcher = Launcher(folder())
    for launcher.order in (0, 1, 2):
        assert error(on_the_cpu(launcher, case, device), case) <= 1.01


FAULTS = {
    "a barrier": ("pieces", "    __syncthreads();\n    fill(slot", "    fill(slot"),
    "a wait": ("pieces", "wait<STAGES - 2>();", ""),
    "a wait for too few": ("pieces", "wait<STAGES - 2>();", "wait<STAGES - 1>();"),
    "a bound of the rows": ("pieces", "r >= 0 && r < HEIGHT", "r < HEIGHT + 1"),
    "a bound of the columns": ("pieces", "w >= 0 && w < WIDTH", "w < WIDTH"),
    "one buffer of results": ("pieces", "BUFFERS = BOXED ? STAGES + 1 : 2", "BUFFERS = 1"),
    "the other channel": ("boxes", "0x7632 : 0x5410", "0x5410 : 0x7632"),
    "another pair's taps": ("boxes", "(REACHED - 1 - i) * PARTS", "i * PARTS"),
    "the taps of the adjoint": ("boxes", "(TRANSPOSED ? -down : down)", "down"),
    "another sum": ("large", "n / 4 + 2 * REACH", "n / 4 + 2"),
    "a wait for a box": ("boxes", "    wait_for(full + slot, phase);\n", ""),
    "a wait for the other phase": (
        "boxes",
        "wait_for(full + slot, phase)",
        "wait_for(full + slot, 0)",
    ),
    "a wait for stores": ("boxes", "    stored<1>();\n", "    stored<100>();\n"),
    "the last stores": ("boxes", "  stored<0>();\n", ""),
    "bytes": ("boxes", "expect(full + slot, STAGE);", "expect(full + slot, STAGE / 2);"),
    "older gradients": ("boxes", "late[c][i][f] = late[c][i - 1][f];", ";"),
}


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    few_stages(monkeypatch)
    way, old, new = FAULTS[fault]
    case, device = TILES[way]
    assert old in SOURCE
    launcher = Launcher(folder(), source=SOURCE.replace(old, new))

    def caught(order):
        launcher.order = order
        try:
            # Not "error > 1.01": NaN is never more.
            return not error(on_the_cpu(launcher, case, device), case) <= 1.01
        except RuntimeError:
            return True

    assert any(map(caught, (0, 1, 2)))


@EMULATED
@pytest.mark.slow
def test_an_infinite_pixel_reaches_no_further_than_its_blocks():
    """Four columns and two rows of each side's blocks more than it reaches by itself."""
    case = Case(1, 16, 24, 8, 5, "float16", bias=False)
    x, kernel, _, _ = case.drawn()
    x[0, 8, 12, 1] = np.inf
    taps, where = np.ascontiguousarray(kernel[:, :, 0]), (HOPPER, Launcher(folder()).launch)
    y = launches.forward(x, taps, None, x.shape, "float16", 5, False, *where)
    rows, columns, channels = np.nonzero(~np.isfinite(y.astype(np.float32)))[1:]
    assert set(channels) == {1}
    assert {*range(6, 11)} <= set(rows) <= {*range(6, 12)}
    assert {*range(10, 15)} <= set(columns) <= {*range(8, 16)}


def test_narrow_images_share_products():
    device = Device(232448, 132, boxes=True)
    forward = launches.planned((8, 14, 14, 384), "bfloat16", 5, device)
    assert (forward.blocks, forward.images, forward.columns, forward.boxed) == (4, 4, 14, True)
    weights = launches.planned((8, 14, 14, 35), "bfloat16", 5, device, weights=True)
    assert (weights.blocks, weights.images, weights.columns) == (4, 4, 16)
    assert not weights.boxed and weights.vector == 1


REFUSED = {
    "float32, 16 bits alone": (Case(1, 8, 8, 4, 3), {}),
    "an empty array": (Case(0, 8, 8, 4, 3, "float16"), {}),
    "strides of 2x2": (Case(1, 8, 8, 4, 3, "float16", stride=2), {}),
    "kernels of 11, up to 9": (Case(1, 12, 12, 4, 11, "float16"), {}),
    "bfloat16 on GPUs older than": (Case(1, 8, 8, 4, 3, "bfloat16"), {"capability": "7.5"}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason, monkeypatch):
    case, gpu = REFUSED[reason]
    gpu_of(monkeypatch, **gpu)
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        cuda.check("fwd", conformance.problem(case))


def test_without_a_gpu_it_says_what_is_missing():
    x = jnp.ones((4, 4, 1), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="cuda: needs a GPU, this is a cpu"):
        depthwise_conv2d(x, jnp.ones((3, 3, 1, 1)), implementation="cuda")


REGISTERS = {
    "sm_75": {5: (107, 113), 7: (182, 232)},
    "sm_80": {5: (112, 116), 7: (180, 238)},
    "sm_90a": {5: (117, 116), 7: (192, 233)},
    "sm_120": {5: (128, 124), 7: (202, 255)},
}
"""The registers of the convolution with a bias and of the weight gradient, by kernel size."""
MORE = 8
"""Registers that another version of NVRTC may take more."""


@pytest.mark.parametrize(
    ("arch", "kernel_size"),
    [
        pytest.param(arch, k, marks=[pytest.mark.slow] * ((arch, k) != ("sm_80", 5)))
        for arch, sizes in REGISTERS.items()
        for k in sizes
    ],
)
def test_sums_are_kept_in_registers(arch, kernel_size, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc", reason="the test extra has NVRTC for Linux alone")
    cubins = pytest.importorskip("helpers.cubins", reason="what reads cubins comes with Triton")
    digits = arch.removeprefix("sm_").rstrip("a")
    gpu_of(monkeypatch, f"{digits[:-1]}.{digits[-1]}")
    device = cuda_call.device_properties()
    # JAX 0.10 alone has no tensor maps.
    device = device._replace(boxes=arch == "sm_90a")
    for weights, most in zip((False, True), REGISTERS[arch][kernel_size], strict=True):
        variant = launches.planned((8, 56, 56, 96), "float16", kernel_size, device, weights)
        kernel = variant._replace(biased=True).compiled()
        code = nvrtc.compile_source(kernel.text(), dict(kernel.macros), arch)
        registers, spilled = cubins.usage(code)
        assert spilled == 0 and registers <= most + MORE
        assert registers * kernel.threads * variant.resident <= 65536
        assert variant.resident * (kernel.shared + 1024) <= device.shared + 1024


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("boxes", [True, False])
def test_the_convolution_on_a_gpu(name, boxes, monkeypatch):
    case, _ = CASES[name]
    own = cuda_call.device_properties()
    monkeypatch.setattr(cuda, "device_properties", lambda: own._replace(boxes=boxes and own.boxes))
    jax.clear_caches()
    assert_oracle(case)
