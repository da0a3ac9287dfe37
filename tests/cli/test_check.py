"""`flash-wtconv check` and `python -m torch_bridge check`: what they print, write and refuse."""

import json
import re
import runpy
import sys
from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from flash_wtconv_jax.cli import app
from flash_wtconv_jax.cli.check import rooms, show
from pallas_kernels.conv2d.cases import Case as Conv2dCase
from pallas_kernels.depthwise.cases import Case as PlainCase
from pallas_kernels.dispatch import tuning
from pallas_kernels.haar.cases import Case as HaarCase
from pallas_kernels.mlp.cases import Case as MlpCase
from pallas_kernels.sparse.cases import Case as SparseCase
from pallas_kernels.sparse.depthwise.cases import Case as DepthwiseCase
from pallas_kernels.stylize.cases import Case as NormCase
from pallas_kernels.stylize.convolution.cases import Case as ConvNormCase
from pallas_kernels.wtconv.cases import Case

CASES = (Case((4, 5), 1, 3), Case((3,), 1, 3, "bfloat16"))
FEW = {
    "conv2d": (
        Conv2dCase(1, 4, 5, 2, 3, 2, 3, padding="reflect", bias=True, activation="gelu"),
        Conv2dCase(1, 3, 4, 2, 2, 2, 3, layout="nchw_fchw", dtype="float16", out_dtype="float32"),
    ),
    "depthwise": (PlainCase(1, 4, 5, 2, 3),),
    "conv2d_instance_norm": (ConvNormCase(4, 3, 2, 3, 2, (1,)),),
    "haar": (HaarCase((3, 5), 2), HaarCase((7,), 1, "db2", "bfloat16"), HaarCase((1, 3, 2), 1)),
    "mlp": (MlpCase(5, 8, 16, 8),),
    "instance_norm": (NormCase(3, 4, 2, activation="relu", residual=True),),
    "sparse_conv": (SparseCase((5,), 6, 2, 3, ndim=1),),
    "sparse_depthwise_conv": (DepthwiseCase((5,), 6, 2, 2, groups=2, ndim=1),),
    "wtconv": CASES,
}


@pytest.fixture
def few(monkeypatch):
    """A few cases of each operator."""
    for name, (_, room) in rooms().items():
        monkeypatch.setattr(room, "CASES", FEW[name])


def check(*arguments):
    """Runs `flash-wtconv check`, which must pass; returns what it printed."""
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_operator_against_the_oracle(few, tmp_path):
    output = check("--json", tmp_path / "a.json")
    assert "13 pass, 0 fail" in output
    for operator in ("conv2d", "haar", "wtconv"):
        assert f"skip {operator} mosaic_tpu, {len(FEW[operator])} cases: needs a TPU" in output
    written = json.loads((tmp_path / "a.json").read_text())
    assert {"device", "versions", "rows"} == set(written)
    rows = {(row["operator"], row["backend"], row["case"]): row for row in written["rows"]}
    for operator, cases in FEW.items():
        for case in cases:
            row = rows[operator, "xla", case.name]
            assert row["status"] == "pass" and row["error"] <= row["bound"] < 0.1
            assert (row["bound"] == 1e-5) == (case.dtype == "float32")
    skipped = rows["wtconv", "triton", CASES[0].name]
    assert (skipped["status"], skipped["error"]) == ("skip", None)
    assert skipped["reason"].startswith("needs a GPU")


def test_options_narrow_it(few, tmp_path):
    path = tmp_path / "a.json"
    names = ["--implementation", "mosaic_tpu", "--implementation", "triton"]
    check("--operator", "haar", "--operator", "conv2d", *names, "--json", path)
    rows = json.loads(path.read_text())["rows"]
    assert list(dict.fromkeys((row["operator"], row["backend"]) for row in rows)) == [
        *(("conv2d", "triton"), ("conv2d", "mosaic_tpu")),
        *(("haar", "mosaic_tpu"), ("haar", "triton")),
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["--operator", "wtcon"],
            r"--operator wtcon: expected one of conv2d, conv2d_instance_norm, depthwise, haar, "
            "instance_norm, mlp, "
            "sparse_conv, sparse_depthwise_conv, wtconv$",
        ),
        (
            ["--operator", "haar", "--implementation", "cuda"],
            r"--implementation cuda: expected one of mosaic_gpu, mosaic_tpu, triton, xla$",
        ),
    ],
)
def test_an_unknown_name_is_one_line(arguments, error):
    result = CliRunner().invoke(app, ["check", *arguments])
    assert isinstance(result.exception, ValueError) and re.match(error, str(result.exception))


@pytest.mark.parametrize(("operator", "mode"), [("wtconv", "search"), ("sparse_conv", None)])
def test_nothing_is_measured(operator, mode, monkeypatch, searches):
    """Not even of an operator of which one name measures."""
    room = rooms()[operator][1]
    monkeypatch.setattr(room, "CASES", room.CASES[:1])
    with tuning(mode) if mode else nullcontext():
        assert "1 pass" in check("--operator", operator, "--implementation", "xla")
    assert searches == []


