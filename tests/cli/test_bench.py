"""`flash-wtconv bench`: what it writes and refuses. Nothing is timed here."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.processes import with_devices
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from rich.table import Table
from typer.testing import CliRunner

from flash_wtconv_jax import models, plots
from flash_wtconv_jax.bench import (
    clocks,
    compiling,
    conv2d,
    depthwise,
    devices,
    everything,
    haar,
    host,
    mlp,
    profile,
    roofline,
    sharding,
    sparse,
    stylize,
    timing,
    wtconv,
    wtconvnext,
)
from flash_wtconv_jax.bench.timing import Spread
from flash_wtconv_jax.cli import app
from flash_wtconv_jax.cli.bench import _sharding_table, tell, wtconv_table
from flash_wtconv_jax.plots import bench as drawings
from pallas_kernels.common import device
from pallas_kernels.conv2d import mosaic_gpu
from pallas_kernels.conv2d import shapes as dense
from pallas_kernels.depthwise import mosaic_tpu
from pallas_kernels.depthwise import shapes as plain
from pallas_kernels.dispatch import table, tuning
from pallas_kernels.haar import triton as cascades
from pallas_kernels.sparse import shapes as voxels
from pallas_kernels.sparse.depthwise.problem import Problem as DepthwiseProblem
from pallas_kernels.sparse.problem import Problem, Window
from pallas_kernels.stylize import shapes as norms
from pallas_kernels.stylize.convolution import shapes as layers
from pallas_kernels.wtconv import shapes

WIDE = pytest.mark.wide


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two small shapes, and each contender called once instead of timed."""
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.Shape(1, 6, 5, 4, 2, kernel_size=3))
    monkeypatch.setitem(shapes.SHAPES, "pixel", shapes.Shape(1, 1, 1, 1, 0, kernel_size=1))

    def once(contenders, step):
        for call in contenders.values():
            call()
            step()
        return {name: timing.Spread(2.0, 1.5, 3.0) for name in contenders}

    monkeypatch.setattr(timing, "take_turns", once)
    monkeypatch.setattr(
        roofline, "measure", lambda clock: {"copy_bytes_per_s": 1e9, "fma_per_s": 1e10}
    )


@pytest.fixture
def longer(monkeypatch):
    """Both passes take longer than the first, else nothing is left for the backward pass."""
    turns, times = timing.take_turns, count(1.0)

    def take_turns(contenders, step):
        ms = next(times)
        return {name: timing.Spread(ms, ms, ms) for name in turns(contenders, step)}

    monkeypatch.setattr(timing, "take_turns", take_turns)


@pytest.fixture
def undrawn(monkeypatch):
    """The pictures, which a test of its own has, are empty."""
    for name in ("speedups", "roofline"):
        monkeypatch.setattr(plots, name, lambda report: Figure(figsize=(1, 1)))


UNDRAWN = pytest.mark.usefixtures("undrawn")


def bench(*arguments, benchmark="wtconv"):
    return CliRunner().invoke(app, ["bench", benchmark, *map(str, arguments)])


def test_the_users_clock_goes_before_the_profiler():
    order = []

    def clock(name):
        def take_turns(calls, step):
            order.append((name, {who: call() for who, call in calls.items()}))
            return {who: Spread(1.0, 1.0, 1.0) for who in calls}

        return SimpleNamespace(take_turns=take_turns, turns=lambda contenders: contenders)

    one = wtconv.Contender(call=lambda: "cold", warm=lambda: "warm")
    steps = []
    wtconv.by_both_clocks(clock("events"), clock("host"), {"one": one}, steps.append)
    assert order == [("host", {"one": "warm"}), ("events", {"one": "cold"})] and steps == [2]


@WIDE
def test_levels_have_a_field_parameters_and_times(tmp_path):
    options = {"depth": 2, "kernel-size": 3, "batch": 1, "size": 8, "channels": 2, "out": tmp_path}
    flat = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = bench(*flat, benchmark="levels")
    assert result.exit_code == 0, result.output
    assert "too noisy to compare" not in result.output and "…" not in result.output
    rows = json.loads((tmp_path / "levels.json").read_text())["rows"]
    keys = ("contender", "levels", "field", "parameters", "direction", "speedup")
    assert [tuple(row[key] for key in keys) for row in rows[:4]] == [
        ("depthwise 7x7", None, 7, 98, "forward", 1.0),
        ("0 levels", 0, 3, 22, "forward", 1.0),
        ("1 levels", 1, 6, 102, "forward", 1.0),
        ("2 levels", 2, 12, 182, "forward", 1.0),
    ]


def test_dense_convolutions(tmp_path, monkeypatch):
    layer = dense.Shape(1, 5, 6, 3, 3, 3, 4)
    monkeypatch.setitem(dense.SHAPES, "tiny", layer)
    result = bench("--shape", "tiny", "--out", tmp_path, benchmark="conv2d")
    assert result.exit_code == 0, result.output
    assert "reflect+bias+gelu, forward+backward" in result.output and "TFLOP/s" in result.output
    assert "…" not in result.output
    report = json.loads((tmp_path / "conv2d.json").read_text())
    rows = {(r["expression"], r["direction"], r["contender"]): r for r in report["rows"]}
    assert set(rows) == {
        (expression, direction, contender)
        for expression in ("convolution", "reflect+bias+gelu")
        for direction in ("forward", "forward+backward")
        for contender in ("plain jax", "flash xla")
    }
    assert rows["convolution", "forward", "plain jax"]["tflops_per_s"] == layer.operations / 2e9
    assert {mean["speedup"] for mean in report["means"]} == {1.0} and len(report["means"]) == 8
    # What does not take a dtype is no contender.
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)
    assert conv2d.implementations(layer, "float32") == ["xla"]
    for more in ([], ["--write-defaults"]):
        result = bench("--shape", "huge", *more, "--out", tmp_path, benchmark="conv2d")
        assert "['huge'] is not one of" in str(result.exception)


@pytest.mark.wide
def test_depthwise_convolutions(tmp_path, monkeypatch):
    monkeypatch.setitem(plain.SHAPES, "tiny", plain.Shape(1, 5, 6, 3, 3, 2))
    result = bench("--shape", "tiny", "--out", tmp_path, benchmark="depthwise")
    assert result.exit_code == 0, result.output
    assert "tiny 3x3 stride 2 forward+backward" in result.output and "…" not in result.output
    report = json.loads((tmp_path / "depthwise.json").read_text())
    rows = {(row["direction"], row["contender"]): row for row in report["rows"]}
    contenders = "copy", "plain jax", "flash"
    assert set(rows) == {(d, c) for d in ("forward", "forward+backward") for c in contenders}
    assert [rows["forward", name]["copies"] for name in contenders] == [1.0] * 3
    # Five passes are two and a half copies.
    assert rows["forward+backward", "flash"]["copies"] == 0.4
    assert rows["forward", "flash"]["extra_memory"] > 0 and rows["forward", "flash"]["speedup"] == 1


