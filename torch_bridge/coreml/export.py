"""`python -m torch_bridge.coreml export`: packages of a layer or of a whole network."""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from flash_wtconv_jax.cli.messages import say
from pallas_kernels.common.files import making_folder
from torch_bridge.coreml.compress import Compression, change, compressed, size_of
from torch_bridge.coreml.networks import Size, convnext, transformer_net

_OF_LAYERS = {"convs": "WTConvConvModules", "whole": "WTConvWhole"}
"""The names of a layer's packages, by their kind."""
_SIDE, _FLEXIBLE_SIDE = 224, 256
"""The height and width of a network's image: what the published weights were trained with, and what
the wavelet levels of every stage halve evenly."""
_MOST_SIDE = 2**30
"""MIL keeps sizes in 32 bits, and flexible packages go up to twice this."""

Models = dict[str, Any]
"""Models of coremltools by the names of their files."""


class Precision(StrEnum):
    """The dtype that weights are kept in and values computed in."""

    FP32 = "fp32"
    FP16 = "fp16"


class Network(StrEnum):
    """The functions of `flash_wtconv_jax.models` that make a network."""

    WTCONVNEXT_TINY = "wtconvnext_tiny"
    WTCONVNEXT_SMALL = "wtconvnext_small"
    WTCONVNEXT_BASE = "wtconvnext_base"
    CONVNEXT_TINY = "convnext_tiny"
    CONVNEXT_SMALL = "convnext_small"
    CONVNEXT_BASE = "convnext_base"
    TRANSFORMER_NET = "transformer_net"


_OF_NETWORKS = {
    Network.WTCONVNEXT_TINY: "WTConvNeXtTiny",
    Network.WTCONVNEXT_SMALL: "WTConvNeXtSmall",
    Network.WTCONVNEXT_BASE: "WTConvNeXtBase",
    Network.CONVNEXT_TINY: "ConvNeXtTiny",
    Network.CONVNEXT_SMALL: "ConvNeXtSmall",
    Network.CONVNEXT_BASE: "ConvNeXtBase",
    Network.TRANSFORMER_NET: "TransformerNet",
}


def export(
    model: Annotated[
        Network | None, typer.Option(help="A whole network. Default: a layer.")
    ] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of a layer.")] = None,
    height: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_SIDE, help="Rows of the input; 224 of a network's."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_SIDE, help="Columns of the input; 224 of a network's."),
    ] = None,
    levels: Annotated[
        int | None, typer.Option(min=0, max=63, help="Wavelet levels of a layer, 1 by default.")
    ] = None,
    kernel_size: Annotated[
        int | None, typer.Option(min=1, help="Taps of a layer along an axis, 5 by default.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights: an Orbax folder, or a .safetensors or .pth file of any layout that "
            "`flash-wtconv convert` reads. Default: random ones.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A classifier's labels, one a line. Default: logits come out."
        ),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="A network's maps of all stages, not its logits.")
    ] = False,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of weights and computation, fp32 of a layer and fp16 of a network by default; "
            "arrays go in and out as float32.",
        ),
    ] = None,
    flexible: Annotated[
        bool, typer.Option("--flexible", help="Take other sizes too, up to twice the given one.")
    ] = False,
    compress: Annotated[
        Compression | None, typer.Option(help="Keep weights in fewer bits, and tell what it costs.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the packages.")] = Path(
        "Models"
    ),
    force: Annotated[
        bool, typer.Option("--force", help="Replace packages that are there.")
    ] = False,
) -> None:
    """Write Core ML packages: of a layer its convolutions and the whole of it, or of a network."""
    of_layer = {"--channels": channels, "--levels": levels, "--kernel-size": kernel_size}
    of_network = {"--labels": labels, "--features": features or None}
    for option, value in (of_network if model is None else of_layer).items():
        if value is not None:
            kind = "a network: say --model" if model is None else "a layer: leave out --model or it"
            raise ValueError(f"{option} is for {kind}")
    names = list(_OF_LAYERS.values()) if model is None else [_file(model, features)]
    paths = {name: out / f"{name}.mlpackage" for name in names}
    _check_free(out, paths.values(), force)
    if model is None:
        models = _of_layer(
            checkpoint, channels, levels, kernel_size, seed, height, width, precision, flexible
        )
    else:
        models = _of_network(
            model, checkpoint, seed, height, width, labels, features, precision, flexible
        )
    for name, one in models.items():
        _write(paths[name], one, compress, force)


