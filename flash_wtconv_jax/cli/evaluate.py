"""`flash-wtconv eval` and `flash-wtconv predict`: what a trained network tells of images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flash_wtconv_jax.cli.messages import say

if TYPE_CHECKING:
    from flash_wtconv_jax.train.images.evaluation import Trained

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
    """Print the scores of a network on held-out images, cropped from the centre.

    Of images these are loss, top-1 and top-5; of pixels loss, their share that is right, mIoU, and
    the intersection over union of each class.
    """
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
    if not trained.of_pixels:
        say(
            f"{len(source)} images: top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}, "
            f"loss {scores['loss']:.4f}"
        )
        return
    say(
        f"{len(source)} images: mIoU {scores['miou']:.2%}, pixels {scores['pixels']:.2%}, "
        f"loss {scores['loss']:.4f}"
    )
    for name in trained.classes:
        found = scores.get(f"iou {name}")
        say(f"  {name}: {'in no image' if found is None else f'{found:.2%}'}")


def predict(
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    network: Annotated[Path, typer.Option("--network", help=_NETWORK)],
    top: Annotated[int, typer.Option(min=1, help="Classes of each, the likeliest first.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the masks of a network that tells pixels."),
    ] = None,
) -> None:
    """Print the likeliest classes of pictures, or the shares of their pixels, and write masks."""
    import grain  # noqa: F401 - its extra brings all that the evaluation needs.

    from flash_wtconv_jax import environment
    from flash_wtconv_jax.train.images import evaluation

    environment.device()  # Where JAX has none, its reason is all there is to say.
    broken: list[str] = []
    trained = evaluation.load(network)
    if trained.of_pixels:
        _predict_masks(trained, images, top, out, broken.append)
    elif out is not None:
        raise ValueError(f"--out is {out}, but the network tells whole images apart: no masks")
    else:
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


def _predict_masks(
    trained: "Trained",
    images: Sequence[Path],
    top: int,
    out: Path | None,
    on_broken: Callable[[str], None],
) -> None:
    """Tells the shares of an image's pixels, and writes its mask in the classes' colours."""
    import numpy as np
    from PIL import Image

    from flash_wtconv_jax import plots
    from flash_wtconv_jax.train.images import evaluation
    from pallas_kernels.common.files import replacing

    places = {} if out is None else {image: out / f"{image.stem}.png" for image in images}
    if len(set(places.values())) < len(places):
        raise ValueError("two pictures have the same name: give them to two calls, and two --out")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    colours = plots.class_colours(len(trained.classes))
    for found in evaluation.predict_masks(trained, images, on_broken=on_broken):
        shares = np.bincount(found.classes.ravel(), minlength=len(trained.classes))
        best = np.argsort(-shares, kind="stable")[:top]
        told = (
            f"{trained.classes[place]} {shares[place] / found.classes.size:.1%}" for place in best
        )
        say(f"{found.path}: {', '.join(told)}")
        if out is None:
            continue
        mask = Image.fromarray(found.classes).convert("P")
        mask.putpalette(colours.tobytes())
        with replacing(places[found.path], force=True) as temporary:
            mask.save(temporary, "PNG")
