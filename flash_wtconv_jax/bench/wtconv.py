"""`flash-wtconv bench wtconv`: our layer beside plain JAX and PyTorch eager, in one run."""

import importlib.util
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import platform
from pallas_kernels.platform import on_cpu
from pallas_kernels.wtconv import wtconv2d
from pallas_kernels.wtconv.api import OPERATOR, Problem
from pallas_kernels.wtconv.shapes import FOR_PLATFORM, Shape

from .. import environment
from . import plain
from .timing import Spread, take_turns, turns

DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("forward", "forward+backward")
Calls = dict[str, Callable[[], object]]

_AT_ONCE = 20
"""Calls of an accelerator that are waited for together, so that it never waits for the next."""


def run(
    shapes: list[str],
    baseline: str | None,
    progress: Callable[[str, int], Callable[[], None]],
    dtype: str = "float32",
) -> dict[str, Any]:
    """Times every contender that this machine has.

    On an accelerator a plain 7 x 7 depthwise convolution is one, the layer's rival at its cost.

    Args:
        shapes: Names in `pallas_kernels.wtconv.shapes.FOR_PLATFORM` of the device.
        baseline: The contender that ratios refer to: "torch eager", "plain jax", "depthwise 7x7"
            or "flash"; None is PyTorch where it can be measured beside us, else plain JAX.
        progress: Told a label and a number of steps, returns what to call after each step.
        dtype: One of `DTYPES`; of x, dy and the parameters.

    Returns:
        A JSON-able report: device, versions, date, and a row for each shape, direction and
        contender with its times in milliseconds, `speedup` (the baseline's median over its own),
        for JAX `temporaries`, the peak of temporary memory in inputs, and for "flash" the
        `implementation` of each direction that the device's rule picks.

    Raises:
        ValueError: An unknown shape or dtype, or a baseline that this machine does not have.
    """
    known = FOR_PLATFORM[platform.current()]
    unknown = sorted(set(shapes) - set(known))
    if unknown:
        raise ValueError(f"shape: {unknown} is not one of {sorted(known)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {list(DTYPES)}")
    here = [*_functions(), *(["torch eager"] if _has_torch(dtype) else [])]
    baseline = baseline or ("torch eager" if "torch eager" in here else "plain jax")
    if baseline not in here:
        raise ValueError(f"baseline: {baseline!r} is not here, expected one of {here}")
    rows = []
    for name in shapes:
        rows += _rows(name, known[name], dtype, baseline, progress)
    return {
        "benchmark": "wtconv",
        "date": date.today().isoformat(),
        "device": environment.device(),
        "versions": environment.versions() | _torch_version(dtype),
        "dtype": dtype,
        "baseline": baseline,
        "rows": rows,
    }


def _functions() -> dict[str, Callable]:
    """The contenders in JAX, of x and the layer's parameters."""
    functions: dict[str, Callable] = {"flash": wtconv2d, "plain jax": plain.wtconv}
    return functions if on_cpu() else functions | {"depthwise 7x7": _depthwise}


def _depthwise(x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        params["depthwise"],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _rows(
    name: str, shape: Shape, dtype: str, baseline: str, progress: Callable
) -> list[dict[str, Any]]:
    x, dy, params = _data(shape, dtype)
    rival = {"depthwise": jnp.ones((7, 7, 1, shape.channels), dtype)}
    calls: dict[str, Calls] = {direction: {} for direction in DIRECTIONS}
    temporaries: dict[tuple[str, str], float] = {}
    for contender, function in _functions().items():
        own = rival if function is _depthwise else params
        for direction, compiled, arguments in _compiled(function, x, own, dy):
            calls[direction][contender] = _blocking(compiled, arguments)
            used = compiled.memory_analysis().temp_size_in_bytes
            temporaries[direction, contender] = used / x.nbytes
    if _has_torch(dtype):
        for direction, call in _torch_calls(x, params, dy).items():
            calls[direction]["torch eager"] = call
    rows = []
    for direction in DIRECTIONS:
        step = progress(f"{name} {direction}", turns(len(calls[direction])))
        times = {
            contender: Spread(*(time / _at_once() for time in spread))
            for contender, spread in take_turns(calls[direction], step).items()
        }
        for contender, spread in times.items():
            rows.append(
                {
                    "shape": name,
                    "x": list(shape.x),
                    "levels": shape.levels,
                    "kernel_size": shape.kernel_size,
                    "direction": direction,
                    "contender": contender,
                    **{f"{key}_ms": value for key, value in spread._asdict().items()},
                    "speedup": times[baseline].median / spread.median,
                    "temporaries": temporaries.get((direction, contender)),
                    "implementation": _picked(shape, dtype) if contender == "flash" else None,
                }
            )
    return rows


def _picked(shape: Shape, dtype: str) -> dict[str, str]:
    """What computes our layer here, forward and backward."""
    problem = Problem(shape.x, jnp.dtype(dtype), shape.kernel_size, shape.levels, "haar")
    here = platform.current()
    return {name: OPERATOR.pick(name, None, here, problem) for name in OPERATOR.directions}


def _at_once() -> int:
    return 1 if on_cpu() else _AT_ONCE


def _data(shape: Shape, dtype: str) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    k, c = shape.kernel_size, shape.channels
    sizes = {"base_kernel": (k, k, 1, c), "base_bias": (c,), "base_scale": (c,)}
    for i in range(shape.levels):
        sizes |= {f"wavelet_kernel_{i}": (k, k, 4, c), f"wavelet_scale_{i}": (4, c)}
    params = {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in sizes.items()}
    x, dy = (jnp.asarray(rng.normal(size=shape.x), dtype) for _ in range(2))
    return x, dy, params


def _compiled(function: Callable, *arrays: Any) -> list[tuple[str, Any, tuple[Any, ...]]]:
    def both(x: jax.Array, params: Mapping[str, jax.Array], dy: jax.Array) -> Any:
        y, pullback = jax.vjp(function, x, params)
        return y, pullback(dy)

    forward = jax.jit(function).lower(*arrays[:2]).compile()
    return [
        ("forward", forward, arrays[:2]),
        ("forward+backward", jax.jit(both).lower(*arrays).compile(), arrays),
    ]


def _blocking(compiled: Callable, arguments: tuple[Any, ...]) -> Callable[[], object]:
    def call() -> None:
        for _ in range(_at_once()):
            result = compiled(*arguments)
        jax.block_until_ready(result)

    return call


def _has_torch(dtype: str) -> bool:
    """Whether PyTorch runs beside us: it is installed, and both compute float32 on the CPU."""
    return on_cpu() and dtype == "float32" and importlib.util.find_spec("torch") is not None


def _torch_calls(x: jax.Array, params: Any, dy: jax.Array) -> Calls:
    """Both directions of the published layer in PyTorch."""
    import torch

    import torch_bridge

    layer = torch_bridge.from_jax({"params": params})
    image, gradient = (
        torch.tensor(np.asarray(array)).permute(0, 3, 1, 2).contiguous() for array in (x, dy)
    )
    leaf = image.clone().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            layer(image)

    def both() -> None:
        layer.zero_grad()
        leaf.grad = None
        layer(leaf).backward(gradient)

    return {"forward": forward, "forward+backward": both}


def _torch_version(dtype: str) -> dict[str, str]:
    if not _has_torch(dtype):
        return {}
    import torch

    return {"torch": torch.__version__}
