"""`flash-wtconv check`: every implementation that is here, against the oracle."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", dir_okay=False, help="Write the rows there too."),
]
"""The option that `python -m torch_bridge check` has too."""


def check(as_json: AsJson = None) -> None:
    """Compute the shared cases with every implementation that this machine has; 1 if one fails."""
    from flash_wtconv_jax import environment
    from pallas_kernels.common import conformance

    device = environment.device()
    rows = conformance.run(_backends(), _plain)
    versions = environment.versions()
    show(rows, {"device": device, "versions": versions}, f"JAX, {device['kind']}", as_json)


def show(
    rows: Iterable[dict[str, Any]], about: Mapping[str, Any], title: str, as_json: Path | None
) -> None:
    """Prints the rows of a check as a table while they come, and writes them into a file.

    Args:
        rows: Of `pallas_kernels.wtconv.conformance.run`.
        about: What stands beside the rows in the file.
        title: Of the table.
        as_json: The file, or None.

    Raises:
        typer.Exit: With code 1, if a row is a failure.
    """
    from rich.console import Console
    from rich.progress import Progress

    from pallas_kernels.common.files import check_folder, replacing

    if as_json is not None:
        check_folder(as_json)
    console = Console()
    done = []
    with Progress("{task.description}", console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        for row in rows:
            done.append(row)
            bar.update(task, description=f"{len(done)} {row['backend']} {row['case']}")
    console.print(_table(done, title))
    for line in _reasons(done):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    count = {status: sum(row["status"] == status for row in done) for status in _COLOURS}
    console.print(", ".join(f"{number} {status}" for status, number in count.items()))
    if as_json is not None:
        with replacing(as_json, force=True) as path:
            path.write_text(json.dumps({**about, "rows": done}, indent=2) + "\n")
        console.print(f"wrote {as_json}")
    if count["fail"]:
        raise typer.Exit(1)


_COLOURS = {"pass": "green", "fail": "red", "skip": "yellow"}


def _table(rows: list[dict[str, Any]], title: str) -> Any:
    """A section a backend, a row a case that it computed."""
    from rich.table import Table

    caption = "error: greatest one of the array nearest to its bound, as a fraction of its RMS"
    table = Table(title=title, caption=caption)
    table.add_column("", no_wrap=True)
    for name in ("error", "bound", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    previous = None
    for row in rows:
        if row["status"] == "skip":
            continue
        if row["backend"] != previous:
            table.add_section()
            table.add_row(f"[bold]{row['backend']}[/]")
            previous = row["backend"]
        table.add_row(
            row["case"],
            *("" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "bound")),
            "" if row["seconds"] is None else f"{row['seconds']:.2f}",
            f"[{_COLOURS[row['status']]}]{row['status']}[/]",
        )
    return table


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each failure, and one for all cases that a backend skips for the same reason."""
    skipped = Counter((r["backend"], r["reason"]) for r in rows if r["status"] == "skip")
    lines = [
        f"skip {backend}, {number} case{'s' * (number > 1)}: {reason}"
        for (backend, reason), number in skipped.items()
    ]
    failed = (row for row in rows if row["status"] == "fail")
    return lines + [f"fail {row['backend']} {row['case']}: {row['reason']}" for row in failed]


def _backends() -> list[Any]:
    """Every implementation of the operator in JAX, on the platform that JAX is on."""
    from functools import partial

    from pallas_kernels.common import device
    from pallas_kernels.common.conformance import Backend
    from pallas_kernels.wtconv.api import OPERATOR
    from pallas_kernels.wtconv.cases import CASES

    here = device.platform()
    return [
        Backend(name, CASES, partial(_refusal, name, reason), partial(_compute, name))
        for name, reason in OPERATOR.status(here)
    ]


def _refusal(name: str, unavailable: str | None, case: Any) -> str | None:
    """Why an implementation does not take a case, which its `check` says."""
    import math

    import jax.numpy as jnp

    from pallas_kernels.common import device
    from pallas_kernels.wtconv.api import OPERATOR
    from pallas_kernels.wtconv.problem import Problem

    if unavailable is not None:
        return unavailable
    if case.dtype == "float16" and device.platform() == "tpu":
        return "TPUs have no float16"
    shape = (math.prod(case.batch), *case.spatial, case.channels)
    problem = Problem(shape, jnp.dtype(case.dtype), case.kernel_size, case.levels, case.wavelet)
    try:
        for direction in OPERATOR.directions:
            OPERATOR.module(name).check(direction, problem)
    except NotImplementedError as error:
        return str(error)
    return None


def _compute(name: str, case: Any) -> dict[str, Any]:
    """Output and gradients of one implementation."""
    from functools import partial

    from pallas_kernels import wtconv

    call = getattr(wtconv, f"wtconv{case.ndim}d")
    keys = {"wavelet": case.wavelet, "stride": case.stride, "implementation": name}
    return _value_and_grads(partial(call, **keys), case)


def _plain(case: Any) -> dict[str, Any]:
    """What plain JAX makes of a case in its low precision."""
    from functools import partial

    from flash_wtconv_jax.bench import baseline_jax

    return _value_and_grads(partial(baseline_jax.wtconv, ndim=case.ndim, stride=case.stride), case)


def _value_and_grads(function: Any, case: Any) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.common.conformance import drawn

    @jax.jit
    def both(x: jax.Array, params: dict[str, jax.Array], dy: jax.Array) -> Any:
        y, pullback = jax.vjp(function, x, params)
        return y, pullback(dy)

    with jax.enable_x64(case.dtype == "float64"):
        y, (dx, dparams) = both(*jax.tree.map(jnp.asarray, drawn(case)))
        return jax.tree.map(np.asarray, {"y": y, "dx": dx, **dparams})
