"""`flash-wtconv info`: device, versions, and what can run here."""

import json
from typing import Annotated

import typer

from pallas_kernels.common.types import Json


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print device, versions, and why an implementation cannot run here."""
    from flash_wtconv_jax import environment

    report: Json = {"versions": environment.versions()}
    try:
        report["device"] = environment.device()
    except RuntimeError as error:
        # JAX has no device, which is what the reader came to find out.
        report["device"] = {"platform": "none", "kind": _first_line(error), "count": 0}
    report["operators"] = _operators(report["device"]["platform"])
    if report["device"]["count"] == 0:
        for status in report["operators"].values():
            status.update(dict.fromkeys(status, "no device"))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _operators(platform: str) -> Json:
    """Status of each implementation of each operator: None, or why it cannot run."""
    from pallas_kernels import dispatch

    return {operator.name: dict(operator.status(platform)) for operator in dispatch.operators()}


def _print(report: Json) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from flash_wtconv_jax.cli.tables import plain_console, print_table

    console = plain_console()
    device, versions = report["device"], report["versions"]
    console.print(f"device    {device['count']} x {device['platform']}: {device['kind']}")
    console.print(f"versions  {', '.join(f'{name} {v}' for name, v in versions.items())}")
    table = Table("operator", "implementation", Column("here", overflow="fold"))
    for operator, status in report["operators"].items():
        for row, (name, reason) in enumerate(status.items()):
            here = Text("available", "green") if reason is None else f"unavailable: {reason}"
            table.add_row("" if row else operator, name, here)
    print_table(console, table)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
