"""The versions and the device that results depend on, for `info` and every saved figure."""

import os
import platform
from importlib import metadata

_DISTRIBUTIONS = ("flash-wtconv", "jax", "jaxlib", "flax", "numpy", "triton", "jax-triton")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on.

    Returns:
        Version by name; a package that is not installed is left out.

    Example:
        >>> sorted(set(versions()) & {"jax", "python"})
        ['jax', 'python']
    """
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device() -> dict[str, str | int]:
    """The devices that JAX computes on here, unless told otherwise.

    Returns:
        `platform` ("cpu", "gpu" or "tpu"), `kind` and `count`.

    Raises:
        RuntimeError: If JAX cannot start any device, with its reason.

    Example:
        >>> sorted(device())
        ['count', 'kind', 'platform']
    """
    import jax

    from pallas_kernels.common.device import platform as current

    try:
        devices = jax.devices(current())
    except (AssertionError, RuntimeError) as error:
        # An assertion fails if JAX_PLATFORMS names a platform whose plugin is not installed.
        reason = str(error).splitlines()[0] if str(error) else "its plugin is not installed"
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise RuntimeError(
            f"JAX starts no device (JAX_PLATFORMS={platforms!r}): {reason}"
        ) from error
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        # JAX calls every CPU "cpu".
        kind = f"{platform.machine()}, {platform.system()}"
    return {"platform": devices[0].platform, "kind": kind, "count": len(devices)}
