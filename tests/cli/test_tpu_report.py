"""`flash-wtconv tpu-report`: what it writes and refuses. Nothing is compiled here."""

import json
import re
from itertools import product

import jax
import pytest
from typer.testing import CliRunner

from flash_wtconv_jax import plots
from flash_wtconv_jax.aot import compiling, programs, report, sparse
from flash_wtconv_jax.cli import app

COMPUTATIONS = [
    {"name": "copy", "cycles": 50, "vmem_bytes": 5, "busy": {"VALU": 0.0}, "loops": []},
    {"name": "wtconv_forward.1", "cycles": 900, "busy": {"VALU": 0.5}, "loops": []},
    {"name": "wtconv_weight_grad.1", "cycles": 100, "busy": {"VALU": 1.0}, "loops": []},
    {"name": "depthwise_forward.1", "cycles": 200, "busy": {"VALU": 0.5}, "loops": []},
]


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """A compiler that answers at once: ours 1000 cycles, XLA's 5000, one of them never."""
    ours = compiling.Result(None, None, 1050, 250, 3 << 20, 128 << 20, 3 << 20, 1.0, COMPUTATIONS)
    xla = compiling.Result(None, "a branch on data", None, 5000)

    def run(jobs, on_result=lambda _: None):
        results = [xla if ":plain_" in job.program else ours for job in jobs]
        results[-1] = compiling.Result("not compiled within 180 s")
        for result in results:
            on_result(result)
        return results

    monkeypatch.setattr(compiling, "run", run)
    monkeypatch.setattr(compiling, "libtpu_version", lambda: "1.2")


def tpu_report(*arguments, **environment):
    return CliRunner().invoke(
        app, ["tpu-report", *map(str, arguments)], env={"COLUMNS": "80", **environment}
    )


def test_a_terminal_shows_the_time_left_and_whole_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    result = tpu_report("--out", tmp_path / "a.png", FORCE_COLOR="1", NO_COLOR="1")
    assert result.exit_code == 0, result.output
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", result.output).split())
    assert re.search(r"compiling for v5e \S* 100% 0:00:00 12/12", shown)
    assert "float32 forward: cycles 1,000, around 250, XLA 5,000, fewer 4.0x" in shown
    assert "…" not in shown


