"""`flash-wtconv data`: images made ready for training."""

from pathlib import Path
from typing import Annotated

import typer

from flash_wtconv_jax.cli.messages import say

data = typer.Typer(help="Make images ready for training.", no_args_is_help=True)


@data.callback()
def _root() -> None:
    """Keeps `pack` a command of its own while it is the only one."""


@data.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Folder of train and val, as for training.")],
    out: Annotated[Path, typer.Argument(help="Folder to make, with the same two parts.")],
    size: Annotated[int, typer.Option(min=1, help="Pixels of the shorter side at most.")] = 256,
    kind: Annotated[str, typer.Option(help="tar, or array_record.")] = "tar",
    shard: Annotated[int, typer.Option(min=1, help="Images a file.")] = 2048,
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
                    workers=workers,
                    on_image=lambda done, bar=bar, to=progress: to.update(bar, completed=done),  # type: ignore[misc]
                )
            for message in packed.broken:
                say(f"left out, {message}")
            say(f"{out / part}: {packed.images:,} images, {packed.size / 1e6:,.1f} MB")
