"""Writes docs/notebooks/, a page a notebook, from its outputs: `python .ci/notebook_pages.py`.

Nothing is run, and pages are plain Markdown, so that MkDocs and Zensical both read them. A cell
that shows a picture tells in its metadata, `alt`, what is to be seen there.
"""

import base64
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORGE = "https://github.com/flash-wtconv/flash-wtconv/blob/main/"
_BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)")
_ESCAPES = re.compile(r"\x1b\[[\d;]*m")
_Cell = dict[str, Any]


def page(name: str, cells: list[_Cell]) -> tuple[str, dict[str, bytes]]:
    """The page of the notebook `name`, and its pictures by the names of their files.

    Raises:
        LookupError: A cell shows a picture and has no `alt`.
    """
    pictures: dict[str, bytes] = {}
    parts = list(_parts(name, cells, pictures))
    return "\n\n".join(parts) + "\n", pictures


def _parts(name: str, cells: list[_Cell], pictures: dict[str, bytes]) -> Iterator[str]:
    """Yields the parts of a page, and puts pictures into `pictures`."""
    links = rf"[Open in Colab](\1) · [the notebook]({FORGE}notebooks/{name}.ipynb)"
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text = _BADGE.sub(links, source)
            # What is a page of the site too is one click away, not at the forge.
            yield re.sub(rf"\({re.escape(FORGE)}docs/([^)]+\.md[^)]*)\)", r"(../\1)", text)
            continue
        if number == 1:
            indented = "\n".join(f"    {line}".rstrip() for line in _fenced("python", source))
            yield f'??? note "Installation"\n\n{indented}'
        else:
            yield "\n".join(_fenced("python", source))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                if not (alt := cell["metadata"].get("alt")):
                    raise LookupError(f"{name}: cell {number} shows a picture and has no `alt`")
                file = f"{name}_{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode(data["image/png"])
                yield f"![{alt}]({file})"
            elif shown := "".join(output.get("text") or data.get("text/plain", "")).strip("\n"):
                yield "\n".join(_fenced("text", _ESCAPES.sub("", shown)))


def _fenced(language: str, text: str) -> list[str]:
    """The lines of a block of code."""
    return [f"```{language}", *text.splitlines(), "```"]


def files(root: Path) -> dict[str, str | bytes]:
    """Returns the contents of every file of docs/notebooks by its name.

    Raises:
        LookupError: A cell shows a picture and has no `alt`.
    """
    found: dict[str, str | bytes] = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found[f"{path.stem}.md"], pictures = page(path.stem, cells)
        found |= pictures
    return found


def main() -> int:
    """Writes the pages and removes those of notebooks that are gone."""
    folder = ROOT / "docs" / "notebooks"
    folder.mkdir(exist_ok=True)
    try:
        found = files(ROOT)
    except LookupError as error:
        print(f"flash-wtconv: {error}", file=sys.stderr)
        return 1
    for path in folder.iterdir():
        if path.name not in found:
            path.unlink()
    for name, contents in found.items():
        new = contents.encode() if isinstance(contents, str) else contents
        path = folder / name
        # A page that stays the same is not touched: `mkdocs serve` would build it again.
        if not path.exists() or path.read_bytes() != new:
            path.write_bytes(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