def test_one_shape_or_all_of_them(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(report, "run", lambda chip, shapes, *_: made.append(shapes) or 1 / 0)
    for arguments in ((), ("--all",), ("--shape", "image_2048"), ("--all", "--shape", "image_56")):
        result = tpu_report("--out", tmp_path / "a.png", *arguments)
    assert made == [["image_56"], list(report.TPU_SHAPES), ["image_2048"]]
    assert "--all takes every shape" in str(result.exception)


def test_table_json_and_picture(tmp_path):
    result = tpu_report(
        "--shape", "image_56", "--json", tmp_path / "a.json", "--out", tmp_path / "a.png"
    )
    assert result.exit_code == 0, result.output
    assert "no measurement" in " ".join(result.output.split())
    # No figure is cut where the columns are wider than what there is.
    assert "…" not in result.output
    assert all(figure in result.output for figure in ("1,000", "5,000", "4.0x", "3.0 MiB"))
    assert "haar image_56 bfloat16 backward, XLA's: not compiled within 180 s" in result.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["chip"] == "v5e" and written["versions"]["libtpu"] == "1.2"
    assert [(row["kernel"], row["dtype"], row["direction"]) for row in written["rows"]] == [
        *product(report.KERNELS, report.DTYPES, report.DIRECTIONS)
    ]
    first, *_, last = written["rows"]
    assert (first["name"], first["x"], first["levels"]) == ("image_56", [8, 56, 56, 128], 3)
    assert (first["cycles"], first["xla_cycles"], first["vmem_bytes"]) == (1000, 5000, 3 << 20)
    assert (first["around_cycles"], first["fewer"]) == (250, 4.0)
    assert first["busy"] == {"VALU": 0.55}
    assert first["floor_cycles"] == max(first["valu_floor_cycles"], first["hbm_floor_cycles"])
    assert first["xla_error"] == "a branch on data" and first["xla_bundle_cycles"] is None
    (depthwise, *_) = (row for row in written["rows"] if row["kernel"] == "depthwise")
    assert (depthwise["levels"], depthwise["kernel_size"], depthwise["cycles"]) == (0, 5, 200)
    assert last["kernel"] == "haar"
    assert [last[key] for key in ("cycles", "xla_cycles", "fewer")] == [None] * 3


def test_one_kernel_alone_is_counted(tmp_path):
    kernels = ("--kernel", "haar", "--kernel", "depthwise")
    result = tpu_report(*kernels, "--json", tmp_path / "a.json", "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert list(dict.fromkeys(row["kernel"] for row in rows)) == ["depthwise", "haar"]
    assert len(rows) == 8


def test_a_bar_a_kernel_and_none_below_its_floor():
    rows = [
        {"kernel": "wtconv", "direction": "forward", "name": "image_56", "dtype": dtype}
        | {"cycles": cycles, "around_cycles": around, "floor_cycles": 900, "xla_cycles": 5000}
        for dtype, cycles, around in (
            ("float32", 1000, 50),
            ("bfloat16", 500, 0),
            ("a", None, None),
        )
    ]
    figure = plots.static_cycles({"rows": rows, "chip": "v5e", "date": "2026-01-01"})
    (bars,) = figure.axes[0].containers
    assert [bar.get_height() for bar in bars] == [1050, 900, 900]
    assert [bar.get_hatch() for bar in bars] == [None, "///", None]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["1k", "900", "not counted"]


def test_sparse_convolutions_have_rows_of_their_own(tmp_path):
    names = "room_100000_64_128_s1", "room_100000_64_128_s2"
    arguments = [part for name in names for part in ("--shape", name)]
    result = tpu_report(*arguments, "--json", tmp_path / "a.json", "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "room_100000_64_128_s2 backward: not compiled within 180 s" in result.output
    assert "3.0 MiB" in result.output and "…" not in result.output
    # No picture of kernels that were not compiled.
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    rows = json.loads((tmp_path / "a.json").read_text())["sparse"]["rows"]
    assert [(row["name"], row["part"]) for row in rows] == [*product(names, sparse.PARTS)]
    assert (rows[0]["estimated_cycles"], rows[0]["temporary_bytes"]) == (250, 3 << 20)
    assert all(row["floor_cycles"] > 0 for row in rows)


@pytest.mark.parametrize("part", sparse.PARTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_sparse_programs_trace(part, stride):
    function, arguments = programs.sparse([64, 8, 16, 3, stride], "bfloat16", part)
    result = jax.eval_shape(function, *arguments)
    if part == "forward":
        assert result.shape == (64, 16)
    elif part == "backward":
        assert [each.shape for each in result] == [(64, 8), (27, 1, 8, 16)]


def test_floors_are_those_of_the_arithmetic_and_of_the_traffic():
    chip, shape = report.CHIPS["v5e"], report.TPU_SHAPES["image_56"]
    samples = 8 * 56 * 56 * 128
    # 50 operations a tap and coefficient; 1 + 1/4 + 1/16 coefficients a sample at three levels.
    assert report.floors(chip, "wtconv", shape, "float32", "forward") == (
        round(samples * (50 + 1.3125 * 54.25) / 4096),
        round(samples * 2 * 4 / 546),
    )
    assert report.floors(chip, "haar", shape, "bfloat16", "backward")[1] == round(
        samples * 2 * 2 / 546
    )


def test_what_is_wrong_is_named_before_anything_is_compiled(tmp_path):
    out = ("--out", tmp_path / "a.png")
    cases = {
        ("--chip", "v9", *out): "chip: 'v9' is not one of ['v5e'",
        ("--chip", "v9[/b]", *out): "chip: 'v9[/b]' is not one of ['v5e'",
        ("--kernel", "no", *out): "kernel: ['no'] is not one of ['wtconv'",
        ("--kernel", "haar", "--shape", "room_10000_32_32_s1", *out): "is of no sparse",
        ("--kernel", "depthwise", "--shape", "image_2048", *out): "none of the kernel's",
        ("--shape", "no", *out): "shape: ['no'] is not one of ['image_56'",
        ("--out", tmp_path / "no" / "a.png"): "no folder",
        ("--json", tmp_path / "no" / "a.json", *out): "no folder",
    }
    for arguments, message in cases.items():
        result = tpu_report(*arguments)
        assert message in str(result.exception), arguments
    assert not list(tmp_path.iterdir())
