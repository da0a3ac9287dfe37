"""`flash-wtconv convert`: weights from PyTorch to Flax, back, and from layout to layout."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from flash_wtconv_jax.cli.messages import say

if TYPE_CHECKING:
    import numpy as np


def convert(
    source: Annotated[
        Path, typer.Argument(help="A .safetensors, .pth, .pt or .pth.tar file, or an Orbax folder.")
    ],
    destination: Annotated[
        Path,
        typer.Argument(help="Likewise; a name without an extension makes an Orbax folder."),
    ],
    layout: Annotated[
        str | None,
        typer.Option(
            help="PyTorch layout of DESTINATION, or of SOURCE when DESTINATION is a folder: "
            "published, fast, metal, wtconvnext, original, mmseg, features_only or "
            "transformer_net. Default: that of SOURCE, which is recognised."
        ),
    ] = None,
    wavelet: Annotated[
        str | None,
        typer.Option(
            help="PyWavelets name of the layers' wavelet. Default: what SOURCE says, if it does."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DESTINATION.")] = False,
) -> None:
    """Convert weights between PyTorch state dicts and Flax variables (an Orbax folder)."""
    from flash_wtconv_jax.checkpoints import LAYOUTS
    from flash_wtconv_jax.checkpoints.files import is_state_dict

    if layout is not None and layout not in LAYOUTS:
        _fail(f"--layout is {layout}, expected one of: {', '.join(LAYOUTS)}")
    is_folder = destination.suffix == "" or destination.is_dir()
    if not is_state_dict(destination) and not is_folder:
        _fail(
            f"destination {destination} has extension {destination.suffix}, expected .safetensors, "
            ".pth, .pt, .pth.tar, or none for an Orbax folder",
        )
    if os.path.lexists(destination) and not force:
        _fail(f"{destination} exists already; give --force to replace it")
    try:
        _convert(source, destination, layout, wavelet, force)
    except (TypeError, ValueError, OSError, RuntimeError, ImportError) as error:
        _fail(str(error))


def _convert(
    source: Path, destination: Path, layout: str | None, wavelet: str | None, force: bool
) -> None:
    from flash_wtconv_jax import checkpoints
    from flash_wtconv_jax.checkpoints.files import is_state_dict
    from flash_wtconv_jax.checkpoints.names import flatten
    from pallas_kernels.common.files import check_folder

    check_folder(destination)
    to_file = is_state_dict(destination)
    if source.is_dir():
        variables = checkpoints.restore(source)
        wavelet = checkpoints.wavelet_of(source, wavelet)
        said = f"wavelet {wavelet}" if wavelet else "no wavelet named"
        say(f"read {source}: Orbax folder, {said}, {_size(flatten(variables))}")
    else:
        state_dict = checkpoints.read_state_dict(source)
        found = checkpoints.recognise(state_dict)
        read_as = found.layout if to_file or layout is None else layout
        wavelet = wavelet or found.wavelet
        variables = checkpoints.from_torch(state_dict, read_as, wavelet=wavelet)
        layout = layout or found.layout
        say(
            f"read {source}: layout {read_as}, {found.ndim}-D, wavelet {wavelet}, "
            f"{_size(state_dict)}"
        )
    if to_file:
        state_dict = checkpoints.to_torch(variables, layout, wavelet=wavelet or "haar")
        if wavelet is None and any(_is_frozen(name) for name in state_dict):
            raise ValueError(
                f"{source} does not say which wavelet its layers have, and {destination} holds its "
                "filters: name it, for instance with --wavelet haar"
            )
        checkpoints.write_state_dict(destination, state_dict, force=force)
        made = checkpoints.recognise(state_dict)
        say(
            f"wrote {destination}: layout {made.layout}, {made.ndim}-D, wavelet {made.wavelet}, "
            f"{_size(state_dict)}"
        )
    else:
        checkpoints.save(destination, variables, wavelet=wavelet, force=force)
        say(f"wrote {destination}: Orbax folder, {_size(flatten(variables))}")


def _size(arrays: "dict[str, np.ndarray]") -> str:
    """Numbers of tensors and parameters, the frozen ones apart: PyTorch users count them."""
    total = sum(array.size for array in arrays.values())
    frozen = sum(array.size for name, array in arrays.items() if _is_frozen(name))
    text = f"{len(arrays)} tensors, {total - frozen:,} parameters"
    return text + (f" and {frozen:,} values of frozen filters" if frozen else "")


def _is_frozen(name: str) -> bool:
    return name.endswith("_filter")


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
