"""`python -m torch_bridge.coreml export`: packages of a layer."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flash_wtconv_jax.cli.messages import say
from pallas_kernels.common.files import making_folder

_NAMES = {"convs": "WTConvConvModules", "whole": "WTConvWhole"}
"""What packages are called, by their kind."""


class Precision(StrEnum):
    """The dtype that weights are kept in and values computed in."""

    FP32 = "fp32"
    FP16 = "fp16"


def export(
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of a layer.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Rows of the input.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Columns of the input.")] = None,
    levels: Annotated[
        int | None, typer.Option(min=0, max=63, help="Wavelet levels of a layer.  [default: 1]")
    ] = None,
    kernel_size: Annotated[
        int | None, typer.Option(min=1, help="Taps of a layer along an axis.  [default: 5]")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights: an Orbax folder, or a .safetensors or .pth file of any layout that "
            "flash-wtconv convert reads. Default: random ones.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
    precision: Annotated[
        Precision, typer.Option(help="Of weights and computation; arrays go in and out as float32.")
    ] = Precision.FP32,
    flexible: Annotated[
        bool, typer.Option("--flexible", help="Take other sizes too, up to twice the given one.")
    ] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the packages.")] = Path(
        "Models"
    ),
    force: Annotated[
        bool, typer.Option("--force", help="Replace packages that are there.")
    ] = False,
) -> None:
    """Write Core ML packages of a wavelet convolution."""
    from torch_bridge.coreml import layer, weights

    if height is None or width is None:
        raise ValueError("--height and --width are needed, the size of the input")
    paths = _paths(out, layer.KINDS, force)
    params = weights.of_layer(checkpoint, channels, levels, kernel_size, seed)
    size: Any = {"height": height, "width": width, "precision": precision, "flexible": flexible}
    models = {"whole": layer.whole(params, **size), "convs": layer.convs(params, **size)}
    _save({paths[kind]: model for kind, model in models.items()}, force)


def _paths(folder: Path, kinds: tuple[str, ...], force: bool) -> dict[str, Path]:
    """The package of each kind in a folder."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file, expected a folder")
    paths = {kind: folder / f"{_NAMES[kind]}.mlpackage" for kind in kinds}
    for path in paths.values():
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists already; give --force to replace it")
    return paths


def _save(models: dict[Path, Any], force: bool) -> None:
    from torch_bridge.coreml.package import save

    for path, model in models.items():
        with making_folder(path.parent):
            save(path, model, force=force)
        files = (file for file in path.rglob("*") if file.is_file())
        size = sum(file.stat().st_size for file in files)
        say(f"wrote {path}: {model.short_description} {size / 1e6:.2f} MB")
