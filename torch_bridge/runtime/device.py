"""The device that PyTorch computes on here, and the kind that measured times hold for."""

from __future__ import annotations

from typing import cast

import torch
from torch import distributed, overrides
from torch.utils._device import DeviceContext

from pallas_kernels.common import versions


def best_device() -> torch.device:
    """The default device where one was set, else CUDA, MPS or the CPU, the first that is here.

    In a process group CUDA's is the device of this rank.

    Example:
        >>> with torch.device("meta"):
        ...     best_device()
        device(type='meta')
    """
    default = torch.get_default_device()
    # PyTorch says "cpu" where none was set too; what sets one is a mode.
    modes = overrides._get_current_function_mode_stack()
    if default.type != "cpu" or any(isinstance(mode, DeviceContext) for mode in modes):
        return default
    if torch.cuda.is_available():
        return _of_rank() or torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else default


def named(name: str | None) -> torch.device:
    """The device of a name.

    Args:
        name: "cpu", "cuda" or "mps"; None is `best_device`.

    Raises:
        ValueError: Another name, or PyTorch has no such device here.

    Example:
        >>> named("cpu")
        device(type='cpu')
    """
    if name is None:
        return best_device()
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name not in here:
        raise ValueError(f"device: {name!r} is not one of {list(here)}")
    if not here[name]:
        found = [kind for kind, there in here.items() if there]
        raise ValueError(f"device: PyTorch finds no {name} here, only {found}")
    return torch.device(name)


def _of_rank() -> torch.device | None:
    """The GPU of this process of a group, as the group, `set_device` or the launcher tells it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    bound = cast(distributed.ProcessGroup, distributed.group.WORLD).bound_device_id
    # 0 is also what PyTorch says where none was set.
    index = torch.cuda.current_device() or distributed.get_node_local_rank(fallback_rank=0)
    return bound or torch.device("cuda", index % torch.cuda.device_count())


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all that was enqueued.

    Example:
        >>> synchronize(torch.device("cpu"))
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    else:
        torch.get_device_module(device).synchronize()


def kind(device: torch.device) -> str:
    """The kind of device that measured times hold for: a GPU's name, a CPU's model and threads.

    Example:
        >>> kind(torch.device("meta"))
        'meta'
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {versions.cpu()} x{torch.get_num_threads()}"
    if device.type == "mps" and torch.backends.mps.is_available():
        # PyTorch 2.6 does not tell the chip.
        return f"mps {getattr(torch.backends.mps, 'get_name', versions.cpu)()}"
    return device.type
