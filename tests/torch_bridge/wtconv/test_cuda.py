"""The CUDA kernels: run on the CPU by fibers, in several orders of threads, with faults planted."""

import copy
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels.common import conformance  # noqa: E402
from pallas_kernels.common.cuda import Device, source_text  # noqa: E402
from pallas_kernels.common.on_cpu.cuda import HOPPER  # noqa: E402
from pallas_kernels.dispatch import tuning  # noqa: E402
from pallas_kernels.wtconv import cuda_launches  # noqa: E402
from pallas_kernels.wtconv.cases import CASES, Case  # noqa: E402
from pallas_kernels.wtconv.cuda_launches import Images  # noqa: E402
from torch_bridge import check  # noqa: E402
from torch_bridge.runtime import calls  # noqa: E402
from torch_bridge.wtconv import cuda as cuda_launch  # noqa: E402
from torch_bridge.wtconv import ops, scaling  # noqa: E402
from torch_bridge.wtconv.on_cpu import cuda  # noqa: E402

CPU = torch.device("cpu")
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ON_CPU = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
SMALL = Device(shared=50000, multiprocessors=1)
"""On which images are cut into tiles."""
ONE = Device(shared=232448, multiprocessors=1)
"""On which segments of signals have several blocks."""
TILED = (
    Case((72, 61), 3, 5, batch=(1,), channels=2),
    Case((40, 75), 5, 3, batch=(1,), channels=4),
    Case((33, 36), 1, 1, "bfloat16", batch=(2,), channels=9),
    Case((36, 30), 2, 9, batch=(1,), channels=1),
)
WHOLE = (
    Case((13, 12), 5, 9, "float16", batch=(3,), channels=12),
    Case((6, 5), 1, 9, batch=(1,)),
    # Several planes a block, and one of them alone.
    Case((8, 9), 2, 5, batch=(33,), channels=2),
)


def taken(case):
    """Whether the kernels are made for a case; the others are refused, which has its own test."""
    if case.ndim != 2 or 0 in case.batch or case.stride > 1 or case.strided:
        return False
    return (
        case.wavelet == "haar"
        and case.kernel_size % 2
        and 0 < case.levels < 6
        and (case.dtype != "float64")
    )


STREAMED = Case((9, 10), 2, 3, channels=20)
"""Level by level where channels are last, in float32."""
EMULATED = [
    (device, case)
    for device, cases in ((HOPPER, (*filter(taken, CASES), *WHOLE)), (SMALL, TILED))
    for case in cases
]
"""Every case is run in one memory format, every other one in the other; in both if slow."""
# What others have too, but for their numbers of taps and levels.
WIDE = {
    "b33-8x9-c2-l2-k5-float32",
    "b2-17x6-c3-l3-k5-float32-nobias",
    "b2-2x3-c3-l2-k3-float32",
}
# What the wide ones have too.
SLOW = {
    "b2-33x36-c9-l1-k1-bfloat16",
    "b-9x6-c3-l2-k3-float32",
    "b2-2x3-c3-l5-k5-float16",
    "b1-36x30-c1-l2-k9-float32",
    "b1-6x5-c100-l1-k5-float32",
    "b2x3-6x9-c4-l1-k5-float32",
    "b1-6x5-c3-l1-k9-float32",
    "b2-14x14-c3-l2-k5-float32",
    "b2-7x7-c3-l1-k1-bfloat16",
    "b2-28x28-c3-l3-k3-float32",
    "b2-28x28-c3-l4-k5-float32",
    "b1-40x75-c4-l5-k3-float32",
}


def marks(case, other):
    """Those of a case in one memory format, and in the other."""
    if case.name in SLOW or other:
        return [pytest.mark.slow]
    return [pytest.mark.wide] * (case.name in WIDE)


def assert_oracle(got, case):
    plain = partial(check.layer_results, "eager", CPU, torch.contiguous_format)
    want, allowed = conformance.expected(case), conformance.bounds(case, plain)
    for name, value in got.items():
        # Not "worst > allowed": NaN is never more.
        assert conformance.worst(value, want[name]) <= allowed[name], name


@ON_CPU
@pytest.mark.parametrize(
    ("device", "case", "memory_format"),
    [
        pytest.param(
            *(device, case, memory_format),
            id=f"{case.name}-{name}",
            marks=marks(case, (i + j) % 2),
        )
        for i, (device, case) in enumerate(EMULATED)
        for j, (name, memory_format) in enumerate(FORMATS.items())
    ],
)
def test_the_kernels_are_the_oracles_in_every_order_of_threads(device, case, memory_format):
    with cuda.emulated(device) as launcher:
        first = check.layer_results("cuda", CPU, memory_format, case)
        assert_oracle(first, case)
        for launcher.order in (1, 2):
            again = check.layer_results("cuda", CPU, memory_format, case)
            assert all(np.array_equal(first[name], again[name]) for name in first)


