"""`flash-wtconv tpu-report`: static cycles of the TPU kernels, on a machine without a TPU."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flash_wtconv_jax.cli.messages import say
from pallas_kernels.common.types import Json
from pallas_kernels.sparse.shapes import SHAPES as VOXELS
from pallas_kernels.wtconv.shapes import TPU_SHAPES

if TYPE_CHECKING:
    from rich.table import Table

_FIRST = next(iter(TPU_SHAPES))
_LOOK_BACK_S = 3600
_NOTE = (
    "The compiler's static figures, no measurement. cycles: bundles of our kernels, without "
    "waiting for memory; around: estimated_cycles of what XLA does before and after them. XLA: "
    "estimated_cycles, what its cost model says of its own program of the same layer (scales and "
    "bias included), with traffic to HBM; fewer: that over cycles and around. XLA bundles: those "
    "of its program, without traffic. floor: the greater of arithmetic (VALU) and traffic (HBM)."
)
_SPARSE_NOTE = (
    "The compiler's static figures, no measurement. cycles: what XLA's cost model estimates; "
    "floor: HBM moves every array once; temporary: HBM beside arguments and results."
)


def tpu_report(
    chip: Annotated[str, typer.Option(help="v5e, v6e, v5p or v4.")] = "v5e",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A named shape; several are allowed: {', '.join(TPU_SHAPES)}; of sparse "
            f"convolutions {', '.join(VOXELS)}. Default: {_FIRST}, which takes minutes."
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            help="wtconv, depthwise or haar; several are allowed. Default: all. One is counted in "
            "less time; of sparse convolutions there is no choice."
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="All shapes, sparse ones left out, in a quarter of an hour or more."
        ),
    ] = False,
    as_json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", dir_okay=False, help="Write the report there too."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("tpu_report.png"),
) -> None:
    """Count the static cycles of the TPU kernels and of XLA's program; needs libtpu, but no TPU."""
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress

    from flash_wtconv_jax import plots
    from flash_wtconv_jax.aot import report as tpu
    from flash_wtconv_jax.aot import sparse
    from flash_wtconv_jax.cli.tables import plain_console, print_table
    from pallas_kernels.common.files import check_folder, replacing

    if every and shape:
        raise ValueError(f"--all takes every shape, expected no --shape beside it, got {shape}")
    plots.check_path(out)
    if as_json is not None:
        check_folder(as_json)
    console = plain_console()
    names = list(TPU_SHAPES) if every else shape or [_FIRST]
    voxels = [name for name in names if name in VOXELS]
    shapes = [name for name in names if name not in VOXELS]
    kernels = kernel or tpu.KERNELS
    if kernel and not shapes:
        raise ValueError(f"--kernel is of no sparse convolution, got {kernel} and {names}")
    # A program takes longer than rich looks back for its estimate of the time left.
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, speed_estimate_period=_LOOK_BACK_S
    ) as bar:
        task = bar.add_task(
            f"compiling for {escape(chip)}",
            total=len(tpu.rows(shapes, kernels)) + len(sparse.PARTS) * len(voxels),
        )
        report = tpu.run(chip, shapes, lambda: bar.advance(task), kernels) if shapes else {}
        if voxels:
            report["sparse"] = sparse.run(chip, voxels, lambda: bar.advance(task))
    if shapes:
        print_table(console, _table(report))
    if voxels:
        print_table(console, _sparse_table(report["sparse"]))
    for row in report.get("rows", []):
        for key, whose in (("error", "ours"), ("xla_error", "XLA's")):
            if row[key]:
                name = f"{row['kernel']} {row['name']} {row['dtype']} {row['direction']}"
                console.print(f"{name}, {whose}: {row[key]}", highlight=False)
    for row in report["sparse"]["rows"] if voxels else []:
        if row["error"]:
            console.print(f"{row['name']} {row['part']}: {row['error']}", highlight=False)
    if as_json is not None:
        with replacing(as_json, force=True) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
        say(f"wrote {as_json}")
    if shapes:
        plots.save(plots.static_cycles(report), out)
        say(f"wrote {out}")


def _sparse_table(report: Json) -> "Table":
    from rich.table import Table

    table = Table(
        title=f"TPU {report['chip']}, sparse convolution in plain JAX, {report['dtype']}",
        caption=_SPARSE_NOTE,
    )
    table.add_column("", no_wrap=True)
    for name in ("cycles", "floor", "temporary", "compiled in"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        if row["part"] == "map":
            table.add_section()
            table.add_row(row["name"], style="bold")
        memory = row["temporary_bytes"]
        table.add_row(
            row["part"],
            *(_number(row[f"{key}_cycles"]) for key in ("estimated", "floor")),
            "-" if memory is None else f"{memory / 2**20:,.1f} MiB",
            "-" if row["error"] else f"{row['seconds']:.0f} s",
        )
    return table


def _table(report: Json) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"TPU {report['chip']}, static cycles", caption=_NOTE)
    table.add_column("shape", no_wrap=True)
    names = ("cycles", "around", "XLA", "fewer", "XLA bundles", "floor", "VALU", "HBM", "VMEM")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in report["rows"]:
        title = f"{row['kernel']} {row['name']}", f" {tuple(row['x'])} {row['levels']} levels"
        if title != previous:
            table.add_section()
            table.add_row(Text(title[0], "bold") + title[1])
            previous = title
        vmem = row["vmem_bytes"]
        table.add_row(
            f"{row['dtype']} {row['direction']}",
            *(_number(row[key]) for key in ("cycles", "around_cycles", "xla_cycles")),
            f"{row['fewer']:.1f}x" if row["fewer"] else "-",
            *(_number(row[f"{key}_cycles"]) for key in ("xla_bundle", "floor")),
            *(_number(row[f"{key}_floor_cycles"]) for key in ("valu", "hbm")),
            f"{vmem / 2**20:.1f} MiB" if vmem else "-",
        )
    return table


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
