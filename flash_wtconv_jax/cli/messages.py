"""The messages of the commands on standard output."""

import os
import sys
from contextlib import suppress

import typer


def say(message: str) -> None:
    """Prints a message; a reader that is gone, of a pipe that was closed, is no error."""
    try:
        typer.echo(message)
    except OSError:
        # What waits in the buffer would fail again when the program ends.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
