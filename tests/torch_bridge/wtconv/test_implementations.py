"""Every implementation in PyTorch on the shared cases, and the choice of one."""

import os
from functools import partial

import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels.common import conformance  # noqa: E402
from pallas_kernels.dispatch import tuning  # noqa: E402
from pallas_kernels.wtconv.cases import Case  # noqa: E402
from torch_bridge import check  # noqa: E402
from torch_bridge.wtconv import ops  # noqa: E402
from torch_bridge.wtconv import triton as triton_launch  # noqa: E402

CPU = torch.device("cpu")
VARIABLE = "FLASH_WTCONV_TORCH_WTCONV_"
FORMATS = [torch.contiguous_format, torch.channels_last]
NAMES = [f"{name}{suffix}" for name in ops.Implementation for suffix in ("", " channels-last")]


@pytest.fixture
def interpreter():
    """Triton's interpreter, in which the kernels take tensors of the CPU."""
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a process has Triton's interpreter or a GPU")


def statuses(name, device, cases=None):
    """Checks what a back end computes; returns each case with "pass" or "skip"."""
    plain = partial(check.layer_results, "eager", device, torch.contiguous_format)
    (backend,) = (backend for backend in check.backends(device) if backend.name == name)
    if cases is not None:
        backend = backend._replace(cases=cases)
    rows = list(conformance.run([backend], plain))
    assert [row for row in rows if row["status"] == "fail"] == []
    return {row["case"]: row["status"] for row in rows}


@pytest.mark.parametrize("name", ["eager", "eager channels-last"])
def test_eager_computes_every_case(name):
    assert set(statuses(name, CPU).values()) == {"pass"}


def test_gradients_of_volumes_read_no_memory_that_nobody_wrote():
    layer = torch_bridge.WTConv3d(3, 3, 3, wt_levels=0, device="cpu", dtype=torch.bfloat16)
    x = torch.ones(2, 2, 2, 2, 3, dtype=torch.bfloat16).movedim(-1, 1).requires_grad_()
    y = layer(x).sum()
    # What is freed here, the backward pass finds.
    _ = [torch.full((4**n,), float("nan")) for n in range(1, 9) for _ in range(20)]
    del _
    y.backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param("triton", Case((6, 7), 2, 3, strided=True), marks=pytest.mark.slow),
        ("triton", Case((4, 4), 1, 3, batch=(0,))),
        ("triton", Case((2, 3), 1, 3, "bfloat16")),
        pytest.param("triton channels-last", Case((9, 6), 2, 3, batch=()), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_triton_interpreted(interpreter, name, case):
    assert statuses(name, CPU, [case]) == {case.name: "pass"}


@pytest.mark.slow
def test_triton_interpreted_with_other_sizes(interpreter, monkeypatch):
    sizes = {"columns": 2, "strips": 2}
    monkeypatch.setattr(triton_launch, "search_space", lambda direction, problem: [sizes])
    with tuning("search"):
        arguments = (CPU, (1, 1, 2, 6), torch.float32, 3, 1, "db1")
        assert ops.pick("triton", *arguments) == ("triton columns=2 strips=2",) * 2
        case = Case((2, 6), 1, 3, batch=(1,), channels=1)
        assert statuses("triton", CPU, [case]) == {case.name: "pass"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in NAMES if "metal" not in name])
def test_every_case_on_a_gpu(name):
    found = statuses(name, torch.device("cuda"))
    assert list(found.values()).count("pass") >= (20 if "eager" in name else 12)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_gradients_are_bitwise_reproducible(implementation, memory_format):
    torch.manual_seed(0)
    layer = torch_bridge.WTConv2d(40, 40, wt_levels=3, device="cuda", implementation=implementation)
    x = torch.randn(64, 40, 57, 60, device="cuda").contiguous(memory_format=memory_format)
    first, again = (
        torch.autograd.grad(
            layer(x).sin().sum(), [p for p in layer.parameters() if p.requires_grad]
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, first, again))


