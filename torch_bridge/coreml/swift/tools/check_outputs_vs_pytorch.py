"""Compares the Swift runner with PyTorch: the same input and weights through both.

Run it as `python check_outputs_vs_pytorch.py --channels 32 --height 128 --width 128`. The exit
status is 0 if all numbers are close.
"""

import json
import shutil
import subprocess
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from flash_wtconv_jax.cli import run
from flash_wtconv_jax.cli.messages import say

_PACKAGE = Path(__file__).resolve().parents[1]
_TOLERANCES = {"fp32": 1e-5, "fp16": 5e-3}
"""The largest error, by the precision of the package."""
_STAGES = "haar", "convolutions", "inverse", "sum", "whole", "total"
"""In the order in which they run; JSON has none."""


class Backend(StrEnum):
    """The backend of the runner; "cpu" alone needs no Apple machine."""

    METAL = "metal"
    CPU = "cpu"
    WHOLE = "coreml-whole"


Size = Annotated[int, typer.Option(min=1)]


def check(
    channels: Size,
    height: Size,
    width: Size,
    levels: Annotated[int, typer.Option(min=0, help="Wavelet levels.")] = 1,
    model: Annotated[
        Path | None,
        typer.Option(metavar="PACKAGE", help="An .mlpackage. Default: one of random weights."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
    atol: Annotated[
        float | None,
        typer.Option(min=0, help="Absolute error.  [default: 1e-5, of fp16 packages 5e-3]"),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(min=0, help="Relative error.  [default: 1e-5, of fp16 packages 5e-3]"),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="What the runner computes with.")] = (
        Backend.METAL
    ),
    runner: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A built WTConvCoreMLRunner. Default: build it."),
    ] = None,
) -> None:
    """Compare the Swift runner with PyTorch; 1 if they differ."""
    sizes = channels, height, width
    with TemporaryDirectory() as folder:
        package = model or _exported(Path(folder), backend, sizes, levels, seed)
        params, precision = _weights(package)
        runner = runner or _built()
        output = Path(folder) / "y.f32"
        report = _run(runner, backend, package, sizes, levels, output)
        found = np.fromfile(output, "<f4").reshape(1, *sizes)
    expected = _expected(params, sizes)
    errors = np.abs(found.astype(np.float64) - expected)
    absolute = _TOLERANCES[precision] if atol is None else atol
    relative = _TOLERANCES[precision] if rtol is None else rtol
    close = np.allclose(found, expected, rtol=relative, atol=absolute)
    say(f"{backend}, {' x '.join(map(str, sizes))}, levels {levels}, {precision}")
    for stage in _STAGES:
        if stage in report["milliseconds"]:
            say(f"  {stage:12} {report['milliseconds'][stage]:10.3f} ms")
    say(f"max_abs  {errors.max():.3e}")
    say(f"mean_abs {errors.mean():.3e}")
    say(f"rmse     {np.sqrt(np.mean(errors**2)):.3e}")
    say(f"allclose(atol={absolute:g}, rtol={relative:g}) {close}")
    if not close:
        raise typer.Exit(1)


def _built() -> Path:
    """The runner, built in the package's own folder."""
    if shutil.which("swift") is None:
        raise RuntimeError(
            "there is no swift to build the runner with: install Swift 6, or name a built one by "
            "--runner"
        )
    command = ["swift", "build", "-c", "release", "--package-path", str(_PACKAGE)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{built.stdout}{built.stderr}")
    where = subprocess.run(
        [*command, "--show-bin-path"], check=True, capture_output=True, text=True
    )
    return Path(where.stdout.strip()) / "WTConvCoreMLRunner"


def _exported(
    folder: Path, backend: Backend, sizes: tuple[int, int, int], levels: int, seed: int
) -> Path:
    """A package of random weights, of the kind that a backend takes."""
    from torch_bridge.coreml import layer, package, weights

    channels, height, width = sizes
    params = weights.of_layer(None, channels, levels, None, seed)
    make = layer.whole if backend == Backend.WHOLE else layer.convs
    path = folder / f"{make.__name__}.mlpackage"
    package.save(path, make(params, height, width, precision="fp32"), force=False)
    return path


def _weights(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The parameters in a package of a layer, and its precision."""
    from torch_bridge.coreml.evaluator import Package
    from torch_bridge.coreml.layer import params_of

    package = Package(path)
    precision = package.metadata.get("flash_wtconv.precision", "")
    if precision not in _TOLERANCES:
        raise ValueError(f"{path} is no package of a layer: it tells no precision")
    return params_of(package), precision


def _run(
    runner: Path,
    backend: Backend,
    package: Path,
    sizes: tuple[int, int, int],
    levels: int,
    output: Path,
) -> Any:
    """The runner's report; its output, for the input of the shared formula, goes into a file."""
    names = "--channels", "--height", "--width"
    options = [f"{part}" for pair in zip(names, sizes, strict=True) for part in pair]
    options += ["--levels", str(levels), "--backend", backend, "--model", str(package)]
    command = [str(runner), *options, "--output-f32", str(output), "--repeat", "5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{runner.name} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def _expected(params: dict[str, np.ndarray], sizes: tuple[int, int, int]) -> np.ndarray:
    """The output of PyTorch's layer for the input of the shared formula."""
    import torch

    from torch_bridge.coreml.inputs import formula
    from torch_bridge.exchange import from_jax

    torch_layer = from_jax({"params": params}).cpu()
    torch_layer.implementation = "eager"
    with torch.no_grad():
        return torch_layer(torch.from_numpy(formula(*sizes))).numpy()


if __name__ == "__main__":
    run(lambda: typer.run(check))
