"""The layers of Flash WTConv for PyTorch, with the state dict of the published layer.

Importing this package imports neither jax nor flax, and torch only when a layer is first used.

Example:
    >>> import torch, torch_bridge
    >>> layer = torch_bridge.WTConv2d(8, 8, wt_levels=2)
    >>> layer(torch.zeros(1, 8, 15, 20, device=layer.device)).shape
    torch.Size([1, 8, 15, 20])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_bridge.exchange import from_jax, to_jax
    from torch_bridge.wtconv.layers import WTConv1d, WTConv2d, WTConv3d

__all__ = ["WTConv1d", "WTConv2d", "WTConv3d", "from_jax", "to_jax"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        room = "wtconv" if name.startswith("WTConv") else "exchange"
        return getattr(import_module(f"torch_bridge.{room}"), name)
    raise AttributeError(f"module 'torch_bridge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
