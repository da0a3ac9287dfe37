"""`flash-wtconv check`: every implementation of every operator, against the oracle."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from flash_wtconv_jax.cli.messages import say
from pallas_kernels.common.types import Json

if TYPE_CHECKING:
    from rich.table import Table

    from pallas_kernels.common.conformance import Backend, Case, Results, Room
    from pallas_kernels.dispatch import Operator

Operators = Annotated[
    list[str] | None,
    typer.Option(
        "--operator", metavar="NAME", help="Only this one; several are allowed. `info` lists them."
    ),
]
Implementations = Annotated[
    list[str] | None,
    typer.Option(
        "--implementation",
        metavar="NAME",
        help="Only this one; several are allowed. `info` lists them.",
    ),
]
AsJson = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", dir_okay=False, help="Write the rows there too."),
]
"""The options that `python -m torch_bridge check` has too."""


def check(
    operator: Operators = None, implementation: Implementations = None, as_json: AsJson = None
) -> None:
    """Compute the shared cases with every implementation that this machine has; 1 if one fails."""
    from flash_wtconv_jax import environment

    found = rooms()
    chosen = {name: found[name] for name in narrowed("--operator", operator, found)}
    known = [name for one, _ in chosen.values() for name in map(str, one.implementations)]
    names = narrowed("--implementation", implementation, known)
    device = environment.device()
    about = {"device": device, "versions": environment.versions()}
    show(_rows(chosen, names), about, f"JAX, {device['kind']}", as_json)


def narrowed(option: str, wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Returns the names that an option narrows a check to: all of them where it was not given.

    Args:
        option: What the user calls it.
        wanted: The names that the user gave.
        known: Every name that there is.

    Raises:
        ValueError: An unknown name.

    Example:
        >>> narrowed("--operator", ["haar"], ["conv2d", "haar", "wtconv"])
        ['haar']
    """
    names = list(dict.fromkeys(known))
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise ValueError(f"{option} {unknown[0]}: expected one of {', '.join(names)}")
    return [name for name in names if name in (wanted or names)]


def rooms() -> "dict[str, tuple[Operator, Room]]":
    """Returns every operator of `pallas_kernels` whose folder has a module `conformance`."""
    from importlib import import_module
    from importlib.util import find_spec

    from pallas_kernels import dispatch

    found = {}
    for operator in dispatch.operators():
        name = f"{operator.package}.conformance"
        # PyTorch's operators, where they are imported, have a check of their own.
        if name.startswith("pallas_kernels.") and find_spec(name):
            found[operator.name] = operator, cast("Room", import_module(name))
    return found


