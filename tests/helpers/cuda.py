"""CUDA kernels of JAX's rooms on the CPU, and the traces of programs for a GPU that is not here."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import device
from pallas_kernels.common.cuda import Kernel, source_text
from pallas_kernels.common.on_cpu.cuda import HOPPER, Launcher, unavailable

EMULATED = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def folder():
    """The libraries that any test, worker or run has built; `make clean` removes them."""
    made = Path(__file__).parents[2] / ".jax_cache" / "on_cpu"
    made.mkdir(parents=True, exist_ok=True)
    return made


def emulate(monkeypatch, room, properties=HOPPER):
    """Lets JAX's room "cuda" of an operator launch on the CPU, which it calls back.

    Returns the launcher.
    """
    if unavailable() is not None:
        pytest.skip(unavailable())
    launcher = Launcher(folder())
    # What was traced before launches as it did then.
    jax.clear_caches()

    def launch(kernel, arguments, outputs, blocks):
        types = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in outputs]
        arrays = [a for a in arguments if not isinstance(a, int) and a is not None]

        def call(*given):
            own = iter(map(np.asarray, given))
            values = [a if isinstance(a, int) or a is None else next(own) for a in arguments]
            made = [(each.shape, each.dtype) for each in types]
            return launcher.launch(kernel, values, made, blocks)

        return jax.pure_callback(call, types, *arrays)

    monkeypatch.setattr(room, "launch", launch)
    monkeypatch.setattr(room, "unavailable", lambda platform: None)
    monkeypatch.setattr(room, "device_properties", lambda: properties)
    return launcher


def plant(monkeypatch, old, new):
    """Changes the text of each kernel from here on.

    Returns a list that grows by whether a kernel had the old text.
    """
    found = []

    def text(kernel):
        own = source_text(kernel.source)
        found.append(old in own)
        return own.replace(old, new)

    monkeypatch.setattr(Kernel, "text", text)
    return found


def recorded(monkeypatch, room):
    """The kernels, numbers and blocks of the launches of JAX's room "cuda", which return zeros."""
    found = []

    def launch(kernel, arguments, outputs, blocks):
        numbers = [a for a in arguments if isinstance(a, int)]
        found.append((kernel.name, dict(kernel.macros), numbers, blocks))
        return [jnp.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(room, "launch", launch)
    monkeypatch.setattr(room, "unavailable", lambda platform: None)
    return found


def gpu_of(monkeypatch, capability="9.0", **properties):
    """Lets calls be traced for a GPU that is not here."""
    gpu = SimpleNamespace(
        platform="gpu", device_kind="NVIDIA GPU", compute_capability=capability, **properties
    )
    monkeypatch.setattr(device, "current", lambda: gpu)
    return gpu
