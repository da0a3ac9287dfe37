"""`flash-wtconv erf`: the effective receptive field of one or two checkpoints as a picture."""

from pathlib import Path
from typing import Annotated

import typer


def erf(
    checkpoint: Annotated[
        Path, typer.Argument(help="An Orbax folder that holds network.json, as the demo writes.")
    ],
    other: Annotated[
        Path | None, typer.Argument(help="A second one, to be drawn beside the first.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("erf.png"),
    size: Annotated[int, typer.Option(min=1, help="Height and width of the input.")] = 64,
) -> None:
    """Draw how much each input pixel moves the centre of the last feature map (log scale)."""
    from .. import plots, training
    from ..receptive_field import SHARES, contribution_side

    plots.check_path(out)
    folders = [checkpoint] if other is None else [checkpoint, other]
    # Everything is read before anything is computed: a wrong second folder costs no minute.
    networks = [training.load_network(folder) for folder in folders]
    fields = {}
    for folder, network in zip(folders, networks, strict=True):
        field = training.network_field(network, (size, size, network.config.in_channels))
        sides = (f"{share:.0%} in {contribution_side(field, share)} px" for share in SHARES)
        typer.echo(f"{folder}: {', '.join(sides)}")
        fields[str(folder)] = field
    # The last part of a path says enough, unless it says the same of both.
    if len({folder.name for folder in folders}) == len(folders):
        fields = {Path(name).name: field for name, field in fields.items()}
    plots.save(plots.receptive_fields(fields), out)
    typer.echo(f"wrote {out}")