@pytest.mark.wide
def test_haar_cascades(tmp_path, monkeypatch):
    """By two clocks, as on a GPU."""
    monkeypatch.setattr(clocks, "users", lambda clock: clock)
    result = bench("--shape", "small", "--out", tmp_path, benchmark="haar")
    assert result.exit_code == 0, result.output
    assert "small 2 levels synthesis" in result.output and "…" not in result.output
    assert "ms as users" in result.output
    report = json.loads((tmp_path / "haar.json").read_text())
    rows = {(row["direction"], row["contender"]): row for row in report["rows"]}
    contenders = "copy", "plain jax", "flash"
    assert set(rows) == {(d, c) for d in ("analysis", "synthesis") for c in contenders}
    assert {row["copies"] for row in report["rows"]} == {1.0}
    assert rows["analysis", "flash"]["users"]["copies"] == 1
    assert rows["synthesis", "flash"]["extra_memory"] >= 1


def test_haar_cascades_are_kept_shape_by_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(haar, "_contenders", lambda layer, dtype: {"analysis": {}})
    left = []
    report = haar.run(
        ["small", "pixel"],
        lambda label, steps: lambda: None,
        keep=lambda report: left.append([*report["left"]]),
    )
    assert left == [["pixel"], []] and report["rows"] == []
    # The kernels take two dimensions, and 16 bits of either kind.
    monkeypatch.setattr(cascades, "unavailable", lambda platform: None)
    for dtype in wtconv.DTYPES:
        assert haar.implementations(shapes.SHAPES["small"], dtype) == ["triton", "xla"]
    result = bench("--shape", "huge", "--out", tmp_path, benchmark="haar")
    assert "['huge'] is not one of" in str(result.exception)


@pytest.mark.wide
def test_mlps(tmp_path, monkeypatch, longer):
    """Plain JAX beside two of ours, of which the faster is kept by direction."""
    ours = mlp.mlp
    monkeypatch.setitem(mlp.SHAPES, "tiny", mlp.Shape(128, 2))
    monkeypatch.setattr(mlp, "implementations", lambda shape, dtype: ["mosaic_gpu", "xla"])
    monkeypatch.setattr(
        mlp, "mlp", lambda *arrays, implementation=None, **keys: ours(*arrays, **keys)
    )
    monkeypatch.setattr(table, "FOLDER", tmp_path / "defaults")
    arguments = "--shape", "tiny", "--write-defaults", "--out", tmp_path
    result = bench(*arguments, benchmark="mlp")
    assert result.exit_code == 0, result.output
    assert "tiny forward+backward" in result.output and "…" not in result.output
    report = json.loads((tmp_path / "mlp.json").read_text())
    names = ["plain jax", "flash", "flash mosaic_gpu", "flash xla"]
    assert [row["contender"] for row in report["rows"]] == names * 2
    assert report["rows"][0]["tflops_per_s"] == pytest.approx(2 * 2 * 4 * 2 * 8 / 1e9)
    kept = json.loads((tmp_path / "defaults" / "cpu.json").read_text())["entries"]
    assert [entry["direction"] for entry in kept] == ["bwd", "fwd", "whole"]
    assert kept[0]["ms"] == kept[1]["ms"]
    size = {"shape": [4, 2], "dtype": "bfloat16", "hidden": 8, "features": 2}
    assert kept[0]["problem"] == size
    table.fastest.cache_clear()
    result = bench("--shape", "huge", "--out", tmp_path, benchmark="mlp")
    assert "['huge'] is not one of" in str(result.exception)


def test_depthwise_convolutions_that_are_not_there(tmp_path, monkeypatch):
    layer = plain.Shape(1, 5, 6, 3, 3)
    monkeypatch.setattr(mosaic_tpu, "unavailable", lambda platform: None)
    assert depthwise.implementations(layer, "float32") == ["mosaic_tpu", "xla"]
    # The kernels have neither a stride nor 16 bits of that kind.
    assert depthwise.implementations(layer._replace(stride=2), "float32") == ["xla"]
    assert depthwise.implementations(layer, "float16") == ["xla"]
    row = {"x": list(layer.x), "kernel_size": 3, "stride": 1}
    times = {"flash xla": 2.0, "flash mosaic_tpu": 1.0, "copy": 0.5}
    report = {"date": "2026-11-28", "versions": {"jax": "0.11"}, "dtype": "float32"}
    report["rows"] = [
        row | {"direction": direction, "contender": name, "median_ms": ms * passes}
        for direction, passes in (("forward", 1), ("forward+backward", 3))
        for name, ms in times.items()
    ]
    kept = depthwise.defaults(report)
    assert [(one["direction"], one["implementation"]) for one in kept] == [
        ("fwd", "mosaic_tpu"),
        ("bwd", "mosaic_tpu"),
    ]
    assert depthwise._problem(layer, "float32").distance(kept[0]["problem"]) == 0
    result = bench("--shape", "huge", "--out", tmp_path, benchmark="depthwise")
    assert "['huge'] is not one of" in str(result.exception)


@pytest.mark.parametrize(
    ("name", "missing"), [("tiny", []), pytest.param("depthwise_tiny", ["im2col"], marks=WIDE)]
)
def test_sparse_convolutions(name, missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sparse.SHAPES, "tiny", voxels.Shape(20, 2, 3, 1, 1))
    monkeypatch.setitem(sparse.DEPTHWISE, "tiny", voxels.Shape(20, 2, 2, 2, 2))
    monkeypatch.setattr(sparse, "NAMES", (name,))
    with tuning("off"):
        result = bench("--shape", name, "--out", tmp_path, benchmark="sparse")
    assert result.exit_code == 0, result.output
    assert f"{name} forward+backward" in result.output and "…" not in result.output
    report = json.loads((tmp_path / "sparse.json").read_text())
    every = ["gather, dot, scatter-add", "im2col", "flash", "flash xla"]
    contenders = [one for one in every if one not in missing]
    assert [(row["direction"], row["contender"]) for row in report["rows"]] == [
        ("map", "sorted"),
        ("map", "shuffled"),
        *((direction, one) for direction in sparse.DIRECTIONS for one in contenders),
    ]
    first = next(row for row in report["rows"] if row["direction"] != "map")
    ms, flops = first["median_ms"], 2.0 * first["pairs"] * 2 * (1 if missing else 3)
    product = report["roofs"]["product_flops_per_s"]
    assert first["over_arithmetic"] == pytest.approx(ms * product / flops / 1e3)
    assert first["over_forward"] == 1 and report["left"] == []
    result = bench("--shape", "huge", "--out", tmp_path, benchmark="sparse")
    assert "['huge'] is not one of" in str(result.exception)


MS = {f"{which}_ms": 1.0 for which in ("median", "least", "greatest")}


