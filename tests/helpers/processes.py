"""The environment of processes that tests start."""

import os


def with_devices(count: int) -> dict[str, str]:
    """This process' variables, for one of so many devices, parts of a CPU, that compiles fast."""
    flags = os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={count}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": " ".join(flags).strip(),
    }
