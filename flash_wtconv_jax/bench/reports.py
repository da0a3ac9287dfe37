"""The parts of reports that several benchmarks share."""

import os
from collections.abc import Callable, Collection, Iterable
from datetime import date
from typing import Any

from flash_wtconv_jax import environment
from flash_wtconv_jax.bench.clocks import Clock
from pallas_kernels.common.types import Json

Keep = Callable[[Json], None]
"""Keeps a report that is not whole yet: a run that is stopped loses what it is at alone."""


def unkept(report: Json) -> None:
    """Keeps nothing."""


def head(
    benchmark: str,
    clock: Clock,
    no_device_events: str | None,
    others: Iterable[Any] = (),
) -> Json:
    """The beginning of a report, which tells what ran, when, where, and by which clock.

    Args:
        benchmark: The name.
        clock: The clock that timed it.
        no_device_events: The reason why a GPU's events are not the clock, as `clocks.best` has it.
        others: Contenders of other packages, which tell their `versions()`.

    Returns:
        `benchmark`, `date`, `device`, `versions`, `xla_flags` (the variable, None without),
        `clock` and `no_device_events`.

    Example:
        >>> from flash_wtconv_jax.bench.clocks import HostClock
        >>> head("naps", HostClock(), None)["clock"]
        'host'
    """
    versions = environment.versions()
    for other in others:
        versions |= other.versions()
    return {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "device": environment.device(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS") or None,
        "clock": clock.name,
        "no_device_events": no_device_events,
    }


def check_shapes(shapes: Iterable[str], known: Collection[str]) -> None:
    """Raises `ValueError` for names of shapes that are not among the known ones."""
    unknown = sorted(set(shapes) - set(known))
    if unknown:
        raise ValueError(f"shape: {unknown} is not one of {sorted(known)}")