@ON_CPU
def test_levels_of_16_bits_share_the_memory_of_the_output():
    case = Case((9, 10), 2, 3, "bfloat16", channels=40)
    with cuda.emulated(Device(shared=66000, multiprocessors=1), order=1):
        assert_oracle(check.layer_results("cuda", CPU, torch.channels_last, case), case)


@ON_CPU
@pytest.mark.parametrize("boxes", [True, pytest.param(False, marks=pytest.mark.wide)])
def test_float32_goes_level_by_level_where_channels_are_last(boxes, monkeypatch):
    for name in ("forward", "weight_grad"):
        monkeypatch.setattr(cuda_launches, name, None)
    monkeypatch.setattr(cuda_launch, "_WORTH_LAUNCHES", 1)
    with cuda.emulated(HOPPER._replace(multiprocessors=3, boxes=boxes)):
        got = check.layer_results("cuda", CPU, torch.channels_last, STREAMED)
    assert_oracle(got, STREAMED)


@ON_CPU
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(size, marks=pytest.mark.slow if size == {"resident": 1} else pytest.mark.wide)
        for size in cuda_launches.search_space()[1:]
    ],
    ids=str,
)
def test_other_sizes_of_blocks_are_the_oracles(size, monkeypatch):
    monkeypatch.setattr(cuda_launch, "search_space", lambda direction, problem: [size])
    case, device = Case((72, 61), 2, 3, batch=(1,), channels=4), Device(40000, 1)
    with cuda.emulated(device), tuning("search"):
        assert_oracle(check.layer_results("cuda", CPU, torch.channels_last, case), case)
    images = Images((1, 72, 61, 4), "float32")
    plan = partial(cuda_launches.planned, "forward", images, 3, 2, device)
    assert plan(**size) != plan()


SOURCE = source_text(cuda_launches.SOURCE)
BARRIER = "__syncthreads();"
FAULTS = {
    f"barrier {i}": (match.start(), match.end(), "")
    for i, match in enumerate(re.finditer(re.escape(BARRIER), SOURCE))
}
FAULTS |= {
    name: (SOURCE.index(old), SOURCE.index(old) + len(old), new)
    for name, old, new in (
        ("a bound of the rows of x", "row + i < bottom", "true"),
        ("a bound of the columns of x", "column + j < right", "true"),
        ("a subband of another sign", "bands[1].at[j] = sum0 -", "bands[1].at[j] = -sum0 +"),
        ("swapped subbands", "= bands[s];", "= bands[s < 3 ? 3 - s : 3];"),
        ("taps not transposed", "transpose ? KK - 1 - tap : tap", "tap"),
        ("dy's halo counted twice", "block, 0, zeros, other", "block, 2 * halo[1], zeros, other"),
    )
}


ALWAYS = ("barrier 0",)
"""A fault of order; what is computed wrongly the oracle sees."""
THEN = ("taps not transposed", "a bound of the rows of x")
"""One of the gradient of x and one of a bound: the wide suite's."""


def planted(name):
    """A fault with its mark."""
    mark = pytest.mark.wide if name in THEN else pytest.mark.slow
    return pytest.param(name, marks=[] if name in ALWAYS else [mark])


@ON_CPU
@pytest.mark.parametrize(
    "fault",
    list(map(planted, FAULTS)),
)
def test_a_planted_fault_is_caught(fault):
    start, end, new = FAULTS[fault]
    faulty = SOURCE[:start] + new + SOURCE[end:]
    runs = [
        (HOPPER, Case((9, 7), 3, 3, batch=(3,), channels=2)),
        (SMALL, Case((50, 34), 2, 5, batch=(2,), channels=9)),
    ]

    def caught(device, case):
        with cuda.emulated(device, source=faulty) as launcher:
            for launcher.order in (0, 1, 2):
                try:
                    assert_oracle(
                        check.layer_results("cuda", CPU, torch.contiguous_format, case), case
                    )
                except AssertionError:
                    return True
        return False

    # What the first one finds need not be built for the second.
    assert any(caught(*run) for run in runs)


ADDRESSES = """
import sys
from contextlib import nullcontext
import torch
from pallas_kernels.common.cuda import Device, source_text
from pallas_kernels.wtconv.cuda_launches import SOURCE
from torch_bridge.wtconv.on_cpu import cuda
from torch_bridge.wtconv import cuda as cuda_launch
torch.manual_seed(0)
folder, old, new = sys.argv[1:]
# What kernels include is read once. To optimise them takes longer than they run.
cuda.TemporaryDirectory = lambda: nullcontext(folder)
flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O0")
x, dy = torch.randn(2, 1, 3, 21, 18)
taps = [torch.randn(3 * bands, 1, 5, 5) for bands in (1, 4, 4)]
whole = (232448, torch.contiguous_format), (40000, torch.channels_last)
for text, runs in (None, whole), (source_text(SOURCE).replace(old, new), whole[:1]):
    for shared, memory_format in runs:
        with cuda.emulated(Device(shared, 1), source=text, flags=flags):
            image, other = (t.contiguous(memory_format=memory_format) for t in (x, dy))
            cuda_launch.forward(image, taps, None, wavelet="haar", transpose=False)
            if memory_format == torch.channels_last:
                cuda_launch.weight_grad(image, other, kernel_size=5, levels=2, wavelet="haar")
    print("clean", flush=True)
"""


