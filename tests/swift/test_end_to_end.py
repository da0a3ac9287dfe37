"""Layers through the Swift runner, on the CPU and on fakes of Metal and Core ML."""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import zlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import typer
from helpers import swift as tools

from pallas_kernels.oracle import wtconv
from pallas_kernels.wtconv.cases import Case

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.swift,
    # Not imported, which takes seconds where these tests are not asked for.
    pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed"),
]

from torch_bridge.coreml import inputs, layer, package  # noqa: E402
from torch_bridge.coreml.evaluator import Package  # noqa: E402

CASES = [
    # Sizes even and odd at every level, each number of levels, kernels of each parity.
    Case((16, 16), 1, 5, batch=(1,), channels=3),
    Case((7, 9), 1, 2, batch=(1,), channels=2),
    Case((32, 48), 2, 3, batch=(1,), channels=2),
    Case((14, 14), 2, 5, batch=(1,), channels=3),
    Case((27, 40), 3, 4, batch=(1,), channels=2),
    Case((28, 28), 4, 5, batch=(1,), channels=2),
    Case((33, 70), 5, 3, batch=(1,), channels=2),
    Case((64, 32), 5, 5, batch=(1,), channels=1),
    # More levels than the kernels of wtconv.metal have, and none.
    Case((65, 3), 7, 3, batch=(1,), channels=1),
    Case((5, 6), 0, 3, batch=(1,), channels=2, bias=False),
]
BACKENDS = {"cpu": "convs", "metal": "convs", "coreml-whole": "whole"}
TOLERANCE = 1e-5


