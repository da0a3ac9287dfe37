"""`flash-wtconv bench conv2d`: TFLOP/s of dense convolutions beside XLA's, in one run."""

from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial
from statistics import geometric_mean
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platform
from pallas_kernels.conv2d import conv2d
from pallas_kernels.conv2d.api import OPERATOR
from pallas_kernels.conv2d.shapes import SHAPES, Shape

from .. import environment
from . import clocks
from .clocks import Call
from .wtconv import check_dtype

EXPRESSIONS: dict[str, dict[str, Any]] = {
    "convolution": {"padding": "SAME"},
    "reflect+bias+gelu": {"padding": "reflect", "activation": "gelu"},
}
"""What is computed, as arguments of `conv2d`: the product alone, and with all around it."""

_PLAIN = "plain jax"


def run(
    shapes: list[str],
    progress: Callable[[str, int], Callable[[], None]],
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Times `lax.conv_general_dilated` and every implementation that can run here.

    Args:
        shapes: Names in `pallas_kernels.conv2d.shapes.SHAPES`.
        progress: Told a label and a number of steps, returns what to call after each step.
        dtype: One of `wtconv.DTYPES`; of x, the filters and the bias.

    Returns:
        A JSON-able report: device, versions, date, `clock` and `no_device_events` as in
        `wtconv.run`; a row for each expression, shape, direction and contender with its times in
        milliseconds, `tflops_per_s`, and `speedup`, the median of plain JAX over its own; and the
        `means` of the speedups over the shapes.

    Raises:
        ValueError: An unknown shape or dtype.
    """
    unknown = sorted(set(shapes) - set(SHAPES))
    if unknown:
        raise ValueError(f"shape: {unknown} is not one of {sorted(SHAPES)}")
    check_dtype(dtype)
    clock, no_device_events = clocks.best()
    here = platform.current()
    names = [name for name, reason in OPERATOR.status(here) if reason is None]
    rows: list[dict[str, Any]] = []
    for expression, arguments in EXPRESSIONS.items():
        for shape in shapes:
            contenders: dict[str, Callable[..., jax.Array]] = {_PLAIN: partial(_plain, **arguments)}
            for name in names:
                contenders[f"flash {name}"] = partial(_ours, implementation=name, **arguments)
            layer, compiled = SHAPES[shape], {}
            for name, one in contenders.items():
                # Not every implementation takes every dtype.
                with suppress(NotImplementedError):
                    compiled[name] = _compiled(one, layer, dtype)
            for direction, work in (("forward", 1), ("forward+backward", 3)):
                step = progress(f"{shape} {expression} {direction}", clock.turns(len(compiled)))
                calls = {name: both[direction] for name, both in compiled.items()}
                times = clock.take_turns(calls, step)
                rows += [
                    {
                        "expression": expression,
                        "shape": shape,
                        "x": list(layer.x),
                        "w": list(layer.w),
                        "direction": direction,
                        "contender": name,
                        **{f"{key}_ms": value for key, value in spread._asdict().items()},
                        "tflops_per_s": work * layer.operations / spread.median / 1e9,
                        "speedup": times[_PLAIN].median / spread.median,
                    }
                    for name, spread in times.items()
                ]
    return {
        "benchmark": "conv2d",
        "date": date.today().isoformat(),
        "device": environment.device(),
        "versions": environment.versions(),
        "dtype": dtype,
        "baseline": _PLAIN,
        "clock": clock.name,
        "no_device_events": no_device_events,
        "rows": rows,
        "means": _means(rows),
    }


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The geometric mean of the speedups of each expression, direction and contender."""
    names = ("expression", "direction", "contender")
    keys = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    return [
        dict(zip(names, key, strict=True))
        | {
            "speedup": geometric_mean(
                row["speedup"] for row in rows if tuple(row[name] for name in names) == key
            )
        }
        for key in keys
    ]


def _compiled(function: Callable[..., jax.Array], layer: Shape, dtype: str) -> dict[str, Call]:
    """A function of x, filters and bias, and the same with its gradients, compiled."""

    def both(x: jax.Array, w: jax.Array, bias: jax.Array, dy: jax.Array) -> Any:
        y, pullback = jax.vjp(function, x, w, bias)
        return y, pullback(dy)

    sizes = layer.x, layer.w, (layer.features,), (*layer.x[:3], layer.features)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    *inputs, dy = (
        jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True)
    )
    forward = jax.jit(function).lower(*inputs).compile()
    backward = jax.jit(both).lower(*inputs, dy).compile()
    return {
        "forward": partial(forward, *inputs),
        "forward+backward": partial(backward, *inputs, dy),
    }


def _ours(x: jax.Array, w: jax.Array, bias: jax.Array, **arguments: Any) -> jax.Array:
    return conv2d(x, w, bias=bias if "activation" in arguments else None, **arguments)


def _plain(
    x: jax.Array, w: jax.Array, bias: jax.Array, padding: str, activation: str | None = None
) -> jax.Array:
    """What a user of JAX would write, in full float32 where x is."""
    if padding == "reflect":
        sides = [((k - 1) // 2, k // 2) for k in w.shape[:2]]
        x, padding = jnp.pad(x, [(0, 0), *sides, (0, 0)], mode="reflect"), "VALID"
    y = lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )
    return y if activation is None else jax.nn.gelu(y + bias, approximate=False)