def test_sparse_convolutions_are_timed_in_parts(tmp_path, monkeypatch):
    """Results that are there are not timed again, but under another dtype."""
    monkeypatch.setattr(sparse, "NAMES", ("one", "two"))
    for name in sparse.NAMES:
        monkeypatch.setitem(sparse.SHAPES, name, voxels.Shape(20, 2, 3, 1, 1))
    timed = []

    def rows(report, name, *_):
        timed.append(name)
        return [{"shape": name, "direction": "map", "contender": "sorted"} | MS]

    monkeypatch.setattr(sparse, "_rows", rows)

    def part(minutes, *more):
        result = bench("--out", tmp_path, "--minutes", minutes, *more, benchmark="sparse")
        assert result.exit_code == 0, result.output
        return result.output

    now = iter([0, 1, 600] + [0] * 9)
    monkeypatch.setattr(sparse, "monotonic", lambda: next(now))
    assert "not timed yet: two" in part(5)
    assert json.loads((tmp_path / "sparse.json").read_text())["left"] == ["two"]
    assert "not timed yet" not in part(5) and timed == ["one", "two"]
    part(5, "--dtype", "float32")
    assert timed == ["one", "two", "one", "two"]
    (tmp_path / "sparse.json").write_text("{")
    result = bench("--out", tmp_path, "--minutes", 5, benchmark="sparse")
    assert "sparse.json: no report" in str(result.exception)


def test_other_packages_layers_stand_beside_ours(monkeypatch):
    """Those of stride 1; what fails is told of."""
    ms = {"forward": [2.0, 1.0, 3.0]}
    other = SimpleNamespace(NAME="other", times=lambda *sizes: ms if sizes[0] == 20 else fail())
    layer = SimpleNamespace(name="one", regular=True, dtype="float16")

    def fail():
        raise RuntimeError("no more memory")

    for shape, want in {
        voxels.Shape(20, 2, 3): {"forward": timing.Spread(2.0, 1.0, 3.0)},
        voxels.Shape(20, 2, 3, stride=2): {},
    }.items():
        layer.shape = shape
        assert sparse._times_of(other, layer) == want
    layer.shape = voxels.Shape(30, 2, 3)
    with pytest.warns(UserWarning, match="one has no row of other: no more memory"):
        assert sparse._times_of(other, layer) == {}


@pytest.mark.wide
def test_plain_sparse_convolutions_are_ours():
    layer = sparse._Layer.of("room_10000_32_32_s2", "float32")
    plain, *others = (one(own, layer.x, layer.w) for one, own in layer.contenders().values())
    for other in others:
        np.testing.assert_allclose(other, plain, atol=1e-4)


@pytest.mark.wide
def test_the_fastest_dense_convolutions_are_kept(tmp_path, monkeypatch, longer):
    ours = conv2d.conv2d
    monkeypatch.setitem(dense.SHAPES, "tiny", dense.Shape(1, 5, 6, 3, 3, 2, 4))
    monkeypatch.setattr(conv2d, "implementations", lambda shape, dtype: ["mosaic_gpu", "xla"])
    monkeypatch.setattr(conv2d, "conv2d", lambda x, w, implementation, **keys: ours(x, w, **keys))
    monkeypatch.setattr(table, "FOLDER", tmp_path / "defaults")
    arguments = "--shape", "tiny", "--write-defaults", "--out", tmp_path
    result = bench(*arguments, benchmark="conv2d")
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "defaults" / "cpu.json").read_text())["entries"]
    assert {(e["operator"], e["direction"], e["problem"]["window"]["reflect"]) for e in kept} == {
        ("conv2d", direction, reflect) for direction in ("bwd", "fwd") for reflect in (False, True)
    }
    assert kept[-1]["problem"] == {
        "shape": [1, 5, 6, 3],
        "dtype": "bfloat16",
        "kernel_height": 3,
        "kernel_width": 2,
        "features": 4,
        "window": {
            "stride": [1, 1],
            "dilation": [1, 1],
            "groups": 1,
            "reflect": True,
            "layout": "nhwc_hwcf",
            "upsample": 1,
        },
    }
    # None comes twice.
    report = json.loads((tmp_path / "conv2d.json").read_text())
    assert json.loads(table.merged("cpu", conv2d.defaults(report)))["entries"] == kept
    table.fastest.cache_clear()


