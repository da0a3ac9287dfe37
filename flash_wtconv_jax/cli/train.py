"""`flash-wtconv train`: teach a network to tell images, or their pixels, apart."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash_wtconv_jax.cli.messages import progress, say, say_files

if TYPE_CHECKING:
    from flash_wtconv_jax.train.images.trainer import Progress


def train(
    file: Annotated[
        Path | None, typer.Argument(help="Settings in TOML; options come before what it says.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Defaults: plain, convnext_tiny or convnext_tiny_finetune."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Such as wtconvnext_tiny; any of flash_wtconv_jax.models.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of train and val: folders of classes, shards, images and masks, or .npz."
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="Devices along axes, such as data=2,model=1; fsdp splits parameters."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images of a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything by chance.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to begin from: whatever `convert` reads.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Parameters that stay as they are, such as stem, stages.0, backbone."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")] = Path(
        "runs/train"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
    distributed: Annotated[
        bool,
        typer.Option("--distributed", help="One of several processes: Slurm, GKE, mpirun."),
    ] = False,
) -> None:
    """Train a network to tell images apart, or with masks their pixels."""
    import grain  # noqa: F401 - its extra brings all that the trainer needs.
    import jax

    if distributed:
        jax.distributed.initialize()

    from flash_wtconv_jax import environment
    from flash_wtconv_jax.train.images import settings, trainer

    environment.device()  # Where JAX has none, its reason is all there is to say.
    if file is None and (data is None or (model is None and recipe is None and not checkpoint)):
        raise ValueError("give a FILE.toml, or --data and one of --model, --recipe, --checkpoint")
    said: dict[str, Any] = {"model": {}, "data": {}, "run": {}}
    for section, key, value in (
        ("model", "name", model),
        ("model", "checkpoint", None if checkpoint is None else str(checkpoint)),
        ("model", "freeze", freeze or None),
        ("data", "folder", None if data is None else str(data)),
        ("run", "mesh", None if mesh is None else _axes(mesh)),
        ("run", "epochs", epochs),
        ("run", "batch", batch),
        ("run", "seed", seed),
    ):
        if value is not None:
            said[section][key] = value
    if recipe is not None:
        said["recipe"] = recipe
    if checkpoint is not None and model is None:
        said["model"].setdefault("name", "")
    resolved = settings.resolved(*([settings.read(file)] if file is not None else []), said)
    if not resolved.data.folder:
        raise ValueError("no images: give --data, or a folder under [data] in the file")
    first = jax.process_index() == 0
    try:
        with _bar(first) as (report, tell):
            summary = trainer.train(
                resolved, out, resume=resume, on_progress=report, on_message=tell
            )
    except KeyboardInterrupt:
        typer.echo("error: interrupted; --resume goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None
    if first:
        _say_summary(summary, out)


@contextmanager
def _bar(shown: bool) -> Iterator[tuple[Callable[["Progress"], None], Callable[[str], None]]]:
    """Yields what tells of progress by a bar, and of messages above it."""
    from flash_wtconv_jax.train.images import evaluation

    with progress("train", "{task.fields[state]}", disable=not shown) as bars:
        bar = bars.add_task("train", total=None, state="compiling")

        def report(now: "Progress") -> None:
            parts = [
                f"epoch {now.epoch:.2f}",
                f"loss {now.loss:.3f}",
                f"{now.images_per_s:,.0f} images/s",
                f"waiting {now.waiting:.0%}",
            ]
            if now.scores:
                parts.insert(1, f"held out {evaluation.leading(now.scores):.2%}")
            bars.update(bar, total=now.steps, completed=now.step, state=", ".join(parts))

        def tell(message: str) -> None:
            bars.console.print(message, markup=False, highlight=False, soft_wrap=True)

        yield report, tell


def _axes(text: str) -> dict[str, int]:
    """The axes of "data=2,model=1"."""
    axes = {}
    for part in text.split(","):
        name, _, count = (piece.strip() for piece in part.partition("="))
        if not count.isdecimal() or name in axes:
            raise ValueError(f"--mesh is {text!r}, expected axes such as data=2,model=1")
        axes[name] = int(count)
    return axes


def _say_summary(summary: dict[str, Any], out: Path) -> None:
    from flash_wtconv_jax.train.images.trainer import FILES

    told = ", ".join(
        f"{name.replace('_', ' ')} {score:.2%}"
        for name, score in summary["scores"].items()
        if "loss" not in name and "iou " not in name
    )
    # Several processes do not time it.
    alone = summary.get("loader_images_per_s")
    loader = "" if alone is None else f", the loader alone {alone:,.0f} images/s"
    if summary["stopped"]:
        say(
            f"stopped after {summary['steps']} of {summary['of_steps']} steps; --resume goes on. "
            "Written:"
        )
    else:
        say(
            f"{summary['steps']} steps, {summary['parameters']:,} parameters, "
            f"{summary['seconds']:.0f} s, {summary['images_per_s']:,.0f} images/s, waiting "
            f"{summary['waiting']:.0%}{loader}; held out: {told}. Written:"
        )
    say_files(out, FILES)
