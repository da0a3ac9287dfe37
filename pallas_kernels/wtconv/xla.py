"""Wavelet convolution in plain JAX: runs on every platform, differentiable in both modes.

On a CPU a depthwise convolution is a sum of shifted products, which XLA compiles to vectorised
loops over the contiguous channels; `conv_general_dilated` with as many groups as channels is an
order of magnitude slower there. On a GPU the grouped convolution is faster (by 17 times on an
H200), so every platform but the CPU takes it; on a CPU `search_space` offers the tuner both.

There the work is also cut so that a part and its coefficients stay in cache: into a few images at a
time, and large images into some of their channels, and those into strips of rows (`xla_strips`).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common._compat import unfused, vary_like
from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.sharding import left_to_xla
from pallas_kernels.common.types import Taps
from pallas_kernels.haar.filters import IS_HAAR
from pallas_kernels.wtconv import xla_strips
from pallas_kernels.wtconv.problem import Problem
from pallas_kernels.wtconv.xla_levels import (
    Reach,
    cascade,
    convolve,
    correlate,
    levels_of_pixels,
    merged,
    reaches_of,
    unmerged,
)

DIFFERENTIABLE = True
BIAS_GRADIENT = False


_PART_BYTES = 4 << 20
"""The bytes of x in a part; with its coefficients they fill a CPU's last-level cache."""
_MIN_CHANNELS = 32
"""The fewest channels of a part of a large image."""


def unavailable(platform: str) -> str | None:
    """None: plain JAX runs on every platform."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""


def search_space(direction: str, problem: Problem) -> list[dict[str, bool]]:
    """The forms that are worth timing, the default one first; only a CPU has more than one.

    The grouped convolution's weight gradient is left out: it takes a CPU a thousand times as long.
    """
    if not on_cpu():
        return [{}]
    forms = [{"shifted": True}] + [{"shifted": False}] * (direction == "fwd")
    whole = _cut(problem.shape, problem.dtype, problem.wavelet) == Cut()
    return forms if whole else [{**form, "chunked": cut} for form in forms for cut in (True, False)]


def forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    shifted: bool | None = None,
    chunked: bool = True,
) -> jax.Array:
    """The operator on `x [N, *spatial, C]`, or its transpose; see `vjp` for the arguments.

    Args:
        x: Signal.
        taps: Kernels, the base's first.
        bias: `[C]` or None.
        wavelet: Name of the wavelet.
        transpose: Whether to compute the transpose.
        precision: Precision of a grouped convolution.
        shifted: Whether a depthwise convolution is a sum of shifted products, else a grouped
            convolution; None picks the form that suits the platform.
        chunked: Whether a CPU may work on a part of the images at a time.
    """
    base, *others = taps
    return _forward(
        *(x, (base[..., 0, :], *others), bias),
        wavelet=wavelet,
        transpose=transpose,
        precision=precision,
        shifted=on_cpu() if shifted is None else shifted,
        cut=_cut(x.shape, x.dtype, wavelet) if chunked else Cut(),
    )


@partial(unfused, static_argnames=("wavelet", "transpose", "precision", "shifted", "cut"))
def _forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    shifted: bool,
    cut: "Cut",
) -> jax.Array:
    """The operator by kernels of which the base's, `[*kernel, C]`, has no axis of bands."""
    acc, size = accumulation_dtype(x.dtype), x.shape[1:-1]
    reaches = reaches_of(size, taps[0].shape[0], len(taps) - 1)
    taps = tuple(tap.astype(acc) for tap in taps)
    taps, reaches = merged(taps, reaches, levels_of_pixels(size, len(taps) - 1, wavelet))
    if transpose:
        reaches = [reach.flipped(len(tap)) for reach, tap in zip(reaches, taps, strict=True)]
        taps = tuple(jnp.flip(tap, range(len(size))) for tap in taps)
    run = partial(
        _part,
        reaches=reaches,
        wavelet=wavelet,
        transpose=transpose,
        precision=precision,
        shifted=shifted,
        strips=cut.strips and shifted,
    )
    if cut.parts == 1:
        return run(x, taps, bias)

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        weights = partial(cut.read, i=i, batch=False)
        part = run(cut.read(x, i), *jax.tree.map(weights, (taps, bias)))
        return cut.write(y, part, i)

    return lax.fori_loop(0, cut.parts, add, vary_like((x, taps, bias), jnp.zeros_like(x)))


def _part(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    reaches: Sequence[Reach],
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    shifted: bool,
    strips: bool,
) -> jax.Array:
    """The operator on one part of x, in one form."""
    if strips:
        return xla_strips.forward(x, taps, bias, reaches)
    pads = [reach.pads for reach in reaches]
    image, *coefficients = cascade(x, pads, shifted, wavelet, transpose)
    base, *others = taps
    if bias is None and on_cpu():
        # So the transpose shares what is compiled, unless XLA knows that it adds zeros.
        bias = lax.optimization_barrier(jnp.zeros(x.shape[-1:], base.dtype))
    merge = partial(
        convolve,
        wavelet=wavelet,
        transpose=transpose,
        precision=precision,
        shifted=shifted,
    )
    filtered = None
    for stored, kernel, reach in zip(coefficients[::-1], others[::-1], reaches[:0:-1], strict=True):
        filtered = merge(stored, kernel, filtered, None, reach=reach, dtype=base.dtype)
    return merge(image, base, filtered, bias, reach=reaches[0], dtype=x.dtype)


