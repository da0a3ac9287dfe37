"""The device that a benchmark runs on."""

import os
from contextlib import suppress

import jax
from jax.extend.backend import backends

PLATFORMS = ("cpu", "gpu", "tpu")


def first(platform: str | None) -> jax.Device | None:
    """The first device of a platform, for `jax.default_device`.

    Args:
        platform: One of `PLATFORMS`; None is JAX's default.

    Returns:
        The device, None for None.

    Raises:
        ValueError: No such platform, or it is not on this machine; says which are.

    Example:
        >>> first("cpu").platform
        'cpu'
    """
    if platform is None:
        return None
    if platform not in PLATFORMS:
        raise ValueError(f"device: {platform!r} is not one of {list(PLATFORMS)}")
    devices = [client.local_devices()[0] for client in backends().values()]
    here = {device.platform: device for device in devices}
    if platform not in here:
        named = os.environ.get("JAX_PLATFORMS")
        setting = f" (JAX_PLATFORMS={named!r})" if named else ""
        raise ValueError(f"device: JAX finds no {platform} here, only {sorted(here)}{setting}")
    return here[platform]


def share_cpu(count: int) -> None:
    """Makes JAX take a CPU for so many devices, unless it has been told how many, or has started.

    Args:
        count: The number of devices.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with suppress(RuntimeError):  # It has started.
            jax.config.update("jax_num_cpu_devices", count)
