"""`flash-wtconv bench conv2d`: TFLOP/s of dense convolutions beside XLA's, in one run."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from statistics import geometric_mean
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flash_wtconv_jax.bench import clocks
from flash_wtconv_jax.bench.clocks import Call
from flash_wtconv_jax.bench.defaults import OURS, able, entries
from flash_wtconv_jax.bench.reports import Keep, check_shapes, head, unkept
from flash_wtconv_jax.bench.timing import comparison
from flash_wtconv_jax.bench.wtconv import check_dtype
from pallas_kernels.common.types import Json, Keywords, Tree
from pallas_kernels.conv2d import conv2d
from pallas_kernels.conv2d.api import OPERATOR
from pallas_kernels.conv2d.problem import Problem, Window
from pallas_kernels.conv2d.shapes import SHAPES, Shape
from pallas_kernels.dispatch.table import Entry

EXPRESSIONS: dict[str, Keywords] = {
    "convolution": {"padding": "SAME"},
    "reflect+bias+gelu": {"padding": "reflect", "activation": "gelu"},
}
"""The arguments of `conv2d` by expression: the convolution alone, and with all that it fuses."""

_PLAIN = "plain jax"


def run(
    shapes: list[str],
    progress: Callable[[str, int], Callable[[], None]],
    dtype: str = "bfloat16",
    keep: Keep = unkept,
) -> Json:
    """Times `lax.conv_general_dilated` and every implementation that can compute a shape here.

    Args:
        shapes: Names in `pallas_kernels.conv2d.shapes.SHAPES`.
        progress: Told a label and a number of steps, returns what to call after each step.
        dtype: Dtype of x, the filters and the bias, one of `wtconv.DTYPES`.
        keep: Told the report so far whenever rows are added, `left` naming what is to come.

    Returns:
        A JSON-able report: device, versions, date, `clock` and `no_device_events` as in
        `wtconv.run`; a row for each expression, shape, direction and contender with its times in
        milliseconds, `tflops_per_s`, and `speedup`, the median of plain JAX over its own; the
        `means` of the speedups over the shapes; and what is `left`, nothing in the end.

    Raises:
        ValueError: An unknown shape or dtype.
    """
    check_shapes(shapes, SHAPES)
    check_dtype(dtype)
    clock, no_device_events = clocks.best()
    report: Json = {
        **head("conv2d", clock, no_device_events),
        "dtype": dtype,
        "baseline": _PLAIN,
        "rows": [],
        "means": [],
        "left": [" ".join(one) for one in product(EXPRESSIONS, dict.fromkeys(shapes))],
    }
    for label in [*report["left"]]:
        expression, shape = label.split()
        arguments, layer = EXPRESSIONS[expression], SHAPES[shape]
        contenders: dict[str, Callable[..., jax.Array]] = {_PLAIN: partial(_plain, **arguments)}
        for name in implementations(layer, dtype):
            contenders[f"{OURS} {name}"] = partial(_ours, implementation=name, **arguments)
        compiled = {name: _compiled(one, layer, dtype) for name, one in contenders.items()}
        for direction, work in (("forward", 1), ("forward+backward", 3)):
            step = progress(f"{label} {direction}", clock.turns(len(compiled)))
            calls = {name: both[direction] for name, both in compiled.items()}
            times = clock.take_turns(calls, step)
            report["rows"] += [
                {
                    "expression": expression,
                    "shape": shape,
                    "x": list(layer.x),
                    "w": list(layer.w),
                    "direction": direction,
                    "contender": name,
                    **spread.row(),
                    "tflops_per_s": work * layer.operations / spread.median / 1e9,
                    **comparison(spread, times[_PLAIN]),
                }
                for name, spread in times.items()
            ]
        report["left"].remove(label)
        report["means"] = _means(report["rows"])
        keep(report)
    return report


def known() -> dict[str, Shape]:
    """The named shapes, which are the same on every device."""
    return SHAPES


def implementations(shape: Shape, dtype: str) -> list[str]:
    """Our implementations that can compute every expression of a shape here, as `wtconv` has them.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     implementations(Shape(1, 8, 8, 4, 3, 3, 5), "float32")
        ['xla']
    """
    check_dtype(dtype)
    each = [able(OPERATOR, _problem(shape.x, shape.w, dtype, one)) for one in EXPRESSIONS]
    return [name for name in each[0] if all(name in names for names in each)]


def defaults(report: Json) -> list[Entry]:
    """The fastest implementations of a report, as `defaults.entries` returns them.

    Args:
        report: A report of `run`.

    Returns:
        An entry for each direction of each expression and shape that several implementations can
        compute; its problem has neither pads nor `out_dtype`, which a call need not share.
    """

    def problem(row: Json) -> Json:
        of = _problem(row["x"], row["w"], report["dtype"], row["expression"])._asdict()
        window = of["window"]._asdict()
        del of["out_dtype"], window["pads"]
        return of | {"dtype": report["dtype"], "window": window}

    return entries(OPERATOR, report, problem)


def _problem(x: Sequence[int], w: Sequence[int], dtype: str, expression: str) -> Problem:
    """The problem of an expression, which keeps the size of the images."""
    height, width, _, features = w
    above, left = (((k - 1) // 2, k // 2) for k in (height, width))
    window = Window(pads=(above, left), reflect=EXPRESSIONS[expression]["padding"] == "reflect")
    return Problem(tuple(x), jnp.dtype(dtype), height, width, features, window, jnp.dtype(dtype))


def _means(rows: list[Json]) -> list[Json]:
    """The geometric mean of the speedups of each expression, direction and contender."""
    names = ("expression", "direction", "contender")
    keys = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    means = []
    for key in keys:
        own = [row for row in rows if tuple(row[name] for name in names) == key]
        mean = {
            "speedup": geometric_mean(row["speedup"] for row in own),
            "too_noisy": any(row["too_noisy"] for row in own),
        }
        means.append(dict(zip(names, key, strict=True)) | mean)
    return means


def _compiled(function: Callable[..., jax.Array], layer: Shape, dtype: str) -> dict[str, Call]:
    """A function of x, filters and bias, and the same with its gradients, compiled."""

    def both(x: jax.Array, w: jax.Array, bias: jax.Array, dy: jax.Array) -> Tree:
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
    """The expression as a user of JAX would write it, in full float32 where x is float32."""
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
