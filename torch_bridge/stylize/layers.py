"""The instance normalisation layer for PyTorch, drop-in for `torch.nn.InstanceNorm2d`."""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pallas_kernels.dispatch import Choice
from torch_bridge.stylize import ops

Model = TypeVar("Model", bound=nn.Module)

_AVERAGES = "running_mean", "running_var", "num_batches_tracked"
_DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
_DROPPED: set[str] = set()
"""The warnings that were given, once in a process."""


class FusedInstanceNorm2d(nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` in one pass, which keeps channels last.

    The arguments, the parameters and the state dict are those of PyTorch's layer. Statistics are
    always those of the images at hand. So where PyTorch's layer was made with
    `track_running_stats=True` and evaluates, results differ: it then normalises by averages over
    the training, which is another network than the one that was trained, and which this layer
    refuses. Such averages in a state dict are dropped, with a warning once. An image of one pixel
    becomes the bias, where PyTorch's layer refuses to train.

    Args:
        num_features: Channels.
        eps: Is added to the variance.
        momentum: Of the averages that PyTorch's layer keeps; nothing here depends on it.
        affine: Whether there are `weight [num_features]` and `bias [num_features]`.
        track_running_stats: Whether PyTorch's layer would keep averages. Training computes the
            same with and without; evaluation refuses True.
        device: Of the parameters.
        dtype: Of the parameters.
        implementation: Filter on the implementations, "triton" and "eager"; None takes the fastest
            known for the device, or Triton on a GPU and plain PyTorch elsewhere.

    Raises:
        ValueError: An unknown implementation.

    Example:
        >>> layer = FusedInstanceNorm2d(8, affine=True)
        >>> x = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
        >>> layer(x).is_contiguous(memory_format=torch.channels_last)
        True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        implementation: Choice = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, False, device=device, dtype=dtype)
        self.track_running_stats = track_running_stats
        ops.OPERATOR.check_names(implementation)
        self.implementation = implementation

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of each image.

        Args:
            x: `[N, num_features, H, W]` or one image `[num_features, H, W]`, of any strides.

        Returns:
            A tensor of x's shape, dtype and memory format.

        Raises:
            ValueError: A wrong number of axes or channels, no pixel, or a dtype that is none of
                float32, bfloat16, float16 and float64.
            NotImplementedError: `track_running_stats=True` in evaluation, or no allowed
                implementation can run here; it says why.
        """
        if self.track_running_stats and not self.training:
            raise NotImplementedError(
                "track_running_stats=True in evaluation normalises by averages over the training, "
                "which FusedInstanceNorm2d does not keep: make the layer with "
                "track_running_stats=False, which takes the statistics of each image, as in "
                "training, or keep torch.nn.InstanceNorm2d"
            )
        self._check_input_dim(x)
        channels = x.shape[-3]
        if channels != self.num_features:
            raise ValueError(
                f"x: expected num_features={self.num_features} channels, got {channels} in shape "
                f"{tuple(x.shape)}"
            )
        if x.dtype not in _DTYPES:
            raise ValueError(f"x: expected one of {list(_DTYPES)}, got {x.dtype}")
        if x.shape[-1] == 0 or x.shape[-2] == 0:
            raise ValueError(f"x: expected at least one pixel, got shape {tuple(x.shape)}")
        images = x.unsqueeze(0) if x.ndim == 3 else x
        y = ops.instance_norm(
            images, self.weight, self.bias, eps=self.eps, implementation=self.implementation
        )
        return y.squeeze(0) if x.ndim == 3 else y

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **keywords: Any
    ) -> None:
        dropped = [name for name in _AVERAGES if state_dict.pop(prefix + name, None) is not None]
        if dropped and not _DROPPED:
            _DROPPED.update(dropped)
            warnings.warn(
                f"FusedInstanceNorm2d: {', '.join(prefix + name for name in dropped)} of the state "
                "dict are dropped, here and in other layers: they are averages over the training, "
                "and it takes the statistics of each image; where PyTorch's layer evaluated by "
                "them, results differ",
                UserWarning,
                stacklevel=2,
            )
        # Not that of PyTorch's layer, which is about the averages.
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest, **keywords)

    def reset_running_stats(self) -> None:
        """Does nothing: there are no averages."""


def replace_instance_norm(model: Model, *, implementation: Choice = None) -> Model:
    """Swaps every `torch.nn.InstanceNorm2d` of a model for a `FusedInstanceNorm2d`, weights kept.

    Parameters are the same objects, so that an optimizer goes on, and hooks stay. Classes that
    derive from PyTorch's layer are left as they are, for they may compute something else.

    Args:
        model: A module, changed in place.
        implementation: Filter on the implementations of the layers.

    Returns:
        The model; the new layer where the model is an `InstanceNorm2d` itself.

    Raises:
        NotImplementedError: Layers evaluate by averages over the training
            (`track_running_stats=True`); tells all their names, and nothing is swapped.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True))
        >>> type(replace_instance_norm(model)[1]).__name__
        'FusedInstanceNorm2d'
    """
    ops.OPERATOR.check_names(implementation)
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.InstanceNorm2d
    }
    averaged = [
        name or "the model"
        for name, module in found.items()
        if module.track_running_stats and not module.training
    ]
    if averaged:
        raise NotImplementedError(
            f"{', '.join(averaged)}: track_running_stats=True in evaluation normalises by averages "
            "over the training, which FusedInstanceNorm2d does not keep; set track_running_stats "
            "to False where the statistics of each image are meant, as in training"
        )
    made = {id(module): _fused(module, implementation) for module in found.values()}
    for name, module in found.items():
        parent, _, own = name.rpartition(".")
        if own:
            setattr(model.get_submodule(parent), own, made[id(module)])
    return made.get(id(model), model)  # type: ignore[return-value]


def _fused(module: nn.InstanceNorm2d, implementation: Choice) -> FusedInstanceNorm2d:
    """The layer with a module's parameters and hooks."""
    fused = FusedInstanceNorm2d.__new__(FusedInstanceNorm2d)
    fused.__dict__.update(_copied(module.__dict__))
    fused._buffers.update(dict.fromkeys(_AVERAGES))
    fused.implementation = implementation
    return fused


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A module's attributes, its own dictionaries copied, so that the old one stays as it was."""
    return {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in attributes.items()
    }
