"""Writes docs/results.md and its charts from docs/results/*.json: `python .ci/results.py`.

The files are what `flash-wtconv bench … --out` leaves. Nothing on the page is typed by hand.
"""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
NOISY = 2.0
"""The greatest time over the least from which on times are not compared."""
COLOURS = {"ours": "#0072b2", "others": "#999999"}
"""Two that the colour-blind tell apart, on white and on black."""
Report = dict[str, Any]
Row = dict[str, Any]

HEAD = """# Results

Every figure of this page is from a file in
[docs/results](https://github.com/flash-wtconv/flash-wtconv/tree/main/docs/results), which
`flash-wtconv bench` wrote on the device that it names; `.ci/results.py` makes tables and charts.
Times are medians in milliseconds, with the least and the greatest of a run. A ratio is the speed
over the baseline, which has 1, in the same run; where the greatest time is over twice the least,
*noisy* stands in its place. In charts names that begin with *flash* are blue: alone it is what
`implementation=None` takes, else the implementation that is named. Whiskers are orange.
"""


def reports(folder: Path) -> dict[str, Report]:
    """The reports of a folder by the names of their files."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def groups(report: Report) -> dict[tuple[str, str], list[Row]]:
    """The rows of what was computed, in one direction: those that are compared."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in report["rows"]:
        what = row.get("shape") or f"{row['work']}, {row['name']}"
        found.setdefault((what, row["direction"]), []).append(row)
    return found


def ratio(row: Row) -> str:
    """The speed over the baseline's."""
    if row.get("speedup") is None:
        return ""
    return "noisy" if row["greatest_ms"] > NOISY * row["least_ms"] else f"{row['speedup']:.2f}"


def table(report: Report) -> Iterator[str]:
    """The lines of a report's table."""
    yield "| | direction | by | ms | least – greatest | ratio |"
    yield "|---|---|---|---|---|---|"
    before = None
    for (what, direction), rows in groups(report).items():
        for row in rows:
            first = what if what != before else ""
            times = " – ".join(f"{row[key]:.4g}" for key in ("least_ms", "greatest_ms"))
            cells = first, direction, row["contender"], f"{row['median_ms']:.4g}", times, ratio(row)
            yield f"| {' | '.join(cells)} |"
            before = what


def chart(report: Report) -> str:
    """Bars of the ratios as SVG, with whiskers from the greatest to the least time."""
    bars = [
        (f"{what}, {direction}" if i == 0 else "", row)
        for (what, direction), rows in groups(report).items()
        for i, row in enumerate(row for row in rows if ratio(row) not in ("", "noisy"))
    ]
    fastest = max(row["speedup"] * row["median_ms"] / row["least_ms"] for _, row in bars)
    lines, y, scale = [], 10.0, 300 / fastest
    for title, row in bars:
        if title:
            y += 20
            lines.append(f'<text x="10" y="{y - 4:.0f}" font-weight="bold">{escape(title)}</text>')
        colour = COLOURS["ours" if row["contender"].startswith("flash") else "others"]
        long, least, most = (
            180 + scale * row["speedup"] * row["median_ms"] / row[f"{key}_ms"]
            for key in ("median", "greatest", "least")
        )
        lines += [
            f'<text x="174" y="{y + 11:.0f}" text-anchor="end">{escape(row["contender"])}</text>',
            f'<rect x="180" y="{y:.0f}" width="{long - 180:.1f}" height="13" fill="{colour}"/>',
            f'<path d="M{least:.1f} {y + 6.5:.1f}H{most:.1f}" stroke="#d55e00" stroke-width="2"/>',
            f'<text x="{max(long, most) + 5:.1f}" y="{y + 11:.0f}">{row["speedup"]:.2f}</text>',
        ]
        y += 16
    view = f'viewBox="0 0 540 {y + 10:.0f}" font-family="sans-serif" font-size="11"'
    style = "<style>text{fill:#222}svg{background:#fff}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {view}>{style}'
    return "\n".join([head, *lines, "</svg>", ""])


def section(name: str, report: Report) -> Iterator[str]:
    """The lines of one report."""
    dtype = report.get("dtype") or report["rows"][0]["dtype"]
    versions = report["versions"]
    title = f"{report['benchmark'].capitalize()}, {dtype}, {report['device']['kind']}"
    yield f"\n## {title}\n"
    yield (
        f"`flash-wtconv bench {report['benchmark']}`, {report['date']}, JAX {versions['jax']}, "
        f"by {report['clock']}: [{name}.json](https://github.com/flash-wtconv/flash-wtconv/blob/main/"
        f"docs/results/{name}.json).\n"
    )
    yield f"![Bars: speed of {title} over the baseline's](images/results_{name}.svg)\n"
    yield from table(report)


def files(docs: Path) -> dict[Path, str]:
    """Returns what is made of the reports in `docs/results`: the page and its charts."""
    found = reports(docs / "results")
    lines = [line for name, report in found.items() for line in section(name, report)]
    made = {docs / "results.md": "\n".join([HEAD, *lines, ""]).replace("\n\n\n", "\n\n")}
    for name, report in found.items():
        made[docs / "images" / f"results_{name}.svg"] = chart(report)
    return made


if __name__ == "__main__":
    for path, text in files(DOCS).items():
        path.write_text(text, encoding="utf-8")
