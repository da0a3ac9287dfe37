"""Tables on terminals, and in files, that are narrower than they are."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from flash_wtconv_jax.cli.tables import print_table


def printed(table, **console):
    out = io.StringIO()
    print_table(Console(file=out, width=80, **console), table)
    return out.getvalue()


@pytest.fixture
def table():
    """Ten columns of figures, 120 characters wide."""
    made = Table(title="all", caption="in ms")
    made.add_column("", no_wrap=True)
    for i in range(9):
        made.add_column("floor" if i % 2 else "time", justify="right", no_wrap=True)
    made.add_row("shape", style="bold")
    made.add_row("flash", *(f"1,234,56{i}.9" for i in range(8)))
    return made


def test_without_a_terminal_it_is_as_wide_as_it_needs_to_be(table):
    lines = printed(table).splitlines()
    (row,) = [line for line in lines if "flash" in line]
    assert all(f"1,234,56{i}.9" in row for i in range(8)) and len(row) > 80
    assert "\u2026" not in "".join(lines)


def test_on_a_narrow_terminal_a_row_is_a_line_of_figures(table):
    terminal = {"force_terminal": True, "color_system": None, "_environ": {}}
    text = printed(table, **terminal)
    assert max(map(len, text.splitlines())) <= 80 and "\u2026" not in text
    row = " ".join(text.split())
    assert "shape flash: time 1,234,560.9, floor 1,234,561.9, time 1,234,562.9, floor" in row
    assert row.endswith("in ms")
    # A table that fits, and one that wraps, stay tables.
    for text in ("text", "text " * 30):
        kept = Table("what", "time")
        kept.add_row(text, "1.0")
        assert "\u2502" in printed(kept, **terminal)