def _file(model: Network, features: bool) -> str:
    """The name of a network's package."""
    return _OF_NETWORKS[model] + ("Features" if features else "")


def _check_free(folder: Path, paths: Iterable[Path], force: bool) -> None:
    """Raises before any work is done for a folder that cannot take the packages."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file, expected a folder")
    for path in paths:
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists already; give --force to replace it")


def _of_layer(
    checkpoint: Path | None,
    channels: int | None,
    levels: int | None,
    kernel_size: int | None,
    seed: int,
    height: int | None,
    width: int | None,
    precision: Precision | None,
    flexible: bool,
) -> Models:
    """The two packages of a layer."""
    from torch_bridge.coreml import layer, weights

    if height is None or width is None:
        raise ValueError("--height and --width are needed, the size of the layer's input")
    params = weights.of_layer(checkpoint, channels, levels, kernel_size, seed)
    options: Any = {"precision": precision or Precision.FP32, "flexible": flexible}
    # The whole layer first: it takes fewer sizes.
    whole = layer.whole(params, height, width, **options)
    convs = layer.convs(params, height, width, **options)
    return {_OF_LAYERS["convs"]: convs, _OF_LAYERS["whole"]: whole}


def _of_network(
    model: Network,
    checkpoint: Path | None,
    seed: int,
    height: int | None,
    width: int | None,
    labels: Path | None,
    features: bool,
    precision: Precision | None,
    flexible: bool,
) -> Models:
    """The package of a network."""
    from torch_bridge.coreml import weights

    side = _FLEXIBLE_SIDE if flexible else _SIDE
    size = Size(height or side, width or side, flexible)
    kept: Any = {"precision": precision or Precision.FP16}
    if model is Network.TRANSFORMER_NET:
        if labels or features:
            raise ValueError("--labels and --features are for classifiers, not transformer_net")
        params = weights.of_transformer_net(checkpoint, seed)
        return {_file(model, features): transformer_net(params, size, **kept)}
    if labels and features:
        raise ValueError("--labels and --features exclude each other: maps are of no class")
    classes = _labels(labels) if labels else ()
    params, config = weights.of_convnext(model, checkpoint, seed)
    network = convnext(model, params, config, size, labels=classes, features=features, **kept)
    return {_file(model, features): network}


def _labels(path: Path) -> list[str]:
    """The labels in a file, each of which names one class."""
    if not path.is_file():
        raise FileNotFoundError(f"--labels {path}: there is no such file")
    try:
        # Editors of Windows put a mark before the first one.
        labels = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels {path} is no text in UTF-8") from error
    twice = [label for label, number in Counter(labels).items() if number > 1]
    if twice:
        lines = [i for i, label in enumerate(labels, 1) if label == twice[0]]
        raise ValueError(
            f"--labels {path} has {twice[0]!r} on the lines {', '.join(map(str, lines))}, but "
            "Core ML tells probabilities by label: make them differ"
        )
    return labels


def _write(path: Path, model: Any, compression: Compression | None, force: bool) -> None:
    """Writes a package, compressed perhaps, and says what it is."""
    from torch_bridge.coreml.package import save

    kept = model
    if compression is not None:
        kept = compressed(model, compression)
    with making_folder(path.parent):
        save(path, kept, force=force)
    say(f"wrote {path}, {size_of(path) / 1e6:.2f} MB: {model.short_description}")
    if compression is None:
        return
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.mlpackage"
        save(plain, model, force=False)
        found = change(plain, path)
    say(
        f"  {compression}: {found.before / 1e6:.2f} MB before, {found.after / 1e6:.2f} MB after; "
        f"{found.what} change by up to {found.most:.3g}, their root mean square is {found.rms:.3g}"
    )
