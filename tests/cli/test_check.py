"""`flash-wtconv check` and `python -m torch_bridge check`: what they print, write and refuse."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from flash_wtconv_jax.cli import app
from pallas_kernels.common import conformance
from pallas_kernels.wtconv import cases
from pallas_kernels.wtconv.cases import Case

CASES = (Case((4, 5), 1, 3), Case((3,), 1, 3, "bfloat16"))


def test_jax_against_the_oracle(monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "CASES", CASES)
    result = CliRunner().invoke(app, ["check", "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    assert "2 pass, 0 fail" in result.output
    assert "skip mosaic_tpu, 2 cases: needs a TPU" in result.output
    written = json.loads((tmp_path / "a.json").read_text())
    assert {"device", "versions", "rows"} == set(written)
    rows = {(row["backend"], row["case"]): row for row in written["rows"]}
    exact, low = (rows["xla", case.name] for case in CASES)
    assert exact["status"] == low["status"] == "pass"
    assert 0 < exact["error"] <= exact["bound"] == 1e-5 < low["error"] <= low["bound"] < 0.1
    skipped = rows["triton", CASES[0].name]
    assert (skipped["status"], skipped["error"]) == ("skip", None)
    assert skipped["reason"].startswith("needs a GPU")


def test_a_file_that_cannot_be_written_is_told_first(tmp_path):
    result = CliRunner().invoke(app, ["check", "--json", str(tmp_path / "none" / "a.json")])
    assert isinstance(result.exception, FileNotFoundError) and "pass" not in result.output
    for command in ("check", "tpu-report"):
        result = CliRunner().invoke(app, [command, "--json", str(tmp_path)])
        assert result.exit_code == 2 and "directory" in result.output


class TestTorch:
    @pytest.fixture(autouse=True)
    def two_cases(self, monkeypatch):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        from torch_bridge import check

        monkeypatch.setattr(check, "CASES", CASES)
        monkeypatch.setattr(check, "best_device", lambda: torch.device("cpu"))
        # These have tests of their own, with many compilations.
        for module in (check.cuda, check.metal):
            monkeypatch.setattr(module, "unavailable", lambda: "needs the compiler g++")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def check(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["torch_bridge", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("torch_bridge", run_name="__main__")
        return stopped.value.code

    def test_against_the_oracle(self, monkeypatch, capsys, tmp_path):
        assert self.check(monkeypatch, "--json", tmp_path / "a.json") == 0
        output = capsys.readouterr().out
        assert "3 pass, 0 fail, 15 skip" in output
        assert "skip cuda, 2 cases: needs an NVIDIA GPU, this is cpu" in output
        assert "skip triton, 2 cases: needs a GPU, this is cpu" in output
        assert "skip metal, 2 cases: needs an Apple GPU, this is cpu" in output
        rows = json.loads((tmp_path / "a.json").read_text())["rows"]
        assert [row["backend"] for row in rows] == [
            *("cuda", "cuda", "cuda channels-last"),
            *("triton", "triton", "triton channels-last"),
            *("metal", "metal", "metal channels-last"),
            *("eager", "eager", "eager channels-last"),
            *("cuda on CPU", "cuda on CPU", "cuda on CPU channels-last"),
            *("metal on CPU", "metal on CPU", "metal on CPU channels-last"),
        ]

    def test_a_swapped_subband_fails(self, monkeypatch, capsys):
        from torch_bridge.wtconv import eager

        transform = eager.wavelet_transform
        swapped = lambda x, filters: transform(x, filters)[:, :, [0, 2, 1, 3]]  # noqa: E731
        monkeypatch.setattr(eager, "wavelet_transform", swapped)
        monkeypatch.setattr("torch_bridge.check.CASES", CASES[:1])
        assert self.check(monkeypatch) == 1
        output = capsys.readouterr().out
        assert "0 pass, 2 fail" in output and "is off by" in output

    def test_what_cannot_be_written_is_one_line(self, monkeypatch, capsys, tmp_path):
        assert self.check(monkeypatch, "--json", tmp_path / "none" / "a.json") == 1
        assert capsys.readouterr().err.startswith("error: no folder")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda got: got | {"y": got["y"] + 1e-3}, "y is off by"),
        (lambda got: got | {"dx": np.full_like(got["dx"], np.nan)}, "dx is off by nan"),
        (lambda got: got | {"base_scale": np.ones(2)}, r"base_scale has shape \(2,\), expected"),
        (lambda got: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_wrong_is_a_failure(change, reason):
    backend = conformance.Backend(
        "own", CASES[:1], lambda case: None, lambda case: change(dict(conformance.expected(case)))
    )
    (row,) = conformance.run([backend], conformance.expected)
    assert row["status"] == "fail"
    assert re.match(reason, row["reason"]), row
    json.dumps(row, allow_nan=False)
