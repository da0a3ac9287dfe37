"""`flash-wtconv data`: images made ready for training."""

from pathlib import Path
from typing import Annotated

import typer

from flash_wtconv_jax.cli.messages import say

data = typer.Typer(help="Make images ready for training.", no_args_is_help=True)


@data.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Folder of train and val, as for training.")],
    out: Annotated[Path, typer.Argument(help="Folder to make, with the same two parts.")],
    size: Annotated[int, typer.Option(min=1, help="Pixels of the shorter side at most.")] = 256,
    kind: Annotated[str, typer.Option(help="tar, or array_record.")] = "tar",
    shard: Annotated[int, typer.Option(min=1, help="Images a file.")] = 2048,
    uncompressed: Annotated[
        bool, typer.Option("--uncompressed", help="Eight times the space, and no decoding.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that scale images; 0 does it in this one.")
    ] = 0,
) -> None:
    """Pack images into few large files, scaled down once: reading them costs less than half."""
    import grain  # noqa: F401 - its extra brings all that packing needs.
    from rich.progress import MofNCompleteColumn, Progress

    from flash_wtconv_jax.train.images import packing, sources
    from pallas_kernels.common.files import making_folder

    parts = dict(zip(("train", "val"), sources.opened_pair(source), strict=True))
    with making_folder(out):
        for part in parts:
            if (out / part).exists():
                raise FileExistsError(f"{out / part} exists already; name another folder")
        for part, images in parts.items():
            with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
                bar = progress.add_task(part, total=len(images))
                packed = packing.pack(
                    images,
                    out / part,
                    kind=kind,
                    size=size,
                    shard=shard,
                    compressed=not uncompressed,
                    workers=workers,
                    on_image=lambda done, bar=bar, to=progress: to.update(bar, completed=done),  # type: ignore[misc]
                )
            for message in packed.broken:
                say(f"left out, {message}")
            say(f"{out / part}: {packed.images:,} images, {packed.size / 1e6:,.1f} MB")


@data.command()
def speed(
    folder: Annotated[Path, typer.Argument(help="Folder of train and val, as for training.")],
    size: Annotated[int, typer.Option(min=1, help="Side of the crops in pixels.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 256,
    batches: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 40,
    randaugment: Annotated[float, typer.Option(min=0, help="RandAugment's magnitude.")] = 0.0,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read images; 0 reads in threads.")
    ] = 0,
) -> None:
    """Print how many images a second are read and cropped for training, with nothing to learn."""
    import os

    import grain  # noqa: F401 - its extra brings all that reading needs.

    from flash_wtconv_jax.train.images import loading, sources
    from flash_wtconv_jax.train.images.settings import Data

    source = sources.opened(folder, "train")
    asked = Data(size=size, randaugment=randaugment, workers=workers)
    found = loading.speed(source, asked, batch=batch, batches=batches)
    say(
        f"{found:,.0f} images/s of {size} pixels: {workers or 'no'} workers, "
        f"{os.cpu_count()} CPUs, {batches} batches of {batch}"
    )
