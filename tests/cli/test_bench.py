"""`flash-wtconv bench`: what it writes and refuses. Nothing is timed here."""

import json

import pytest
from typer.testing import CliRunner

from flash_wtconv_jax.bench import timing, wtconv
from flash_wtconv_jax.cli import app
from pallas_kernels.wtconv import shapes


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One small shape, and each contender called once instead of timed."""
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.Shape(1, 6, 5, 4, 2, kernel_size=3))

    def once(contenders, step):
        for call in contenders.values():
            call()
            step()
        return {name: timing.Spread(2.0, 1.0, 4.0) for name in contenders}

    monkeypatch.setattr(wtconv, "take_turns", once)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "wtconv", *map(str, arguments)])


def test_report_table_and_picture(tmp_path):
    pytest.importorskip("torch", reason="the third contender is PyTorch")
    result = bench("--shape", "small", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "small" in result.output and "2.0 (1.0-4.0)" in result.output
    assert (tmp_path / "wtconv.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "wtconv.json").read_text())
    assert report["device"]["platform"] == "cpu" and "torch" in report["versions"]
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


def test_unknown_shape_and_baseline_are_named(tmp_path):
    result = bench("--shape", "no", "--out", tmp_path)
    assert isinstance(result.exception, ValueError)
    assert "['no']" in str(result.exception) and "convnext_t_stage1" in str(result.exception)
    result = bench("--shape", "small", "--baseline", "no", "--out", tmp_path)
    assert isinstance(result.exception, ValueError)
    assert "baseline: 'no'" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_without_torch_plain_jax_is_the_baseline(monkeypatch, tmp_path):
    monkeypatch.setattr(wtconv, "_has_torch", lambda dtype: False)
    assert bench("--shape", "small", "--out", tmp_path).exit_code == 0
    report = json.loads((tmp_path / "wtconv.json").read_text())
    assert report["baseline"] == "plain jax"
    assert {row["contender"] for row in report["rows"]} == {"flash", "plain jax"}


def test_a_file_in_the_way_is_found_before_anything_is_timed(tmp_path):
    (tmp_path / "file").write_text("")
    result = bench("--shape", "no", "--out", tmp_path / "file")
    assert isinstance(result.exception, NotADirectoryError)


def test_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "_REST_S", 0.0)
    monkeypatch.setattr(timing, "_TURN_S", 0.0)
    order = []
    times = timing.take_turns({name: lambda n=name: order.append(n) for name in "ab"})
    assert set(times) == {"a", "b"}
    turn = 1 + timing._CALLS
    assert order == (["a"] * turn + ["b"] * turn) * timing._ROUNDS


def test_another_dtype_and_one_that_is_none(tmp_path):
    assert bench("--shape", "small", "--dtype", "bfloat16", "--out", tmp_path).exit_code == 0
    report = json.loads((tmp_path / "wtconv.json").read_text())
    assert report["dtype"] == "bfloat16" and report["baseline"] == "plain jax"
    result = bench("--shape", "small", "--dtype", "int8", "--out", tmp_path)
    assert "dtype: 'int8' is not one of ['float32'" in str(result.exception)


def test_an_accelerator_is_measured_beside_a_depthwise_convolution(monkeypatch, tmp_path):
    monkeypatch.setattr(wtconv, "on_cpu", lambda: False)
    result = bench("--shape", "small", "--baseline", "depthwise 7x7", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "wtconv.json").read_text())["rows"]
    assert {row["contender"] for row in rows} == {"flash", "plain jax", "depthwise 7x7"}
    # Twenty calls are waited for together.
    assert {row["median_ms"] for row in rows} == {0.1}
