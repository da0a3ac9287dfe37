"""`flash-wtconv eval` and `flash-wtconv predict`: what a trained network tells of images."""

from pathlib import Path
from typing import Annotated

import typer

from flash_wtconv_jax.cli.messages import say

_NETWORK = "A run of `flash-wtconv train`, one of its checkpoints, or whatever `convert` reads."


def evaluate(
    network: Annotated[Path, typer.Argument(help=_NETWORK)],
    data: Annotated[Path, typer.Option(help="Folder of train and val, as for training.")],
    part: Annotated[str, typer.Option(help="The part that is read: val or train.")] = "val",
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 128,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read images; 0 reads in threads.")
    ] = 0,
) -> None:
    """Print loss, top-1 and top-5 of a network on held-out images, cropped from the centre."""
    import grain  # noqa: F401 - its extra brings all that the evaluation needs.
    from rich.progress import Progress

    from flash_wtconv_jax import environment
    from flash_wtconv_jax.train.images import evaluation, sources

    environment.device()  # Where JAX has none, its reason is all there is to say.
    source = sources.opened(data, part)
    trained = evaluation.load(network)
    with Progress(transient=True) as progress:
        bar = progress.add_task("eval", total=len(source))
        scores = evaluation.evaluate(
            trained,
            source,
            batch=batch,
            workers=workers,
            on_images=lambda done: progress.update(bar, completed=done),
        )
    say(
        f"{len(source)} images: top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}, "
        f"loss {scores['loss']:.4f}"
    )


def predict(
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    network: Annotated[Path, typer.Option("--network", help=_NETWORK)],
    top: Annotated[int, typer.Option(min=1, help="Classes of each, the likeliest first.")] = 5,
) -> None:
    """Print the likeliest classes of pictures."""
    import grain  # noqa: F401 - its extra brings all that the evaluation needs.

    from flash_wtconv_jax import environment
    from flash_wtconv_jax.train.images import evaluation

    environment.device()  # Where JAX has none, its reason is all there is to say.
    broken: list[str] = []
    trained = evaluation.load(network)
    for found in evaluation.predict(trained, images, top=top, on_broken=broken.append):
        told = (
            f"{name} {share:.1%}"
            for name, share in zip(found.classes, found.probabilities, strict=True)
        )
        say(f"{found.path}: {', '.join(told)}")
    for message in broken:
        typer.echo(f"error: {message}", err=True)
    if broken:
        raise typer.Exit(1)