def test_report_table_and_picture(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="the third contender is PyTorch")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    result = bench("--shape", "small", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "small" in result.output and "2.0 (1.5-3.0)" in result.output
    for picture in ("wtconv.png", "wtconv_roofline.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "wtconv.json").read_text())
    assert report["device"]["platform"] == "cpu" and "torch" in report["versions"]
    assert report["clock"] == "host" and report["no_device_events"] is None
    assert report["xla_flags"] == "--xla_gpu_autotune_level=4"
    rows = {(row["direction"], row["contender"]): row for row in report["rows"]}
    assert set(rows) == {
        (direction, contender)
        for direction in ("forward", "forward+backward")
        for contender in ("flash", "plain jax", "torch eager")
    }
    assert rows["forward", "flash"]["implementation"] == {"fwd": "xla", "bwd": "xla"}
    assert "flash (xla)" in result.output
    for row in rows.values():
        assert row["x"] == [1, 6, 5, 4] and row["median_ms"] == 2.0 and row["speedup"] == 1.0
        assert (row["temporaries"] is None) == (row["contender"] == "torch eager")
        assert row["speedup_over_plain_jax"] == 1.0
    # 2 passes of 120 values at 1 GB/s; taps of x, and of 4 subbands of 3 x 3 and of 2 x 2 values.
    forward, both = rows["forward", "flash"], rows["forward+backward", "flash"]
    assert forward["floor_ms"] == pytest.approx(2 * 120 * 4 / 1e6)
    assert forward["over_floor"] == pytest.approx(2.0 / forward["floor_ms"])
    assert both["floor_ms"] == pytest.approx(2.5 * forward["floor_ms"])
    assert forward["multiply_adds"] == 9 * 4 * (30 + 4 * 9 + 4 * 4)
    assert both["multiply_adds"] == 3 * forward["multiply_adds"]
    assert forward["extra_memory"] == pytest.approx(forward["temporaries"] + 1.0)


@WIDE
@UNDRAWN
def test_signals_are_timed_too(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="the third contender is PyTorch")
    monkeypatch.setitem(shapes.SHAPES, "signal", shapes.Line(1, 30, 4, 2, kernel_size=3))
    result = bench("--shape", "signal", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "wtconv.json").read_text())["rows"]
    assert len(rows) == 6 and all(row["x"] == [1, 30, 4] for row in rows)
    # Taps of x, and of 2 subbands of 15 and of 8 values.
    assert rows[0]["multiply_adds"] == 3 * 4 * (30 + 2 * 15 + 2 * 8)


def test_a_failed_picture_loses_no_measurement(capsys, tmp_path):
    def fail(report):
        raise RuntimeError("latex could not be found")

    report = {"benchmark": "x", "no_device_events": "no [/a]"}
    tell(report, Table("a heading", title="t[/b]"), {"x": fail}, tmp_path / "out [c]")
    printed = capsys.readouterr()
    assert json.loads((tmp_path / "out [c]" / "x.json").read_text()) == report
    assert printed.err.endswith("out [c]/x.png could not be drawn: latex could not be found\n")
    for text in ("no [/a]", "t[/b]", f"wrote {tmp_path}/out [c]/x.json"):
        assert text in printed.out


def test_unknown_shape_and_baseline_are_named(tmp_path):
    result = bench("--shape", "no", "--out", tmp_path)
    assert isinstance(result.exception, ValueError)
    assert "['no']" in str(result.exception) and "convnext_t_stage1" in str(result.exception)
    result = bench("--shape", "small", "--baseline", "no", "--out", tmp_path)
    assert isinstance(result.exception, ValueError)
    assert "baseline: 'no'" in str(result.exception)
    assert not list(tmp_path.iterdir())


@UNDRAWN
def test_without_torch_plain_jax_is_the_baseline(monkeypatch, tmp_path):
    monkeypatch.setattr(wtconv, "_registered", lambda dtype: {})
    # The device is the one that JAX takes anyway.
    assert bench("--shape", "pixel", "--device", "cpu", "--out", tmp_path).exit_code == 0
    report = json.loads((tmp_path / "wtconv.json").read_text())
    assert report["baseline"] == "plain jax"
    assert {row["contender"] for row in report["rows"]} == {"flash", "plain jax"}


def test_a_file_in_the_way_is_found_before_anything_is_timed(tmp_path):
    (tmp_path / "file").write_text("")
    result = bench("--shape", "no", "--out", tmp_path / "file")
    assert isinstance(result.exception, NotADirectoryError)


@UNDRAWN
def test_another_dtype_and_one_that_is_none(tmp_path):
    assert bench("--shape", "pixel", "--dtype", "bfloat16", "--out", tmp_path).exit_code == 0
    report = json.loads((tmp_path / "wtconv.json").read_text())
    assert report["dtype"] == "bfloat16" and report["baseline"] == "plain jax"
    for more in ([], ["--write-defaults"]):
        result = bench("--shape", "small", "--dtype", "int", *more, "--out", tmp_path)
        assert "dtype: 'int' is not one of ['float32'" in str(result.exception)


@UNDRAWN
def test_an_accelerator_is_measured_beside_a_depthwise_convolution(monkeypatch, tmp_path):
    monkeypatch.setattr(wtconv, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    result = bench("--shape", "pixel", "--baseline", "depthwise 7x7", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "wtconv.json").read_text())
    rows = report["rows"]
    assert {row["contender"] for row in rows} == {"flash", "plain jax", "depthwise 7x7"}
    assert wtconv._rival(shapes.GPU_LINES["audio"]) == "depthwise 7"
    # Twenty calls are waited for together.
    assert {row["median_ms"] for row in rows} == {0.1}
    # The host's clock is the users' own.
    assert report["users_clock"] is None and {row["users"] for row in rows} == {None}
    assert {r["multiply_adds"] for r in rows if r["contender"] == "depthwise 7x7"} == {
        49,
        3 * 49,
    }


@UNDRAWN
def test_a_gpu_is_timed_by_two_clocks(monkeypatch, tmp_path):
    events = SimpleNamespace(
        name="device events",
        turns=lambda contenders: contenders,
        take_turns=lambda contenders, step: {n: Spread(3.0, 2.0, 5.0) for n in contenders},
    )
    monkeypatch.setattr(clocks, "best", lambda: (events, None))
    monkeypatch.setattr(wtconv, "_registered", lambda dtype: {})
    result = bench("--shape", "pixel", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for text in ("as users", "one jit, called back to back", "3.0 (2.0-5.0)", "device events"):
        assert text in " ".join(result.output.split())
    report = json.loads((tmp_path / "wtconv.json").read_text())
    assert (report["clock"], report["users_clock"]) == ("device events", "host")
    for row in report["rows"]:
        assert row["median_ms"] == 3.0 and row["users"]["median_ms"] == 2.0
        assert row["users"]["speedup_over_plain_jax"] == 1.0
    assert "back to back" in drawings.speedups(report).get_suptitle()


def test_a_device_that_is_not_here(monkeypatch, tmp_path):
    for name, message in (
        ("tpu", "device: JAX finds no tpu here, only \\['cpu'\\]"),
        ("npu", "device: 'npu' is not one of \\['cpu', 'gpu', 'tpu'\\]"),
    ):
        for benchmark in ("wtconv", "wtconvnext"):
            result = bench("--device", name, "--out", tmp_path, benchmark=benchmark)
            with pytest.raises(ValueError, match=message):
                raise result.exception
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ValueError, match=r"JAX finds no tpu here, only \['cpu'\]$"):
        devices.first("tpu")
    assert not list(tmp_path.iterdir())


@UNDRAWN
def test_several_implementations_are_contenders_and_the_fastest_is_kept(
    monkeypatch, tmp_path, longer
):
    ours = wtconv._WTCONV[2]
    monkeypatch.setattr(wtconv, "_registered", lambda dtype: {})
    monkeypatch.setattr(wtconv, "implementations", lambda shape, dtype: ["mosaic_tpu", "xla"])
    named = lambda x, params, implementation=None: ours(x, params)  # noqa: E731
    monkeypatch.setitem(wtconv._WTCONV, 2, named)
    monkeypatch.setattr(table, "FOLDER", tmp_path / "defaults")
    result = bench("--shape", "pixel", "--write-defaults", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "wtconv.json").read_text())["rows"]
    assert [row["contender"] for row in rows if row["direction"] == "forward"] == [
        "flash",
        "flash mosaic_tpu",
        "plain jax",
        "flash xla",
    ]
    kept = json.loads((tmp_path / "defaults" / "cpu.json").read_text())
    assert kept["device_kind"] == "cpu"
    assert [entry["direction"] for entry in kept["entries"]] == ["bwd", "fwd"]
    table.fastest.cache_clear()


def test_the_fastest_of_each_direction():
    def row(direction, contender, ms):
        shape = {"shape": "small", "x": [1, 6, 5, 4], "kernel_size": 3, "levels": 2}
        return shape | {"direction": direction, "contender": contender, "median_ms": ms}

    report = {
        "date": "2026-11-21",
        "dtype": "bfloat16",
        "versions": {"jax": "0.11.2", "numpy": "2.4"},
        "rows": [
            row("forward", "flash", 0.5),
            row("forward", "flash triton", 2.0),
            row("forward", "flash xla", 1.0),
            row("forward", "plain jax", 0.1),
            row("forward+backward", "flash triton", 3.0),
            row("forward+backward", "flash xla", 4.0),
        ],
    }
    forward, backward = wtconv.defaults(report)
    assert (forward["direction"], forward["implementation"]) == ("fwd", "xla")
    assert (backward["direction"], backward["implementation"]) == ("bwd", "triton")
    assert forward["ms"] == {"triton": 2.0, "xla": 1.0}
    assert backward["ms"] == {"triton": 1.0, "xla": 3.0}
    assert forward["versions"] == {"jax": "0.11.2"}
    assert forward["problem"] == {
        "shape": [1, 6, 5, 4],
        "dtype": "bfloat16",
        "kernel_size": 3,
        "levels": 2,
        "wavelet": "haar",
    }
    # Nearly as fast is enough where that compiles in a second.
    for ms, taken in ((1.06, "cuda"), (1.08, "xla")):
        quick = {"rows": [*report["rows"][:4], row("forward", "flash cuda", ms)]}
        (found,) = wtconv.defaults(report | quick)
        assert found["implementation"] == taken
    del report["rows"][-2:]
    assert wtconv.defaults(report) == [forward]
    report["rows"] = [row("forward", "flash", 0.5), row("forward+backward", "flash", 0.5)]
    assert wtconv.defaults(report) == []


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (wtconv, "pixel"),
        (conv2d, "sd_unet_64_1x1"),
        (sparse, "room_10000_32_32_s1"),
        (stylize, "style_512_trunk"),
    ],
    ids=["wtconv", "conv2d", "sparse", "stylize"],
)
def test_defaults_without_a_choice_are_none(module, shape, monkeypatch, tmp_path):
    """That is said before anything is timed, and no table is written."""
    monkeypatch.setattr(table, "FOLDER", tmp_path / "defaults")
    for name in ("tell", "wtconv_table", "_conv2d_table", "_sparse_table", "_stylize_table"):
        monkeypatch.setattr(sys.modules[tell.__module__], name, lambda *_: None)
    report = {"rows": [], "left": [], "date": "2026-11-30", "versions": {}}
    monkeypatch.setattr(module, "run", lambda *_: report)
    name = module.__name__.rpartition(".")[2]
    result = bench("--shape", shape, "--write-defaults", "--out", tmp_path, benchmark=name)
    assert result.exit_code == 0
    assert result.output.startswith("--write-defaults will write nothing: no shape has several")
    assert not list(tmp_path.iterdir())


