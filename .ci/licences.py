"""Writes docs/licences.md, the licences of what users install: `python .ci/licences.py`.

It reads the metadata of the packages that are installed where it runs, which must be those of all
extras of users, of one package after the other. `--print` shows the page and writes nothing.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
# What only developers install, and what installs a vendor's own libraries through JAX.
NOT_USERS = {"audit", "docs", "release", "test", "test-core", "test-jax"}
VENDORS = {"cuda12", "cuda13", "tpu"}
# Copyleft that a whole program must follow, and copyleft of a library.
COPYLEFT = re.compile(r"\b(A|L)?GPL|GNU |EUPL|SSPL|CDDL|CeCILL|OSL-", re.I)
# The licences of packages whose metadata state none, as their own files do.
STATED_ELSEWHERE = {
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary (a list of NVIDIA's packages, without code)",
    "jax-triton": "Apache-2.0",
}
HEADER = """# Licences of dependencies

Flash WTConv is under Apache-2.0, and its wheel holds nobody else's code. These packages are
installed beside it, by the extras that the last column names ("core" is what every installation
has). No licence among them asks more of a program that uses it than to keep its notices: a test
fails on one that does (GPL, LGPL, AGPL and their like). MPL-2.0 covers the files of that package
alone.

The extras `cuda12`, `cuda13` and `tpu`, and PyTorch for CUDA, install NVIDIA's and Google's own
libraries (`nvidia-*`, `libtpu`) under the terms that those packages carry.

`python .ci/licences.py` writes this page from the packages' own metadata.

| package | licence | installed by |
|---|---|---|
"""


def extras(root: Path) -> dict[str, list[str]]:
    """The requirements of each part that users install: "core", then the extras."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return {"core": project["dependencies"]} | {
        name: list(optional[name]) for name in optional if name not in NOT_USERS | VENDORS
    }


def applies(requirement: Requirement, chosen: Iterable[str]) -> bool:
    """Whether the requirement holds on Linux and this Python with one of the extras `chosen`."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *chosen))


@cache
def required_by(name: str) -> list[str]:
    """The requirements that an installed package's metadata state, read once.

    Raises:
        metadata.PackageNotFoundError: If it is not installed.
    """
    return metadata.requires(name) or []


def closure(requirements: Iterable[str], own: dict[str, list[str]]) -> Iterator[str]:
    """Yields the names that the requirements lead to, each once.

    Raises:
        metadata.PackageNotFoundError: If one is not installed.
    """
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name, chosen = canonicalize_name(requirement.name), tuple(sorted(requirement.extras))
        if (name, chosen) in seen or not applies(requirement, ()):
            continue
        seen.add((name, chosen))
        if name == "flash-wtconv":
            waiting += [Requirement(text) for extra in chosen for text in own[extra]]
            continue
        yield name
        needed = (Requirement(text) for text in required_by(name))
        for one in needed:
            if applies(one, chosen):
                # What brought it in is known to hold; its own marker may ask for that extra.
                one.marker = None
                waiting.append(one)


@cache
def licence(name: str) -> str:
    """The licence that an installed package's metadata states, in one line."""
    about = metadata.metadata(name)
    if name in STATED_ELSEWHERE:
        return STATED_ELSEWHERE[name]
    if expression := about.get("License-Expression"):
        return expression
    classifiers = [
        one.rpartition(" :: ")[2]
        for one in about.get_all("Classifier", [])
        if one.startswith("License :: ") and not one.endswith("OSI Approved")
    ]
    stated = (about.get("License") or "").strip().splitlines()
    return ", ".join(classifiers) or (stated[0].strip() if stated else "not stated")


def page(root: Path) -> str:
    """The text of the page."""
    parts = extras(root)
    installed_by: dict[str, list[str]] = {}
    for part, requirements in parts.items():
        for name in sorted(set(closure(requirements, parts))):
            installed_by.setdefault(name, []).append(part)
    rows = [
        f"| {name} | {licence(name)} | {'core' if 'core' in by else ', '.join(by)} |\n"
        for name, by in sorted(installed_by.items())
    ]
    return HEADER + "".join(rows)


def rows_of(text: str) -> dict[str, str]:
    """The licences by package that a page lists."""
    cells = re.findall(r"^\| ([a-z0-9-]+) \| (.+?) \| .+ \|$", text, re.M)
    return {name: stated for name, stated in cells if name != "package"}


def problems(licences: dict[str, str]) -> Iterator[str]:
    """Yields the packages whose licence asks too much, or is not known."""
    for name, stated in licences.items():
        if COPYLEFT.search(stated):
            yield f"{name} is under {stated}: a copyleft licence"
        if stated == "not stated":
            yield f"{name} states no licence in its metadata"


def main() -> int:
    """Writes or prints the page, and returns the process' status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--print", action="store_true", help="show the page, write nothing")
    text = page(ROOT)
    if parser.parse_args().print:
        print(text, end="")
    else:
        PAGE.write_text(text, encoding="utf-8")
    found = list(problems(rows_of(text)))
    for problem in found:
        print(f"flash-wtconv: {problem}", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
