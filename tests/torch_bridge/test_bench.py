"""`python -m torch_bridge bench`: what it prints and writes, on a CPU and where a GPU is."""

import json
import math
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from flash_wtconv_jax.bench import timing  # noqa: E402
from pallas_kernels.wtconv.shapes import GPU_SHAPES, Shape  # noqa: E402
from torch_bridge import bench, spconv_contender  # noqa: E402

SHAPES = {"small": Shape(2, 6, 5, 3, 1), "other": Shape(1, 4, 4, 2, 2, 3)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "KNOWN", {"cpu": SHAPES, "gpu": SHAPES})
    monkeypatch.setattr(timing, "_REST_S", 0.0)
    monkeypatch.setattr(timing, "_TURN_S", 0.0)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["torch_bridge", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("torch_bridge", run_name="__main__")
    return stopped.value.code


def test_times_beside_plain_pytorch(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run(monkeypatch, *["--device", "cpu", "--dtype", "bfloat16"], "--out", tmp_path) == 0
    output = capsys.readouterr().out
    assert "WTConv, bfloat16" in output and "eager channels-last" in output
    assert (tmp_path / "torch_wtconv.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "torch_wtconv.json").read_text())
    rows = {(row["shape"], row["contender"], row["direction"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 2 * 2 * 2
    row = rows["small", "eager", "forward+backward"]
    assert row["speedup"] == 1.0 and row["x"] == [2, 6, 5, 3]
    floor_ms = 5 * 2 * 180 / report["roofs"]["copy_bytes_per_s"] * 1e3
    assert row["floor_ms"] == pytest.approx(floor_ms)
    assert row["over_floor"] == pytest.approx(row["median_ms"] / floor_ms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_times_hold_what_a_device_has_enqueued(monkeypatch, dtype):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    now, enqueued = [0.0], []

    def finish():
        now[0] += sum(enqueued)
        enqueued.clear()

    monkeypatch.setattr(torch.mps, "synchronize", finish)
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(timing, "time", clock)

    def enqueuing(call, seconds):
        return lambda: (call(), enqueued.append(seconds))

    calls = bench._calls(SHAPES["small"], torch.device("cpu"), dtype)["forward+backward"]
    calls = {name: enqueuing(call, i) for i, (name, call) in enumerate(calls.items(), 1)}
    times = bench.take_turns(torch.device("mps"), calls, lambda steps: lambda: None)
    milliseconds = {name: (spread.least, spread.greatest) for name, spread in times.items()}
    assert milliseconds == {"eager": (1e3, 1e3), "eager channels-last": (2e3, 2e3)}


@pytest.mark.gpu
def test_every_implementation_on_a_gpu(tmp_path):
    report = bench.run(["other"], "float32", lambda label, steps: lambda: None)
    rows = {(row["contender"], row["direction"]): row for row in report["rows"]}
    # Metal's are for an Apple GPU.
    here = set(bench.ops.Implementation) - {"metal"}
    names = [f"{name}{suffix}" for name in here for suffix in bench._FORMATS]
    assert {name for name, _ in rows} == set(names)
    assert all(row["extra_memory"] > 0 and row["least_ms"] > 0 for row in rows.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "most"),
    # Of 7 x 7 pixels a low band is a third of x, and each copy of the taps a thirtieth.
    [("convnext_t_stage2", 2.5), ("convnext_t_stage3", 2.5), ("convnext_t_stage4", 2.6)],
)
def test_a_step_holds_little_beside_its_results(name, most):
    shape, device = GPU_SHAPES[name], torch.device("cuda")
    size = 4 * math.prod(shape.x)
    for contender, call in bench._calls(shape, device, torch.float32)["forward+backward"].items():
        if not contender.startswith("eager"):
            call()
            _, extra_memory = bench._memory(device, call, size)
            assert 2.0 < extra_memory <= most, contender


def test_a_run_that_is_stopped_keeps_the_shapes_that_it_has_timed(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    calls = bench._calls

    def stopped(shape, *rest):
        if shape == bench.KNOWN["cpu"]["other"]:
            raise KeyboardInterrupt
        return calls(shape, *rest)

    monkeypatch.setattr(bench, "_calls", stopped)
    run(
        monkeypatch, *["--device", "cpu", "--shape", "small", "--shape", "other"], "--out", tmp_path
    )
    kept = json.loads((tmp_path / "torch_wtconv.json").read_text())
    assert {row["shape"] for row in kept["rows"]} == {"small"} and kept["left"] == ["other"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], r"shape: ['huge'] is not one of ['other', 'small']"),
        (["--dtype", "int8"], "dtype: 'int8' is not one of ['float32', 'bfloat16', 'float16']"),
        (["--out", __file__], f"--out {__file__} is a file, expected a folder"),
        (["--device", "gpu"], "device: 'gpu' is not one of ['cpu', 'cuda', 'mps']"),
        (["--device", "cuda"], "device: PyTorch finds no cuda here, only ['cpu'"),
    ],
)
def test_wrong_arguments_are_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, *arguments) == 1
    assert message in capsys.readouterr().err


def test_spconv_is_timed_in_a_process_of_its_own(monkeypatch):
    """Whose last lines are times, or why there are none; bfloat16 is timed in float16."""
    layers, codes = [], iter([0, 1])

    def run(command, **_):
        layers.append(json.loads(command[-1]))
        out = 'tuned\n{"forward": [2.0, 1.0, 3.0]}\n'
        return subprocess.CompletedProcess(command, next(codes), out, "Traceback\nno such kernel\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert spconv_contender.times(9, 2, 3, 3, "bfloat16") == {"forward": [2.0, 1.0, 3.0]}
    with pytest.raises(RuntimeError, match="spconv-triton failed for .*: no such kernel"):
        spconv_contender.times(9, 2, 3, 3, "float32")
    assert layers == [[9, 2, 3, 3, "float16"], [9, 2, 3, 3, "float32"]]
