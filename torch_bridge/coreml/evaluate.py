"""`python -m torch_bridge.coreml evaluate`: a package on any machine."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from flash_wtconv_jax.cli.messages import say
from pallas_kernels.common.files import check_folder, replacing, writing
from torch_bridge.coreml.program import Array


def evaluate(
    package: Annotated[Path, typer.Argument(help="An .mlpackage.")],
    source: Annotated[
        Path,
        typer.Option(
            "--input",
            metavar="FILE",
            help="A .npy file, or an .npz file with an array for each input by its name.",
        ),
    ],
    destination: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Likewise: .npy for one output, .npz for any number of them by name.",
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace the output.")] = False,
) -> None:
    """Compute the outputs of a package in NumPy, from its saved program and weights."""
    from torch_bridge.coreml.evaluator import Package

    if destination.suffix not in (".npy", ".npz"):
        raise ValueError(f"--output {destination}: expected a name that ends in .npy or .npz")
    if destination.exists() and not force:
        raise FileExistsError(f"{destination} exists already; give --force to replace it")
    check_folder(destination)
    loaded = Package(package)
    outputs = loaded.predict(_inputs(source, list(loaded.inputs)))
    _write(destination, outputs, force)
    for name, value in outputs.items():
        numbers = value.dtype.kind == "f" and value.size
        said = f" from {value.min():.6g} to {value.max():.6g}" if numbers else f" {value}"
        say(f"{name} {value.shape}{said}")
    say(f"wrote {destination}")


def _inputs(path: Path, names: list[str]) -> dict[str, Array]:
    """The arrays of a file by the names of inputs."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        found = np.load(path, allow_pickle=False)
        arrays = found if isinstance(found, np.ndarray) else dict(found.items())
    # NumPy raises whatever it stumbles over in a damaged file.
    except Exception as error:
        raise ValueError(f"{path} is no whole .npy or .npz file of numbers") from error
    if isinstance(arrays, np.ndarray):
        if len(names) > 1:
            raise ValueError(
                f"{path} holds one array, but the package has the inputs {', '.join(names)}: "
                "give an .npz file with an array for each by its name, as numpy.savez writes it"
            )
        arrays = {names[0]: arrays}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{path}: {name} is of {array.dtype}, expected numbers")
    return arrays


def _write(path: Path, outputs: dict[str, Array], force: bool) -> None:
    if path.suffix == ".npy" and len(outputs) > 1:
        raise ValueError(
            f"--output {path}: the package has the outputs {', '.join(outputs)}, give a name that "
            "ends in .npz"
        )
    with replacing(path, force) as temporary, writing(path):
        if path.suffix == ".npy":
            (only,) = outputs.values()
            np.save(temporary, only)
        else:
            np.savez(temporary, **outputs)  # type: ignore[arg-type]
