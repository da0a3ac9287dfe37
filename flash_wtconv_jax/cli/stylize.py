"""`flash-wtconv stylize`: pictures, animations and folders of them in the style of a network."""

import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flash_wtconv_jax.cli.messages import progress, say

if TYPE_CHECKING:
    from flash_wtconv_jax.stylize.pipeline import Job, Report

_DTYPES = ("float32", "bfloat16", "float16")
# Float16 has three bits more than bfloat16 for the same time, and pictures have eight.
_FASTEST = {"gpu": "float16", "tpu": "bfloat16"}


def stylize(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="IN...", help="Pictures, animations, or folders of pictures."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="A file for one picture, a folder for several."),
    ],
    style: Annotated[
        Path | None,
        typer.Option(
            help="Weights of a TransformerNet: .pth, .safetensors or an Orbax folder. "
            "Default: stained glass, which comes with the package."
        ),
    ] = None,
    blend: Annotated[
        str | None,
        typer.Option(
            metavar="A=W,B=W", help="Several files of weights, and the share of each in their sum."
        ),
    ] = None,
    strength: Annotated[
        float, typer.Option(min=0, help="0 leaves the picture, 1 is the style.")
    ] = 1.0,
    keep_colour: Annotated[
        bool, typer.Option("--keep-colour", help="Change the brightness alone.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(min=5, help="Resize the longer side to so many pixels first.")
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="Compute pictures larger than this by tiles of this side, a multiple of 4. "
            "Default: 1024 for those of more than 16 million pixels.",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Pictures of one size that are computed together.")
    ] = 1,
    smooth: Annotated[
        bool,
        typer.Option(
            "--smooth", help="The pictures are the frames of a film: keep them from flickering."
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: float32 on a CPU, else 16 bits."),
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Pixels of the largest picture that is read.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files.")] = False,
) -> None:
    """Give pictures the style of a network, at their own size, with all that their files hold."""
    import imagecodecs  # noqa: F401 - its extra brings all that pictures need.

    from flash_wtconv_jax import environment, pictures
    from flash_wtconv_jax.stylize import pipeline
    from flash_wtconv_jax.stylize.stylizer import Stylizer

    # Of odd tags in files that can be read all the same.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    styles = _styles(style, blend)
    if not math.isfinite(strength):
        raise ValueError(f"--strength is {strength}, expected a number such as 0.5")
    if smooth and tile is not None:
        raise ValueError("--tile does not go with --smooth, which computes each frame whole")
    if tile is not None and tile % 4:
        raise ValueError(f"--tile is {tile}, expected a multiple of 4")
    if dtype is None:
        dtype = _FASTEST.get(str(environment.device()["platform"]), "float32")
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype is {dtype}, expected one of: {', '.join(_DTYPES)}")
    jobs, left_out = _jobs(sources, out, force)
    stylizer = Stylizer(
        list(styles),
        list(styles.values()),
        dtype=dtype,
        strength=strength,
        keep_colour=keep_colour,
        tile=tile,
    )
    settings = pipeline.Settings(
        size=size,
        batch=batch,
        smooth=smooth,
        force=force,
        max_pixels=max_pixels or pictures.MAX_PIXELS,
        workers=max(2, min(8, (os.cpu_count() or 2) - 1)),
    )
    done = 0
    try:
        with progress("stylize") as bars:
            bar = bars.add_task("stylize", total=len(jobs))

            def on_done() -> None:
                nonlocal done
                done += 1
                bars.advance(bar)

            report = pipeline.run(jobs, stylizer, settings, on_done)
    except KeyboardInterrupt:
        typer.echo(f"error: interrupted; {done} of {len(jobs)} files are done", err=True)
        raise typer.Exit(130) from None
    _tell(report, jobs, left_out, out)


def _styles(style: Path | None, blend: str | None) -> dict[Path, float]:
    """Files of weights, and the share of each; shares add up to 1."""
    from flash_wtconv_jax.stylize.stylizer import STAINED_GLASS

    if blend is None:
        return {style or STAINED_GLASS: 1.0}
    if style is not None:
        raise ValueError("give --style FILE, or --blend A=0.5,B=0.5 for several, and not both")
    weights: dict[Path, float] = {}
    for part in blend.split(","):
        name, _, text = part.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not (name and math.isfinite(weight)):
            raise ValueError(f"--blend has {part!r}, expected FILE=WEIGHT, such as candy.pth=0.5")
        weights[Path(name)] = weights.get(Path(name), 0.0) + weight
    total = sum(weights.values())
    if total <= 0:
        raise ValueError(f"--blend has weights that add up to {total}, expected more than 0")
    return {name: weight / total for name, weight in weights.items()}


def _jobs(sources: Sequence[Path], out: Path, force: bool) -> "tuple[list[Job], list[Path]]":
    """The files to stylise with their targets, and what else the folders hold."""
    from flash_wtconv_jax.pictures import SUFFIXES, check_writable
    from flash_wtconv_jax.stylize.pipeline import Job
    from pallas_kernels.common.files import check_folder

    files: list[Path] = []
    left_out: list[Path] = []
    for source in sources:
        if not source.is_dir():
            if not source.exists():
                raise FileNotFoundError(f"{source} does not exist")
            files.append(source)
            continue
        for path in sorted(source.iterdir()):
            # A link that leads nowhere is a file that cannot be read.
            is_picture = path.suffix.lower() in SUFFIXES and not path.is_dir()
            (files if is_picture else left_out).append(path)
    if not files:
        raise ValueError(f"no pictures in {', '.join(map(str, sources))}")
    into_folder = out.is_dir() or len(files) > 1 or sources[0].is_dir()
    if not into_folder:
        jobs = [Job(files[0], out)]
    elif out.is_file():
        raise NotADirectoryError(f"--out {out} is a file, expected a folder for {len(files)} files")
    else:
        jobs = [Job(path, out / path.name) for path in files]
    targets: dict[Path, Path] = {}
    for job in jobs:
        check_writable(job.target)
        if job.target in targets:
            both = f"{targets[job.target]} and {job.source}"
            raise ValueError(f"{both} would both become {job.target}")
        targets[job.target] = job.source
        if os.path.lexists(job.target) and not force:
            raise FileExistsError(f"{job.target} exists already; give --force to replace it")
    if into_folder:
        out.mkdir(parents=True, exist_ok=True)
    else:
        check_folder(out)
    return jobs, left_out


def _tell(report: "Report", jobs: "Sequence[Job]", left_out: Sequence[Path], out: Path) -> None:
    """Prints what was written, what was not and why, and what took the time."""
    written = len(jobs) - len(report.failures)
    busy = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.busy.items())
    say(f"{written} of {len(jobs)} files written to {out}")
    if len(jobs) > 1:
        say(f"{busy}; the {report.limit} was the limit")
    for path in left_out:
        kind = "a folder inside" if path.is_dir() else "not a picture by its name"
        say(f"left out, {kind}: {path}")
    for source, reason in report.failures.items():
        text = reason if str(source) in reason else f"{source}: {reason}"
        typer.echo(f"error: {text}", err=True)
    if report.failures:
        raise typer.Exit(1)
