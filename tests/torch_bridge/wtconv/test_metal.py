"""`wtconv.metal`, run on the CPU and on Apple GPUs, and what the checks find of faults in it."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels import oracle  # noqa: E402
from pallas_kernels.common import conformance  # noqa: E402
from pallas_kernels.haar import cases as haar_cases  # noqa: E402
from pallas_kernels.wtconv.cases import CASES, HARD, Case  # noqa: E402
from torch_bridge import check  # noqa: E402
from torch_bridge.wtconv import metal as metal_launch  # noqa: E402
from torch_bridge.wtconv import ops  # noqa: E402
from torch_bridge.wtconv.on_cpu import metal  # noqa: E402

SOURCE = metal_launch.SOURCE.read_text()
CPU = torch.device("cpu")
LOW = [torch.bfloat16, torch.float16]
ORDERS = [0, 1, 2, 3]
"""Forward, backward, and two shuffled ones."""
LARGE = [
    # Several squares along each axis, of either size; even kernels, and the largest.
    Case((70, 37), 5, 5, batch=(1,), channels=2),
    Case((33, 40), 2, 4, "float16", batch=(1,), channels=2),
    Case((37, 34), 2, 5, "bfloat16", batch=(1,), channels=1),
    Case((20, 35), 1, 9, batch=(1,), channels=2),
    Case((16, 3), 3, 8, batch=(3,), channels=1),
    Case((18, 17), 1, 1, batch=(1,), channels=1),
]
IMAGES = [
    *(
        case
        for case in haar_cases.CASES
        if case.ndim == 2 and case.wavelet == "haar" and 1 <= case.level <= 5
        if case.dtype != "float64" and 0 not in case.batch
    ),
    haar_cases.Case((70, 37), 5, batch=(1,)),
    haar_cases.Case((34, 21), 3, dtype="bfloat16", batch=(1,)),
    haar_cases.Case((1, 2), 2, dtype="bfloat16", channels=1),
]


@pytest.fixture(scope="module")
def emulated():
    """Skips where nothing runs the source."""
    if metal.unavailable() is not None:
        pytest.skip(metal.unavailable())


@pytest.fixture
def apple():
    if not torch.backends.mps.is_available():
        pytest.skip("needs an Apple GPU")
    return torch.device("mps")


def results(case, memory_format=torch.contiguous_format):
    return check.layer_results("metal", CPU, memory_format, case)


def failures(cases, compute):
    """The failures of cases, without those that are not taken."""
    plain = partial(check.layer_results, "eager", CPU, torch.contiguous_format)
    refusal = partial(check._refusal, "metal", None, CPU)
    rows = list(conformance.run([conformance.Backend("metal", cases, refusal, compute)], plain))
    ran = [row for row in rows if row["status"] != "skip"]
    return len(ran), [(row["case"], row["reason"]) for row in ran if row["status"] == "fail"]


def assert_every_case(name, device, more=()):
    """A backend of `check` computes what its kernels are made for, and other cases."""
    (backend,) = (backend for backend in check.backends(device) if backend.name == name)
    plain = partial(check.layer_results, "eager", CPU, torch.contiguous_format)
    rows = list(conformance.run([backend._replace(cases=[*backend.cases, *more])], plain))
    assert [row for row in rows if row["status"] == "fail"] == []
    assert sum(row["status"] == "pass" for row in rows) >= 15 + len(more)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metal on CPU", "metal on CPU channels-last"])
def test_check_computes_every_case(emulated, name):
    assert_every_case(name, CPU)


@pytest.mark.parametrize(
    ("order", "cases"),
    [
        pytest.param(1, HARD[1:9], marks=pytest.mark.wide),
        pytest.param(2, CASES, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_orders(emulated, order, cases):
    with metal.emulated(order=order):
        ran, failed = failures(cases, results)
    assert failed == [] and ran >= min(len(cases), 12)


@pytest.mark.parametrize(
    ("memory_format", "sums", "cases"),
    [
        pytest.param(torch.contiguous_format, 512, LARGE, marks=pytest.mark.slow),
        # Not the largest, nor what only has other numbers of taps.
        pytest.param(torch.channels_last, 1, LARGE[1:3], marks=pytest.mark.wide),
    ],
    ids=["contiguous", "channels last"],
)
def test_large_images(emulated, monkeypatch, memory_format, sums, cases):
    monkeypatch.setattr(metal_launch, "_SUMS", sums)
    with metal.emulated(order=ORDERS[3]):
        ran, failed = failures(cases, partial(results, memory_format=memory_format))
    assert failed == [] and ran == len(cases)


@pytest.mark.wide
def test_weight_gradients_are_the_same_in_every_order(emulated):
    x, dy = torch.randn(2, 3, 2, 18, 21)
    found = []
    for order in ORDERS:
        with metal.emulated(order=order):
            taps = metal_launch.weight_grad(x, dy, kernel_size=3, levels=2, wavelet="haar")
        found.append(torch.cat([tap.flatten() for tap in taps]))
    assert all(torch.equal(found[0], other) for other in found[1:])


def channels_first(value, case):
    """`[*batch, H, W, ..., C]` as `[N, C, ..., H, W]`."""
    flat = np.asarray(value).reshape(-1, *value.shape[len(case.batch) :])
    return flat.transpose(0, *range(flat.ndim - 1, 2, -1), 1, 2)


def check_cascades(case, device, memory_format=torch.contiguous_format):
    """Both cascades, which are each other's gradients, and a second derivative."""
    x, coefficients = case.drawn()
    x, low, *details = (value.astype(np.float64) for value in (x, *coefficients))
    image, *coeffs = (
        torch.from_numpy(channels_first(value, case).copy())
        .to(getattr(torch, case.dtype))
        .to(device)
        for value in (x, low, *reversed(details))
    )
    image = image.contiguous(memory_format=memory_format)
    for value in (image, *coeffs):
        value.requires_grad_()
    analysed = metal_launch.wavedec2(image, case.level)
    synthesised = metal_launch.waverec2(coeffs, shape=case.spatial)
    (dimage,) = torch.autograd.grad(analysed, image, coeffs, create_graph=True)
    dcoeffs = torch.autograd.grad(synthesised, coeffs, image)
    second = torch.autograd.grad(dimage, coeffs, image)

    bands = oracle.wavedec(x, 2, case.level)
    bands = [bands[-1][..., 0, :], *(level[..., 1:, :] for level in reversed(bands))]
    full = [np.concatenate([0 * d[..., :1, :], d], -2) for d in details]
    full[-1][..., 0, :] = low
    whole = oracle.waverec(full, 2, case.spatial)
    for found in (analysed, dcoeffs, second):
        assert_close(case, found, bands)
    assert_close(case, [synthesised, dimage], [whole, whole])


