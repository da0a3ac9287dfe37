"""The PyTorch layers choose by measurement: on a CPU between `eager` and a stand-in for `cuda`."""

import logging
import sys
import warnings
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels.dispatch import forget, tuning  # noqa: E402
from torch_bridge.runtime import calls, measuring  # noqa: E402
from torch_bridge.wtconv import eager, ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("many_compilations")

CPU = torch.device("cpu")
VARIABLE = "FLASH_WTCONV_TORCH_WTCONV_"


@pytest.fixture(autouse=True)
def twin(request, monkeypatch):
    """Computes as `eager` does, as the implementation `cuda`; Triton is not here."""
    if request.node.get_closest_marker("gpu"):
        return None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = ModuleType("twin")
    vars(module).update({name: getattr(eager, name) for name in ("check", "forward")})
    module.weight_grad = eager.weight_grad
    module.unavailable = lambda platform: None
    monkeypatch.setitem(sys.modules, "torch_bridge.wtconv.cuda", module)
    return module


@pytest.fixture
def clock(monkeypatch):
    """Makes one implementation the fastest: of the directions named, `cuda`, else `eager`."""

    def fastest(*directions):
        def milliseconds(self, call):
            module, direction = call.of
            mine = module is not eager
            return 1.0 if mine == (direction in directions) else 2.0

        prepared = measuring.TorchMeasurement.prepared

        def kept(self, module, config):
            call = prepared(self, module, config)
            # The reference of a backward pass has more than one tensor.
            call.of = module, "fwd" if len(call()) == 1 else "bwd"
            return call

        monkeypatch.setattr(measuring.TorchMeasurement, "milliseconds", milliseconds)
        monkeypatch.setattr(measuring.TorchMeasurement, "prepared", kept)

    return fastest


def make_layer(implementation="auto", channels=2, **options):
    torch.manual_seed(0)
    options = {"device": CPU} | options
    return torch_bridge.WTConv2d(channels, channels, 3, implementation=implementation, **options)


def picked(shape=(2, 2, 4, 5), dtype=torch.float32, implementation="auto", **options):
    options = {"strides": torch.empty(shape).stride()} | options
    return ops.pick(implementation, CPU, shape, dtype, 3, 1, "db1", **options)


def gradients(layer, x):
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y.sin().sum(), trained)


@pytest.mark.parametrize("choice", ["auto", ["eager", ops.Implementation.CUDA]])
def test_measured_once_each_direction_apart(measured, searches, choice):
    x, layer = torch.randn(2, 2, 4, 5), make_layer(choice)
    for _ in range(2):
        for got, want in zip(gradients(layer, x), gradients(make_layer("eager"), x), strict=True):
            torch.testing.assert_close(got, want)
    assert searches == ["torch_wtconv fwd", "torch_wtconv bwd"]
    entries = measured.entries(measuring.kind(CPU))
    assert [entry["direction"] for entry in entries] == ["bwd", "fwd"]
    for entry in entries:
        assert entry["operator"] == "torch_wtconv"
        assert entry["problem"]["shape"] == [2, 4, 5, 2]
        assert entry["static"] == {"bias": True, "channels_last": False}
        assert entry["versions"]["torch"] == torch.__version__
        assert sorted(one["implementation"] for one in entry["measured"]) == ["cuda", "eager"]
        assert all(one["ms"] > 0 for one in entry["measured"])


def test_what_is_measured_apart(measured, searches):
    nhwc = torch.empty(2, 2, 4, 5).to(memory_format=torch.channels_last)
    for other in (
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"bias": True},
        {"strides": nhwc.stride()},
        {"shape": (2, 2, 4)},
    ):
        picked(**other)
    assert len(searches) == 12
    # Batches share what was measured, up to twice as many.
    picked((3, 2, 4, 5))
    assert len(searches) == 12
    found = measured.entries(measuring.kind(CPU))
    assert {len(entry["measured"]) for entry in found} == {2}
    # All are right, in low precision too.
    assert all("ms" in one for entry in found for one in entry["measured"])


@pytest.mark.parametrize("directions", [(), ("fwd",), ("bwd",), ("fwd", "bwd")], ids=str)
def test_the_fastest_computes(clock, directions):
    clock(*directions)
    want = tuple("cuda" if direction in directions else "eager" for direction in ("fwd", "bwd"))
    assert picked() == want
    x = torch.randn(2, 2, 4, 5)
    for got, right in zip(
        gradients(make_layer(), x), gradients(make_layer("eager"), x), strict=True
    ):
        torch.testing.assert_close(got, right)


def test_modes_and_the_environment(clock, searches, monkeypatch):
    clock("fwd", "bwd")
    assert picked(implementation=None) == ("eager else",) * 2
    assert picked(implementation="eager") == ("eager", "eager")
    for mode in ("off", "cached"):
        with tuning(mode):
            assert picked() == ("eager", "eager")
    assert searches == []
    monkeypatch.setenv(f"{VARIABLE}BWD", "[Eager, cuda]")
    assert picked(implementation=None) == ("eager else", "cuda")
    assert picked(implementation="eager") == ("eager", "eager")
    assert searches == ["torch_wtconv bwd"]


