"""Wavelet convolution (WTConv) of 1-D, 2-D and 3-D signals."""

from importlib import import_module
from typing import Any

__all__ = ["Implementation", "wtconv1d", "wtconv2d", "wtconv3d"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("pallas_kernels.wtconv.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
