"""Tables that keep their figures, however narrow the terminal is."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


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


def _lines(table: "Table") -> Iterator[str]:
    """The rows of a table as text, between its title and its caption."""
    headings = [str(column.header) for column in table.columns[1:]]
    yield f"[italic]{table.title}[/]"
    for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
        figures = [
            f"{heading} {cell}" for heading, cell in zip(headings, cells, strict=True) if cell
        ]
        yield f"{name}: {', '.join(map(str.strip, figures))}" if figures else str(name)
    yield f"[dim]{table.caption}[/]"