@ON_CPU
@pytest.mark.wide
def test_no_address_is_out_of_bounds_and_a_removed_bound_is_found(tmp_path):
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("asan", "ubsan", "stdc++")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    fault = "if (top + i >= height) break;", ""
    command = [sys.executable, "-c", ADDRESSES, str(tmp_path), *fault]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "clean\n", done.stderr
    assert "heap-buffer-overflow" in done.stderr and "wtconv_forward" in done.stderr


@ON_CPU
@pytest.mark.wide
@pytest.mark.parametrize(
    ("device", "channels", "length", "channels_last"),
    [
        (HOPPER, 4, 85, False),
        (HOPPER, 4, 85, True),
        # Several segments, and more channels than a warp has.
        (ONE, 36, 777, False),
        (ONE, 36, 840, False),
    ],
)
def test_signals_of_either_memory_format(device, channels, length, channels_last):
    torch.manual_seed(0)
    layers = {
        name: torch_bridge.WTConv1d(channels, channels, 5, wt_levels=3, implementation=name)
        for name in ("eager", "cuda")
    }
    layers["cuda"].load_state_dict(layers["eager"].state_dict())
    x, dy = torch.randn(2, 2, channels, length)
    if channels_last:
        x, dy = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (x, dy))
    found = []
    with cuda.emulated(device):
        for layer in layers.values():
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            found.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    assert y.stride() == x.stride()
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_slice_of_a_signal_keeps_its_memory_format():
    x = torch.zeros(2, 4, 9)
    last = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert cuda_launch._signals(last[:, :, 1:]).channels_last
    assert not cuda_launch._signals(x[:, :, 1:]).channels_last


