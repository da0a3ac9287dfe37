"""The console of the commands, and tables that keep their figures in a narrow terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def plain_console() -> "Console":
    """A console that takes no text for markup: paths, names and reasons may look like it.

    Styles are those of `rich.text.Text` and of rows.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False)


def print_table(console: "Console", table: "Table") -> None:
    """Prints a table of which no figure is cut.

    A file or a pipe has no width to keep to, so that the table is as wide as it needs to be. On a
    terminal that is too narrow for columns that do not wrap, each row is a line of its figures
    after their headings.

    Args:
        console: Where to print it.
        table: Its cells are texts, and the first of each row says what the others are of.
    """
    from rich.measure import Measurement

    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    if not console.is_terminal:
        console.width = max(console.width, needed)
    if needed <= console.width or not all(column.no_wrap for column in table.columns):
        console.print(table)
        return
    for line in _lines(table):
        console.print(line)


def _lines(table: "Table") -> Iterator["Text"]:
    """The rows of a table as text, between its title and its caption."""
    from rich.text import Text

    headings = [str(column.header) for column in table.columns[1:]]
    yield Text(str(table.title), "italic")
    for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
        figures = [
            f"{heading} {cell}" for heading, cell in zip(headings, cells, strict=True) if cell
        ]
        yield Text(f"{name}: {', '.join(map(str.strip, figures))}" if figures else str(name))
    yield Text(str(table.caption), "dim")
