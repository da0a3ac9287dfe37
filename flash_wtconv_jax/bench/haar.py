"""`flash-wtconv bench haar`: Haar cascades of images beside plain JAX and a copy, in one run."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flash_wtconv_jax.bench import clocks, copies_of_x
from flash_wtconv_jax.bench.copies_of_x import COPY, PLAIN
from flash_wtconv_jax.bench.defaults import able, each
from flash_wtconv_jax.bench.reports import Keep, check_shapes, head, unkept
from flash_wtconv_jax.bench.wtconv import (
    Contender,
    beside_each_other,
    by_both_clocks,
    check_dtype,
    compiled_call,
    drawn_copies,
)
from pallas_kernels.common import device
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.haar import baseline_jax, wavedec2, waverec2
from pallas_kernels.haar.api import OPERATOR
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.haar.problem import Problem
from pallas_kernels.wtconv.shapes import IMAGES, Shape

_WAVELET = "haar"


def run(
    shapes: list[str],
    progress: Callable[[str, int], Callable[[], None]],
    dtype: str = "float32",
    keep: Keep = unkept,
) -> Json:
    """Times a copy of x, plain JAX, our cascades, and each of their implementations.

    Analysis and synthesis are each other's gradient, so that these two are forward and backward
    pass of both.

    Args:
        shapes: Names in `pallas_kernels.wtconv.shapes.IMAGES` of the device.
        progress: Told a label and a number of steps, returns what to call after each step.
        dtype: Dtype of x and the coefficients, one of `wtconv.DTYPES`.
        keep: Told the report so far whenever rows are added, `left` naming what is to come.

    Returns:
        A JSON-able report: device, versions, date, `clock` and `no_device_events` as in
        `wtconv.run`; a row for each shape, direction ("analysis" or "synthesis") and contender with
        its times in milliseconds; `copies`, its median over that of a copy of x, which reads and
        writes as much as a cascade has to; `speedup`, the median of plain JAX over its own;
        `users`, the same by `users_clock` (`clocks.users`), both None where `clock` is no other;
        for JAX's programs `temporaries` and `extra_memory`; and the shapes that are `left`, none in
        the end.

    Raises:
        ValueError: An unknown shape or dtype.
    """
    named = known()
    check_shapes(shapes, named)
    check_dtype(dtype)
    clock, no_device_events = clocks.best()
    users = clocks.users(clock)
    report: Json = {
        **head("haar", clock, no_device_events),
        "dtype": dtype,
        "baseline": PLAIN,
        "users_clock": users.name if users else None,
        "rows": [],
        "left": list(dict.fromkeys(shapes)),
    }
    for name in [*report["left"]]:
        layer = named[name]
        for direction, here in _contenders(layer, dtype).items():
            told = partial(progress, f"{name} {direction}")
            times, theirs = by_both_clocks(clock, users, here, told)
            report["rows"] += [
                {
                    "shape": name,
                    "x": list(layer.x),
                    "levels": layer.levels,
                    "direction": direction,
                    "contender": contender,
                    **copies_of_x.figures(times, contender),
                    "users": copies_of_x.figures(theirs, contender) if theirs else None,
                    "temporaries": one.temporaries,
                    "extra_memory": one.extra_memory,
                }
                for contender, one in here.items()
            ]
        report["left"].remove(name)
        keep(report)
    return report


def known() -> dict[str, Shape]:
    """The named images of this device."""
    return IMAGES[device.platform()]


def implementations(shape: Shape, dtype: str) -> list[str]:
    """Our implementations that can compute a shape here, see `wtconv.implementations`.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     implementations(Shape(1, 8, 8, 4, 3), "float32")
        ['xla']
    """
    check_dtype(dtype)
    return able(OPERATOR, Problem(shape.x, jnp.dtype(dtype), 2, shape.levels, _WAVELET))


class _Cascade(NamedTuple):
    """The functions that are timed: each takes what the other one returns."""

    analysis: Callable[..., Tree]
    synthesis: Callable[..., Tree]


def _contenders(layer: Shape, dtype: str) -> dict[str, dict[str, Contender]]:
    """Every contender of a shape, by direction."""
    copies = [x for x, _ in drawn_copies(layer.x, layer.x, dtype)]
    plain, ours = _cascades(layer, dtype)
    cascades = {PLAIN: plain, **ours}
    jobs = {name: partial(_compiled, cascade, copies) for name, cascade in cascades.items()}
    programs = beside_each_other(jobs, [PLAIN])
    copy = copies_of_x.copy(copies[0])
    return {
        direction: {COPY: copy} | {name: one[direction] for name, one in programs.items()}
        for direction in _Cascade._fields
    }


def _compiled(cascade: _Cascade, copies: list[jax.Array]) -> dict[str, Contender]:
    """A contender by direction; the coefficients are its own, laid out as it returns them."""
    size = copies[0].nbytes
    analysis = compiled_call(cascade.analysis, [(x,) for x in copies], size)
    coefficients = [(analysis.call(),) for _ in copies]
    synthesis = compiled_call(cascade.synthesis, coefficients, size)
    return {"analysis": analysis, "synthesis": synthesis}


def _cascades(layer: Shape, dtype: str) -> tuple[_Cascade, dict[str, _Cascade]]:
    """Plain JAX's cascade, and ours by name."""
    names, sides = implementations(layer, dtype), (layer.height, layer.width)
    analyses = each(partial(wavedec2, wavelet=_WAVELET, level=layer.levels), names)
    syntheses = each(partial(waverec2, wavelet=_WAVELET, shape=sides), names)
    dec, rec = filter_bank(_WAVELET)
    plain = _Cascade(
        partial(baseline_jax.wavedec, ndim=2, level=layer.levels, bank=dec),
        partial(baseline_jax.waverec, shape=sides, bank=rec),
    )
    return plain, {name: _Cascade(analyses[name], syntheses[name]) for name in analyses}
