"""Wavelet analysis and synthesis along one to three axes, channels last, of any depth."""

from importlib import import_module
from typing import Any

__all__ = [
    "Implementation",
    "dwt",
    "dwt2",
    "dwt3",
    "dwt_max_level",
    "dwtn",
    "idwt",
    "idwt2",
    "idwt3",
    "idwtn",
    "wavedec",
    "wavedec2",
    "wavedec3",
    "wavedecn",
    "waverec",
    "waverec2",
    "waverec3",
    "waverecn",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("pallas_kernels.haar.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
