"""`python -m torch_bridge compare`: one checkpoint, computed by PyTorch and by JAX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer

from flash_wtconv_jax.cli.messages import say
from pallas_kernels.common.types import Json
from torch_bridge.models import WTConvNeXt

if TYPE_CHECKING:
    from flash_wtconv_jax.models import ConvNeXtConfig

_ROUNDING = 1e-4
"""The greatest error of a network in float32, by the root mean square of its logits."""
_TOLD = ("depths", "dims", "in_channels", "num_classes", "levels", "kernel_size", "layer_scale")
"""The fields of a config that `WTConvNeXt` has arguments for."""


def compare(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A WTConvNeXt or ConvNeXt: .safetensors, .pth, or an Orbax folder."),
    ],
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 64,
    images: Annotated[int, typer.Option(min=1, help="Number of images, of white noise.")] = 2,
) -> None:
    """Compute a network in PyTorch and in JAX, from one file; 1 if their logits differ."""
    found = compared(checkpoint, size, images)
    say(
        f"{checkpoint}: {found['parameters']:,} parameters, {images} images of {size} x {size}: "
        f"logits differ by {found['error']:.1e} of their RMS at most, {_ROUNDING:.0e} allowed"
    )
    if not found["error"] <= _ROUNDING:
        raise typer.Exit(1)


def compared(checkpoint: Path, size: int, images: int) -> Json:
    """The logits of a checkpoint by both frameworks.

    The weights of PyTorch's network are those of the file, loaded strictly under their own names;
    those of an Orbax folder, or of a file in other names than timm's, are converted.

    Args:
        checkpoint: A file or folder that `flash_wtconv_jax.models.load_network` reads.
        size: Height and width of the images.
        images: Their number.

    Returns:
        `error`, the greatest difference by the root mean square of the logits, and the number of
        `parameters`.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: It is no checkpoint of such a network, or one of options that `WTConvNeXt`
            does not have.
    """
    from flash_wtconv_jax import checkpoints
    from flash_wtconv_jax.models import load_network

    network = load_network(checkpoint)
    network.eval()
    model = WTConvNeXt(**_arguments(network.config), device="cpu").eval()
    own = model.state_dict()
    state_dict = {} if checkpoint.is_dir() else checkpoints.read_state_dict(checkpoint)
    if state_dict.keys() != own.keys():
        state_dict = checkpoints.to_torch(checkpoints.variables_of(network), like=own)
    model.load_state_dict(checkpoints.to_tensors(state_dict))

    x = np.random.default_rng(0).normal(size=(images, size, size, network.config.in_channels))
    x = x.astype(np.float32)
    theirs = np.asarray(network(x), np.float64)
    with torch.no_grad():
        ours = model(torch.from_numpy(x).movedim(-1, 1)).double().numpy()
    error = np.abs(ours - theirs).max() / np.sqrt(np.mean(theirs**2))
    parameters = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return {"error": float(error), "parameters": parameters}


def _arguments(config: ConvNeXtConfig) -> Json:
    """The arguments of the same network in PyTorch."""
    from flash_wtconv_jax.models import ConvNeXtConfig

    plain = ConvNeXtConfig()
    computed = ("dtype", "param_dtype", "precision", "implementation", "conv_implementation")
    skipped = {*_TOLD, *computed, "drop_path", "dropout", "remat", "head_init_scale"}
    other = {
        name: value
        for name, value in vars(config).items()
        if name not in skipped and value != getattr(plain, name)
    }
    kernel_size, *more = set(config.kernel_sizes)
    if more:
        other["kernel_size"] = config.kernel_size
    if other:
        raise ValueError(
            f"the network has {', '.join(f'{name}={value!r}' for name, value in other.items())}, "
            "which torch_bridge.models.WTConvNeXt does not have; compare a network without"
        )
    return {
        "in_chans": config.in_channels,
        "num_classes": config.num_classes,
        "depths": config.depths,
        "dims": config.dims,
        "wt_levels": config.levels,
        "kernel_size": kernel_size,
        "ls_init_value": config.layer_scale,
    }
