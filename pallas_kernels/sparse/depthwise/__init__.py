"""Depthwise sparse convolution, whose rooms stand beside those of the regular one."""

from importlib import import_module
from typing import Any

__all__ = ["Implementation", "spatially_sparse_depthwise_conv"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("pallas_kernels.sparse.depthwise.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