def test_a_warm_choice_is_looked_up_and_follows_all_that_it_depends_on(
    clock, twin, measured, monkeypatch
):
    clock("fwd", "bwd")
    assert picked() == ("cuda", "cuda")
    assert picked() == ("cuda", "cuda")
    with monkeypatch.context() as warm:
        warm.setattr(calls, "chosen", None)
        assert picked() == ("cuda", "cuda")
    # A block of `tuning`, the environment, what is measured later, and a module that is another.
    with tuning("off"):
        assert picked() == ("eager", "eager")
    monkeypatch.setenv("FLASH_WTCONV_TUNING", "off")
    assert picked() == ("eager", "eager")
    monkeypatch.delenv("FLASH_WTCONV_TUNING")
    assert picked(implementation=None) == ("eager else",) * 2
    monkeypatch.setenv(f"{VARIABLE}FWD", "cuda")
    assert picked(implementation=None) == ("cuda", "eager else")
    assert picked(implementation=None, differentiated=False) == ("cuda", "cuda")
    kind = measuring.kind(CPU)
    (forward,) = (one for one in measured.entries(kind) if one["direction"] == "fwd")
    times = [one | {"ms": 3.0} for one in forward["measured"] if one["implementation"] == "cuda"]
    measured.put(kind, [forward | {"measured": times}])
    assert picked() == ("eager", "cuda")
    twin.unavailable = lambda platform: "gone"
    assert picked() == ("eager", "cuda")
    forget()
    assert picked() == ("eager", "eager")


def test_times_are_of_calls_outside_of_autocast():
    measurement = measuring.TorchMeasurement(
        lambda module, config, x: [x @ x],
        lambda draw: (draw((2, 2), torch.float32),),
        *(CPU, eager, {}, True),
    )
    with torch.autocast("cpu"):
        (found,) = measurement.untraced(measurement.prepared(eager, ()))()
    assert found.dtype == torch.float32


def test_what_is_wrong_is_disqualified(twin, caplog):
    twin.forward = lambda *args, **keys: 2 * eager.forward(*args, **keys)
    with caplog.at_level(logging.WARNING, "flash_wtconv"):
        assert picked(dtype=torch.bfloat16) == ("eager", "eager")
    assert caplog.text.count("cuda is disqualified, an output is off") == 2


def test_parameters_reach_the_kernels_and_stay_in_programs(clock, twin):
    clock("fwd", "bwd")
    told = []

    def kernel(function):
        def call(*args, columns=4, **keys):
            told.append((function.__name__, columns))
            return function(*args, **keys)

        return call

    twin.forward, twin.weight_grad = kernel(eager.forward), kernel(eager.weight_grad)
    twin.search_space = lambda direction, problem: [{"columns": 2 if direction == "fwd" else 3}]
    x, layer = torch.randn(2, 2, 4, 5, requires_grad=True), make_layer()
    assert picked(bias=True) == ("cuda columns=2", "cuda columns=3")
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        told.clear()
        call(x).sum().backward()
        assert told == [("forward", 2), ("weight_grad", 3), ("forward", 3)]


def test_traced_programs_measure_too(searches, clock):
    clock("fwd", "bwd")
    layer, plain = make_layer(), make_layer("eager")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((3, 2, 4, 5), (2, 2, 7, 6)):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), plain(x))
    # By the sizes that it was traced with, which it is not bound to.
    assert searches == ["torch_wtconv fwd", "torch_wtconv bwd"]
    x, batch = torch.randn(2, 2, 3, 3), torch.export.Dim("batch", min=2)
    for strict in (True, False):
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},), strict=strict)
        torch.testing.assert_close(program.module()(x[:1].repeat(5, 1, 1, 1))[:1], plain(x[:1]))
        assert "flash_wtconv.wtconv.default" in [str(node.target) for node in program.graph.nodes]
    assert len(searches) == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.vmap(layer)(x[:, None])
    assert len(searches) == 6


def test_where_nothing_can_be_timed_the_rule_chooses(monkeypatch, searches):
    layer = make_layer(device="meta")
    with pytest.warns(RuntimeWarning, match="cannot be timed here: tensors on the device 'meta'"):
        assert layer(torch.empty(2, 2, 4, 5, device="meta")).shape == (2, 2, 4, 5)
    # As PyTorch 2.11 has it.
    monkeypatch.setattr(calls, "tells_sizes", lambda: False)
    compiled = torch.compile(make_layer(), fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="does not tell the sizes of a traced program"):
        compiled(torch.randn(2, 2, 4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_layer()(torch.empty(0, 2, 4, 5))
    assert searches == ["torch_wtconv fwd", "torch_wtconv bwd"]


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fastest_on_a_gpu(measured, dtype, memory_format):
    options = {"device": "cuda", "dtype": dtype, "channels": 96}
    x = torch.randn(16, 96, 56, 57, device="cuda", dtype=dtype).to(memory_format=memory_format)
    for got, want in zip(
        gradients(make_layer(**options), x),
        gradients(make_layer("eager", **options), x),
        strict=True,
    ):
        limit = (1e-3 if dtype == torch.float32 else 5e-2) * float(want.detach().abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=limit)
    entries = measured.entries(torch.cuda.get_device_name())
    assert [entry["direction"] for entry in entries] == ["bwd", "fwd"]
    for entry in entries:
        timed = {one["implementation"]: one["ms"] for one in entry["measured"] if "ms" in one}
        assert {"triton", "eager"} <= set(timed)
        assert timed["eager"] > min(timed.values())


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    layer, x = make_layer(device="cuda"), torch.randn(2, 2, 9, 8, device="cuda")
    other = x[:1].clone()
    with torch.no_grad():
        want = layer(x)
        # Compiles what the rule takes.
        make_layer(None, device="cuda")(other)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), pytest.warns(RuntimeWarning, match="is being captured"):
            y = layer(x)
            layer(other)
        graph.replay()
    torch.testing.assert_close(y, want)
