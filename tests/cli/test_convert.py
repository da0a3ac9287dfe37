"""`flash-wtconv convert`, run in this process."""

import re

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from flash_wtconv_jax import checkpoints
from flash_wtconv_jax.cli.convert import convert

app = typer.Typer()
app.command()(convert)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    shapes = {"base_kernel": (5, 5, 1, 4), "base_bias": (4,), "base_scale": (4,)}
    shapes |= {"wavelet_kernel_0": (5, 5, 4, 4), "wavelet_scale_0": (4, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def assert_same(one, other):
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


def test_every_kind_to_every_kind(tmp_path, params):
    pytest.importorskip("torch")
    checkpoints.write_state_dict(tmp_path / "0.safetensors", checkpoints.to_torch(params))
    chain = ["0.safetensors", "1", "2.pth", "3.pth.tar", "4.pt", "5", "6.safetensors"]
    for source, destination in zip(chain, chain[1:], strict=False):
        result = run(tmp_path / source, tmp_path / destination)
        assert result.exit_code == 0, result.output
        assert_same(checkpoints.load(tmp_path / destination)["params"], params)
    assert_same(
        checkpoints.read_state_dict(tmp_path / "6.safetensors"),
        checkpoints.read_state_dict(tmp_path / "0.safetensors"),
    )


def test_it_says_what_it_did(tmp_path, params):
    state_dict = checkpoints.to_torch(params, wavelet="db2")
    checkpoints.write_state_dict(tmp_path / "a.safetensors", state_dict)
    result = run(tmp_path / "a.safetensors", tmp_path / "b")
    assert result.output.replace(f"{tmp_path}/", "").splitlines() == [
        "read a.safetensors: layout published, 2-D, wavelet db2, 7 tensors, 524 parameters "
        "and 512 values of frozen filters",
        "wrote b: Orbax folder, 5 tensors, 524 parameters",
    ]
    result = run(tmp_path / "b", tmp_path / "c.safetensors")
    assert "b: Orbax folder, wavelet db2, 5 tensors" in result.output
    assert "layout published, 2-D, wavelet db2" in result.output
    assert_same(checkpoints.read_state_dict(tmp_path / "c.safetensors"), state_dict)


def test_a_folder_that_names_no_wavelet_gives_no_filters(tmp_path, params):
    checkpoints.save(tmp_path / "a", {"params": params})
    result = run(tmp_path / "a", tmp_path / "b.safetensors")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'a'} does not say which wavelet")
    assert not (tmp_path / "b.safetensors").exists()
    assert run(tmp_path / "a", tmp_path / "b.safetensors", "--wavelet", "db2").exit_code == 0
    written = checkpoints.read_state_dict(tmp_path / "b.safetensors")
    assert checkpoints.recognise(written).wavelet == "db2"
    # Where no filters are written the wavelet does not matter, and a later one may name it.
    assert run(tmp_path / "a", tmp_path / "c.safetensors", "--layout", "fast").exit_code == 0
    assert run(tmp_path / "a", tmp_path / "d").exit_code == 0
    assert checkpoints.wavelet_of(tmp_path / "d") is None


def test_an_argument_never_contradicts_what_a_source_records(tmp_path, params):
    state_dict = checkpoints.to_torch(params)
    checkpoints.write_state_dict(tmp_path / "a.safetensors", state_dict)
    assert run(tmp_path / "a.safetensors", tmp_path / "a").exit_code == 0
    for source, destination in (("a.safetensors", "b"), ("a", "b.safetensors"), ("a", "b")):
        result = run(tmp_path / source, tmp_path / destination, "--wavelet", "db2")
        assert result.exit_code == 1, result.output
        assert "'haar'" in result.stderr and "'db2'" in result.stderr
        assert not (tmp_path / destination).exists()
    # Two names of one wavelet do not contradict each other.
    assert run(tmp_path / "a", tmp_path / "b.safetensors", "--wavelet", "db1").exit_code == 0
    assert_same(checkpoints.read_state_dict(tmp_path / "b.safetensors"), state_dict)


def test_layout_to_layout(tmp_path, params):
    checkpoints.write_state_dict(tmp_path / "a.safetensors", checkpoints.to_torch(params))
    result = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--layout", "fast")
    assert result.exit_code == 0, result.output
    assert "wt_weights.0" in checkpoints.read_state_dict(tmp_path / "b.safetensors")


def test_nothing_is_overwritten_unasked(tmp_path, params):
    source, destination = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    checkpoints.write_state_dict(source, checkpoints.to_torch(params))
    destination.write_text("precious")
    result = run(source, destination)
    assert result.exit_code == 1
    assert result.stderr == f"error: {destination} exists already; give --force to replace it\n"
    assert destination.read_text() == "precious"
    assert run(source, destination, "--force").exit_code == 0
    assert_same(checkpoints.load(destination)["params"], params)
    (tmp_path / "link.safetensors").symlink_to("nowhere.safetensors")
    result = run(source, tmp_path / "link.safetensors")
    assert (result.exit_code, "exists already" in result.stderr) == (1, True)
    assert (tmp_path / "link.safetensors").is_symlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.safetensors", "b"], "no file missing.safetensors"),
        (["missing", "b"], "path missing has extension '', expected"),
        (["a.safetensors", "b.bin"], "destination b.bin has extension .bin, expected"),
        (["a.safetensors", "b", "--layout", "nope"], "--layout is nope, expected one of"),
        (["a.safetensors", "b", "--wavelet", "nope"], "wavelet='nope' is not"),
        (["bad.safetensors", "b"], "bad.safetensors is not a whole .safetensors file"),
        (["folder", "b.safetensors"], "folder .*/folder is no Orbax checkpoint"),
        (["a.safetensors", "missing/b.safetensors"], "no folder .*/missing to write"),
    ],
)
def test_errors_are_one_line(tmp_path, params, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    checkpoints.write_state_dict("a.safetensors", checkpoints.to_torch(params))
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    (tmp_path / "folder").mkdir()
    result = run(*arguments)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert re.search(message, result.stderr), result.stderr


def test_every_misfit_is_listed(tmp_path, params):
    state_dict = checkpoints.to_torch(params)
    del state_dict["base_scale.weight"]
    state_dict["more"] = np.zeros(2)
    checkpoints.write_state_dict(tmp_path / "a.safetensors", state_dict)
    result = run(tmp_path / "a.safetensors", tmp_path / "b")
    assert result.exit_code == 1
    assert "missing: base_scale.weight (1, 4, 1, 1)" in result.stderr
    assert "surplus: more (2,)" in result.stderr
    assert not (tmp_path / "b").exists()
