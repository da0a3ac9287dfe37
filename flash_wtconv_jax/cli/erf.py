"""`flash-wtconv erf`: the effective receptive field of one or two checkpoints as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from flash_wtconv_jax.cli.messages import say


def erf(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A WTConvNeXt or ConvNeXt: .safetensors, .pth, or an Orbax folder."),
    ],
    other: Annotated[
        Path | None, typer.Argument(help="A second one, to be drawn beside the first.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("erf.png"),
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width of the input. Default: 64, or 224 for whole WTConvNeXts."
        ),
    ] = None,
) -> None:
    """Draw how much each input pixel moves the centre of the last feature map (log scale)."""
    from flash_wtconv_jax import environment, plots
    from flash_wtconv_jax.models import load_network
    from flash_wtconv_jax.receptive_field import (
        SHARES,
        contribution_side,
        network_field,
        reaches_border,
    )

    environment.device()  # Where JAX has none, its reason is all there is to say.
    plots.check_path(out)
    paths = [checkpoint] if other is None else [checkpoint, other]
    # Everything is read before anything is computed: a wrong second path costs no minute.
    networks = [load_network(path) for path in paths]
    if size is None:
        # 224 for the published networks; one size for both, so that they can be compared.
        size = max(64, *(7 * network.config.total_stride for network in networks))
    fields = {}
    for path, network in zip(paths, networks, strict=True):
        field = network_field(network, (size, size, network.config.in_channels))
        sides = [f"{share:.0%} in {contribution_side(field, share)} px" for share in SHARES]
        if reaches_border(field):
            sides.append(f"it reaches the border: try a --size above {size}")
        say(f"{path}: {', '.join(sides)}")
        fields[str(path)] = field
    # The last part of a path says enough, unless it says the same of both.
    if len({path.name for path in paths}) == len(paths):
        fields = {Path(name).name: field for name, field in fields.items()}
    plots.save(plots.receptive_fields(fields), out)
    say(f"wrote {out}")
