"""What `dispatch.tuner` needs of JAX: implementations run and timed on random arrays."""

import os
import platform as machine
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from pallas_kernels import platform
from pallas_kernels.dispatch.cache import Entry
from pallas_kernels.dispatch.tuner import Config

_AT_ONCE_MS = 10
_MOST_AT_ONCE = 50
"""Calls of an accelerator that the host waits for together, so that it never waits for the next."""


class OnRandomArrays:
    """One direction of one call of an operator: a `dispatch.tuner.Measurement`.

    Nothing of it reads the call's own arrays, which have no values where a function is traced.

    Args:
        run: Makes the function of arrays that an implementation with its parameters computes.
        inputs: Their shapes and dtypes, a tuple of pytrees of `jax.ShapeDtypeStruct`.
        reference: The implementation that is right, with its own defaults.
        static: What times depend on, besides the problem.
    """

    def __init__(
        self,
        run: Callable[[ModuleType, Config], Callable[..., Any]],
        inputs: tuple[Any, ...],
        reference: ModuleType,
        static: Mapping[str, Any],
    ) -> None:
        self._run = run
        self._inputs = inputs
        self._reference = reference
        self.static = static

    @property
    def device_kind(self) -> str:
        """As JAX names it; of a CPU, which JAX calls "cpu", the model and the number of threads."""
        kind = platform.kind()
        return f"cpu {_cpu()} x{os.cpu_count()}" if kind == "cpu" else kind

    @property
    def versions(self) -> Mapping[str, str]:
        """Those of JAX, whose compiler it is, and of this package."""
        return {"flash-wtconv": _version(), "jax": jax.__version__}

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return jax.process_count() == 1

    def impossible(self) -> str | None:
        """A program that is compiled ahead of time has no device to be timed on."""
        if isinstance(platform.device(), jax.Device):
            return None
        return f"this program is compiled ahead of time for {platform.kind()}"

    def outside(self, search: Callable[[], Entry]) -> Entry:
        """Runs it in a thread of its own, which traces nothing, for the same device."""
        device, wide = platform.device(), jax.config.jax_enable_x64

        def run() -> Entry:
            with jax.default_device(device), jax.enable_x64(wide):
                return search()

        with ThreadPoolExecutor(1, thread_name_prefix="flash-wtconv tuner") as pool:
            return pool.submit(run).result()

    def prepared(self, module: ModuleType, config: Config) -> Callable[[], Any]:
        """A call that enqueues its work, and returns what to wait for."""
        compiled = jax.jit(self._run(module, config))
        return lambda: compiled(*self._arrays)

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """The host's clock; on an accelerator around calls enough that launching is hidden."""
        one = _waited(call, 1)
        if platform.on_cpu():
            return one
        return _waited(call, min(_MOST_AT_ONCE, max(1, round(_AT_ONCE_MS / one))))

    def arrays(self, result: Any) -> list[np.ndarray]:
        """The leaves of a result, on the host."""
        return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]

    def reference(self) -> list[np.ndarray]:
        """What the reference makes of the same arrays."""
        return self.arrays(self.prepared(self._reference, ())())

    @cached_property
    def _arrays(self) -> tuple[Any, ...]:
        leaves, tree = jax.tree.flatten(self._inputs)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        drawn = [
            jax.random.normal(key, leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return tree.unflatten(drawn)


def _waited(call: Callable[[], Any], times: int) -> float:
    """Milliseconds of each of some calls that the host waits for together."""
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) * 1e3 / times


@cache
def _cpu() -> str:
    """The model of this CPU, where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, machine.machine())


@cache
def _version() -> str:
    try:
        return metadata.version("flash-wtconv")
    except metadata.PackageNotFoundError:
        return "0+uninstalled"
