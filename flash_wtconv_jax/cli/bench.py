"""`flash-wtconv bench`: times beside a baseline, as a table, a JSON file and a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(
    help="Time the operators beside plain JAX and PyTorch, in one run.", no_args_is_help=True
)


@bench.callback()
def _group() -> None:
    """A group even while it has one command."""


@bench.command("wtconv")
def wtconv(
    shape: Annotated[
        list[str] | None, typer.Option(help="A named shape; several are allowed. [default: all]")
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="What ratios refer to: 'torch eager', 'plain jax' or 'flash'.")
    ] = "torch eager",
    out: Annotated[
        Path, typer.Option(help="Folder for wtconv.json and wtconv.png.")
    ] = Path("runs/bench"),
) -> None:
    """Time the 2-D wavelet convolution, forward and forward+backward, float32."""
    from rich.console import Console
    from rich.progress import Progress

    from pallas_kernels.wtconv.shapes import SHAPES

    from .. import plots
    from ..bench import wtconv as benchmark
    from ..checkpoints.files import replacing

    console = Console()
    with Progress(console=console, transient=True) as bar:

        def progress(label: str, steps: int) -> Callable[[], None]:
            task = bar.add_task(label, total=steps)
            return lambda: bar.advance(task)

        report = benchmark.run(shape or list(SHAPES), baseline, progress)
    console.print(_table(report))
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "wtconv.json", force=True) as path:
        path.write_text(json.dumps(report, indent=2))
    plots.save(plots.speedups(report), out / "wtconv.png")
    console.print(f"wrote {out / 'wtconv.json'} and {out / 'wtconv.png'}")


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    kind = report["device"]["kind"]
    table = Table(title=f"WTConv, float32, {kind}; speedup over {report['baseline']}")
    for column in ("shape", "direction", "contender"):
        table.add_column(column)
    for column in ("median ms", "least - greatest", "speedup", "temporaries"):
        table.add_column(column, justify="right")
    previous = None
    for row in report["rows"]:
        head = (row["shape"], row["direction"])
        memory = row["temporaries"]
        table.add_row(
            *(("", "") if head == previous else head),
            row["contender"],
            f"{row['median_ms']:.1f}",
            f"{row['least_ms']:.1f} - {row['greatest_ms']:.1f}",
            f"{row['speedup']:.2f}",
            "" if memory is None else f"{memory:.1f} inputs",
        )
        previous = head
    return table