def assert_close(case, found, want):
    # Rounded once, from float32.
    bound = 1e-5 if case.dtype == "float32" else 2 * torch.finfo(getattr(torch, case.dtype)).eps
    for got, value in zip(found, want, strict=True):
        value = channels_first(value, case)
        assert str(got.dtype) == f"torch.{case.dtype}" and tuple(got.shape) == value.shape
        assert conformance.worst(got.detach().cpu().double(), value) <= bound


def check_rounded_once(dtype, device, compute, *values):
    """Results of images in low precision are those of float32, rounded."""
    values = [value.to(dtype).to(device) for value in values]
    for got, value in zip(
        compute(*values), compute(*(value.float() for value in values)), strict=True
    ):
        want = value.to(got.dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def cascades(x, *coeffs):
    """Both cascades, of images of any size and of coefficients of images of 18 by 19."""
    return [*metal_launch.wavedec2(x, 2), metal_launch.waverec2(coeffs, shape=(18, 19))]


def check_cascades_rounded_once(dtype, device):
    torch.manual_seed(0)
    coeffs = (torch.randn(1, 2, *shape) for shape in [(5, 5), (3, 5, 5), (3, 9, 10)])
    check_rounded_once(dtype, device, cascades, torch.randn(1, 2, 18, 19), *coeffs)


def check_convolutions_rounded_once(dtype):
    """On the CPU: a GPU's compiler may round a product and its sum at once, or not."""
    torch.manual_seed(0)
    taps, bias = [torch.randn(rows, 1, 3, 3) for rows in (2, 8, 8)], torch.randn(2)

    def compute(x, dy):
        return [
            metal_launch.forward(x, taps, bias, wavelet="haar", transpose=False),
            metal_launch.forward(dy, taps, None, wavelet="haar", transpose=True),
            *metal_launch.weight_grad(x, dy, kernel_size=3, levels=2, wavelet="haar"),
        ]

    check_rounded_once(dtype, CPU, compute, *torch.randn(2, 1, 2, 18, 19))


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.name)
def test_cascades(emulated, case):
    for order in ORDERS[:3]:
        with metal.emulated(order=order):
            check_cascades(case, CPU)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_rounded_once(emulated, dtype):
    with metal.emulated(order=ORDERS[2]):
        check_cascades_rounded_once(dtype, CPU)
        check_convolutions_rounded_once(dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_number_of_low_precision(emulated, dtype):
    """Zeros, infinities, NaNs and the smallest numbers among them."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    with metal.emulated():
        check_rounded_once(
            dtype, CPU, partial(metal_launch.wavedec2, level=1), numbers.reshape(1, 1, 256, 256)
        )


def test_a_cascade_of_strided_images(emulated):
    with metal.emulated():
        check_cascades(haar_cases.Case((6, 9), 2), CPU, torch.channels_last)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _emulated(self, emulated):
        with metal.emulated():
            yield

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"dtype": torch.float64}, "float64, float32, bfloat16, float16 alone"),
            ({"kernel_size": 11}, "kernels of 11, up to 9"),
            ({"levels": 0}, "0 levels, 1 to 5"),
            ({"levels": 6}, "6 levels, 1 to 5"),
            ({"wavelet": "db2"}, "wavelet 'db2', 'haar' alone"),
            ({"shape": (1, 2, 8)}, "1-D signals, 2-D alone"),
            ({"shape": (1, 2, 2**15, 2**15)}, "too large"),
        ],
        ids=str,
    )
    def test_says_why_and_mps_falls_to_eager(self, change, reason):
        call = dict(shape=(1, 2, 8, 8), dtype=torch.float32, kernel_size=5, levels=1, wavelet="db1")
        assert ops.pick(None, torch.device("mps"), **call) == ("metal else",) * 2
        with pytest.raises(NotImplementedError, match=f"metal: does not take .*{reason}"):
            ops.pick("metal", torch.device("mps"), **call | change)
        assert ops.pick(None, torch.device("mps"), **call | change) == ("eager else",) * 2

    def test_of_the_cascades(self):
        x = torch.ones(1, 2, 4, 4)
        with pytest.raises(NotImplementedError, match="6 levels, 1 to 5"):
            metal_launch.wavedec2(x, 6)
        with pytest.raises(ValueError, match=r"x has shape \(1, 2, 4\), expected \(N, C, H, W\)"):
            metal_launch.wavedec2(x[..., 0])
        low, details = metal_launch.wavedec2(x)
        with pytest.raises(ValueError, match=r"coeffs\[1\] is \(1, 2, 3, 2, 2\) torch.*, exp"):
            metal_launch.waverec2([low, details], shape=(4, 5))
        with pytest.raises(ValueError, match=r"coeffs\[0\] has shape"):
            metal_launch.waverec2([low[..., :1], details])
        with pytest.raises(ValueError, match="one array"):
            metal_launch.waverec2([low])


class TestBeforeMetal31:
    """macOS 13, whose compiler has no bfloat16."""

    @pytest.fixture(autouse=True)
    def _emulated(self, emulated):
        with metal.emulated(version=300):
            yield

    def test_bfloat16_is_refused(self):
        reason = "does not take bfloat16, which needs Metal 3.1: macOS 14 or newer"
        with pytest.raises(NotImplementedError, match=f"{reason}$"):
            metal_launch.wavedec2(torch.ones(1, 2, 4, 4, dtype=torch.bfloat16))
        call = (torch.device("mps"), (1, 2, 7, 8), torch.bfloat16, 5, 1, "db1")
        with pytest.raises(NotImplementedError, match=f"metal: {reason}"):
            ops.pick("metal", *call)
        assert ops.pick(None, *call) == ("eager else",) * 2

    def test_the_rest_runs(self):
        library = metal_launch.library(None, 0)
        assert not hasattr(library, "analysis_bfloat16") and hasattr(library, "analysis_float16")
        check_cascades(haar_cases.Case((6, 9), 2, dtype="float16"), CPU)


@pytest.mark.parametrize(
    ("available", "newer", "has"), [(False, None, False), (True, False, False), (True, True, True)]
)
def test_bfloat16_comes_with_macos_14(monkeypatch, available, newer, has):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda *version: {(14, 0): newer}[version]
    )
    assert metal_launch.has_bfloat16() is has
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M1")
    case = Case((4, 4), 1, 3, "bfloat16")
    refused = check._refusal("eager", None, torch.device("mps"), case)
    assert refused == (None if has else "MPS has bfloat16 from macOS 14 on")


def test_pixels_too_far_apart_come_nearer():
    x = torch.empty_strided((1, 1, 2, 2), (1, 1, 2**31, 1), device="meta")
    assert metal_launch._near(x).stride() == (4, 4, 2, 1)
    assert metal_launch._near(x[:, :, :1]).stride(2) == 2**31


def test_needs_an_apple_gpu():
    layer = torch_bridge.WTConv2d(2, 2, 3, device="cpu", implementation="metal")
    with pytest.raises(NotImplementedError, match="metal: needs an Apple GPU, this is cpu"):
        layer(torch.ones(1, 2, 4, 4))


def changed(old, new):
    """The source with a fault at its one place."""
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


class TestPlantedFaults:
    """A fault is caught where some order of the threads fails a check."""

    SMALL = Case((18, 19), 2, 3, channels=2)
    EVEN = Case((6, 7), 2, 4, channels=1)
    LOW = SMALL._replace(dtype="bfloat16")
    IMAGE = haar_cases.Case((40, 33), 3, channels=1)

    @pytest.fixture(autouse=True)
    def _emulated(self, emulated, monkeypatch):
        # So that each threadgroup of a weight gradient treats several squares.
        monkeypatch.setattr(metal_launch, "_SUMS", 1)

    def caught(self, case, **fault):
        for order in ORDERS:
            with metal.emulated(order=order, **fault):
                # What does not compile is no fault that a check finds.
                metal_launch.library(None, 0)
                metal_launch.library(case.kernel_size, 8)
                try:
                    check_cascades(self.IMAGE._replace(dtype=case.dtype), CPU)
                    if case == self.LOW and order == 0:
                        check_cascades_rounded_once(torch.bfloat16, CPU)
                        check_convolutions_rounded_once(torch.bfloat16)
                    _, failed = failures([case], results)
                except (AssertionError, RuntimeError, TypeError):
                    return True
                if failed:
                    return True
        return False

    def test_without_one_nothing_is_caught(self):
        assert not any(map(self.caught, (self.SMALL, self.EVEN, self.LOW)))

    @pytest.mark.parametrize("which", range(1, SOURCE.count("threadgroup_barrier(") + 1))
    def test_a_removed_barrier(self, which):
        assert self.caught(self.SMALL, without=which)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("above - below, left + right", "left + right, above - below"),
            *(
                pytest.param(*fault, marks=pytest.mark.wide)
                for fault in (
                    ("int(sizes.before)", "(K - 1) / 2"),
                    ("if (sizes.below)", "if (false)"),
                )
            ),
            *(
                pytest.param(*fault, marks=pytest.mark.slow)
                for fault in (
                    ("row >= 0 && ", ""),
                    ("column >= 0 && column < size.y", "column >= 0"),
                    ("(size + 1) / 2", "size / 2"),
                    ("row < size.x && column >= 0", "column >= 0"),
                    ("column >= 0 && ", ""),
                    ("BASE && sizes.bias", "false"),
                    ("row < 2 * TILE", "row < TILE"),
                )
            ),
        ],
    )
    def test_a_changed_source(self, old, new):
        case = self.EVEN if "before" in old else self.SMALL
        assert self.caught(case, source=changed(old, new))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("first_level_bfloat16, bfloat, true", "first_level_bfloat16, bfloat, false"),
            ("first_weights_bfloat16, bfloat, true", "first_weights_bfloat16, bfloat, false"),
            ("low_bands_bfloat16, bfloat, float", "low_bands_bfloat16, bfloat, bfloat"),
            # Sums that are rounded on their way.
            ("low[row][column] = bands.x", "low[row][column] = float(T(bands.x))"),
            (
                "low[2 * row][2 * column] = values.x",
                "low[2 * row][2 * column] = float(T(values.x))",
            ),
            ("float low = bands[0][r]", "float low = float(T(bands[0][r]))"),
            ("+ i) * K + j] = found[j]", "+ i) * K + j] = float(T(found[j]))"),
        ],
    )
    def test_a_changed_source_of_bfloat16(self, old, new):
        assert self.caught(self.LOW, source=changed(old, new))


SANITIZED = """
import sys, torch
from torch_bridge.wtconv.on_cpu import metal
from torch_bridge.wtconv import metal as metal_launch
source = metal_launch.SOURCE.read_text()
for text in source, source.replace(*sys.argv[1:]):
    with metal.emulated(text, flags=["-O0", "-fsanitize=address"]):
        x, dy = torch.randn(2, 2, 1, 9, 7)
        metal_launch.waverec2(metal_launch.wavedec2(x, 2), shape=(9, 7))
        taps = [torch.randn(1, 1, 4, 4), torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4)]
        for transpose in (False, True):
            metal_launch.forward(x, taps, torch.randn(1), wavelet="haar", transpose=transpose)
        metal_launch.weight_grad(x, dy, kernel_size=4, levels=2, wavelet="haar")
    print("clean", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if (row < size.x && column < size.y) plane", "plane"),
        ("SIDE = TILE + K - 1", "SIDE = TILE + K - 2"),
    ],
)
def test_under_address_sanitizer(emulated, old, new):
    """The source does not; each thread of the changed one reads or writes outside of its array."""
    assert SOURCE.count(old) == 1
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libstdc++")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("g++ has no AddressSanitizer")
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, old, new],
        env=os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "clean\n", done.stderr
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr


HEADER = Path(__file__).with_name("metal_as_opencl.h")


def address_space_errors(source, defines):
    """Runs clang over the source, read as C++ for OpenCL."""
    source = source.replace("#include <metal_stdlib>", "")
    source = re.sub(r"\[\[kernel, [^\]]*\]\]", "__kernel", source)
    extensions = "-all,+cl_khr_fp16,+__cl_clang_non_portable_kernel_param_types"
    command = ["clang-19", "--target=spir64", "-x", "cl", "-cl-std=clc++2021", "-fsyntax-only"]
    for option in (f"-cl-ext={extensions}", "-finclude-default-header"):
        command += ["-Xclang", option]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-attributes", "-include", str(HEADER)]
    defines = {"__METAL_VERSION__": 310, **defines}
    command += [f"-D{name}={value}" for name, value in defines.items()]
    return subprocess.run([*command, "-"], input=source, capture_output=True, text=True).stderr


LEVEL = {"KERNEL_SIZE": 5, "TILE": 16, "ROWS": 2, "SLICES": 12}


@pytest.mark.skipif(
    not shutil.which("clang-19"), reason="needs clang-19, whose OpenCL has Metal's address spaces"
)
class TestAddressSpaces:
    @pytest.mark.parametrize("defines", [{}, LEVEL], ids=["cascades", "level"])
    def test_fit(self, defines):
        assert address_space_errors(SOURCE, defines) == ""

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (
                "float read_pixel(device const T* plane",
                "float read_pixel(threadgroup const T* plane",
            ),
            ("plane_strides(constant Planes& strides)", "plane_strides(Planes& strides)"),
            ("threadgroup float (&weights)[5 * K * K]", "device float (&weights)[5 * K * K]"),
            ("    threadgroup float weights[5 * K * K];", "    float weights[5 * K * K];"),
            ("  const int channel = group.z", "  sizes.below = 0;\n  const int channel = group.z"),
            (
                "inline void store_block(device T* plane",
                "inline void store_block(device const T* plane",
            ),
        ],
    )
    def test_a_changed_one_does_not(self, old, new):
        assert SOURCE.count(old) == 1
        assert "error:" in address_space_errors(SOURCE.replace(old, new), LEVEL)