def test_sparse_layers_write_what_was_the_fastest(monkeypatch, tmp_path):
    """A call of another size and kernel finds it, one of another stride does not."""
    ms = {"triton": (1.0, 4.0), "xla": (2.0, 3.0)}
    rows = [
        {"shape": shape, "direction": direction, "contender": f"flash {name}", "median_ms": time}
        for shape in ("room_10000_64_128_s2", "depthwise_room_10000_128")
        for name, times in ms.items()
        for direction, time in zip(("forward", "forward+backward"), times, strict=True)
    ]
    report = {"date": "2026-11-28", "versions": {}, "dtype": "bfloat16", "rows": rows}
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    table.path("cpu").write_text(table.merged("cpu", sparse.defaults(report)))
    table.fastest.cache_clear()
    window = Window((2, 2, 2), (2, 2, 2), (1, 1, 1))
    layer = Problem((4, 5000, 32), "bfloat16", 64, window)
    grouped = Window((5, 5, 5), (1, 1, 1), (1, 1, 1), groups=16)
    wanted = {"fwd": "triton", "bwd": "xla"}
    for direction, name in wanted.items():
        assert table.fastest("sparse_conv", direction, layer, "cpu") == name
        other = layer._replace(window=window._replace(stride=(1, 1, 1)))
        assert table.fastest("sparse_conv", direction, other, "cpu") is None
        depthwise = DepthwiseProblem((1, 900, 16), "bfloat16", 16, grouped)
        assert table.fastest("sparse_depthwise_conv", direction, depthwise, "cpu") == name
    table.fastest.cache_clear()


@pytest.fixture
def styles(monkeypatch):
    """A norm and a layer that are tiny, and networks that are one product."""
    monkeypatch.setitem(norms.SHAPES, "tiny", norms.Shape(1, 3, 4, 2))
    monkeypatch.setitem(layers.SHAPES, "tiny_layer", layers.Shape(1, 4, 5, 2, 3, 3, residual=True))
    steps = {name: lambda params, x: params * x for name in ("plain jax", "flash", "flash xla")}
    monkeypatch.setattr(stylize, "_steps", lambda model, dtype: steps)

    def made(size, batch, dtype):
        return None, np.ones(3, np.float32), np.ones((batch, size, size, 3), np.float32)

    monkeypatch.setattr(stylize, "_made", made)
    monkeypatch.setattr(stylize, "_VITS", ())
    monkeypatch.setattr(stylize, "_registered", lambda: [])

    class Stylizer:
        """Tiles of which are one off."""

        def __init__(self, styles, dtype, tile=None):
            self.off = tile is not None

        def start(self, pixels):
            return lambda: pixels // 2 + self.off

    monkeypatch.setattr(stylize, "Stylizer", Stylizer)
    used = iter((5, 3_600_000))
    monkeypatch.setattr(stylize, "_most_in_use", lambda: next(used))