class Layer:
    """A case as files: its packages, its input, and what the oracle expects."""

    def __init__(self, folder: Path, case: Case, precision: str = "fp32", **options) -> None:
        x, params, _ = case.drawn()
        self.sizes = (case.channels, *case.spatial)
        self.levels = case.levels
        self.expected = case.expected()["y"].transpose(0, 3, 1, 2)
        self.input = folder / "x.f32"
        inputs.write_raw(self.input, np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        self.packages = {}
        for kind in layer.KINDS:
            self.packages[kind] = folder / f"{kind}.mlpackage"
            model = getattr(layer, kind)(params, *case.spatial, precision=precision, **options)
            package.save(self.packages[kind], model, force=False)

    def arguments(self, backend: str) -> list[str | Path]:
        """The runner's."""
        sizes = zip(("--channels", "--height", "--width"), map(str, self.sizes), strict=True)
        found = [part for pair in sizes for part in pair]
        found += ["--levels", str(self.levels), "--backend", backend]
        return [*found, "--model", self.packages[BACKENDS[backend]], "--input-f32", self.input]

    def error(self, path: Path) -> float:
        """How far a raw file is from what is expected, in units of its RMS."""
        found = inputs.read_raw(path, *self.sizes)
        rms = np.sqrt(np.mean(self.expected**2))
        # Not a number is the largest error.
        return float(np.nan_to_num(np.abs(found - self.expected).max(), nan=np.inf) / rms)


@pytest.fixture(scope="session")
def layers(tmp_path_factory):
    """Each case's `Layer`, made when it is first asked for."""
    return cache(lambda case: Layer(tmp_path_factory.mktemp("layer"), case))


@pytest.fixture(scope="session")
def run(swift, metal, evaluator):
    """Runs the runner of a build, which finds the fakes."""

    def run(build, *arguments, **environment):
        settings = {"FAKE_METAL": str(metal), "FAKE_COREML": str(evaluator), **environment}
        return swift.run(build.runner, *arguments, timeout=60, **settings)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_are_the_oracles(fake, run, layers, tmp_path, case, backend):
    found = layers(case)
    done = run(fake, *found.arguments(backend), "--output-f32", tmp_path / "y.f32")
    assert done.returncode == 0, done.stderr
    assert found.error(tmp_path / "y.f32") <= TOLERANCE


def test_the_cpu_needs_no_apple(plain, run, layers, tmp_path):
    for case in CASES[3:5]:
        found = layers(case)
        done = run(plain, *found.arguments("cpu"), "--output-f32", tmp_path / "y.f32")
        assert done.returncode == 0, done.stderr
        assert found.error(tmp_path / "y.f32") <= TOLERANCE


def test_float16_weights_are_read(fake, run, tmp_path):
    case = Case((13, 10), 2, 3, batch=(1,), channels=5)
    found = Layer(tmp_path, case, "fp16")
    rounded = layer.params_of(Package(found.packages["convs"]))
    x = inputs.read_raw(found.input, *found.sizes).transpose(0, 2, 3, 1)
    found.expected = wtconv(x, rounded, 2).transpose(0, 3, 1, 2)
    for backend, tolerance in (("cpu", TOLERANCE), ("metal", 5e-3)):
        done = run(fake, *found.arguments(backend), "--output-f32", tmp_path / "y.f32")
        assert done.returncode == 0, done.stderr
        assert found.error(tmp_path / "y.f32") <= tolerance


def test_flexible_packages_take_other_sizes(fake, run, tmp_path):
    made = Layer(tmp_path, Case((16, 16), 2, 3, batch=(1,), channels=2), flexible=True)
    (tmp_path / "other").mkdir()
    other = Layer(tmp_path / "other", Case((24, 32), 2, 3, batch=(1,), channels=2))
    other.packages = made.packages
    # The weights are drawn by the sizes too.
    params = layer.params_of(Package(made.packages["convs"]))
    x = inputs.read_raw(other.input, *other.sizes).transpose(0, 2, 3, 1)
    other.expected = wtconv(x, params, 2).transpose(0, 3, 1, 2)
    for backend in BACKENDS:
        done = run(fake, *other.arguments(backend), "--output-f32", tmp_path / "y.f32")
        assert done.returncode == 0, done.stderr
        assert other.error(tmp_path / "y.f32") <= TOLERANCE
    other.sizes = (2, 23, 32)
    done = run(fake, *other.arguments("coreml-whole"))
    assert done.returncode == 2


def test_the_report_is_json(fake, run, layers, tmp_path):
    found = layers(CASES[3])
    output = tmp_path / "y.f32"
    arguments = [*found.arguments("metal"), "--output-f32", output, "--repeat", "3", "--json"]
    report = json.loads(run(fake, *arguments).stdout)
    values = np.fromfile(output, "<f4")
    assert report["shape"] == [1, *found.sizes]
    assert (report["backend"], report["levels"], report["runs"]) == ("metal", 2, 3)
    stages = report["milliseconds"]
    assert set(stages) == {"haar", "convolutions", "inverse", "sum", "total"}
    assert stages["total"] >= max(stages["haar"], stages["convolutions"]) > 0
    assert report["output"]["checksum"] == zlib.crc32(output.read_bytes())
    np.testing.assert_allclose(
        [report["output"][name] for name in ("min", "max", "mean")],
        [values.min(), values.max(), values.mean(dtype=np.float64)],
        rtol=1e-6,
    )
    whole = run(fake, *found.arguments("coreml-whole"), "--json")
    assert set(json.loads(whole.stdout)["milliseconds"]) == {"whole", "total"}


def test_without_an_input_the_formula_fills_it(fake, run, layers, tmp_path):
    found = layers(CASES[0])
    *arguments, _, _ = found.arguments("cpu")
    inputs.write_raw(tmp_path / "x.f32", inputs.formula(*found.sizes))
    for name, more in (("a", []), ("b", ["--input-f32", tmp_path / "x.f32"])):
        done = run(fake, *arguments, *more, "--output-f32", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_kernels_of_older_metal_compute_too(fake, run, layers, tmp_path):
    """That of macOS 13, which has no bfloat16."""
    library = tools.build_metal(tmp_path, version=300)
    found = layers(CAUGHT)
    settings = {"FAKE_METAL": str(library)}
    done = run(fake, *found.arguments("metal"), "--output-f32", tmp_path / "y.f32", **settings)
    assert done.returncode == 0, done.stderr
    assert found.error(tmp_path / "y.f32") <= TOLERANCE


def test_what_was_compiled_is_removed(fake, run, layers, tmp_path):
    run(fake, *layers(CASES[0]).arguments("metal"), TMPDIR=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--channels", "3"], "--height is missing"),
        (["--channels"], "--channels needs a value"),
        (["--channels", "0"], "--channels is 0, expected a whole number of at least 1"),
        (["--width", "four"], "--width is four, expected a whole number"),
        (["--levels", "-1"], "--levels is -1, expected a whole number of at least 0"),
        (["--width", "4", "--width", "5"], "--width is given twice"),
        (["--backend", "cuda"], "--backend is cuda, expected one of metal, cpu, coreml-whole"),
        (["--colour"], "there is no option --colour"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be(fake, run, arguments, sentence):
    done = run(fake, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"WTConvCoreMLRunner: {sentence}")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_misuses_are_one_sentence(fake, plain, run, layers, tmp_path):
    found = layers(CASES[3])
    sizes = ["--channels", "3", "--height", "14", "--width", "14", "--levels", "2"]
    convs = ["--model", found.packages["convs"]]
    short = tmp_path / "short.f32"
    short.write_bytes(bytes(8))
    (tmp_path / "no.mlpackage").mkdir()
    damaged = tmp_path / "damaged.mlpackage"
    shutil.copytree(found.packages["convs"], damaged)
    program = next(damaged.rglob("*.mlmodel"))
    program.write_bytes(program.read_bytes()[:-100])
    without = tmp_path / "without.mlpackage"
    shutil.copytree(found.packages["convs"], without)
    next(without.rglob("weight.bin")).write_bytes(bytes(200))
    cpu = ["--backend", "cpu"]
    metal = ["--backend", "metal"]
    whole = ["--backend", "coreml-whole"]
    for build, arguments, sentence in [
        (fake, [*sizes], "there is no model Models/WTConvConvModules.mlpackage"),
        (fake, [*sizes, *whole], "there is no model Models/WTConvWhole.mlpackage"),
        (fake, [*sizes, *cpu, "--model", tmp_path / "no.mlpackage"], "is no .mlpackage"),
        (fake, [*sizes, *cpu, "--model", damaged], "its program is damaged"),
        (fake, [*sizes, *cpu, "--model", without], "its weights are damaged"),
        (fake, [*sizes, *whole, *convs], "is of kind convs, expected whole"),
        (fake, [*sizes, *cpu, "--model", found.packages["whole"]], "is of kind whole"),
        (fake, [*sizes[:-2], *convs], "has 2 levels, asked for 1"),
        (fake, [*sizes[:-4], "--width", "15", *sizes[-2:], *convs], "was made for 3 x 14 x 14"),
        (
            fake,
            [
                "--height",
                "9999999",
                "--width",
                "9999999",
                "--channels",
                "3",
                "--levels",
                "2",
                *convs,
            ],
            "was made for 3 x 14 x 14",
        ),
        (fake, [*sizes, *convs, "--input-f32", short], "has 8 bytes, expected 2352"),
        (fake, [*sizes, *convs, "--input-f32", tmp_path / "x"], "cannot read"),
        (fake, [*sizes, *cpu, *convs, "--output-f32", tmp_path / "a/y"], "cannot write"),
        (plain, [*sizes, *metal, *convs], "has no Metal and no Core ML"),
    ]:
        done = run(build, *arguments)
        assert done.returncode == 2, done.stdout
        assert sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
    settings = {"FAKE_COREML": str(tmp_path)}
    done = fake.swift.run(fake.runner, *found.arguments("metal"), **settings)
    assert done.returncode == 2 and "no Metal device; use the backend cpu" in done.stderr


HALVED = "inline int2 halved(int2 size) { return (size + 1) / 2; }"
METAL_FAULTS = {
    "a swapped subband": {
        "at.x, at.y, bands.y);": "at.x, at.y, bands.other);",
        "at.x, at.y, bands.z);": "at.x, at.y, bands.y);",
        "bands.other": "bands.z",
    },
    "a wrong crop": {HALVED: "inline int2 halved(int2 size) { return size / 2; }"},
}
"""Changes of wtconv.metal."""

SWIFT_FAULTS = {
    "a swapped subband": (
        *("cpu", "CPUHaarRunner.swift", "0.5 * ((a - b) - (c - d))"),
        "0.5 * ((a - b) - (c - d)); if fault { bands.swapAt(to + plane, to + 2 * plane) }",
    ),
    "a transposed weight": (
        *("cpu", "Convolutions.swift", "let tap = taps.values[(channel * k + i) * k + j]"),
        "let (y, x) = fault ? (j, i) : (i, j); let tap = taps.values[(channel * k + y) * k + x]",
    ),
    "a wrong crop": (
        *("cpu", "CPUHaarRunner.swift", "let at = row / 2 *"),
        "let start = fault ? height % 2 : 0; let at = (row + start) / 2 *",
    ),
    "a low band that is not added": (
        *("metal", "HaarRunner.swift", "if let below { all"),
        "if let below, !fault { all",
    ),
}
"""Backend, file, what is replaced, and what it becomes, where `fault` is whether it shows."""


@pytest.fixture(scope="session")
def faulty(swift, modules, tmp_path_factory):
    """A build with all of `SWIFT_FAULTS`, of which the environment's FAULT shows one.

    It is the build that is optimised.
    """
    folder = tmp_path_factory.mktemp("faulty")
    source = folder / "source"
    shutil.copytree(tools.PACKAGE, source, ignore=shutil.ignore_patterns(".build"))
    sources = source / "Sources/WTConvCore"
    for name, (_, file, old, new) in SWIFT_FAULTS.items():
        changed = new.replace("fault", f'planted("{name}")')
        path = sources / file
        path.write_text(tools.replaced(path.read_text(), {old: changed}))
    (sources / "Planted.swift").write_text(
        "import Foundation\n\nfunc planted(_ name: String) -> Bool {\n"
        '  ProcessInfo.processInfo.environment["FAULT"] == name\n}\n'
    )
    return tools.Build.make(swift, folder / "build", modules, source, mode="release")


# Odd at its second level.
CAUGHT = CASES[3]


def caught(run, build, found, path, backend, **environment) -> bool:
    """Whether an output is wrong."""
    done = run(build, *found.arguments(backend), "--output-f32", path, **environment)
    return done.returncode != 0 or found.error(path) > TOLERANCE


@pytest.mark.parametrize("fault", SWIFT_FAULTS)
def test_faults_of_swift_are_caught(faulty, run, layers, tmp_path, fault):
    backend = SWIFT_FAULTS[fault][0]
    found = layers(CAUGHT)
    assert not caught(run, faulty, found, tmp_path / "y.f32", backend)
    assert caught(run, faulty, found, tmp_path / "y.f32", backend, FAULT=fault)


@pytest.mark.parametrize("fault", METAL_FAULTS)
def test_faults_of_metal_are_caught(fake, run, layers, tmp_path, fault):
    library = tools.build_metal(tmp_path, METAL_FAULTS[fault])
    path = tmp_path / "y.f32"
    assert caught(run, fake, layers(CAUGHT), path, "metal", FAKE_METAL=str(library))


@pytest.mark.parametrize("barrier", "12")
def test_dropped_barriers_are_caught(fake, run, layers, tmp_path, barrier):
    path = tmp_path / "y.f32"
    settings = {"FAKE_METAL_WITHOUT": barrier}
    assert any(
        caught(run, fake, layers(CASES[5]), path, "metal", FAKE_METAL_ORDER=order, **settings)
        for order in "0123"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_weights_are_caught(fake, run, tmp_path, monkeypatch, backend):
    own = layer.folded

    def transposed(params):
        found = own(params)
        return found._replace(wavelet=tuple(taps.swapaxes(2, 3) for taps in found.wavelet))

    monkeypatch.setattr(layer, "folded", transposed)
    assert caught(run, fake, Layer(tmp_path, CAUGHT), tmp_path / "y.f32", backend)


SCRIPT = tools.PACKAGE / "tools/check_outputs_vs_pytorch.py"


def runner_of(build, path):
    """A program that calls a build's runner where Swift is."""
    command = shlex.join([*build.swift.prefix, str(build.runner)])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    return path


def test_the_check_script_reads_the_weights_of_a_whole_layer(
    fake, evaluator, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FAKE_COREML", str(evaluator))
    check = runpy.run_path(str(SCRIPT))["check"]
    package = Layer(tmp_path, CASES[3], "fp16").packages["whole"]
    sizes = {"channels": 3, "height": 14, "width": 14, "levels": 2}
    check(**sizes, model=package, backend="coreml-whole", runner=runner_of(fake, tmp_path / "run"))
    assert "rtol=0.005) True" in capsys.readouterr().out


def test_the_check_script_compares_with_pytorch(plain, tmp_path, capsys):
    runner = runner_of(plain, tmp_path / "runner")
    check = runpy.run_path(str(SCRIPT))["check"]
    sizes = {"channels": 4, "height": 18, "width": 21, "levels": 2}
    check(**sizes, seed=3, backend="cpu", runner=runner)
    found = capsys.readouterr().out
    for name in ("max_abs", "mean_abs", "rmse", "allclose(atol=1e-05, rtol=1e-05) True"):
        assert f"\n{name}" in found
    with pytest.raises(typer.Exit) as exit:
        check(**sizes, atol=0.0, rtol=0.0, backend="cpu", runner=runner)
    assert exit.value.exit_code == 1 and "rtol=0) False" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="runner failed: .* asked for 3"):
        found = Layer(tmp_path, CASES[3]).packages["convs"]
        check(3, 14, 14, 3, found, backend="cpu", runner=runner)
    arguments = ["--channels", "4", "--height", "9", "--width", "9", "--model", "none.mlpackage"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "none.mlpackage" in done.stderr