def test_every_pointer_has_an_address_space():
    """In templates clang finds one by itself, Metal does not."""
    types = "T|O|float|Planes|Cascade|Level|Weights"
    found = re.findall(rf"(\w+)( const)? (?:{types})(?:\*| ?\(?&)", SOURCE)
    assert len(found) > 70
    assert {space for space, _ in found} == {"device", "constant", "threadgroup"}


@pytest.mark.mps
@pytest.mark.parametrize("name", ["metal", "metal channels-last"])
def test_every_case_on_an_apple_gpu(apple, name):
    assert_every_case(name, apple, LARGE)


@pytest.mark.mps
@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.name)
def test_cascades_on_an_apple_gpu(apple, case):
    if case.dtype == "bfloat16" and not metal_launch.has_bfloat16():
        pytest.skip("needs macOS 14")
    check_cascades(case, apple)


@pytest.mark.mps
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_rounded_once_on_an_apple_gpu(apple, dtype):
    if dtype == torch.bfloat16 and not metal_launch.has_bfloat16():
        pytest.skip("needs macOS 14")
    check_cascades_rounded_once(dtype, apple)


@pytest.mark.mps
def test_gradients_on_an_apple_gpu_are_bitwise_reproducible(apple):
    x, dy = torch.randn(2, 16, 24, 57, 60, device=apple)
    found = [
        metal_launch.weight_grad(x, dy, kernel_size=5, levels=3, wavelet="haar") for _ in range(3)
    ]
    assert all(all(map(torch.equal, found[0], again)) for again in found[1:])


@pytest.mark.mps
def test_the_layer_on_an_apple_gpu_takes_these_kernels(apple):
    layer = torch_bridge.WTConv2d(4, 4, wt_levels=2)
    assert layer.device.type == "mps"
    call = ((2, 4, 9, 9), torch.float32, 5, 2, "db1")
    assert ops.pick(None, torch.device("mps"), *call) == ("metal else",) * 2
    layer(torch.randn(2, 4, 9, 9, device=apple)).sum().backward()
