"""Writes the tables of docs/implementations.md that `check` knows: `python .ci/implementations.py`.

For each operator: the shared cases of each dtype that an implementation takes, as its own `check`
answers, and the platforms that take it unasked. Nothing is computed.
"""

import re
from collections import Counter
from importlib import import_module
from pathlib import Path

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Operator

PAGE = Path(__file__).parents[1] / "docs" / "implementations.md"
DTYPES = ("float32", "bfloat16", "float16", "float64")
BEGIN, END = "<!-- {}: made by .ci/implementations.py -->", "<!-- end -->"


def taken(operator: Operator, name: str) -> Counter[str]:
    """How many of the shared cases of each dtype an implementation takes, in every direction."""
    room = import_module(f"{operator.package}.conformance")
    module = operator.module(name)
    found: Counter[str] = Counter()
    for case in room.CASES:
        try:
            for direction in operator.directions:
                module.check(direction, room.problem(case))
        except NotImplementedError:
            continue
        found[case.dtype] += 1
    return found


def unasked(operator: Operator, name: str) -> list[str]:
    """The platforms whose rule has an implementation before plain JAX, or as plain JAX."""
    return [
        platform.upper()
        for platform, names in sorted(operator.rule.items())
        if name in names[: names.index("xla") + 1]
    ]


def table(operator: Operator) -> str:
    """A row an implementation: its platforms, and its share of the cases of each dtype."""
    room = import_module(f"{operator.package}.conformance")
    cases = Counter(case.dtype for case in room.CASES)
    dtypes = [dtype for dtype in DTYPES if cases[dtype]]
    lines = [["name", "unasked on", *(f"{dtype}, of {cases[dtype]}" for dtype in dtypes)]]
    lines.append(["---"] * len(lines[0]))
    for name in map(str, operator.implementations):
        found = taken(operator, name)
        shares = ["all" if found[each] == cases[each] else found[each] or "–" for each in dtypes]
        lines.append([f"`{name}`", ", ".join(unasked(operator, name)) or "–", *map(str, shares)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(text: str) -> str:
    """The page with each of its tables made anew.

    Raises:
        LookupError: An operator has no table.
    """
    for operator in dispatch.operators():
        if not operator.package.startswith("pallas_kernels."):
            continue
        begin = BEGIN.format(operator.name)
        place = re.compile(f"{re.escape(begin)}\n.*?{re.escape(END)}", re.S)
        if not place.search(text):
            raise LookupError(f"the page has no line {begin}")
        text = place.sub(f"{begin}\n{table(operator)}\n{END}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
