"""Checks files that no linter reads: `python .ci/check_files.py FILE...`.

A `.toml` file must parse; a notebook must be valid JSON, and its outputs those of its cells.
"""

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from notebooks import stale


def problems(path: Path) -> Iterator[str]:
    """Yields what is wrong with a file, one sentence a problem."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml":
            tomllib.loads(text)
            return
        cells = json.loads(text)["cells"]
    except (ValueError, KeyError) as error:
        yield f"{path} is no valid {path.suffix} file: {error!r}"
        return
    yield from (f"{path}: {problem}" for problem in stale(cells))


if __name__ == "__main__":
    found = [problem for path in sys.argv[1:] for problem in problems(Path(path))]
    for problem in found:
        print(problem)
    sys.exit(bool(found))
