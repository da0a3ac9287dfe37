"""The CUDA kernels compiled by NVRTC for every kind of GPU that they are made for; none is needed.

The tables keep the registers of a thread. A newer NVRTC may take a few more or less; what matters
is that nothing is spilled, and that as many blocks fit into a multiprocessor as were planned.
"""

import pytest
from helpers.cuda import gpu_of

from pallas_kernels.common import cuda_call, nvrtc
from pallas_kernels.common.cuda import source_text
from pallas_kernels.wtconv import (
    bands_launches,
    cuda_launches,
    folded_launches,
    line_launches,
    scaled_launches,
)
from pallas_kernels.wtconv.cuda_launches import Images
from pallas_kernels.wtconv.gradients_launches import Parameters, gradients
from pallas_kernels.wtconv.line_launches import Signals

pytest.importorskip("cuda.bindings.nvrtc", reason="the test extra has NVRTC for Linux alone")
cubins = pytest.importorskip("helpers.cubins", reason="what reads cubins comes with Triton")

REGISTERS = {
    "sm_75": {"forward": (79, 79), "weights": (124, 124)},
    "sm_80": {"forward": (72, 80), "weights": (120, 121)},
    "sm_86": {"forward": (79, 79), "weights": (122, 121)},
    "sm_89": {"forward": (79, 79), "weights": (122, 121)},
    "sm_90a": {"forward": (72, 88), "weights": (120, 120)},
    "sm_100a": {"forward": (71, 95), "weights": (129, 127)},
    "sm_120": {"forward": (80, 80), "weights": (128, 127)},
}
"""The registers of kernels of 5, two levels, small channels-last images, float32 and float16."""
FOLDED = {
    "sm_75": (246, 255, 168),
    "sm_80": (244, 255, 168),
    "sm_86": (244, 255, 168),
    "sm_89": (244, 255, 168),
    "sm_90a": (168, 168, 168),
    "sm_100a": (208, 245, 168),
    "sm_120": (240, 255, 168),
}
"""The registers on tensor cores, kernels of 5: forward, weights, levels in one launch."""
BANDS = {
    "sm_80": (254, 235, 196, 255, 202),
    "sm_86": (255, 235, 195, 255, 205),
    "sm_89": (255, 235, 195, 255, 205),
    "sm_90a": (168, 230, 194, 168, 198),
    "sm_100a": (244, 230, 208, 255, 205),
    "sm_120": (246, 230, 211, 255, 201),
}
"""The registers in float32, kernels of 5: levels 1, 2, deeper; gradients of level 1, of deeper."""
LINE = {
    "sm_75": ((229, 0), (202, 0)),
    "sm_80": ((168, 16), (168, 16)),
    "sm_86": ((168, 8), (206, 0)),
    "sm_89": ((168, 8), (206, 0)),
    "sm_90a": ((168, 8), (168, 16)),
    "sm_100a": ((168, 0), (168, 0)),
    "sm_120": ((168, 0), (202, 0)),
}
"""The registers of signals' kernels of 5, five levels, channels-last, bfloat16, and the bytes that
they spill: forward, weights. Where fewer than twelve warps fit into shared memory they are more."""
LINE_FIRST = {
    "sm_75": ((213, 0), (212, 0)),
    "sm_80": ((168, 0), (168, 0)),
    "sm_86": ((168, 0), (216, 0)),
    "sm_89": ((168, 0), (216, 0)),
    "sm_90a": ((168, 0), (168, 0)),
    "sm_100a": ((168, 0), (168, 0)),
    "sm_120": ((168, 0), (206, 0)),
}
"""The same channels-first, the more of even and odd lengths."""
SIGNALS = {
    "channels-last": Signals((32, 16384, 256), "bfloat16"),
    "channels-first": Signals((32, 16384, 256), "bfloat16", channels_last=False),
    "channels-first odd": Signals((32, 16383, 256), "bfloat16", channels_last=False),
}
SPILLED = 24
"""Bytes that weight gradients of 5 may spill where there are no boxes: 255 registers are all."""
MORE = 16
"""Registers that another version of NVRTC may take more."""


def device_of(arch, monkeypatch):
    digits = arch.removeprefix("sm_").rstrip("a")
    gpu_of(monkeypatch, f"{digits[:-1]}.{digits[-1]}")
    return cuda_call.device_properties()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "weights"])
@pytest.mark.parametrize("arch", REGISTERS)
def test_nothing_is_spilled_and_blocks_fit(arch, kernel, monkeypatch):
    device, source = device_of(arch, monkeypatch), source_text(cuda_launches.SOURCE)
    for dtype, most in zip(("float32", "float16"), REGISTERS[arch][kernel], strict=True):
        variant = cuda_launches.planned(kernel, Images((8, 28, 28, 32), dtype), 5, 2, device)
        registers, spilled = cubins.usage(nvrtc.compile_source(source, variant.macros(), arch))
        assert spilled == 0 and registers <= most + MORE
        assert registers * variant.threads * variant.blocks <= 65536
        assert variant.blocks * (variant.shared() + 1024) <= device.shared + 1024


