"""A pointwise MLP: two linear layers, an exact GELU between them."""

from importlib import import_module
from typing import Any

__all__ = ["Implementation", "mlp"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("pallas_kernels.mlp.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
