"""Instance normalisation in one pass, alone and behind the convolutions of style transfer."""

from importlib import import_module
from typing import Any

_ROOMS = {
    "Implementation": "api",
    "instance_norm": "api",
    "conv2d_instance_norm": "convolution.api",
    "residual_block": "blocks",
}
__all__ = ["Implementation", "conv2d_instance_norm", "instance_norm", "residual_block"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"pallas_kernels.stylize.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
