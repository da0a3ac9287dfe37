"""`python -m torch_bridge.coreml`, run in this process: what it writes, prints and refuses."""

import json
import runpy
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from flash_wtconv_jax import checkpoints  # noqa: E402
from pallas_kernels.oracle import wtconv  # noqa: E402
from pallas_kernels.wtconv.cases import Case  # noqa: E402
from torch_bridge.coreml import check, export, layer  # noqa: E402
from torch_bridge.coreml.evaluator import Package  # noqa: E402
from torch_bridge.coreml.inputs import formula  # noqa: E402


@pytest.fixture
def run(monkeypatch, capsys):
    """Returns what runs the command line: its exit code, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["torch_bridge.coreml", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("torch_bridge.coreml", run_name="__main__")
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


def test_a_checkpoint_is_exported_and_evaluated(run, tmp_path):
    torch.manual_seed(0)
    module = torch_bridge.WTConv2d(3, 3, 3, wt_levels=2, device="cpu", implementation="eager")
    torch.save(module.state_dict(), tmp_path / "layer.pth")
    folder = tmp_path / "new" / "Models"
    code, out, err = run(
        *("export", "--checkpoint", tmp_path / "layer.pth", "--height", 9, "--width", 6),
        *("-o", folder),
    )
    assert (code, err) == (0, "")
    names = "WTConvConvModules.mlpackage", "WTConvWhole.mlpackage"
    assert [line.split(",")[0] for line in out.splitlines()] == [
        f"wrote {folder / name}" for name in names
    ]
    x = formula(3, 9, 6)
    np.save(tmp_path / "x.npy", x)
    code, out, err = run(
        *("evaluate", folder / names[1], "--input", tmp_path / "x.npy"),
        *("--output", tmp_path / "y.npy"),
    )
    assert (code, err) == (0, "") and out.startswith("y (1, 3, 9, 6) from -")
    want = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, atol=1e-5)
    code, out, err = run("export", "--channels", 3, "--height", 9, "--width", 6, "-o", folder)
    assert (code, out) == (1, "") and "exists already; give --force" in err
    inputs = {name: np.zeros(shape) for name, shape in Package(folder / names[0]).inputs.items()}
    np.savez(tmp_path / "x.npz", **inputs)
    code, out, err = run(
        *("evaluate", folder / names[0], "--input", tmp_path / "x.npz"),
        *("--output", tmp_path / "y.npz"),
    )
    assert code == 0 and set(np.load(tmp_path / "y.npz")) == {"base", "filtered_1", "filtered_2"}


def test_random_weights_by_seed_and_compression(run, tmp_path):
    arguments = ["export", "--channels", 40, "--height", 8, "--width", 4, "--precision", "fp16"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(*arguments, "--seed", 3, "-o", first, "--compress", "int8")[0] == 0
    code, out, _ = run(*arguments, "--seed", 3, "-o", second, "--compress", "palettize4")
    assert code == 0 and out.count("palettize4: ") == 2 and "their root mean square is" in out
    hashes = {
        Package(folder / "WTConvWhole.mlpackage").metadata["flash_wtconv.source_hash"]
        for folder in (first, second)
    }
    assert len(hashes) == 1


LAYOUTS = ["layer.safetensors", "folder"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_of_every_kind_of_checkpoint(tmp_path, name):
    from torch_bridge.coreml import weights

    params = Case((4, 4), 1, 3).drawn()[1]
    path = tmp_path / name
    if name == "folder":
        checkpoints.save(path, {"params": params}, wavelet="haar")
    else:
        fast = checkpoints.to_torch({"params": params}, layout="fast")
        checkpoints.write_state_dict(path, fast)
    found = weights.of_layer(path, None, None, None, 0)
    for key, value in params.items():
        np.testing.assert_array_equal(found[key], value)
    with pytest.raises(ValueError, match="--channels is 7, but .* has 3: leave the option out"):
        weights.of_layer(path, 7, None, None, 0)


MISUSES = {
    "--channels 3 --height 4": "--height and --width are needed",
    "--height 4 --width 4": "--channels is needed, or --checkpoint",
    "--channels 3 --height 4 --width 6 --levels 2 --flexible": "width is 6, but in a flexible",
    "--labels x --channels 3": "--labels is for a network: say --model",
    "--model wtconvnext_tiny --levels 2": "--levels is for a layer",
    "--model transformer_net --features": "not transformer_net",
    "--channels 3 --height 4 --width 4 -o FILE": "is a file, expected a folder",
    "--checkpoint none.pth --height 4 --width 4": "no file none.pth",
    "--checkpoint DB2 --height 4 --width 4": "has wavelet db2, expected haar",
    "--checkpoint SURPLUS --height 4 --width 4": "such as foo.bar (2,); save the weights of one",
    "--checkpoint MISSHAPEN --height 4 --width 4": "such as wavelet_convs.0.weight is (7, 1,",
    "--checkpoint PART --height 4 --width 4": "1 missing, such as base_scale (2,)",
    "--model transformer_net --checkpoint NET": "save the weights of one network",
    "--model convnext_tiny --labels none.txt": "--labels none.txt: there is no such file",
    "--checkpoint SIGNAL --height 4 --width 4": "holds a 1-D layer, expected a 2-D one",
    "--checkpoint NET --height 4 --width 4": "expected a layer; of a whole network say --model",
    "--model convnext_tiny --labels TWICE": "has 'crane' on the lines 1, 3",
}


@pytest.mark.parametrize("arguments", MISUSES)
def test_misuses_are_one_line(run, tmp_path, arguments):
    (tmp_path / "file").touch()
    (tmp_path / "labels.txt").write_text("crane\nheron\ncrane\n")
    kind, wavelet = (
        ("1d" if "SIGNAL" in arguments else "2d"),
        "db2" if "DB2" in arguments else "db1",
    )
    module = getattr(torch_bridge, f"WTConv{kind}")(2, 2, 3, wt_type=wavelet, device="cpu")
    state = module.state_dict()
    if "SURPLUS" in arguments:
        state["foo.bar"] = torch.ones(2)
    if "MISSHAPEN" in arguments:
        state["wavelet_convs.0.weight"] = torch.ones(7, 1, 3, 3)
    torch.save(state, tmp_path / "layer.pth")
    if "NET" in arguments:
        kernel = {"stem": {"conv": {"kernel": np.ones((4, 4, 3, 8), np.float32)}}}
        checkpoints.save(tmp_path / "net", {"params": kernel})
    if "PART" in arguments:
        checkpoints.save(tmp_path / "part", {"params": {"base_kernel": np.ones((3, 3, 1, 2))}})
    names = {"FILE": "file", "NET": "net", "PART": "part", "TWICE": "labels.txt"}
    names |= dict.fromkeys(("DB2", "SIGNAL", "SURPLUS", "MISSHAPEN"), "layer.pth")
    words = [tmp_path / names[word] if word in names else word for word in arguments.split()]
    out = [] if "-o" in words else ["-o", tmp_path / "Models"]
    code, output, error = run("export", *words, *out)
    assert (code, output) == (1, "")
    assert error.startswith("error: ") and MISUSES[arguments] in error
    assert error.count("\n") == 1
    assert not (tmp_path / "Models").exists()


def test_sizes_that_cannot_be_are_told(run, tmp_path):
    for size in ("0", "9" * 20):
        size = ["--height", size, "--width", 4]
        code, _, error = run("export", "--channels", 2, *size, "-o", tmp_path / "Models")
        assert code == 2 and "Invalid value for '--height'" in error


def test_coremltools_missing_is_one_line(run, monkeypatch, tmp_path):
    from torch_bridge.coreml import tools

    tools.coremltools.cache_clear()
    monkeypatch.setitem(sys.modules, "coremltools", None)
    size = ["--channels", 2, "--height", 2, "--width", 2, "-o", tmp_path]
    code, _, error = run("export", *size)
    assert code == 1
    assert error == (
        "error: coremltools is not installed: pip install 'flash-wtconv[coreml]' brings it\n"
    )


def test_evaluate_tells_of_wrong_files(run, tmp_path):
    (tmp_path / "x.npy").write_bytes(b"no numbers")
    package = tmp_path / "p.mlpackage"
    source = ["--input", tmp_path / "x.npy"]
    code, _, error = run("evaluate", package, *source, "--output", tmp_path / "y.txt")
    assert code == 1 and "expected a name that ends in .npy or .npz" in error
    code, _, error = run("evaluate", package, *source, "--output", tmp_path / "y.npy")
    assert code == 1 and error == (
        f"error: no package {package}: a package is a folder, NAME.mlpackage\n"
    )
    params = Case((2, 2), 1, 1).drawn()[1]
    from torch_bridge.coreml.package import save

    save(package, layer.convs(params, 2, 2, precision="fp32"), force=False)
    code, _, error = run("evaluate", package, *source, "--output", tmp_path / "y.npz")
    assert code == 1 and "is no whole .npy or .npz file of numbers" in error
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 2, 2)))
    code, _, error = run("evaluate", package, *source, "--output", tmp_path / "y.npz")
    assert code == 1 and "the package has the inputs x, bands_1" in error


def test_a_network_by_command(run, monkeypatch, tmp_path):
    made = {}

    def stand_in(name, params, config, size, **options):
        made.update(name=name, config=config, size=size, **options)
        params = Case((2, 2), 0, 1).drawn()[1]
        return layer.whole(params, 2, 2, precision="fp32")

    monkeypatch.setattr(export, "convnext", stand_in)
    from torch_bridge.coreml import weights

    monkeypatch.setattr(weights, "of_convnext", lambda *_: ({}, "config"))
    (tmp_path / "labels.txt").write_text("crane\nheron\n")
    code, out, error = run(
        *("export", "--model", "wtconvnext_tiny", "--labels", tmp_path / "labels.txt"),
        *("--flexible", "-o", tmp_path),
    )
    assert (code, error) == (0, "") and "WTConvNeXtTiny.mlpackage" in out
    assert made["labels"] == ["crane", "heron"] and made["precision"] == "fp16"
    assert made["size"] == (256, 256, True) and not made["features"]


def test_the_check_writes_its_rows(run, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "CASES", (Case((3, 2), 1, 3, batch=(1,)), Case((4,), 1, 3)))
    code, out, error = run("check", "--json", tmp_path / "rows.json")
    assert (code, error) == (0, "") and "2 pass, 0 fail, 2 skip" in out
    report = json.loads((tmp_path / "rows.json").read_text())
    assert {row["backend"] for row in report["rows"]} == {"convs", "whole"}
    assert report["versions"]["coremltools"]


def test_the_packages_own_weights_are_those_of_a_torch_layer(written):
    params = Case((6, 5), 2, 3, batch=(1,)).drawn()[1]
    package = written(layer.convs(params, 6, 5, precision="fp32"))
    module = torch_bridge.from_jax({"params": layer.params_of(package)})
    x = formula(3, 6, 5)
    want = wtconv(x.transpose(0, 2, 3, 1), params, 2).transpose(0, 3, 1, 2)
    got = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, want, atol=1e-4)
