"""`flash-wtconv train-style`: teach a network the style of a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flash_wtconv_jax.cli.messages import progress, say, say_files

if TYPE_CHECKING:
    import numpy as np

    from flash_wtconv_jax.train.style import Losses


def train_style(
    content: Annotated[Path, typer.Option(help="Folder of photographs to train on.")],
    style: Annotated[Path, typer.Option(help="The picture whose style is learnt.")],
    features: Annotated[
        Path | None,
        typer.Option(help="Weights of a VGG-16: torchvision's .pth, .safetensors, or Keras' .h5."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")] = Path(
        "runs/style"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps in all.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Crops of a step.")] = 4,
    crop: Annotated[int, typer.Option(min=32, help="Side of a crop in pixels.")] = 256,
    rate: Annotated[float, typer.Option(help="First learning rate.")] = 1e-3,
    content_weight: Annotated[float, typer.Option(min=0, help="Weight of the content.")] = 1.0,
    style_weight: Annotated[float, typer.Option(min=0, help="Weight of the style.")] = 3.0,
    smooth_weight: Annotated[float, typer.Option(min=0, help="Weight of smoothness.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of initial values and crops.")] = 0,
    model: Annotated[
        str, typer.Option(help="transformer_net, or style_vit with 4 blocks.")
    ] = "transformer_net",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")
    ] = False,
) -> None:
    """Teach a network the style of a picture, on photographs of a folder."""
    import imagecodecs  # noqa: F401 - its extra brings all that pictures need.

    from flash_wtconv_jax import pictures
    from flash_wtconv_jax.train import style as training
    from flash_wtconv_jax.train import vgg
    from pallas_kernels.common.files import making_folder

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype is {dtype}, expected float32 or bfloat16")
    if model not in training.MODELS:
        raise ValueError(f"--model is {model}, expected one of: {', '.join(training.MODELS)}")
    settings = training.Settings(
        steps, batch, crop, rate, content_weight, style_weight, smooth_weight, seed, dtype, model
    )
    if (out / "checkpoint").exists() and not resume:
        raise FileExistsError(f"{out} holds a run; give --resume to go on, or another folder")
    if resume and not (out / "checkpoint").exists():
        raise FileNotFoundError(f"{out} holds no checkpoint to go on from; leave --resume out")
    photographs = _photographs(content, crop)
    wanted = pictures.resized(pictures.read(style), max(crop, 64)).pixels
    if features is None:
        say("no --features: the losses compare by random filters, which know textures, not things")
    layers = vgg.random_layers() if features is None else vgg.read_layers(features)
    done = 0
    try:
        with making_folder(out), progress("train-style", "{task.fields[state]}") as bars:
            bar = bars.add_task("train-style", total=steps, state="compiling")

            def on_step(step: int, losses: "Losses") -> None:
                nonlocal done
                done = step
                text = f"content {float(losses.content):.3f}, style {float(losses.style):.3f}"
                bars.update(bar, completed=step, state=text)

            training.train(
                out, photographs, wanted, layers, settings, resume=resume, on_step=on_step
            )
    except KeyboardInterrupt:
        typer.echo(
            f"error: interrupted after {done} steps; --resume goes on from the last checkpoint",
            err=True,
        )
        raise typer.Exit(130) from None
    say(f"{steps} steps. Written:")
    say_files(out, training.FILES)


def _photographs(folder: Path, crop: int) -> "list[np.ndarray]":
    """The pictures of a folder; what is no picture by its name, or too small, is said."""
    from flash_wtconv_jax import pictures

    if not folder.is_dir():
        raise NotADirectoryError(f"--content {folder} is no folder of photographs")
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in pictures.SUFFIXES:
            say(f"left out, not a picture by its name: {path}")
            continue
        pixels = pictures.still.eight_bits(pictures.read(path).pixels)
        if min(pixels.shape[:2]) < crop:
            say(f"left out, smaller than --crop {crop}: {path}")
            continue
        found.append(pixels)
    if not found:
        raise ValueError(f"--content {folder} has no photograph of {crop} pixels or more a side")
    return found
