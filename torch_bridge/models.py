"""WTConvNeXt for PyTorch, with the published state dict; timm finds it where timm is installed.

Sources: Finder et al., "Wavelet Convolutions for Large Receptive Fields", ECCV 2024; Liu et al., "A
ConvNet for the 2020s", CVPR 2022. Modules are named as in timm's ConvNeXt, whose weights of plain
networks load too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pallas_kernels.common.types import Keywords
from pallas_kernels.dispatch import Choice
from torch_bridge.runtime.device import best_device
from torch_bridge.wtconv.layers import WTConv2d

__all__ = ["WTConvNeXt", "wtconvnext_base", "wtconvnext_small", "wtconvnext_tiny"]

_EPSILON = 1e-6
_MLP_RATIO = 4
_SIZES: dict[str, Keywords] = {
    "tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
}


class WTConvNeXt(nn.Module):
    """WTConvNeXt: ConvNeXt whose 7x7 depthwise convolutions are WTConv.

    Args:
        in_chans: Channels of the input.
        num_classes: Features of the head; 0 leaves out the linear layer.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        wt_levels: Wavelet levels of each stage; None is the plain ConvNeXt.
        kernel_size: Taps of the depthwise convolutions along each axis.
        drop_rate: Dropout before the head's linear layer.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        ls_init_value: Initial value of each block's `gamma`; None leaves it out.
        device: Where the parameters are made; None is the GPU if there is one.
        dtype: Dtype of the parameters.
        implementation: See `torch_bridge.WTConv2d`.

    Raises:
        ValueError: If there is not one entry for each stage, or an argument is out of range.

    Example:
        >>> model = WTConvNeXt(num_classes=10, depths=(1, 1), dims=(8, 16), wt_levels=(2, 1))
        >>> model(torch.zeros(2, 3, 32, 32, device=model.head.fc.weight.device)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        wt_levels: Sequence[int] | None = (5, 4, 3, 2),
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        ls_init_value: float | None = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        implementation: Choice = None,
    ) -> None:
        super().__init__()
        levels = [None] * len(depths) if wt_levels is None else list(wt_levels)
        if not len(depths) == len(dims) == len(levels):
            raise ValueError(
                f"depths={tuple(depths)}, dims={tuple(dims)} and wt_levels={wt_levels} must have "
                "one entry for each stage"
            )
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}, expected a number in [0, 1)")
        factory: Keywords = {
            "device": best_device() if device is None else device,
            "dtype": dtype,
        }
        self.num_classes = num_classes
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], 4, 4, **factory), _LayerNorm2d(dims[0], **factory)
        )
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(list(depths))
        stages = []
        for s, dim in enumerate(dims):
            blocks = (
                _Block(dim, kernel_size, levels[s], rate, ls_init_value, implementation, factory)
                for rate in rates[s].tolist()
            )
            stages.append(_Stage(dims[s - 1] if s else None, dim, blocks, factory))
        self.stages = nn.Sequential(*stages)
        self.head = _Head(dims[-1], num_classes, drop_rate, factory)
        self.apply(_draw)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map `[N, dims[-1], H / 32, W / 32]` of images `[N, in_chans, H, W]`."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            x: Images `[N, in_chans, H, W]`.

        Returns:
            `[N, num_classes]`; for 0 classes the last map's normalised average `[N, dims[-1]]`.
        """
        return self.head(self.forward_features(x))


class _LayerNorm2d(nn.LayerNorm):
    """The norm of the channels of images `[N, C, H, W]`."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__(dim, eps=_EPSILON, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Stage(nn.Module):
    """Downsampling, for all but the first stage, and the blocks."""

    def __init__(self, before: int | None, dim: int, blocks: Any, factory: Keywords) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if before is not None:
            conv = nn.Conv2d(before, dim, 2, 2, **factory)
            self.downsample = nn.Sequential(_LayerNorm2d(before, **factory), conv)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class _Block(nn.Module):
    """Residual block: depthwise convolution, norm, MLP, layer scale, stochastic depth."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        levels: int | None,
        drop_path: float,
        scale: float | None,
        implementation: Choice,
        factory: Keywords,
    ) -> None:
        super().__init__()
        self.conv_dw: nn.Module
        if levels is None:
            self.conv_dw = nn.Conv2d(dim, dim, kernel_size, padding="same", groups=dim, **factory)
        else:
            self.conv_dw = WTConv2d(
                *(dim, dim, kernel_size),
                wt_levels=levels,
                implementation=implementation,
                **factory,
            )
        self.norm = nn.LayerNorm(dim, eps=_EPSILON, **factory)
        self.mlp = _Mlp(dim, factory)
        self.gamma = None if scale is None else nn.Parameter(torch.full((dim,), scale, **factory))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        # With the channels last, where norm and products are contiguous.
        y = self.mlp(self.norm(self.conv_dw(x).movedim(1, -1)))
        if self.gamma is not None:
            y = y * self.gamma
        if self.training and self.drop_path:
            kept = y.new_empty(len(y), 1, 1, 1).bernoulli_(1 - self.drop_path)
            y = y * kept / (1 - self.drop_path)
        return x + y.movedim(-1, 1)


class _Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, factory: Keywords) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, _MLP_RATIO * dim, **factory)
        self.fc2 = nn.Linear(_MLP_RATIO * dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Head(nn.Module):
    """Global average, norm, dropout, the linear classifier."""

    def __init__(self, dim: int, classes: int, drop_rate: float, factory: Keywords) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=_EPSILON, **factory)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, classes, **factory) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(x.mean((-2, -1)))))


def _draw(module: nn.Module) -> None:
    """Draws the weights of a module as the published code does."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def wtconvnext_tiny(**options: Any) -> WTConvNeXt:
    """WTConvNeXt-T: 30,383,656 trained parameters.

    Args:
        **options: Arguments of `WTConvNeXt` to change.

    Returns:
        The model.

    Example:
        >>> model = wtconvnext_tiny(device="meta")
        >>> sum(one.numel() for one in model.parameters() if one.requires_grad)
        30383656
    """
    return WTConvNeXt(**{**_SIZES["tiny"], **options})


def wtconvnext_small(**options: Any) -> WTConvNeXt:
    """WTConvNeXt-S: 54,015,784 trained parameters; otherwise as `wtconvnext_tiny`."""
    return WTConvNeXt(**{**_SIZES["small"], **options})


def wtconvnext_base(**options: Any) -> WTConvNeXt:
    """WTConvNeXt-B: 93,647,592 trained parameters; otherwise as `wtconvnext_tiny`."""
    return WTConvNeXt(**{**_SIZES["base"], **options})


def _registered() -> None:
    """Lets `timm.create_model` find the models by their names, where timm is installed."""
    try:
        from timm.models import register_model
    except ImportError:
        return
    for make in (wtconvnext_tiny, wtconvnext_small, wtconvnext_base):
        register_model(_entry(make))


def _entry(make: Callable[..., WTConvNeXt]) -> Callable[..., WTConvNeXt]:
    """A function of the model's name with the arguments that timm gives."""

    def entry(pretrained: bool = False, **options: Any) -> WTConvNeXt:
        if pretrained:
            raise ValueError(
                f"pretrained=True, but {make.__name__} has no weights to download; give "
                "checkpoint_path= a file of the published ones"
            )
        # What timm adds of its own to every call.
        own = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
        return make(**{name: value for name, value in options.items() if name not in own})

    entry.__name__ = entry.__qualname__ = make.__name__
    entry.__module__ = __name__
    return entry


_registered()
