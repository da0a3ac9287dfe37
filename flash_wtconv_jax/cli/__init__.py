"""The command line, `flash-wtconv`: one module a command, heavy imports inside the commands."""

import logging
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flash_wtconv_jax.cli.bench import bench
from flash_wtconv_jax.cli.cache import cache
from flash_wtconv_jax.cli.check import check
from flash_wtconv_jax.cli.convert import convert
from flash_wtconv_jax.cli.data import data
from flash_wtconv_jax.cli.demo import demo
from flash_wtconv_jax.cli.erf import erf
from flash_wtconv_jax.cli.evaluate import evaluate, predict
from flash_wtconv_jax.cli.info import info
from flash_wtconv_jax.cli.stylize import stylize
from flash_wtconv_jax.cli.tpu_report import tpu_report
from flash_wtconv_jax.cli.train import train
from flash_wtconv_jax.cli.train_style import train_style

app = typer.Typer(
    name="flash-wtconv",
    help="Wavelet convolutions for JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(info)
app.command()(check)
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")
app.command()(demo)
app.command()(erf)
app.command()(convert)
app.command()(train)
app.command("eval")(evaluate)
app.command()(predict)
app.add_typer(data, name="data")
app.command()(stylize)
app.command()(tpu_report)
app.command()(train_style)


def main() -> None:
    """Runs the command line; an error that a user can mend is one line, not a traceback."""
    run(app)


def run(app: Callable[[], object]) -> None:
    """Runs a command line; an error that a user can mend is printed as one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # Of a name that its encoding lacks, which must not fail what is done already.
            stream.reconfigure(errors="backslashreplace")
    _look_for_no_tpu()
    # Pictures go into files, whatever windows or notebooks the user has set for others.
    os.environ["MPLBACKEND"] = "agg"
    # Orbax logs the traceback of what it raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        app()
    except ModuleNotFoundError as error:
        extras = {
            "PIL": "stylize",
            "coremltools": "coreml",
            "grain": "train",
            "h5py": "stylize",
            "imagecodecs": "stylize",
            "libtpu": "tpu",
            "matplotlib": "plot",
            "nilearn": "voxels",
            "tensorboardX": "train",
            "tifffile": "stylize",
            "torch": "torch",
        }
        name = (error.name or "").partition(".")[0]
        extra = extras.get(name, "demo")
        _fail(f"{name} is not installed: pip install 'flash-wtconv[{extra}]' brings it")
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as error:
        _fail(str(error) or type(error).__name__)


def _look_for_no_tpu() -> None:
    """Keeps libtpu, where it is installed for its compiler alone, from complaining of no TPU."""
    nodes = ("accel*", "vfio/[0-9]*", "nvidia*", "kfd")
    if find_spec("libtpu") and not any(any(Path("/dev").glob(node)) for node in nodes):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _print_version(wanted: bool) -> None:
    if wanted:
        from flash_wtconv_jax import __version__

        typer.echo(f"flash-wtconv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """The options of the program itself."""


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(1)
