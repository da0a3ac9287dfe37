"""A convolution that leaves its moments, and the norm of its output in one pass."""

from importlib import import_module
from typing import Any

__all__ = ["Implementation", "conv2d_instance_norm"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("pallas_kernels.stylize.convolution.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
