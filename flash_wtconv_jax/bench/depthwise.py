"""`flash-wtconv bench depthwise`: our depthwise convolution beside XLA's and a copy, in one run."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from flash_wtconv_jax.bench import clocks, copies_of_x
from flash_wtconv_jax.bench.copies_of_x import COPY, PLAIN
from flash_wtconv_jax.bench.defaults import able, each, entries
from flash_wtconv_jax.bench.reports import Keep, check_shapes, head, unkept
from flash_wtconv_jax.bench.wtconv import PASSES, check_dtype, compiled_calls, drawn_copies
from pallas_kernels.common import device
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.conv2d.api import checked_window
from pallas_kernels.depthwise import baseline_jax, depthwise_conv2d
from pallas_kernels.depthwise.api import OPERATOR
from pallas_kernels.depthwise.problem import Problem
from pallas_kernels.depthwise.shapes import FOR_PLATFORM, Shape
from pallas_kernels.dispatch.table import Entry


def run(
    shapes: list[str],
    progress: Callable[[str, int], Callable[[], None]],
    dtype: str = "bfloat16",
    keep: Keep = unkept,
) -> Json:
    """Times a copy of x, `lax.conv_general_dilated`, our layer, and each of its implementations.

    Args:
        shapes: Names in `pallas_kernels.depthwise.shapes.FOR_PLATFORM` of the device.
        progress: Told a label and a number of steps, returns what to call after each step.
        dtype: Dtype of x, dy and the parameters, one of `wtconv.DTYPES`.
        keep: Told the report so far whenever rows are added, `left` naming what is to come.

    Returns:
        A JSON-able report: device, versions, date, `clock` and `no_device_events` as in
        `wtconv.run`; a row for each shape, direction and contender with its times in milliseconds;
        `copies`, its median over that of a copy of x, which is two of the `passes` of
        `wtconv.PASSES` ("forward+backward" counts in 2.5 copies, five passes); `speedup`, the
        median of plain JAX over its own; for JAX's programs `temporaries` and `extra_memory`; and
        the shapes that are `left`, none in the end.

    Raises:
        ValueError: An unknown shape or dtype.
    """
    named = known()
    check_shapes(shapes, named)
    check_dtype(dtype)
    clock, no_device_events = clocks.best()
    report: Json = {
        **head("depthwise", clock, no_device_events),
        "dtype": dtype,
        "baseline": PLAIN,
        "rows": [],
        "left": list(dict.fromkeys(shapes)),
    }
    for name in [*report["left"]]:
        layer = named[name]
        copies = drawn_copies(layer.x, layer.y, dtype)
        programs = {
            contender: compiled_calls(function, _params(layer, dtype), copies)
            for contender, function in _contenders(layer, dtype).items()
        }
        copy = copies_of_x.copy(copies[0][0])
        for direction, passes in PASSES.items():
            here = {COPY: copy} | {
                contender: each[direction] for contender, each in programs.items()
            }
            step = progress(f"{name} {direction}", clock.turns(len(here)))
            times = clock.take_turns({contender: one.call for contender, one in here.items()}, step)
            report["rows"] += [
                {
                    "shape": name,
                    "x": list(layer.x),
                    "kernel_size": layer.kernel_size,
                    "stride": layer.stride,
                    "direction": direction,
                    "contender": contender,
                    **copies_of_x.figures(times, contender, passes),
                    "temporaries": one.temporaries,
                    "extra_memory": one.extra_memory,
                }
                for contender, one in here.items()
            ]
        report["left"].remove(name)
        keep(report)
    return report


def known() -> dict[str, Shape]:
    """The named shapes of this device."""
    return FOR_PLATFORM[device.platform()]


def implementations(shape: Shape, dtype: str) -> list[str]:
    """Our implementations that can compute a shape here, see `wtconv.implementations`.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     implementations(Shape(1, 8, 8, 4, 3), "float32")
        ['xla']
    """
    check_dtype(dtype)
    return able(OPERATOR, _problem(shape, dtype))


def defaults(report: Json) -> list[Entry]:
    """The fastest implementations of a report, see `wtconv.defaults`."""

    def problem(row: Json) -> Json:
        return {
            "shape": row["x"],
            "dtype": report["dtype"],
            "kernel_size": [row["kernel_size"]] * 2,
            "window": {"stride": [row["stride"]] * 2, "dilation": [1, 1]},
        }

    return entries(OPERATOR, report, problem)


def _contenders(layer: Shape, dtype: str) -> dict[str, Callable[..., jax.Array]]:
    """The functions of x and parameters that are timed."""

    def applied(
        convolve: Callable[..., jax.Array], x: jax.Array, params: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        return convolve(x, *params, stride=layer.stride)

    ours = each(depthwise_conv2d, implementations(layer, dtype))
    found = {PLAIN: baseline_jax.depthwise_conv2d, **ours}
    return {name: partial(applied, one) for name, one in found.items()}


def _params(layer: Shape, dtype: str) -> Tree:
    """The kernel and the bias of a layer."""
    k, c = layer.kernel_size, layer.channels
    of_kernel, of_bias = jax.random.split(jax.random.key(1))
    kernel = jax.random.normal(of_kernel, (k, k, 1, c), dtype)
    return kernel, jax.random.normal(of_bias, (c,), dtype)


def _problem(shape: Shape, dtype: str) -> Problem:
    taps = shape.kernel_size, shape.kernel_size
    filters = *taps, 1, shape.channels
    window = checked_window(shape.x, filters, shape.stride, "SAME", 1, shape.channels)
    return Problem(shape.x, jnp.dtype(dtype), taps, window)