@pytest.mark.usefixtures("styles")
@pytest.mark.parametrize(
    "works", [["norm", "ladder", "large"], pytest.param(stylize.WORKS, marks=WIDE)]
)
def test_style_transfer(works, tmp_path, monkeypatch):
    monkeypatch.setattr(stylize, "implementations", lambda name, dtype: [])
    others = {"torch eager": Spread(8.0, 8.0, 8.0), "torch compiled": "out of memory"}
    registered = lambda params, images, dtype, training: others  # noqa: E731
    monkeypatch.setattr(stylize, "_registered_times", registered)
    arguments = ["--shape", "tiny", "--shape", "tiny_layer", "--size", 8, "--out", tmp_path]
    arguments += [one for work in works for one in ("--work", work)]
    result = bench(*arguments, benchmark="stylize")
    assert result.exit_code == 0, result.output
    assert "norm, tiny, float32, forward+backward; over plain jax" in result.output
    assert (tmp_path / "stylize.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "stylize.json").read_text())["rows"]
    assert {row["work"] for row in rows} == set(works)
    of = {(row["work"], row["direction"], row["contender"]): row for row in rows}
    assert of["norm", "forward", "flash"]["over_copy"] == 1.0
    large = of["large", "forward", "tiles"]
    assert (large["name"], large["off"], large["peak"]) == ("96 x 72", 1, 3_600_000)
    assert of["ladder", "forward", "flash float32"]["speedup"] == 4.0
    assert of["ladder", "forward", "flash float32"]["baseline"] == "torch eager float32"
    assert of["ladder", "forward", "torch compiled float32"]["why_not"] == "out of memory"
    assert "out of memory" in result.output
    if "layer" in works:
        assert of["layer", "forward+backward", "flash parts"]["temporaries"] >= 0
        assert of["network", "forward", "torch eager"]["speedup"] == 0.25
        assert of["training", "step", "torch compiled"]["why_not"] == "out of memory"
        assert ("style_vit", "forward", "TransformerNet") in of


@pytest.mark.usefixtures("styles")
def test_a_run_that_is_stopped_leaves_what_it_has_timed(tmp_path, monkeypatch):
    """The report that is there says what is not, so that no part of `bench all` counts as made."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stylize, "_network", stopped)
    arguments = "--work", "ladder", "--work", "network", "--size", 8, "--out", tmp_path / "part"
    assert bench(*arguments, benchmark="stylize").exit_code == 130
    report = json.loads((tmp_path / "part" / "stylize.json").read_text())
    assert {row["work"] for row in report["rows"]} == {"ladder"}
    assert report["left"] == ["network 8 x 8, batch 1, float32"]
    part = everything.Part("part", (), "stylize.json")
    assert not everything.is_made(tmp_path, part)
    monkeypatch.setattr(stylize, "_network", stylize._training)
    assert bench(*arguments, benchmark="stylize").exit_code == 0
    assert everything.is_made(tmp_path, part)


def test_the_fastest_layers_are_kept_and_their_parts_too():
    names = {"style_512_trunk": (3.0, 1.0, 2.0), "style_512_down1": (1.0, 3.0, 2.0)}
    rows = [
        {"work": "layer", "name": name, "dtype": "bfloat16", "direction": direction}
        | {"contender": f"flash {who}", "median_ms": ms * times}
        for name, each in names.items()
        for who, ms in zip(("parts", "mosaic_gpu", "triton"), each, strict=True)
        for direction, times in (("forward", 1), ("forward+backward", 3))
    ]
    rows += [row | {"work": "norm", "median_ms": row["median_ms"] / 2} for row in rows[2:6]]
    report = {"date": "2026-11-28", "versions": {}, "rows": rows}
    kept = [
        (entry["operator"], entry["direction"], entry["implementation"], entry["problem"]["shape"])
        for entry in stylize.defaults(report)
    ]
    trunk = (8, 128, 128, 128)
    assert kept == [
        ("instance_norm", "fwd", "mosaic_gpu", trunk),
        ("instance_norm", "bwd", "mosaic_gpu", trunk),
        ("conv2d_instance_norm", "fwd", "mosaic_gpu", trunk),
        ("conv2d_instance_norm", "fwd", "parts", (8, 512, 512, 32)),
    ]
    window = stylize.defaults(report)[-1]["problem"]["window"]
    assert window["stride"] == (2, 2) and "pads" not in window


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--work", "sleep"), "work: ['sleep'] is not one of ['norm',"),
        (("--shape", "huge"), "shape: ['huge'] is not one of"),
        (("--dtype", "int8"), "dtype: 'int8' is not one of"),
        (("--size", 4), "size must be at least 8, got 4"),
        (("--batch", 0), "batch must be at least 1, got 0"),
    ],
)
def test_style_transfer_that_is_none(tmp_path, arguments, message):
    result = bench(*arguments, "--out", tmp_path, benchmark="stylize")
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_step_of_the_network_is_the_network(monkeypatch):
    """PyTorch's too, whose times are taken."""
    model, params, images = stylize._made(16, 1, "float32")
    found = {who: step(params, images) for who, step in stylize._steps(model, "float32").items()}
    assert set(found) == {"plain jax", "norm alone", "convolution+norm", "flash", "flash xla"}
    for y in found.values():
        np.testing.assert_allclose(y, found["flash"], atol=1e-3)
    torch = pytest.importorskip("torch")
    from torch_bridge import stylize_contender as contender

    arrays, own = {}, contender.times

    def times(parameters, images, dtype, training):
        arrays["tensors"] = {name: torch.tensor(value) for name, value in parameters.items()}
        return own(parameters, images, dtype, training=training)

    monkeypatch.setattr(contender, "times", times)
    monkeypatch.setattr(stylize, "_registered", lambda: [contender])
    for training in (False, True):
        rest = stylize._registered_times(params, images, "float32", training=training)
        assert list(rest) == ["torch eager"] and rest["torch eager"].median == 2.0
    y = contender.network(arrays["tensors"], torch.tensor(np.array(images)).permute(0, 3, 1, 2))
    np.testing.assert_allclose(y.permute(0, 2, 3, 1), found["flash"], atol=1e-3)


@pytest.fixture
def networks(monkeypatch):
    """Two very small networks instead of the tiny ones."""

    def network(levels):
        config = models.ConvNeXtConfig(
            depths=(1,), dims=(4,), levels=levels, kernel_size=1, num_classes=5
        )
        return lambda *, rngs, dtype: models.ConvNeXt(replace(config, dtype=dtype), rngs=rngs)

    made = {"WTConvNeXt": network((1,)), "ConvNeXt": network(None)}
    monkeypatch.setitem(wtconvnext.MODELS, "tiny", made)
    return made


@pytest.mark.wide
def test_networks(networks, monkeypatch, tmp_path):
    graphs, made = [], wtconvnext.Network

    def recorded(*arguments, **options):
        graphs.append(options["graphs"])
        return made(*arguments, **options)

    monkeypatch.setattr(wtconvnext, "Network", recorded)
    arguments = "--batch", 2, "--size", 8, "--profile", "--out", tmp_path
    result = bench(*arguments, "--work", "inference", benchmark="wtconvnext")
    assert "a profile needs a GPU" in str(result.exception)

    def summed(program, call, parts):
        """Each operation of a part of the program takes a millisecond."""
        of = profile.scopes(program)
        events = [clocks.Event("", 0.0, 1e6, name) for name in of]
        return profile.summed(events, of, parts, calls=2)

    monkeypatch.setattr(profile, "shares", summed)
    result = bench(*arguments, benchmark="wtconvnext")
    assert result.exit_code == 0, result.output
    # Of a kernel of a CUDA graph the profiler tells no operation.
    assert set(graphs) == {False}
    report = json.loads((tmp_path / "wtconvnext.json").read_text())
    assert report["users_clock"] is None and not any(row["users"] for row in report["rows"])
    assert "where the time goes" in result.output and "…" not in result.output
    assert (tmp_path / "wtconvnext.png").read_bytes().startswith(b"\x89PNG")
    assert (report["batch"], report["size"], report["dtype"]) == (2, 8, "float32")
    rows = {(row["work"], row["contender"]): row for row in report["rows"]}
    assert set(rows) == {(work, name) for work in wtconvnext.WORK for name in networks}
    for row in rows.values():
        assert row["images_per_s"] == 1000.0 and row["speedup"] == 1.0
    assert "1,000" in result.output
    parts = {(row["work"], row["direction"], row["part"]) for row in report["profile"]}
    # Of so few pixels nothing is folded.
    inside = {"stem", "depthwise", "norm", "fc1", "fc2", "head"}
    assert {("inference", "forward", part) for part in inside} <= parts
    backward = {("training", "backward", part) for part in {*inside, "slope"}}
    assert backward | {("training", "forward", "optimizer")} <= parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "huge"), "model: 'huge' is not one of ['tiny', 'small', 'base']"),
        (("--dtype", "int8"), "dtype: 'int8' is not one of"),
        (("--batch", 0), "batch must be at least 1, got 0"),
        (("--size", 0), "size must be at least 1, got 0"),
        (("--work", "sleep"), "work: ['sleep'] is not one of ['inference', 'training']"),
    ],
)
def test_networks_that_are_none(tmp_path, arguments, message):
    result = bench(*arguments, "--out", tmp_path, benchmark="wtconvnext")
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_on_a_gpu_each_implementation_is_timed_by_device_events(monkeypatch, networks, tmp_path):
    pytest.importorskip("jax_triton", reason="the second implementation is Triton's")
    layer = shapes.Shape(2, 16, 16, 32, 2, kernel_size=3)
    monkeypatch.setitem(shapes.FOR_PLATFORM["gpu"], "small", layer)
    monkeypatch.setattr(table, "FOLDER", tmp_path / "defaults")
    result = bench("--shape", "small", "--write-defaults", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "wtconv.json").read_text())
    assert (report["clock"], report["no_device_events"]) == ("device events", None)
    ours = {"flash", "flash triton", "flash xla"}
    assert ours | {"plain jax", "depthwise 7x7"} <= {row["contender"] for row in report["rows"]}
    assert all(0 < row["least_ms"] <= row["median_ms"] for row in report["rows"])
    (kept,) = (tmp_path / "defaults").glob("*.json")
    assert len(json.loads(kept.read_text())["entries"]) == 2
    table.fastest.cache_clear()
    arguments = "--batch", 2, "--size", 8, "--profile", "--out", tmp_path
    result = bench(*arguments, benchmark="wtconvnext")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "wtconvnext.json").read_text())
    assert (report["clock"], report["dtype"]) == ("device events", "bfloat16")
    assert {"depthwise", "fc1", "optimizer"} <= {row["part"] for row in report["profile"]}


