"""Runs notebooks and stores small outputs: `python .ci/notebooks.py notebooks/quickstart.ipynb …`.

Each cell that is stored with outputs carries the hash of its source, so that outputs of an older
source are seen (`stale`), here, by `make lint` and by a test.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LARGEST = 1_000_000
"""Bytes that the pictures of one notebook may take."""
_KEPT = ("text/plain", "image/png")
_Cell = dict[str, Any]


def hash_of(cell: _Cell) -> str:
    """The hash of a cell's source."""
    return hashlib.sha256("".join(cell["source"]).encode()).hexdigest()[:16]


def stale(cells: list[_Cell]) -> Iterator[str]:
    """Yields what is wrong with the outputs that cells are stored with."""
    pictures = 0
    for number, cell in enumerate(cells, 1):
        if cell["cell_type"] != "code":
            continue
        if cell.get("execution_count") is not None:
            yield f"cell {number} has an execution count, which changes with every run"
        if cell["outputs"] and cell["metadata"].get("source_hash") != hash_of(cell):
            yield f"cell {number} has outputs of another source: python .ci/notebooks.py"
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"cell {number} failed"
            pictures += len(output.get("data", {}).get("image/png", "")) * 3 // 4
    if pictures > LARGEST:
        yield f"its pictures take {pictures:,} bytes, {LARGEST:,} are allowed"


def reduced(outputs: list[_Cell]) -> list[_Cell]:
    """The outputs worth storing: what was printed, values and pictures, without warnings."""
    found: list[_Cell] = []
    for output in outputs:
        if output["output_type"] == "stream":
            if output["name"] == "stdout" and output["text"]:
                found.append(output)
            continue
        data = {kind: value for kind, value in output["data"].items() if kind in _KEPT}
        if set(data) == {"text/plain"} and " at 0x" in data["text/plain"]:
            continue  # An address in memory.
        if "image/png" in data:
            data["image/png"] = _smaller(data["image/png"])
            # Its text is an address in memory.
            data["text/plain"] = "<Figure>"
        found.append({**output, "data": data, "metadata": {}})
        found[-1].pop("execution_count", None)
        if output["output_type"] == "execute_result":
            found[-1]["execution_count"] = None
    return found


def _smaller(picture: str) -> str:
    """A PNG of 256 colours, which charts hardly miss."""
    from io import BytesIO

    from PIL import Image

    opened = Image.open(BytesIO(base64.b64decode(picture))).convert("RGB")
    stored = BytesIO()
    opened.quantize(256).save(stored, format="png", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()


def run(path: Path) -> None:
    """Runs a notebook and stores what it shows."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.from_dict(one) for one in reduced(cell.outputs)]
            cell.execution_count = None
            # What a picture shows in words is written by hand.
            alt = {"alt": cell.metadata["alt"]} if "alt" in cell.metadata else {}
            cell.metadata = {"source_hash": hash_of(cell), **alt} if cell.outputs else {}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
        found = list(stale(json.loads(Path(name).read_text(encoding="utf-8"))["cells"]))
        print(name, *found, sep="\n  ")
