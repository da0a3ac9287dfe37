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
from pallas_kernels.haar import cases as haar_cases  # noqa: E402
from pallas_kernels.wtconv import checking  # noqa: E402
from pallas_kernels.wtconv.cases import CASES, Case  # noqa: E402
from torch_bridge import check, ops  # noqa: E402
from torch_bridge.backends import eager, metal_launch  # noqa: E402

metal = check.emulator("metal")
CPU = torch.device("cpu")
ORDERS = [0, 1, 2, 3]
"""Forward, backward, and two shuffled ones."""
LARGE = [
    # Several squares along each axis, of either size; even kernels, and the largest.
    Case((70, 37), 5, 5, batch=(1,), channels=2),
    Case((33, 40), 2, 4, "float16", batch=(1,), channels=2),
    Case((20, 35), 1, 9, batch=(1,), channels=2),
    Case((16, 3), 3, 8, batch=(3,), channels=1),
    Case((18, 17), 1, 1, batch=(1,), channels=1),
]
IMAGES = [
    *(
        case
        for case in haar_cases.CASES
        if case.ndim == 2 and case.wavelet == "haar" and 1 <= case.level <= 5
        if case.dtype in ("float32", "float16") and 0 not in case.batch
    ),
    haar_cases.Case((70, 37), 5, batch=(1,)),
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


def results(case, device=CPU, memory_format=torch.contiguous_format):
    return check.layer_results("metal", device, memory_format, case)


def failures(cases, compute):
    """What is wrong of cases, those that are not taken left out."""
    plain = partial(check.layer_results, "eager", CPU, torch.contiguous_format)
    refusal = partial(check._refusal, "metal", None, CPU)
    rows = list(checking.run([checking.Backend("metal", cases, refusal, compute)], plain))
    ran = [row for row in rows if row["status"] != "skip"]
    return len(ran), [(row["case"], row["reason"]) for row in ran if row["status"] == "fail"]


@pytest.mark.parametrize("order", ORDERS[:3])
def test_every_case(emulated, order):
    with metal.on_cpu(order):
        ran, failed = failures(CASES, results)
    assert failed == [] and ran >= 12


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_images(emulated, memory_format):
    with metal.on_cpu(ORDERS[3]):
        ran, failed = failures(LARGE, partial(results, memory_format=memory_format))
    assert failed == [] and ran == len(LARGE)


def test_weight_gradients_are_the_same_in_every_order(emulated):
    x, dy = torch.randn(2, 3, 2, 18, 21)
    found = []
    for order in ORDERS:
        with metal.on_cpu(order):
            found.append(metal_launch.weight_grad(x, dy, kernel_size=3, levels=2, wavelet="haar"))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def channels_first(value, case):
    """`[*batch, H, W, ..., C]` as `[N, C, ..., H, W]`."""
    flat = np.asarray(value).reshape(-1, *value.shape[len(case.batch) :])
    return flat.transpose(0, *range(flat.ndim - 1, 2, -1), 1, 2)


def check_cascades(case, device, memory_format=torch.contiguous_format):
    """Both cascades, which are each other's gradients, and a second derivative."""
    x, low, details = haar_cases.inputs(case)
    x, low, *details = (value.astype(case.dtype) for value in (x, low, *details))
    image, *coeffs = (
        torch.from_numpy(channels_first(value, case).copy()).to(device)
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
    for found, want in (*[(c, bands) for c in (analysed, dcoeffs, second)],):
        assert_close(case, found, want)
    assert_close(case, [synthesised, dimage], [whole, whole])


def assert_close(case, found, want):
    # Rounded once, from float32.
    bound = 1e-5 if case.dtype == "float32" else 4 * 2.0**-11
    for got, value in zip(found, want, strict=True):
        value = channels_first(value, case)
        assert str(got.dtype) == f"torch.{case.dtype}" and tuple(got.shape) == value.shape
        assert checking.worst(got.detach().cpu(), value) <= bound


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.name)
def test_cascades(emulated, case):
    for order in ORDERS[:3]:
        with metal.on_cpu(order):
            check_cascades(case, CPU)


def test_a_cascade_of_strided_images(emulated):
    with metal.on_cpu():
        check_cascades(haar_cases.Case((6, 9), 2), CPU, torch.channels_last)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _emulated(self, emulated):
        with metal.on_cpu():
            yield

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"dtype": torch.bfloat16}, "bfloat16, float32, float16 alone"),
            ({"dtype": torch.float64}, "float64, float32, float16 alone"),
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
        assert ops.pick(None, "mps", **call) == ("metal", "metal")
        with pytest.raises(NotImplementedError, match=f"metal: does not take .*{reason}"):
            ops.pick("metal", "mps", **call | change)
        assert ops.pick(None, "mps", **call | change) == ("eager", "eager")

    def test_of_the_cascades(self):
        x = torch.ones(1, 2, 4, 4)
        with pytest.raises(NotImplementedError, match="6 levels, 1 to 5"):
            metal_launch.wavedec2(x, 6)
        with pytest.raises(ValueError, match=r"\(1, 2, 4\), expected \(N, C, H, W\)"):
            metal_launch.wavedec2(x[..., 0])
        low, details = metal_launch.wavedec2(x)
        with pytest.raises(ValueError, match=r"coeffs\[1\] is \(1, 2, 3, 2, 2\) torch.float32, exp"):
            metal_launch.waverec2([low, details], shape=(4, 5))
        with pytest.raises(ValueError, match=r"coeffs\[0\] has shape"):
            metal_launch.waverec2([low[..., :1], details])
        with pytest.raises(ValueError, match="one array"):
            metal_launch.waverec2([low])


def test_needs_an_apple_gpu():
    layer = torch_bridge.WTConv2d(2, 2, 3, device="cpu", implementation="metal")
    with pytest.raises(NotImplementedError, match="metal: needs an Apple GPU, this is cpu"):
        layer(torch.ones(1, 2, 4, 4))
