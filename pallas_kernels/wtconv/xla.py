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
from pallas_kernels.wtconv.xla_levels import cascade, convolve, correlate, reaches_of

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


@partial(unfused, static_argnames=("wavelet", "transpose", "precision", "shifted", "chunked"))
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
    shifted = on_cpu() if shifted is None else shifted
    acc = accumulation_dtype(x.dtype)
    taps = tuple(tap.astype(acc) for tap in taps)
    if transpose:
        taps = tuple(jnp.flip(tap, range(x.ndim - 2)) for tap in taps)
    cut = _cut(x.shape, x.dtype, wavelet) if chunked else Cut()
    run = partial(
        _forward,
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


def _forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    shifted: bool,
    strips: bool,
) -> jax.Array:
    """The operator on one part of x, in one form."""
    reaches = reaches_of(x.shape[1:-1], taps[0].shape[0], len(taps) - 1, transpose)
    pads = [reach.pads for reach in reaches]
    taps = tuple(tap[reach.taps] for tap, reach in zip(taps, reaches, strict=True))
    if strips:
        return xla_strips.forward(x, taps, bias, pads)
    coefficients = cascade(x, pads, shifted, wavelet, transpose)
    merge = partial(
        convolve,
        wavelet=wavelet,
        transpose=transpose,
        precision=precision,
        shifted=shifted,
    )
    filtered = None
    for level in range(len(taps) - 1, 0, -1):
        stored = coefficients[level]
        filtered = merge(stored, taps[level], filtered, None, pads=pads[level], dtype=taps[0].dtype)
    y = merge(coefficients[0], taps[0], filtered, bias, pads=pads[0], dtype=x.dtype)
    return y[..., 0, :]


@partial(unfused, static_argnames=("kernel_shapes", "wavelet", "precision", "shifted", "chunked"))
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
    form = on_cpu() or left_to_xla(x) if shifted is None else shifted
    cut = _cut(x.shape, x.dtype, wavelet) if chunked else Cut()
    if cut.parts == 1:
        # Not as a loop of one step, which XLA unrolls, but only after a while.
        return _weight_grad(x, dy, kernel_shapes, wavelet, precision, form, cut.strips and form)

    def add(totals: Taps, i: jax.Array) -> tuple[Taps, None]:
        olds = [cut.read(total, i, batch=False) for total in totals]
        shapes = tuple(old.shape for old in olds)
        pair = cut.read(x, i), cut.read(dy, i)
        found = _weight_grad(*pair, shapes, wavelet, precision, form, cut.strips and form)
        return tuple(
            cut.write(total, old + part, i, batch=False)
            for total, old, part in zip(totals, olds, found, strict=True)
        ), None

    zeros = tuple(jnp.zeros(shape, accumulation_dtype(x.dtype)) for shape in kernel_shapes)
    return lax.scan(add, vary_like((x, dy), zeros), jnp.arange(cut.parts))[0]


def _weight_grad(
    x: jax.Array,
    dy: jax.Array,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
    shifted: bool,
    strips: bool,
) -> Taps:
    """The gradients of the taps from one part of x, in one form."""
    reaches = reaches_of(x.shape[1:-1], kernel_shapes[0][0], len(kernel_shapes) - 1, False)
    if strips:
        return xla_strips.weight_grad(x, dy, kernel_shapes, reaches)
    pads = [reach.pads for reach in reaches]
    of_x = cascade(x, pads, shifted, wavelet, False)
    of_dy = cascade(dy, pads, False, wavelet, True)
    return tuple(
        correlate(stored, grad, shape, reach, precision, shifted)
        for stored, grad, shape, reach in zip(of_x, of_dy, kernel_shapes, reaches, strict=True)
    )


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
