"""The messages and the progress bars of the commands on standard output."""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import Progress


def say(message: str) -> None:
    """Prints a message; a reader that is gone, of a pipe that was closed, is no error."""
    try:
        typer.echo(message)
    except OSError:
        # What waits in the buffer would fail again when the program ends.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_files(folder: Path, files: Mapping[str, str]) -> None:
    """Prints what a command has written into a folder.

    Args:
        folder: The folder.
        files: What each file is, by its name; those that are not there are not told of.
    """
    for name, text in files.items():
        if (folder / name).exists():
            say(f"  {folder / name}  {text}")


def progress(name: str, *more: str, disable: bool = False) -> "Progress":
    """The progress bar of a command, which goes when it is done.

    Args:
        name: The command's.
        *more: Texts behind the bar, such as "{task.fields[state]}".
        disable: Whether nothing is shown.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, *map(TextColumn, more), transient=True, disable=disable)
