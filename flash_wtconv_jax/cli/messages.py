"""What the commands say of what they do."""

import os
import sys
from contextlib import suppress

import typer


def say(message: str) -> None:
    """Prints a message, which fails nothing where nobody reads it."""
    try:
        typer.echo(message)
    except OSError:
        # What waits in the buffer would fail again when the program ends.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
