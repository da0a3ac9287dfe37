"""A convolution with its norm for PyTorch: the functions, the operator, kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_bridge.stylize.convolution.functions import conv2d_instance_norm, residual_block

__all__ = ["conv2d_instance_norm", "residual_block"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("torch_bridge.stylize.convolution.functions"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