def results(function: "Callable[..., Results]", case: "Case") -> "Results":
    """Returns what a function of a case's arrays computes, compiled as one program.

    Args:
        function: What `computed` or `baseline` of a `Room` returns.
        case: Whose arrays it takes.

    Returns:
        NumPy's arrays by name.

    Example:
        >>> from pallas_kernels.wtconv import conformance
        >>> case = conformance.CASES[0]
        >>> results(conformance.computed(case, "xla"), case)["y"].shape
        (2, 16, 3)
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.dispatch import tuning

    # A named implementation has parameters, which nobody waits for here to be measured.
    with jax.enable_x64(case.dtype == "float64"), tuning("off"):
        arrays = jax.tree.map(jnp.asarray, case.drawn())
        return jax.tree.map(np.asarray, jax.jit(function)(*arrays))


def show(rows: Iterable[Json], about: Json, title: str, as_json: Path | None) -> None:
    """Prints the rows of a check as a table while they come, and writes them into a file.

    Args:
        rows: What `pallas_kernels.common.conformance.run` yields, each with its `operator`.
        about: What stands beside the rows in the file.
        title: Title of the table.
        as_json: The file, or None.

    Raises:
        typer.Exit: With code 1, if a row is a failure.
    """
    from rich.progress import Progress

    from flash_wtconv_jax.cli.tables import plain_console, print_table
    from pallas_kernels.common.files import check_folder, replacing

    if as_json is not None:
        check_folder(as_json)
    console = plain_console()
    done = []
    with Progress("{task.description}", console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        for row in rows:
            done.append(row)
            bar.update(task, description=f"{len(done)} {_heading(row)} {row['case']}")
    print_table(console, _table(done, title))
    for line in _reasons(done):
        console.print(line, highlight=False, soft_wrap=True)
    count = {status: sum(row["status"] == status for row in done) for status in _COLOURS}
    console.print(", ".join(f"{number} {status}" for status, number in count.items()))
    if as_json is not None:
        with replacing(as_json, force=True) as path:
            path.write_text(json.dumps({**about, "rows": done}, indent=2) + "\n")
        say(f"wrote {as_json}")
    if count["fail"]:
        raise typer.Exit(1)


_COLOURS = {"pass": "green", "fail": "red", "skip": "yellow"}


def _table(rows: list[Json], title: str) -> "Table":
    """A section an operator and backend, a row a case that it computed."""
    from rich.table import Table
    from rich.text import Text

    caption = "error: greatest one of the array nearest to its bound, as a fraction of its RMS"
    table = Table(title=title, caption=caption)
    table.add_column("", overflow="fold")
    for name in ("error", "bound", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    previous = None
    for row in rows:
        if row["status"] == "skip":
            continue
        if _heading(row) != previous:
            previous = _heading(row)
            table.add_section()
            table.add_row(previous, style="bold")
        table.add_row(
            row["case"],
            *("" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "bound")),
            "" if row["seconds"] is None else f"{row['seconds']:.2f}",
            Text(row["status"], _COLOURS[row["status"]]),
        )
    return table


def _reasons(rows: list[Json]) -> list[str]:
    """A line for each failure, and one for all cases that a backend skips for the same reason."""
    skipped = Counter((_heading(r), r["reason"]) for r in rows if r["status"] == "skip")
    lines = [
        f"skip {heading}, {number} case{'s' * (number > 1)}: {reason}"
        for (heading, reason), number in skipped.items()
    ]
    failed = (row for row in rows if row["status"] == "fail")
    return lines + [f"fail {_heading(row)} {row['case']}: {row['reason']}" for row in failed]


def _heading(row: Json) -> str:
    """The operator and the backend of a row."""
    return f"{row['operator']} {row['backend']}"


def _rows(
    chosen: "Mapping[str, tuple[Operator, Room]]", implementations: Sequence[str]
) -> Iterator[Json]:
    """The rows of operators, on the platform that JAX is on."""
    from pallas_kernels.common import conformance

    for name, (operator, room) in chosen.items():

        def plain(case: "Case", room: "Room" = room) -> "Results":
            return results(room.baseline(case), case)

        backends = _backends(operator, room, implementations)
        for row in conformance.run(backends, plain):
            yield {"operator": name, **row}


def _backends(
    operator: "Operator", room: "Room", implementations: Sequence[str]
) -> "Iterator[Backend]":
    """The implementations of an operator that were asked for."""
    from functools import partial

    from pallas_kernels.common import device
    from pallas_kernels.common.conformance import Backend

    def compute(name: str, case: "Case") -> "Results":
        return results(room.computed(case, name), case)

    for name, reason in operator.status(device.platform()):
        if name in implementations:
            refusal = partial(_refusal, operator, room, name, reason)
            yield Backend(name, room.CASES, refusal, partial(compute, name))


def _refusal(
    operator: "Operator", room: "Room", name: str, unavailable: str | None, case: "Case"
) -> str | None:
    """The reason that `check` gives why an implementation does not take a case."""
    from pallas_kernels.common import device

    if unavailable is not None:
        return unavailable
    if case.dtype == "float16" and device.platform() == "tpu":
        return "TPUs have no float16"
    try:
        for direction in operator.directions:
            operator.module(name).check(direction, room.problem(case))
    except NotImplementedError as error:
        return str(error)
    return None
