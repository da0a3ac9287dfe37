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
        str | None,
        typer.Option(
            help="What ratios refer to: 'torch eager', 'plain jax', 'depthwise 7x7' or 'flash'. "
            "Default: the first of them that is here."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder for wtconv.json and wtconv.png.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Time the 2-D wavelet convolution, forward and forward+backward."""
    from rich.console import Console
    from rich.progress import Progress

    from pallas_kernels import platform
    from pallas_kernels.wtconv.shapes import FOR_PLATFORM

    from .. import environment, plots
    from ..bench import wtconv as benchmark
    from ..checkpoints.files import replacing

    environment.device()  # Where JAX has none, its reason is all there is to say.
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file, expected a folder")
    console = Console()
    with Progress(console=console, transient=True) as bar:

        def progress(label: str, steps: int) -> Callable[[], None]:
            task = bar.add_task(label, total=steps)
            return lambda: bar.advance(task)

        names = shape or list(FOR_PLATFORM[platform.current()])
        report = benchmark.run(names, baseline, progress, dtype)
    console.print(_table(report))
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "wtconv.json", force=True) as path:
        path.write_text(json.dumps(report, indent=2))
    plots.save(plots.speedups(report), out / "wtconv.png")
    console.print(f"wrote {out / 'wtconv.json'} and {out / 'wtconv.png'}")


def _table(report: dict[str, Any]) -> Any:
    """A section a shape, a row a contender; medians with their spread, and ratios."""
    from rich.table import Table

    kind = report["device"]["kind"]
    table = Table(
        title=f"WTConv, {report['dtype']}, {kind}",
        caption=f"median ms (least-greatest), on accelerators of 20 calls at once; x: speed over "
        f"{report['baseline']}; flash: ours, and what computes it; "
        "memory: temporaries of forward+backward in inputs",
    )
    table.add_column("", no_wrap=True)
    directions = list(dict.fromkeys(row["direction"] for row in report["rows"]))
    for direction in directions:
        table.add_column(direction, justify="right", no_wrap=True)
        table.add_column("x", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    rows = {(r["shape"], r["contender"], r["direction"]): r for r in report["rows"]}
    previous = None
    for shape, contender in dict.fromkeys(key[:2] for key in rows):
        if shape != previous:
            table.add_section()
            table.add_row(f"[bold]{shape}[/]")
            previous = shape
        both = [rows[shape, contender, direction] for direction in directions]
        cells = [cell for row in both for cell in (_times(row), f"{row['speedup']:.2f}")]
        memory = both[-1]["temporaries"]
        picked = both[0]["implementation"]
        name = f"{contender} ({'/'.join(dict.fromkeys(picked.values()))})" if picked else contender
        table.add_row(name, *cells, "" if memory is None else f"{memory:.1f}")
    return table


def _times(row: dict[str, Any]) -> str:
    middle, least, greatest = (_ms(row[f"{key}_ms"]) for key in ("median", "least", "greatest"))
    return f"{middle} ({least}-{greatest})"


def _ms(value: float) -> str:
    digits = 0 if value >= 10 else 1 if value >= 1 else 3
    return f"{value:.{digits}f}"
