"""Kernels that do not compile or load: another computes, or a named one tells the log."""

import warnings

import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels.common.cuda import Device, source_text  # noqa: E402
from pallas_kernels.common.refusals import KernelError  # noqa: E402
from pallas_kernels.dispatch import forget  # noqa: E402
from pallas_kernels.wtconv import cuda_launches, triton_launches  # noqa: E402
from torch_bridge.runtime import calls  # noqa: E402
from torch_bridge.wtconv import cuda, metal, ops, triton  # noqa: E402


class Broken:
    """A Triton kernel that does not compile."""

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            raise ValueError("at 1:1: planted\n^ expected ')'")

        return launch


def plant_in_cuda(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc", reason="the test extra has NVRTC for Linux alone")
    source = tmp_path / "kernels.cu"
    source.write_text(source_text(cuda_launches.SOURCE).replace("{", "{ planted", 1))
    monkeypatch.setattr(cuda_launches, "SOURCE", source)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(cuda, "device_of", lambda device: Device(166912, 108))
    return cuda, r"kernels.cu\(\d+\): error: .*", r"(?s)\d+ errors? detected"


def plant_in_metal(monkeypatch, tmp_path):
    def compile_shader(source):
        raise RuntimeError("program_source:1:1: error: planted\n^ expected ';'")

    monkeypatch.setattr(torch.mps, "compile_shader", compile_shader)
    return metal, "RuntimeError: program_source:1:1: error: planted$", "expected ';'$"


def plant_in_triton(monkeypatch, tmp_path):
    def forward(x, taps, bias, kernel_size, launch, strides, **sizes):
        return launch(Broken(), [x], [(x.shape, x.dtype)], (1,))[0]

    def weight_grad(x, dy, kernel_size, levels, launch, **sizes):
        return launch(Broken(), [x, dy], [(x.shape, x.dtype)], (1,))

    monkeypatch.setattr(triton_launches, "forward", forward)
    monkeypatch.setattr(triton_launches, "weight_grad", weight_grad)
    monkeypatch.setattr(triton_launches, "check", lambda problem: None)
    return triton, "ValueError: at 1:1: planted$", r"expected '\)'$"


@pytest.fixture(params=[plant_in_cuda, plant_in_metal, plant_in_triton], ids=lambda p: p.__name__)
def planted(request, monkeypatch, tmp_path):
    """An implementation that does not compile, preferred on a CPU; patterns of its log."""
    module, first, last = request.param(monkeypatch, tmp_path)
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(module, "unavailable", lambda platform: None)
    monkeypatch.setitem(ops.OPERATOR.rule, "cpu", (name, "eager"))
    forget()
    yield name, first, last
    calls.FAILED.clear()
    forget()


def step(layer):
    layer.zero_grad()
    x = torch.arange(24.0).reshape(1, 1, 4, 6).sin().requires_grad_()
    y = layer(x)
    y.sin().sum().backward()
    return y, x.grad, layer.base_conv.weight.grad


def make_layer(**options):
    torch.manual_seed(0)
    return torch_bridge.WTConv2d(1, 1, 3, device="cpu", **options)


@pytest.mark.parametrize("only", ["fwd", "bwd"])
def test_the_next_computes_and_one_warning_says_so(planted, only, monkeypatch):
    name, first, _ = planted
    want = step(make_layer(implementation="eager"))
    layer = make_layer()
    if only == "bwd":
        monkeypatch.setattr(
            ops.OPERATOR.module(name), "forward", ops.OPERATOR.module("eager").forward
        )
    pattern = f"{name} of torch_wtconv does not compile or load here, eager computes.*: {first}"
    with pytest.warns(RuntimeWarning, match=pattern) as said:
        found = step(layer)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found += step(layer)
    for got, wanted in zip(found, want + want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_named_one_tells_the_end_of_the_log(planted, monkeypatch):
    name, _, last = planted
    for _ in range(2):
        with pytest.raises(KernelError, match=f"implementation='{name}'.*name 'eager'") as error:
            step(make_layer(implementation=name))
        assert error.match(last)
    monkeypatch.setenv("FLASH_WTCONV_TORCH_WTCONV_FWD", name)
    with pytest.raises(KernelError, match="name 'eager' in its place"):
        step(make_layer())
