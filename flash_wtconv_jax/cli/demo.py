"""`flash-wtconv demo`: train a small network on handwritten digits, write pictures and numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flash_wtconv_jax.cli.messages import say

if TYPE_CHECKING:
    from flash_wtconv_jax.train.history import History


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of initial values and training.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 40,
) -> None:
    """Train a small WTConv network on scikit-learn's digits, beside its twin without wavelets."""
    import sklearn  # noqa: F401 - its extra brings matplotlib too, so that is the one to name.
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from flash_wtconv_jax import environment
    from flash_wtconv_jax.train import digits

    environment.device()  # Where JAX has none, its reason is all there is to say.
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file, expected a folder")
    columns = (
        TextColumn("{task.description:15}"),
        BarColumn(),
        TextColumn("{task.completed:>3}/{task.total} epochs"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    try:
        with Progress(*columns) as progress:
            bars = {
                name: progress.add_task(name, total=epochs, start=False, state="")
                for name in digits.NETWORKS
            }
            waiting = list(bars)

            def start_next() -> None:
                if waiting:
                    bar = bars[waiting.pop(0)]
                    progress.start_task(bar)
                    progress.update(bar, state="compiling")

            def on_epoch(name: str, history: "History") -> None:
                done = len(history.loss)
                state = f"held-out accuracy {history.accuracy[-1]:.1%}"
                progress.update(bars[name], completed=done, state=state)
                if done == epochs:
                    start_next()

            start_next()
            metrics = digits.run_demo(out, seed=seed, epochs=epochs, on_epoch=on_epoch)
    except KeyboardInterrupt:
        typer.echo(f"error: interrupted; {out} is as it was before", err=True)
        raise typer.Exit(130) from None
    wtconv = metrics["networks"]["WTConv"]
    say(
        f"WTConv reads {wtconv['accuracy']:.2%} of the held-out digits, with "
        f"{wtconv['parameters']:,} parameters, after {metrics['seconds']:.0f} s. Written:"
    )
    for name, text in digits.FILES.items():
        if (out / name).exists():
            say(f"  {out / name}  {text}")