def _trained(parameter):
    return parameter.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_channels_whole_images_apart(implementation):
    """More than 2^31 elements in one image of `[N, C, H, W]`."""
    torch.manual_seed(0)
    layer = torch_bridge.WTConv2d(
        130, 130, 3, device="cuda", dtype=torch.bfloat16, implementation=implementation
    )
    for parameter in filter(_trained, layer.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 130, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
        small = layer(x[:, :, -32:, -32:])
    assert y.isfinite().all()
    # Small images may be cut into other blocks, and summed in another order.
    corner, same = y[:, :, -16:, -16:], small[:, :, -16:, -16:]
    torch.testing.assert_close(corner, same, rtol=2**-7, atol=2**-5)


class TestChoice:
    def layer(self, implementation=None, **options):
        return torch_bridge.WTConv2d(2, 2, 3, implementation=implementation, **options)

    @pytest.mark.parametrize(
        ("implementation", "message"),
        [
            ("cudnn", r"implementation names \['cudnn'\], but torch_wtconv has"),
            ((), "implementation is empty"),
            (3, "implementation=3: expected None, a name or a sequence of names"),
        ],
    )
    def test_unknown_names(self, implementation, message):
        with pytest.raises(ValueError, match=message):
            self.layer(implementation)

    def test_a_sequence_takes_what_can_run(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        both = [ops.Implementation.TRITON, "eager"]
        layer = self.layer(both, device="cpu")
        assert layer(torch.ones(1, 2, 4, 4)).shape == (1, 2, 4, 4)
        assert "implementation=('triton', 'eager')" in repr(layer)
        assert self.layer("auto", device="cpu")(torch.ones(1, 2, 4, 4)).shape == (1, 2, 4, 4)
        reason = r"implementation='triton' for x \(1, 4, 4, 2\) float32.*triton: needs a GPU"
        with pytest.raises(NotImplementedError, match=reason):
            self.layer("triton", device="cpu")(torch.ones(1, 2, 4, 4))

    def test_the_environment_chooses_each_direction(self, monkeypatch, interpreter):
        arguments = (CPU, (1, 2, 4, 4), torch.float32, 3, 1, "db1")
        assert ops.pick(None, *arguments) == ("eager else",) * 2
        monkeypatch.setenv(f"{VARIABLE}FWD", "triton")
        assert ops.pick(None, *arguments) == ("triton", "eager else")
        assert ops.pick("eager", *arguments) == ("eager", "eager")
        monkeypatch.setenv(f"{VARIABLE}BWD", "nothing")
        with pytest.raises(ValueError, match=f"{VARIABLE}BWD names"):
            ops.pick(None, *arguments)

    def test_what_triton_does_not_do_says_so(self, interpreter):
        layer = self.layer("triton", wt_type="db2", device="cpu")
        with pytest.raises(NotImplementedError, match="triton: does not take wavelet 'db2'"):
            layer(torch.ones(1, 2, 4, 4))

    def test_a_traced_program_checks_the_sizes_when_it_runs(self, interpreter):
        taps = [torch.ones(1, 1, 3, 3), torch.ones(4, 1, 3, 3)]
        x = torch.ones(1, 1, 1, 1).expand(1, 1, 2, 2**28)
        with pytest.raises(NotImplementedError, match="too long"):
            ops.apply(x, taps, None, [], "haar", False, "triton", "triton")

    @pytest.mark.parametrize("pair", [("triton", "eager"), ("eager", "triton")], ids=str)
    def test_directions_pair_freely(self, interpreter, pair, monkeypatch):
        monkeypatch.setenv(f"{VARIABLE}FWD", pair[0])
        monkeypatch.setenv(f"{VARIABLE}BWD", pair[1])
        case = Case((3, 4), 1, 3, batch=(1,), channels=2)
        got = check.layer_results(None, CPU, torch.contiguous_format, case)
        for name, want in conformance.expected(case).items():
            assert conformance.worst(got[name], want) <= case.tolerance(name), name
