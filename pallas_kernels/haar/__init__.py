"""Wavelet analysis and synthesis of 1-D, 2-D and 3-D signals, any number of levels."""

from importlib import import_module
from typing import Any

__all__ = [
    "Implementation",
    "dwt",
    "dwt2",
    "dwt3",
    "idwt",
    "idwt2",
    "idwt3",
    "wavedec",
    "wavedec2",
    "wavedec3",
    "waverec",
    "waverec2",
    "waverec3",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("pallas_kernels.haar.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
