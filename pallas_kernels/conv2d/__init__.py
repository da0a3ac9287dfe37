"""Dense 2-D convolution as implicit GEMM: the im2col matrix never exists in memory."""

from importlib import import_module
from typing import Any

__all__ = ["Implementation", "TileConfig", "conv2d", "get_igemm_conv2d"]


def __getattr__(name: str) -> Any:
    if name == "Config":
        from pallas_kernels.common.deprecation import warn_renamed

        warn_renamed(__name__, name, "TileConfig", removed_in="0.2")
        name = "TileConfig"
    if name in __all__:
        return getattr(import_module("pallas_kernels.conv2d.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
