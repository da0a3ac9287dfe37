"""Writes docs/reference/, a page a package of public names: `python .ci/reference.py`.

A package is public if it has an `__all__` and no part of its name begins with an underscore; its
page shows every name of that list, by mkdocstrings, from the docstring where the name is defined.
Nothing is imported: what the lazy packages hand on is found in the sources.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("flash_wtconv_jax", "pallas_kernels", "torch_bridge")
# Packages whose `__all__` is for the other rooms of this repository.
PRIVATE = {"pallas_kernels.wtconv.mosaic_gpu"}
# Modules that are public without being a package.
MODULES = (
    "flash_wtconv_jax.functional.mlp",
    "flash_wtconv_jax.surgery",
    "torch_bridge.coreml.evaluator",
    "torch_bridge.coreml.inputs",
    "torch_bridge.models",
)
Sources = dict[str, ast.Module]


def sources(root: Path) -> Sources:
    """The syntax trees of all modules of the three packages, by their dotted names."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def assigned(tree: ast.Module, name: str) -> ast.expr | None:
    """The value that a module assigns to `name` at its top level, None where it does not."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    return None


def strings(tree: ast.Module, node: ast.expr) -> list[str]:
    """The strings inside of an expression, and inside of the constants that it names."""
    found: list[str] = []
    for one in ast.walk(node):
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            found.append(one.value)
        elif isinstance(one, ast.Name) and (value := assigned(tree, one.id)) is not None:
            found += strings(tree, value)
    return found


def defines(tree: ast.Module, name: str) -> bool:
    """Whether a module defines `name` at its top level."""
    definitions = ast.FunctionDef | ast.ClassDef
    return assigned(tree, name) is not None or any(
        isinstance(node, definitions) and node.name == name for node in tree.body
    )


def imported_from(tree: ast.Module, name: str) -> str | None:
    """The module that `name` is imported from, also where only type checkers import it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{name}" if alias.name != name else node.module
    return None


def home(modules: Sources, package: str, name: str) -> str:
    """The dotted name under which something public is defined.

    Raises:
        LookupError: No module that `package` could hand `name` on from defines it.
    """
    tree = modules[package]
    if f"{package}.{name}" in modules or defines(tree, name):
        return f"{package}.{name}"
    source = imported_from(tree, name)
    if source in modules:
        return home(modules, source, name)
    below = [one for one in modules if one.startswith(f"{package}.")]
    for one in sorted(below, key=lambda one: (one.count("."), not one.endswith(".api"), one)):
        if defines(modules[one], name):
            return f"{one}.{name}"
    for one in below:
        source = imported_from(modules[one], name)
        if one.count(".") == package.count(".") + 1 and source in modules:
            return home(modules, source, name)
    raise LookupError(f"{package}.__all__ has {name!r}, which no module defines")


def public(modules: Sources) -> Iterator[tuple[str, list[str]]]:
    """Yields the public packages and modules with their names, those that Python sets left out."""
    for package, tree in modules.items():
        value = assigned(tree, "__all__")
        listed = value is not None and any(one.startswith(f"{package}.") for one in modules)
        if package in PRIVATE or not (listed or package in MODULES) or value is None:
            continue
        # `sorted(_ROOM_OF)`, `_ROOMS` turned round: the names are in its tuples.
        rooms = assigned(tree, "_ROOMS")
        if isinstance(value, ast.Call) and isinstance(rooms, ast.Dict):
            names = [one for tuple_ in rooms.values for one in strings(tree, tuple_)]
        else:
            names = strings(tree, value)
        yield package, sorted({name for name in names if not name.startswith("__")}, key=str.lower)


def pages(modules: Sources) -> dict[str, str]:
    """The text of each page by its file name.

    Raises:
        LookupError: A public name is defined nowhere.
    """
    listed = {package: names for package, names in public(modules)}
    homes = {one: {name: home(modules, one, name) for name in listed[one]} for one in listed}
    # What several packages hand on is shown by the one whose name is the longest.
    shown_by = {
        place: package
        for package in sorted(homes, key=lambda one: (one.count("."), one))
        for place in homes[package].values()
    }
    found, index = {}, []
    for package in listed:
        about = ast.get_docstring(modules[package]) or ""
        first = re.split(r"\n\n", about)[0].replace("\n", " ")
        parts, elsewhere = [], []
        for name, place in homes[package].items():
            shown = shown_by[place]
            if shown == package:
                parts.append(f"::: {place}\n    options:\n      heading: {name}\n")
            else:
                elsewhere.append(f"| `{name}` | [{shown}]({shown}.md#{place}) |\n")
        if elsewhere:
            parts.insert(0, "| name | shown with |\n|---|---|\n" + "".join(elsewhere))
        found[f"{package}.md"] = "\n".join([f"# {package}\n\n{first}\n", *parts])
        index.append(f"| [{package}]({package}.md) | {first} | {len(listed[package])} |\n")
    found["index.md"] = (
        "# API reference\n\nEvery public name, from its docstring. [Stability](../stability.md) "
        "says what may change, and how.\n\n| import from | holds | names |\n|---|---|---|\n"
        + "".join(index)
    )
    return found


def main() -> int:
    """Writes the pages and removes those of packages that are gone."""
    folder = ROOT / "docs" / "reference"
    folder.mkdir(exist_ok=True)
    try:
        found = pages(sources(ROOT))
    except LookupError as error:
        print(f"flash-wtconv: {error}", file=sys.stderr)
        return 1
    for path in folder.glob("*.md"):
        if path.name not in found:
            path.unlink()
    for name, text in found.items():
        path = folder / name
        # A page that stays the same is not touched: `mkdocs serve` would build it again.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
