"""The command line, `flash-wtconv`: one module a command, heavy imports inside the commands."""

import sys
from typing import Annotated, NoReturn

import typer

from .bench import bench
from .convert import convert
from .demo import demo
from .erf import erf
from .info import info

app = typer.Typer(
    name="flash-wtconv",
    help="Wavelet convolutions for JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(info)
app.add_typer(bench, name="bench")
app.command()(demo)
app.command()(erf)
app.command()(convert)


def main() -> None:
    """Runs the command line; what a user can mend is told in one line, not in a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: pip install 'flash-wtconv[demo]' brings it")
    except (ValueError, OSError, RuntimeError) as error:
        _fail(str(error))


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

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