REFUSED = {
    "3-D signals, 1-D and 2-D alone": ((2, 4, 8, 8, 8), torch.float32, 3, 1, "haar"),
    "float64": ((2, 4, 8, 8), torch.float64, 3, 1, "haar"),
    "'db2'": ((2, 4, 8, 8), torch.float32, 3, 1, "db2"),
    "kernels of 4": ((2, 4, 8, 8), torch.float32, 4, 1, "haar"),
    "kernels of 11": ((2, 4, 8, 8), torch.float32, 11, 1, "haar"),
    "0 levels": ((2, 4, 8, 8), torch.float32, 3, 0, "haar"),
    "6 levels": ((2, 4, 8, 8), torch.float32, 3, 6, "haar"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernels_do_not_do_is_refused(reason):
    with cuda.emulated(), pytest.raises(NotImplementedError, match=f"does not take.*{reason}"):
        ops.pick("cuda", torch.device("cpu"), *REFUSED[reason])


def test_it_is_the_first_choice_of_nvidia_gpus():
    with cuda.emulated():
        problem = (2, 4, 8, 8), torch.bfloat16, 3, 1
        assert ops.pick(None, torch.device("cuda"), *problem, "haar") == ("cuda else",) * 2
        assert ops.pick(None, torch.device("cuda"), *problem, "db2") == ("eager else",) * 2


def test_where_there_is_no_gpu_it_says_so():
    with pytest.raises(NotImplementedError, match="cuda: needs an NVIDIA GPU, this is cpu"):
        ops.pick("cuda", torch.device("cpu"), (2, 4, 8, 8), torch.float32, 3, 1, "haar")


@ON_CPU
def test_tensors_that_are_not_dense_or_not_aligned():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 8)
    taps = [torch.randn(3 * bands, 1, 3, 3) for bands in (1, 4, 4)]
    call = partial(cuda_launch.forward, taps=taps, bias=None, wavelet="haar", transpose=False)
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    with cuda.emulated():
        want = call(x)
        for other in (shifted, x.transpose(2, 3).contiguous().transpose(2, 3), x.expand_as(x)):
            torch.testing.assert_close(call(other), want)


@ON_CPU
def test_the_biass_gradient_comes_with_those_of_the_taps(monkeypatch):
    """On tensor cores dy is summed on the way, so that PyTorch does not read it once more."""
    x = torch.randn(1, 8, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    x, dy = (each.contiguous(memory_format=torch.channels_last) for each in (x, x.cos()))

    def gradient(implementation):
        torch.manual_seed(0)
        options = {"device": CPU, "dtype": x.dtype, "implementation": implementation}
        layer = torch_bridge.WTConv2d(8, 8, 3, **options)
        layer(x).backward(dy)
        return layer.base_conv.bias.grad

    want = gradient("eager")
    monkeypatch.setattr(calls, "summed", None)
    with cuda.emulated():
        got = gradient("cuda")
    torch.testing.assert_close(got, want)
    with cuda.emulated(), pytest.raises(TypeError, match="NoneType"):
        x = x.contiguous()
        gradient("cuda")


def test_scales_are_left_to_the_kernels_of_what_goes_level_by_level(monkeypatch):
    """For every kind of strides, by what is known without data; of large images in float32 too."""
    image = torch.zeros(2, 4, 6, 5, dtype=torch.float16)
    last = image.contiguous(memory_format=torch.channels_last)
    expanded = last[:1].expand(3, -1, -1, -1)
    found = []
    wide = torch.zeros(1, 32, 2, 2).contiguous(memory_format=torch.channels_last)
    halves = (last, image, last[..., 1:], expanded, last[:, :1], last[:, :, :1, :1])
    for least, x in (*((1, x) for x in (*halves, last.float(), wide)), (1 << 22, wide)):
        monkeypatch.setattr(cuda_launch, "_WORTH_LAUNCHES", least)
        with cuda.emulated():
            images = cuda_launch._images(cuda_launch._dense(x))
            asked = images, 3, HOPPER
            found.append(cuda_launch._folds(*asked) or cuda_launch._streams(*asked))
            told = tuple(x.shape), x.stride(), x.dtype, 3, x.device
            assert cuda_launch.multiplies(*told) == found[-1]
    assert found == [True, *[False] * 6, True, False]


LAYERS = {
    "of 16 bits": torch.bfloat16,
    "of two dtypes": torch.bfloat16,
    "in autocast": torch.float32,
}
"""Layers whose images are of 16 bits, and the dtype of their kernels."""


@ON_CPU
@pytest.mark.parametrize(
    "which",
    ["of 16 bits", *(pytest.param(name, marks=pytest.mark.wide) for name in list(LAYERS)[1:])],
)
def test_kernels_multiply_by_the_scales_of_a_layer(which, monkeypatch):
    """PyTorch has no launch of its own for them, forward and backward, where channels are last."""
    torch.manual_seed(0)
    options = {"device": CPU, "dtype": LAYERS[which], "implementation": "cuda"}
    layer = torch_bridge.WTConv2d(8, 8, 3, **options)
    if which == "of two dtypes":
        layer.base_scale.float()
        layer.wavelet_scale.float()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    exact = copy.deepcopy(layer).double()
    exact.implementation = "eager"
    x, dy = torch.randn(2, 1, 8, 6, 5, dtype=torch.bfloat16)
    x, dy = (each.contiguous(memory_format=torch.channels_last) for each in (x, dy))

    def computed(layer, x):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16, enabled=which == "in autocast"):
            y = layer(leaf)
        found = torch.autograd.grad(y, inputs, dy.to(y.dtype))
        assert [each.dtype for each in found] == [each.dtype for each in inputs]
        return [y, *found]

    want = computed(exact, x.double())
    for name in ("folded", "gradients"):
        monkeypatch.setattr(scaling, name, None)
    with cuda.emulated():
        got = computed(layer, x)
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= 0.02 * other.abs().max()


@ON_CPU
@pytest.mark.wide
def test_second_derivatives_where_kernels_multiply_by_the_scales():
    torch.manual_seed(0)
    layer = torch_bridge.WTConv2d(4, 4, 3, device=CPU, implementation="cuda")
    exact = copy.deepcopy(layer)
    exact.implementation = "eager"
    x = torch.randn(1, 4, 6, 5).contiguous(memory_format=torch.channels_last)

    def second(layer, **autocast):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            y = layer(leaf)
        first = torch.autograd.grad(y.float().square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), inputs)

    want = second(exact, enabled=False)
    with cuda.emulated():
        got = second(layer)
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= 0.03 * other.abs().max()


@ON_CPU
@pytest.mark.slow
def test_a_program_leaves_scales_to_the_kernels():
    torch.manual_seed(0)
    layer = torch_bridge.WTConv2d(4, 4, 3, device=CPU, implementation="cuda", dtype=torch.float16)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float16)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    with cuda.emulated():
        for one, multiplied in (
            (x.contiguous(memory_format=torch.channels_last), False),
            (x, True),
        ):
            torch.compiler.reset()
            got = torch.compile(layer, backend=backend, fullgraph=True)(one)
            torch.testing.assert_close(got, layer(one))
            # What PyTorch multiplies is in the program.
            assert any("mul" in target for target in graphs[-1]) == multiplied
