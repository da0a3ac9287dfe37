"""The CPU's model and this package's version, which measured times depend on."""

import platform
from functools import cache
from importlib import metadata
from pathlib import Path


@cache
def cpu() -> str:
    """The model of this CPU where Linux reports it, else the CPU's architecture.

    Example:
        >>> isinstance(cpu(), str)
        True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


@cache
def package() -> str:
    """The version of this package; "0+uninstalled" of a source tree that was never installed.

    Example:
        >>> package()[0]
        '0'
    """
    try:
        return metadata.version("flash-wtconv")
    except metadata.PackageNotFoundError:
        return "0+uninstalled"
