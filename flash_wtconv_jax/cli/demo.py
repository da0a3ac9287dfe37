"""`flash-wtconv demo`: train a small network, write pictures and numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flash_wtconv_jax.cli.messages import say, say_files

if TYPE_CHECKING:
    from flash_wtconv_jax.train.history import History

_Report = Callable[[str, int, str], None]
"""Tells of a network how many epochs are done, and what there is to say."""


class Task(StrEnum):
    """Names of what is learned."""

    DIGITS = "digits"
    VOXELS = "voxels"
    ROOMS = "rooms"


def demo(
    task: Annotated[
        Task,
        typer.Option(
            help="digits: WTConv reads handwritten digits that a far mark turns into others, "
            "beside its twin without wavelets, from three seeds. voxels: sparse convolutions tell "
            "gyri from sulci on the human cortex. rooms: they label generated scans of rooms. Both "
            "beside a linear model."
        ),
    ] = Task.DIGITS,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of initial values and training.")] = 0,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the training data. Default: 24 of digits, else 40."),
    ] = None,
    voxel_size: Annotated[
        float | None,
        typer.Option(help="Edge of a voxel. Default: 2 mm of the cortex, 0.1 m of rooms."),
    ] = None,
) -> None:
    """Train a small network on data that needs no download, beside a plainer one."""
    if task is not Task.DIGITS:
        _voxels(task, out, seed, epochs, voxel_size)
    elif voxel_size is not None:
        raise ValueError("--voxel-size belongs to --task voxels and --task rooms")
    else:
        _digits(out, seed, epochs)


def _digits(out: Path, seed: int, epochs: int | None) -> None:
    import sklearn  # noqa: F401 - its extra brings matplotlib too, so that is the one to name.

    from flash_wtconv_jax.train import digits

    epochs = epochs or digits.EPOCHS
    with _training(out, digits.NETWORKS, epochs * digits.SEEDS) as report:

        def on_epoch(name: str, histories: "Sequence[History]") -> None:
            done = sum(len(history.loss) for history in histories)
            report(name, done, f"held-out accuracy {histories[-1].accuracy[-1]:.1%}")

        metrics = digits.run_demo(out, seed=seed, epochs=epochs, on_epoch=on_epoch)
    for name, network in metrics["networks"].items():
        least, greatest = network["least_accuracy"], network["greatest_accuracy"]
        say(
            f"{name}: {network['accuracy']:.1%} of the held-out strips read rightly "
            f"({least:.1%} to {greatest:.1%} by seed); {network['parameters']:,} parameters, "
            f"{network['seconds']:.0f} s a training"
        )
    say(f"{digits.SEEDS} seeds, {metrics['seconds']:.0f} s. Written:")
    say_files(out, digits.FILES)


def _voxels(task: Task, out: Path, seed: int, epochs: int | None, voxel_size: float | None) -> None:
    if task is Task.VOXELS:
        import nilearn  # noqa: F401 - its extra brings matplotlib too, so that is the one to name.

    from flash_wtconv_jax.train import voxels

    epochs = epochs or voxels.EPOCHS
    with _training(out, voxels.NETWORKS, epochs) as report:

        def on_epoch(name: str, losses: Sequence[float]) -> None:
            report(name, len(losses), f"loss {losses[-1]:.3f}")

        metrics = voxels.run_demo(
            out, task.value, voxel_size=voxel_size, seed=seed, epochs=epochs, on_epoch=on_epoch
        )
    for name, network in metrics["networks"].items():
        each = ", ".join(f"{label} {value:.1%}" for label, value in network["iou"].items())
        say(f"{name}: mIoU {network['miou']:.1%} of held-out voxels ({each})")
    count = metrics["voxels"]
    say(
        f"{count['training']:,} voxels of {metrics['voxel_size']} to learn from, "
        f"{count['held_out']:,} held out, {metrics['seconds']:.0f} s. Written:"
    )
    say_files(out, voxels.FILES)


@contextmanager
def _training(out: Path, networks: Mapping[str, object], epochs: int) -> Iterator[_Report]:
    """Runs a training with a bar a network; an interrupt is one line."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from flash_wtconv_jax import environment

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
                for name in networks
            }
            waiting = list(bars)

            def start_next() -> None:
                if waiting:
                    bar = bars[waiting.pop(0)]
                    progress.start_task(bar)
                    progress.update(bar, state="compiling")

            def report(name: str, done: int, state: str) -> None:
                progress.update(bars[name], completed=done, state=state)
                if done == epochs:
                    start_next()

            start_next()
            yield report
    except KeyboardInterrupt:
        typer.echo(f"error: interrupted; {out} is as it was before", err=True)
        raise typer.Exit(130) from None