def test_everything_is_made_in_parts(monkeypatch, tmp_path, undrawn):
    """A run goes on where the one before it was stopped, and joins what belongs together."""
    row = {"shape": "one", "direction": "forward", "contender": "flash", "temporaries": None}
    row |= {"over_floor": 2.0, "speedup": 1.0, "extra_memory": None, "implementation": None} | MS
    report = {"device": {"kind": "a GPU"}, "dtype": "float32", "baseline": "plain jax"}
    roofs = {"copy_bytes_per_s": 1e12, "fma_per_s": 1e13}
    report |= {"benchmark": "wtconv"}
    report |= {"roofs": roofs, "clock": "device events", "rows": [row]}
    report |= {"no_device_events": None, "users_clock": None}
    made = []

    def run(command, **_):
        if "--out" not in command:
            return SimpleNamespace(returncode=0)
        name = command[command.index("--out") + 1].rpartition("/")[2]
        if name == "depthwise" and "sparse" not in made:
            raise subprocess.TimeoutExpired(command, 0)
        made.append(name)
        if name != "compile_0":
            (part,) = (part for part in everything.parts("gpu") if part.name == name)
            (tmp_path / name / part.report).write_text(json.dumps(report))
        return SimpleNamespace(returncode=int(name == "compile_0"))

    known = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(everything, "subprocess", SimpleNamespace(run=run, **known))
    first = bench("--out", tmp_path, benchmark="all")
    assert first.exit_code == 0, first.output
    assert "depthwise was stopped after 9.0 minutes" in first.output
    assert "not made yet: depthwise, sparse_bfloat16_0, sparse_bfloat16_1" in first.output
    joined = json.loads((tmp_path / "wtconv_float32.json").read_text())
    assert joined["benchmark"] == "wtconv" and len(joined["rows"]) == 4
    assert (tmp_path / "wtconv_bfloat16_roofline.png").exists()
    before = list(made)
    made.append("sparse")
    last = bench("--out", tmp_path, benchmark="all")
    # It had been begun before.
    assert made[-1] == "depthwise"
    assert "compile_0 failed, exit code 1" in last.output
    assert "not made yet: compile_0" in last.output and not set(before) & set(
        made[len(before) + 1 :]
    )
    for arguments, message in (
        (("--device", "cpu"), "'cpu' has no published figures"),
        (("--minutes", 0), "minutes must be more than 0"),
    ):
        assert message in str(bench(*arguments, "--out", tmp_path, benchmark="all").exception)


def test_nothing_is_made_without_the_device(tmp_path):
    """PyTorch's parts would be timed on the CPU."""
    refused = str(bench("--out", tmp_path, benchmark="all").exception)
    assert refused.startswith("device: JAX finds no gpu here")
    assert not list(tmp_path.iterdir())


PUBLISHED = Path(__file__).parents[2] / "docs" / "results"


def asked(part):
    """The benchmark of a part, and the values of its options."""
    words = " ".join(part.command[part.command.index("bench") + 1 :])
    options = {}
    for option, value in re.findall(r"--(\S+) ?((?:(?!--).)*?)(?= --|$)", words):
        options.setdefault(option, []).append(value)
    name, _, _ = words.partition("--")
    return name.strip() or "torch_wtconv", options


@pytest.mark.parametrize(
    "path",
    # Those of two GPUs, and of what was before, are no command's of one GPU now.
    [path for path in PUBLISHED.glob("*_h200*.json") if not re.search("h200x2|before", path.stem)],
    ids=lambda path: path.stem,
)
def test_every_published_figure_of_a_gpu_is_made_in_parts(path):
    report = json.loads(path.read_text())
    if report["benchmark"] == "torch_wtconv":
        pytest.importorskip("torch", reason="without PyTorch it has no parts")
    parts = map(asked, everything.parts("gpu"))
    mine = [options for name, options in parts if name == report["benchmark"]]
    # These take all dtypes, or have one of their own, where they are not told.
    if report["benchmark"] not in ("stylize", "wtconvnext", "compile"):
        assert all("dtype" in options for options in mine)
    facts = "dtype", "shape", "work", "size", "batch", "program"
    for row in report["rows"]:
        of_row = {fact: row.get(fact, report.get(fact)) for fact in facts}
        allowed = [
            options
            for options in mine
            if all(str(of_row[fact]) in options.get(fact, [str(of_row[fact])]) for fact in facts)
        ]
        if report["benchmark"] == "wtconv" and row["contender"].startswith("flash "):
            allowed = [options for options in allowed if "write-defaults" in options]
        if "profile" in path.stem:
            allowed = [options for options in allowed if "profile" in options]
        assert allowed, of_row


