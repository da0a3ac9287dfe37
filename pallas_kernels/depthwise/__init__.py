"""Depthwise 2-D convolution: each channel by a kernel of its own."""

from importlib import import_module
from typing import Any

__all__ = ["Implementation", "depthwise_conv2d"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("pallas_kernels.depthwise.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
