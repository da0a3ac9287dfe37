"""`flash-wtconv bench levels`: what each wavelet level adds and costs, in one run."""

from collections.abc import Callable
from functools import partial

import jax

from flash_wtconv_jax.bench import clocks
from flash_wtconv_jax.bench.reports import head
from flash_wtconv_jax.bench.timing import comparison
from flash_wtconv_jax.bench.wtconv import (
    PASSES,
    beside_each_other,
    check_dtype,
    compiled_calls,
    drawn_copies,
    drawn_params,
)
from pallas_kernels.common.types import Json
from pallas_kernels.depthwise import depthwise_conv2d
from pallas_kernels.wtconv import wtconv2d
from pallas_kernels.wtconv.shapes import Shape

_RIVAL = "depthwise 7x7"
_RIVAL_SIZE = 7


def run(
    shape: Shape,
    progress: Callable[[str, int], Callable[[], None]],
    dtype: str = "float32",
) -> Json:
    """Times our layer at every number of levels up to a shape's, beside a 7x7 convolution of ours.

    Args:
        shape: The layer with the most levels.
        progress: Told a label and a number of steps, returns what to call after each step.
        dtype: Dtype of x, dy and the parameters, one of `wtconv.DTYPES`.

    Returns:
        A JSON-able report: device, versions, date, `clock` and `no_device_events` as in
        `wtconv.run`; a row for each contender and direction with its `levels` (None of the
        convolution), the side of its `field` in pixels, its `parameters`, its times in
        milliseconds, and `speedup` and `too_noisy` over the convolution.

    Raises:
        ValueError: An unknown dtype.
    """
    check_dtype(dtype)
    clock, no_device_events = clocks.best()
    copies = drawn_copies(shape.x, shape.x, dtype)
    layers = {
        f"{levels} levels": shape._replace(levels=levels) for levels in range(shape.levels + 1)
    }
    rival = shape._replace(levels=0, kernel_size=_RIVAL_SIZE)
    kernel = drawn_params(rival, dtype)["base_kernel"]
    params = {name: drawn_params(layer, dtype) for name, layer in layers.items()}
    jobs = {_RIVAL: partial(compiled_calls, depthwise_conv2d, kernel, copies)}
    jobs |= {name: partial(compiled_calls, wtconv2d, params[name], copies) for name in layers}
    # XLA computes the layer without levels, too.
    programs = beside_each_other(jobs, (_RIVAL, "0 levels"))
    counts = {name: sum(one.size for one in jax.tree.leaves(params[name])) for name in layers}
    rows = []
    for direction in PASSES:
        step = progress(direction, clock.turns(len(programs)))
        calls = {name: each[direction].call for name, each in programs.items()}
        times = clock.take_turns(calls, step)
        for name, spread in times.items():
            layer = layers.get(name, rival)
            rows.append(
                {
                    "contender": name,
                    "levels": layer.levels if name in layers else None,
                    "field": 2**layer.levels * layer.kernel_size,
                    "parameters": counts.get(name, kernel.size),
                    "direction": direction,
                    **spread.row(),
                    **comparison(spread, times[_RIVAL]),
                }
            )
    return {
        **head("levels", clock, no_device_events),
        "x": list(shape.x),
        "kernel_size": shape.kernel_size,
        "dtype": dtype,
        "baseline": _RIVAL,
        "rows": rows,
    }
