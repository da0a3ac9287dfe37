"""Host time of warm eager calls: what Python costs where little is computed."""

import importlib.metadata
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import jax
import jax.numpy as jnp
from flax import nnx

from flash_wtconv_jax import environment, linen
from flash_wtconv_jax.bench import timing
from flash_wtconv_jax.nnx import WTConv2d
from pallas_kernels.common.types import Json
from pallas_kernels.conv2d import conv2d
from pallas_kernels.haar import wavedec2
from pallas_kernels.wtconv import wtconv2d

GROUP = "flash_wtconv.bench.host"
"""The entry point group of other packages' contenders: a function that returns calls by name."""

CALLS = 100
"""Calls that are timed together."""
_SHAPE = (1, 4, 4, 8)


def run(progress: Callable[[str, int], Callable[[], None]]) -> Json:
    """Times warm eager calls of layers and functions on an image of 4 x 4 pixels.

    Args:
        progress: Told a label and a number of steps, returns what to call after each step.

    Returns:
        A JSON-able report: device, versions, date, and a row for each contender with its time in
        microseconds a call, as `median`, `least` and `greatest`.
    """
    contenders = {name: _many(call) for name, call in _contenders().items()}
    step = progress("host time", timing.turns(len(contenders)))
    times = timing.take_turns(contenders, step)
    rows = [
        {"contender": name} | {key: ms * 1e3 / CALLS for key, ms in spread._asdict().items()}
        for name, spread in times.items()
    ]
    return {
        "benchmark": "host",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": environment.device(),
        "versions": environment.versions(),
        "no_device_events": None,
        "rows": rows,
    }


def _contenders() -> Mapping[str, Callable[[], object]]:
    """A warm call of everything that is timed, by name."""
    x, w = jnp.ones(_SHAPE), jnp.ones((3, 3, 8, 8))
    layer = linen.WTConv2d(channels=8, kernel_size=3, depth=2)
    variables = layer.init(jax.random.key(0), x)
    twin = WTConv2d(channels=8, kernel_size=3, depth=2, rngs=nnx.Rngs(0))
    compiled = jax.jit(lambda x, params: wtconv2d(x, params))
    calls: dict[str, Callable[[], object]] = {
        "linen WTConv2d": lambda: layer.apply(variables, x),
        "nnx WTConv2d": lambda: twin(x),
        "wtconv2d": lambda: wtconv2d(x, variables["params"]),
        "wtconv2d in jax.jit": lambda: compiled(x, variables["params"]),
        "conv2d": lambda: conv2d(x, w, padding=1),
        "wavedec2": lambda: wavedec2(x, level=2),
    }
    for entry in importlib.metadata.entry_points(group=GROUP):
        calls |= entry.load()()
    return calls


def _many(call: Callable[[], object]) -> Callable[[], object]:
    def calls() -> object:
        for _ in range(CALLS - 1):
            call()
        return jax.block_until_ready(call())

    return calls
