"""Instance normalisation for PyTorch: the layer, operators, kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_bridge.stylize.convolution import conv2d_instance_norm, residual_block
    from torch_bridge.stylize.layers import FusedInstanceNorm2d, replace_instance_norm

__all__ = [
    "FusedInstanceNorm2d",
    "conv2d_instance_norm",
    "replace_instance_norm",
    "residual_block",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        room = (
            "layers" if name in ("FusedInstanceNorm2d", "replace_instance_norm") else "convolution"
        )
        return getattr(import_module(f"torch_bridge.stylize.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
