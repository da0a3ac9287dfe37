"""The wavelet convolution of 1-D, 2-D and 3-D signals for PyTorch: layers, operators, kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_bridge.wtconv.layers import WTConv1d, WTConv2d, WTConv3d

__all__ = ["WTConv1d", "WTConv2d", "WTConv3d"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("torch_bridge.wtconv.layers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