def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
    shifted: bool | None = None,
    chunked: bool = True,
) -> Taps:
    """The gradients of the taps: each level's coefficients of x correlated with those of dy.

    `shifted` and `chunked` are as in `forward`, but what XLA splits is shifted everywhere: it gets
    the other form's wrong.
    """
    (*kernel, _, channels), *others = kernel_shapes
    base, *rest = _weight_grad(
        *(x, dy),
        kernel_shapes=((*kernel, channels), *others),
        wavelet=wavelet,
        precision=precision,
        shifted=on_cpu() or left_to_xla(x) if shifted is None else shifted,
        cut=_cut(x.shape, x.dtype, wavelet) if chunked else Cut(),
    )
    return base[..., None, :], *rest


@partial(unfused, static_argnames=("kernel_shapes", "wavelet", "precision", "shifted", "cut"))
def _weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
    shifted: bool,
    cut: "Cut",
) -> Taps:
    """The gradients of the taps, of which the base's, `[*kernel, C]`, have no axis of bands."""
    run = partial(
        _part_of_weight_grad,
        wavelet=wavelet,
        precision=precision,
        shifted=shifted,
        strips=cut.strips and shifted,
    )
    if cut.parts == 1:
        # Not as a loop of one step, which XLA unrolls, but only after a while.
        return run(x, dy, kernel_shapes)

    def add(totals: Taps, i: jax.Array) -> tuple[Taps, None]:
        olds = [cut.read(total, i, batch=False) for total in totals]
        found = run(cut.read(x, i), cut.read(dy, i), tuple(old.shape for old in olds))
        return tuple(
            cut.write(total, old + part, i, batch=False)
            for total, old, part in zip(totals, olds, found, strict=True)
        ), None

    zeros = tuple(jnp.zeros(shape, accumulation_dtype(x.dtype)) for shape in kernel_shapes)
    return lax.scan(add, vary_like((x, dy), zeros), jnp.arange(cut.parts))[0]


def _part_of_weight_grad(
    x: jax.Array,
    dy: jax.Array,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
    shifted: bool,
    strips: bool,
) -> Taps:
    """The gradients of the taps from one part of x, in one form."""
    size, levels = x.shape[1:-1], len(kernel_shapes) - 1
    reaches = reaches_of(size, kernel_shapes[0][0], levels)
    if strips:
        return xla_strips.weight_grad(x, dy, kernel_shapes, reaches)
    pads = [reach.pads for reach in reaches[: levels_of_pixels(size, levels, wavelet) + 1]]
    of_x = cascade(x, pads, shifted, wavelet, False)
    # Padded as the transpose pads it, so that both share what is compiled.
    around = [reach.flipped(kernel_shapes[0][0]).pads for reach in reaches[: len(pads)]]
    of_dy = cascade(dy, around, shifted, wavelet, True)
    found = [
        correlate(stored, grad, pad, shape, reach, precision, shifted)
        for stored, grad, pad, shape, reach in zip(
            of_x, of_dy, around, kernel_shapes, reaches, strict=False
        )
    ]
    return unmerged(found, kernel_shapes, reaches)


class Cut(NamedTuple):
    """How a CPU cuts its work so that a part and its coefficients stay in cache.

    Attributes:
        batches: The parts of the images.
        groups: The parts of the channels.
        strips: Whether a part, of one image, is itself cut into strips of rows.
    """

    batches: int = 1
    groups: int = 1
    strips: bool = False

    @property
    def parts(self) -> int:
        """The number of parts."""
        return self.batches * self.groups

    def read(self, array: jax.Array, i: jax.Array, batch: bool = True) -> jax.Array:
        """Part `i` of an array `[N, ..., C]`, or of weights `[..., C]`, which have no batch.

        There is no axis of parts, which XLA would copy x to make.
        """
        shape = list(array.shape)
        shape[-1] //= self.groups
        if batch:
            shape[0] //= self.batches
        return lax.dynamic_slice(array, self._start(array, i, batch), shape)

    def write(
        self, array: jax.Array, part: jax.Array, i: jax.Array, batch: bool = True
    ) -> jax.Array:
        """The array with another part `i`, see `read`."""
        return lax.dynamic_update_slice(array, part, self._start(array, i, batch))

    def _start(self, array: jax.Array, i: jax.Array, batch: bool) -> list[int | jax.Array]:
        n, c = array.shape[0] // self.batches, array.shape[-1] // self.groups
        start: list[int | jax.Array] = [0] * array.ndim
        start[-1] = i % self.groups * c
        if batch:
            start[0] = i // self.groups * n
        return start


def _cut(shape: Sequence[int], dtype: DTypeLike, wavelet: str) -> Cut:
    """The cut of x; only a single CPU has one, where temporaries are fresh pages in every call.

    Arrays of symbolic size stay whole, as do those that may be sharded over several devices, and
    those on a device with enough threads for all of it.
    """
    known = all(isinstance(size, int) for size in shape) and 0 not in shape
    if not (known and on_cpu() and jax.device_count() == 1):
        return Cut()
    n, *sizes, c = shape
    size = math.prod(sizes) * c * jnp.dtype(dtype).itemsize
    if size <= _PART_BYTES:
        return Cut(next(b for b in range(-(-n * size // _PART_BYTES), n + 1) if n % b == 0))
    # Fewer channels side by side would not fill the lines of the cache.
    groups = [g for g in range(1, c + 1) if c % g == 0 and c // g >= _MIN_CHANNELS] or [1]
    found = next((g for g in groups if size <= g * _PART_BYTES), groups[-1])
    return Cut(n, found, size > found * _PART_BYTES and wavelet in IS_HAAR)