# Each room's own tests compute its cases with `xla` too.
@pytest.mark.slow
@pytest.mark.parametrize("operator", FEW)
def test_every_case_in_plain_jax(operator):
    output = check("--operator", operator, "--implementation", "xla")
    assert re.search(r"\d\d pass, 0 fail, 0 skip", output)


def test_a_file_that_cannot_be_written_is_told_first(tmp_path):
    result = CliRunner().invoke(app, ["check", "--json", str(tmp_path / "none" / "a.json")])
    assert isinstance(result.exception, FileNotFoundError) and "pass" not in result.output
    for command in ("check", "tpu-report"):
        result = CliRunner().invoke(app, [command, "--json", str(tmp_path)])
        assert result.exit_code == 2 and "directory" in result.output


def test_names_and_paths_are_no_markup(capsys, tmp_path):
    folder = tmp_path / "sweep[lr=0.1]"
    folder.mkdir()
    row = {"operator": "o[/a]", "backend": "[red]", "case": "c[/b]", "error": 0.5, "bound": 1.0}
    rows = [
        {**row, "status": "pass", "reason": None, "seconds": 1.0},
        {**row, "status": "skip", "reason": "no [/c]", "seconds": None},
    ]
    show(rows, {}, "t[/d]", folder / "r.json")
    output = capsys.readouterr().out
    for text in ("o[/a] [red]", "c[/b]", "no [/c]", "t[/d]", f"wrote {folder / 'r.json'}"):
        assert text in output


class TestTorch:
    @pytest.fixture(autouse=True)
    def two_cases(self, monkeypatch):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        from torch_bridge import check

        monkeypatch.setattr(check, "CASES", CASES)
        for name, (operator, _, room) in check.OTHERS.items():
            monkeypatch.setitem(check.OTHERS, name, (operator, FEW[name], room))
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
        assert "7 pass, 0 fail, 19 skip" in output
        assert "skip wtconv cuda, 2 cases: needs an NVIDIA GPU, this is cpu" in output
        assert "skip wtconv triton, 2 cases: needs a GPU, this is cpu" in output
        assert "skip wtconv metal, 2 cases: needs an Apple GPU, this is cpu" in output
        rows = json.loads((tmp_path / "a.json").read_text())["rows"]
        others = "depthwise", "instance_norm", "sparse_conv", "sparse_depthwise_conv"
        assert {row["operator"] for row in rows} == {"wtconv", *others}
        for name in others:
            own = [(r["backend"], r["status"]) for r in rows if r["operator"] == name]
            kernels = "cuda" if name == "depthwise" else "triton"
            assert own == [(kernels, "skip"), ("eager", "pass")]
        assert [row["backend"] for row in rows if row["operator"] == "wtconv"] == [
            *("cuda", "cuda", "cuda channels-last"),
            *("triton", "triton", "triton channels-last"),
            *("metal", "metal", "metal channels-last"),
            *("eager", "eager", "eager channels-last"),
            *("cuda on CPU", "cuda on CPU", "cuda on CPU channels-last"),
            *("metal on CPU", "metal on CPU", "metal on CPU channels-last"),
        ]

    def test_options_narrow_it(self, monkeypatch, tmp_path):
        options = ["--operator", "wtconv", "--implementation", "metal", "--implementation", "eager"]
        assert self.check(monkeypatch, *options, "--json", tmp_path / "a.json") == 0
        rows = json.loads((tmp_path / "a.json").read_text())["rows"]
        names = {row["backend"].removesuffix(" channels-last") for row in rows}
        assert names == {"metal", "eager", "metal on CPU"}

    def test_an_unknown_name_is_one_line(self, monkeypatch, capsys):
        assert self.check(monkeypatch, "--operator", "haar") == 1
        assert capsys.readouterr().err == (
            "error: --operator haar: expected one of wtconv, depthwise, instance_norm, "
            "sparse_conv, sparse_depthwise_conv\n"
        )
        assert self.check(monkeypatch, "--implementation", "xla") == 1
        assert "xla: expected one of cuda, triton, metal, eager" in capsys.readouterr().err

    def test_a_swapped_subband_fails(self, monkeypatch, capsys):
        from torch_bridge.wtconv import eager

        transform = eager.wavelet_transform
        swapped = lambda x, filters: transform(x, filters)[:, :, [0, 2, 1, 3]]  # noqa: E731
        monkeypatch.setattr(eager, "wavelet_transform", swapped)
        monkeypatch.setattr("torch_bridge.check.CASES", CASES[:1])
        assert self.check(monkeypatch, "--operator", "wtconv") == 1
        output = capsys.readouterr().out
        assert "0 pass, 2 fail" in output and "is off by" in output

    def test_what_cannot_be_written_is_one_line(self, monkeypatch, capsys, tmp_path):
        assert self.check(monkeypatch, "--json", tmp_path / "none" / "a.json") == 1
        assert capsys.readouterr().err.startswith("error: no folder")
