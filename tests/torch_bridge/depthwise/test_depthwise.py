"""The depthwise convolution in PyTorch: the oracle's cases, CUDA kernels on the CPU, the layer."""

import re

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from pallas_kernels.common import conformance as rules  # noqa: E402
from pallas_kernels.common.cuda import Device  # noqa: E402
from pallas_kernels.common.on_cpu.cuda import HOPPER  # noqa: E402
from pallas_kernels.depthwise.cases import CASES, Case  # noqa: E402
from torch_bridge.depthwise import (  # noqa: E402
    DepthwiseConv2d,
    conformance,
    cuda,
    depthwise_conv2d,
    ops,
)
from torch_bridge.runtime import calls  # noqa: E402
from torch_bridge.wtconv.on_cpu.cuda import emulated, unavailable  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

CPU = torch.device("cpu")
ON_CPU = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
PLAIN = [case for case in CASES if case.n and conformance.refusal(case, "eager", CPU) is None]
KERNELS = {
    "boxes": (Case(2, 9, 10, 8, 5, "bfloat16"), HOPPER, torch.channels_last),
    "pieces": (Case(2, 6, 9, 5, 4, "float16"), Device(166912, 2, 80), torch.contiguous_format),
}


def assert_oracle(case, got):
    want, allowed = rules.expected(case), rules.bounds(case, conformance.baseline)
    # Not "worst > allowed": NaN is never more.
    errors = {name: rules.worst(got[name], want[name]) for name in want}
    assert {n: e for n, e in errors.items() if not e <= allowed[n]} == {}


@pytest.mark.wide
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_plain_pytorch_is_the_oracle(case):
    assert_oracle(case, conformance.computed(case, "eager"))


@ON_CPU
@pytest.mark.parametrize("way", ["boxes", pytest.param("pieces", marks=pytest.mark.slow)])
def test_the_kernels_on_the_cpu(way):
    case, device, memory_format = KERNELS[way]
    with emulated(device, cuda):
        assert_oracle(case, conformance.computed(case, "cuda", CPU, memory_format))


@ON_CPU
@pytest.mark.wide
def test_derivatives_of_derivatives_are_plain_pytorchs():
    x, dy = torch.randn(2, 2, 3, 8, 5, 6).bfloat16().unbind(0)[0].unbind(0)
    weight = torch.randn(8, 1, 3, 3).bfloat16()

    def second(implementation):
        leaves = [value.clone().requires_grad_() for value in (x, weight)]
        y = depthwise_conv2d(*leaves, implementation=implementation)
        first = torch.autograd.grad((y * dy).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g.float() ** 2).sum() for g in first), leaves)

    with emulated(HOPPER, cuda):
        got = second("cuda")
    for found, wanted in zip(got, second("eager"), strict=True):
        assert torch.allclose(found.float(), wanted.float(), atol=0.05 * float(wanted.std()))


def test_the_layer_is_pytorchs_with_its_state_dict():
    theirs = torch.nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)
    layer = DepthwiseConv2d(4, 3, stride=2, padding=1)
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 7, 8)
    assert torch.equal(layer(x), theirs(x))
    assert torch.equal(layer(x[0]), F.conv2d(x[0], theirs.weight, theirs.bias, 2, 1, 1, 4))


WRONG = {
    "weight: expected [C, 1, KH, KW] for x with C = 4": (torch.ones(4, 2, 3, 3), {}),
    "names ['cudnn'], but torch_depthwise has": (
        torch.ones(4, 1, 3, 3),
        {"implementation": "cudnn"},
    ),
}


@pytest.mark.parametrize("told", [True, False], ids=["sizes told", "sizes not told"])
def test_the_layer_compiles_without_a_graph_break(told, monkeypatch):
    if not told:
        # As in PyTorch 2.11.
        monkeypatch.setattr(calls, "tells_sizes", lambda: False)
    layer = DepthwiseConv2d(3, 3, stride=2, padding=1, device="cpu")
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for size in ((2, 3, 6, 5), (4, 3, 9, 7)):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    weight, keywords = WRONG[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        depthwise_conv2d(torch.ones(1, 4, 5, 5), weight, **keywords)


def test_what_the_kernels_refuse_is_said():
    with pytest.raises(NotImplementedError, match="cuda: needs an NVIDIA GPU"):
        depthwise_conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3), implementation="cuda")
    window = ops.window((3, 3), 2, 1, 1)
    with emulated(HOPPER, cuda), pytest.raises(NotImplementedError, match="strides of 2x2"):
        ops.pick("cuda", CPU, (1, 4, 5, 5), torch.float16, (3, 3), window)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_on_a_gpu(case, memory_format):
    device = torch.device("cuda", 0)
    reason = conformance.refusal(case, "cuda", device)
    if reason is None:
        assert_oracle(case, conformance.computed(case, "cuda", device, memory_format))
    else:
        assert "does not take" in reason or "PyTorch" in reason
