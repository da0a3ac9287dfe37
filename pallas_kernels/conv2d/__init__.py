"""Dense 2-D convolution as implicit GEMM: the im2col matrix never exists in memory."""

from importlib import import_module
from typing import Any

__all__ = ["TileConfig", "Implementation", "conv2d", "get_igemm_conv2d"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("pallas_kernels.conv2d.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
