"""`flash-wtconv bench mlp`: the pointwise MLP of ConvNeXt's blocks beside plain JAX, in one run.

With the residual, as in a block.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from flash_wtconv_jax.bench import clocks
from flash_wtconv_jax.bench.defaults import OURS, able, each, entries
from flash_wtconv_jax.bench.reports import Keep, check_shapes, head, unkept
from flash_wtconv_jax.bench.timing import comparison
from flash_wtconv_jax.bench.wtconv import (
    PASSES,
    beside_each_other,
    check_dtype,
    compiled_calls,
    drawn_copies,
)
from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.dispatch.table import Entry
from pallas_kernels.mlp import baseline_jax, mlp
from pallas_kernels.mlp.api import OPERATOR
from pallas_kernels.mlp.problem import Problem
from pallas_kernels.mlp.shapes import SHAPES, Shape

_PLAIN = "plain jax"


def run(
    shapes: list[str],
    progress: Callable[[str, int], Callable[[], None]],
    dtype: str = "bfloat16",
    keep: Keep = unkept,
) -> Json:
    """Times plain JAX, our MLP, and each of its implementations, where there are several.

    Args:
        shapes: Names in `pallas_kernels.mlp.shapes.SHAPES`; on a CPU of 4 images.
        progress: Told a label and a number of steps, returns what to call after each step.
        dtype: Dtype of x, dy and the parameters, one of `wtconv.DTYPES`.
        keep: Told the report so far whenever rows are added, `left` naming what is to come.

    Returns:
        A JSON-able report: device, versions, date, `clock` and `no_device_events` as in
        `wtconv.run`; a row for each shape, direction and contender with its times in milliseconds,
        `tflops_per_s`, and `speedup`, the median of plain JAX over its own; and the shapes that are
        `left`, none in the end.

    Raises:
        ValueError: An unknown shape or dtype.
    """
    named = known()
    check_shapes(shapes, named)
    check_dtype(dtype)
    clock, no_device_events = clocks.best()
    report: Json = {
        **head("mlp", clock, no_device_events),
        "dtype": dtype,
        "baseline": _PLAIN,
        "rows": [],
        "left": list(dict.fromkeys(shapes)),
    }
    for name in [*report["left"]]:
        shape = named[name]
        rows_of_x = shape.rows, shape.channels
        copies = drawn_copies(rows_of_x, rows_of_x, dtype)
        params, contenders = _params(shape, dtype), _contenders(shape, dtype)
        jobs = {
            contender: partial(compiled_calls, function, params, copies)
            for contender, function in contenders.items()
        }
        programs = beside_each_other(jobs, (_PLAIN, f"{OURS} xla"))
        for direction in PASSES:
            calls = {contender: each[direction].call for contender, each in programs.items()}
            step = progress(f"{name} {direction}", clock.turns(len(calls)))
            times = clock.take_turns(calls, step)
            # Two products forward, and two for each of them backward.
            products = 2 if direction == "forward" else 6
            operations = 2 * products * shape.rows * shape.channels * shape.hidden
            report["rows"] += [
                {
                    "shape": name,
                    "x": list(rows_of_x),
                    "hidden": shape.hidden,
                    "direction": direction,
                    "contender": contender,
                    **spread.row(),
                    "tflops_per_s": operations / spread.median / 1e9,
                    **comparison(spread, times[_PLAIN]),
                }
                for contender, spread in times.items()
            ]
        report["left"].remove(name)
        keep(report)
    return report


def known() -> dict[str, Shape]:
    """The named shapes as they are timed on this device.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     known()["convnext_t_stage4"].rows
        196
    """
    return {name: shape.of(4) if on_cpu() else shape for name, shape in SHAPES.items()}


def implementations(shape: Shape, dtype: str) -> list[str]:
    """Our implementations that can compute a shape here, see `wtconv.implementations`.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     implementations(Shape(8, 8), "float32")
        ['xla']
    """
    check_dtype(dtype)
    sizes = (shape.rows, shape.channels), jnp.dtype(dtype), shape.hidden, shape.channels
    return able(OPERATOR, Problem(*sizes))


def defaults(report: Json) -> list[Entry]:
    """The fastest implementations of a report, see `wtconv.defaults`."""

    def problem(row: Json) -> Json:
        _, channels = row["x"]
        sizes = {"hidden": row["hidden"], "features": channels}
        return {"shape": row["x"], "dtype": report["dtype"], **sizes}

    return entries(OPERATOR, report, problem)


def _contenders(shape: Shape, dtype: str) -> dict[str, Callable[..., jax.Array]]:
    """The functions of x and parameters that are timed."""
    found = {_PLAIN: baseline_jax.mlp, **each(mlp, implementations(shape, dtype))}

    def applied(function: Callable[..., jax.Array], x: jax.Array, params: Tree) -> jax.Array:
        kernels, biases, residual = params
        return function(x, kernels, biases, residual=residual)

    return {name: partial(applied, one) for name, one in found.items()}


def _params(shape: Shape, dtype: str) -> Tree:
    """Kernels, biases and the residual."""
    channels, hidden = shape.channels, shape.hidden
    sizes = (channels, hidden), (hidden, channels), (hidden,), (channels,), (shape.rows, channels)
    keys = jax.random.split(jax.random.key(1), len(sizes))
    arrays = [
        0.05 * jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True)
    ]
    return tuple(arrays[:2]), tuple(arrays[2:4]), arrays[4]
