"""The console that the commands print tables on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def plain_console() -> "Console":
    """A console that takes no text for markup: paths, names and reasons may look like it.

    Styles are those of `rich.text.Text` and of rows.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False)