@pytest.mark.slow
@pytest.mark.parametrize("arch", FOLDED)
def test_tensor_cores_have_registers_enough(arch, monkeypatch):
    device = device_of(arch, monkeypatch)._replace(boxes=arch in ("sm_90a", "sm_100a"))
    about = (8, 56, 56, 96), "float16", 5, device
    variants = [
        folded_launches.planned("forward", *about, below=True),
        folded_launches.planned("weights", *about),
        folded_launches.whole((8, 28, 28, 96), "float16", 5, 4, device, (8, 56, 56, 96), 28)
        or folded_launches.whole((8, 14, 14, 96), "float16", 5, 3, device, (8, 28, 28, 96), 14),
    ]
    variants[-1] = variants[-1]._replace(first=1, y_rows=56, y_columns=56)
    # Four blocks of a multiprocessor, whose registers barely suffice.
    variants.append(variants[-1]._replace(resident=4))
    for variant, most in zip(variants, (*FOLDED[arch], 128), strict=True):
        kernel = variant.compiled()
        code = nvrtc.compile_source(kernel.text(), dict(kernel.macros), arch)
        registers, spilled = cubins.usage(code)
        assert registers <= most + MORE and spilled <= {255: SPILLED, 128: 8}.get(most, 0)
        assert registers * kernel.threads * variant.resident <= 65536
        assert most == 128 or variant.resident * (kernel.shared + 1024) <= device.shared + 1024


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=pytest.mark.wide if arch == "sm_90a" else pytest.mark.slow)
        for arch in BANDS
    ],
)
def test_taps_and_sums_of_a_level_are_registers(arch, monkeypatch):
    device = device_of(arch, monkeypatch)._replace(boxes=arch == "sm_90a")
    shapes = [(8, side, side, 96) for side in (56, 28, 14)]
    levels = {"base": True, "below": 2}, {"halved": True, "lows": 2}, {"below": 1}
    planned = [
        bands_launches.planned((shape,), 5, device, **about)
        for shape, about in zip(shapes, levels, strict=True)
    ]
    planned += [
        bands_launches.planned_gradients((shape,), 5, device, base=base, lows=True)
        for shape, base in zip(shapes, (True, False), strict=False)
    ]
    for variant, most in zip(planned, BANDS[arch], strict=True):
        kernel = variant.compiled()
        code = nvrtc.compile_source(kernel.text(), dict(kernel.macros), arch)
        registers, spilled = cubins.usage(code)
        # A word or two around the loop, where a thread has no register more.
        assert spilled <= (8 if most == 255 else 0) and registers <= min(255, most + MORE)
        assert registers * kernel.threads <= 65536 and kernel.shared <= device.shared


@pytest.mark.slow
@pytest.mark.parametrize("signals", SIGNALS.values(), ids=SIGNALS)
@pytest.mark.parametrize("arch", LINE)
def test_a_signals_levels_have_registers_enough(arch, signals, monkeypatch):
    device = device_of(arch, monkeypatch)
    table = LINE if signals.channels_last else LINE_FIRST
    for name, (most, spills) in zip(("forward", "weights"), table[arch], strict=True):
        variant = line_launches.planned(name, signals, 5, 5, device)
        kernel = variant.compiled()
        code = nvrtc.compile_source(kernel.text(), dict(kernel.macros), arch)
        registers, spilled = cubins.usage(code)
        assert registers <= most + MORE and spilled <= spills + MORE
        assert registers * kernel.threads * variant.resident <= 65536


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=pytest.mark.wide if arch == "sm_90a" else pytest.mark.slow)
        for arch in FOLDED
    ],
)
def test_what_reads_and_ends_parameters_compiles_for_every_gpu(arch):
    """The fold of 16-bit taps, and the gradients of parameters in 16 bits and in float32."""
    kernels = []

    def launch(kernel, arguments, outputs, blocks):
        kernels.append(kernel)
        return [None] * len(outputs)

    found = [(None, 0, 1)] * 5
    for dtype in ("float16", "float32"):
        parameters = Parameters([None] * 6, [None] * 6, None, dtype)
        folded_launches.folded(parameters, 96, "float16", 7, launch, False)
        scaled_launches.scaled(parameters, 96, 5, launch, channels_last=False)
        for backward in (False, True):
            ways = {"channels_last": True, "backward": backward}
            scaled_launches.scaled(parameters, 96, 5, launch, **ways)
        scaled_launches.scale_sums([None] * 6, None, parameters, 96, 5, launch)
        gradients(found, 96, 7, launch, False, parameters)
    gradients(found, 96, 7, launch, True)
    for kernel in kernels:
        code = nvrtc.compile_source(kernel.text(), dict(kernel.macros), arch)
        registers, spilled = cubins.usage(code)
        assert spilled == 0 and registers <= 48 + MORE