def test_first_calls_are_timed_in_processes_of_their_own(monkeypatch, tmp_path):
    seconds = dict.fromkeys((*compiling.STEPS, "all"), 2.0)

    def run(command, env, **_):
        assert env["JAX_ENABLE_COMPILATION_CACHE"] == "false"
        if "float32" in command[3]:
            return SimpleNamespace(returncode=1, stderr="first\nout of memory\n")
        about = {"device": {"kind": "a GPU"}, "versions": {"jax": "0.11"}}
        out = json.dumps({"seconds": seconds, "about": about})
        return SimpleNamespace(returncode=0, stdout=f"a warning\n{out}\n")

    monkeypatch.setattr(compiling, "subprocess", SimpleNamespace(run=run))
    arguments = "--program", compiling.PROGRAMS[0], "--program", compiling.PROGRAMS[2]
    result = bench(*arguments, "--out", tmp_path, benchmark="compile")
    assert result.exit_code == 0, result.output
    assert "WTConvNeXt-T inference" in result.output and "2.00" in result.output
    rows = json.loads((tmp_path / "compile.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["flash", "plain jax"] * 2
    for arguments, message in (
        (("--program", "x"), "program: ['x'] is not one of"),
        (("--program", compiling.PROGRAMS[1]), "layer, float32 by flash fails: out of memory"),
    ):
        assert message in str(bench(*arguments, "--out", tmp_path, benchmark="compile").exception)


@pytest.mark.slow
@pytest.mark.parametrize("program", compiling.PROGRAMS)
def test_first_calls_on_this_machine(program, tmp_path):
    result = bench("--program", program, "--out", tmp_path, benchmark="compile")
    assert result.exit_code == 0, result.output
    for row in json.loads((tmp_path / "compile.json").read_text())["rows"]:
        assert (
            0 < row["compile"] < row["all"] == pytest.approx(sum(row[s] for s in compiling.STEPS))
        )


_TWICE = """
import json, jax, jax.numpy as jnp, numpy as np
from flash_wtconv_jax.models import ConvNeXt, ConvNeXtConfig
from flax import nnx
from pallas_kernels.wtconv import wtconv2d
seen = {"hits": 0, "misses": 0}
def listen(event, **_):
    for name in seen:
        seen[name] += event == f"/jax/compilation_cache/cache_{name}"
jax.monitoring.register_event_listener(listen)
config = ConvNeXtConfig(depths=(1,), dims=(4,), levels=(1,), num_classes=3)
model = nnx.jit(lambda: ConvNeXt(config, rngs=nnx.Rngs(0)))()
step = nnx.jit(nnx.value_and_grad(lambda model, x: jnp.sum(model(x) ** 2)))
jax.block_until_ready(step(model, jnp.ones((1, 32, 32, 3))))
alone = dict(seen)
# Partitioned by our own rules, which a key holds too.
mesh = jax.make_mesh((4,), ("n",))
x = jax.device_put(np.ones((4, 6, 5, 4), "float32"), jax.NamedSharding(mesh, jax.P("n")))
params = {"base_kernel": np.ones((3, 3, 1, 4), "float32"), "base_scale": np.ones(4, "float32")}
seen.update(hits=0, misses=0)
jax.block_until_ready(jax.jit(wtconv2d)(x, params))
print(json.dumps([alone, seen]))
"""


@pytest.mark.wide
def test_a_second_process_compiles_no_program(tmp_path):
    """As README says: with a folder for JAX's compilation cache."""
    env = with_devices(4) | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    run = partial(subprocess.run, [sys.executable, "-c", _TWICE], env=env, capture_output=True)
    both = [json.loads(run(text=True, check=True).stdout.splitlines()[-1]) for _ in "12"]
    for first, second in zip(*both, strict=True):
        assert first["misses"] > 0 and second["misses"] == 0
        assert second["hits"] >= first["misses"]


def test_host_time_of_warm_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "CALLS", 2)
    result = bench("--out", tmp_path, benchmark="host")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "host.json").read_text())
    names = {row["contender"] for row in report["rows"]}
    assert {"linen WTConv2d", "nnx WTConv2d", "wtconv2d", "conv2d", "wavedec2"} <= names
    assert ("torch WTConv2d" in names) == (find_spec("torch") is not None)
    assert all(0 < row["least"] <= row["median"] <= row["greatest"] for row in report["rows"])
    assert all(name in result.output for name in names)


class TestSpread:
    REPORT = {
        "dtype": "float32",
        "baseline": "plain jax",
        "clock": "host",
        "users_clock": None,
        "device": {"platform": "cpu", "kind": "cpu"},
        "date": "2026-01-01",
        "roofs": {"copy_bytes_per_s": 1e9, "fma_per_s": 1e10},
    }

    def rows(self):
        times = {"plain jax": Spread(3.0, 2.5, 3.5), "flash": Spread(1.5, 1.0, 2.5)}
        for direction in ("forward", "forward+backward"):
            for who, spread in times.items():
                yield {
                    "shape": "small",
                    "x": [1, 6, 5, 4],
                    "levels": 2,
                    "direction": direction,
                    "contender": who,
                    "implementation": None,
                    "temporaries": None,
                    "extra_memory": None,
                    "over_floor": 2.0,
                    "users": None,
                    **{f"{key}_ms": value for key, value in spread._asdict().items()},
                    **timing.comparison(spread, times["plain jax"]),
                }

    def test_is_told_where_it_is_too_wide_to_compare(self):
        report = self.REPORT | {"rows": list(self.rows())}
        cells = {
            column.header: list(column.cells)
            for column in wtconv_table(report).columns
            if column.header != "x"
        }
        assert cells["forward"][1:] == ["3.0 (2.5-3.5)", "1.5 (1.0-2.5)"]
        compared = [list(one.cells) for one in wtconv_table(report).columns if one.header == "x"]
        assert compared == [["", "1.00", "too noisy to compare"]] * 2

    def test_is_drawn_as_whiskers_and_hatches(self):
        figure = plots.speedups(self.REPORT | {"rows": list(self.rows())})
        axes = figure.axes[0]
        plain, flash = (one for one in axes.containers if isinstance(one, BarContainer))
        assert [bar.get_hatch() for bar in (*plain, *flash)] == [None, "///"]
        ((low, high),) = (segment[:, 1] for segment in flash.errorbar.lines[2][0].get_segments())
        # 1.5 ms are twice the speed of 3 ms; 2.5 ms and 1 ms are 1.2 and 3 times.
        assert (low, high) == pytest.approx((1.2, 3.0))
        texts = {text.get_text() for text in axes.texts}
        assert texts == {"1", "noisy"}


def test_a_call_over_devices_that_fails_leaves_the_others(monkeypatch):
    def trained(count, kind, small):
        raise RuntimeError("no room")

    def cut(count, kind, small):
        return {"kind": kind, "devices": count, "median_ms": 1.0, "wrong": None}

    monkeypatch.setattr(sharding, "_trained", trained)
    monkeypatch.setattr(sharding, "_cut", cut)
    report = sharding.run(lambda *_: lambda: None, ["training", "rows"], [1])
    # One device is told of once: nothing is split there.
    assert [(row["part"], row["kind"]) for row in report["rows"]] == [("rows", "Explicit")]
    assert report["failed"] == ["training: 1 devices, Explicit: RuntimeError: no room"]


def test_sharding_refuses_what_it_does_not_have_and_shows_what_it_found(tmp_path):
    silent = lambda *_: lambda: None  # noqa: E731
    for wrong, message in (
        ({"devices": [99]}, "devices: 99, expected 1 to"),
        ({"parts": ["inference"]}, r"parts: \['inference'\], expected some of operators"),
        ({"operators": ["wtconv4d"]}, "'wtconv4d' is not one of wtconv1d"),
    ):
        with pytest.raises(ValueError, match=message):
            sharding.run(silent, **wrong)
    report = sharding.run(silent, devices=[1], minutes=0)
    assert not report["rows"]
    assert "wtconv2d over h, Auto" in " ".join(report["left"])
    ran = CliRunner().invoke(app, ["bench", "sharding", "--minutes", "0", "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    assert "not run yet: operators: wtconv1d over n, Explicit" in " ".join(ran.output.split())
    row = {"part": "rows", "label": "2 devices, Auto", "median_ms": 2.0, "efficiency": 0.875}
    rest = {"collectives": {"all-reduce": (1, 1024)}, "wrong": None}
    operator = {"part": "operators", "label": "haar over n, Auto", "errors": [0.0, 2e-7]}
    found = report | {"rows": [operator | rest, row | rest]}
    cells = [list(column.cells) for column in _sharding_table(found).columns]
    summed = "1 all-reduce (1,024)"
    last = [column[-1] for column in cells]
    assert last == ["2 devices, Auto", "2.0", "", "0.88", "", summed, ""]
    assert [column[1] for column in cells][1:] == ["", "", "", "2.0e-07", summed, ""]
