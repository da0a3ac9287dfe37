"""Depthwise convolution in plain JAX: runs on every platform.

Everywhere but on a CPU it is `lax.conv_general_dilated` with as many groups as channels. On a CPU,
where that is an order of magnitude slower, it is a sum of shifted products: by the plain JAX of the
wavelet convolution of 0 levels where that computes the same, which also keeps its work in cache.
Any other window is cut into phases. The samples that a tap reads lie a stride apart, so the output
is a sum of plain convolutions: of every stride-th sample, by every stride-th tap.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common.device import on_cpu, platform
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.sharding import left_to_xla
from pallas_kernels.common.types import Pair
from pallas_kernels.conv2d import xla as dense
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.depthwise.problem import Problem
from pallas_kernels.wtconv import xla as wtconv
from pallas_kernels.wtconv.xla_levels import shifted_products, shifted_sums

DIFFERENTIABLE = True
BIAS_GRADIENT = False


def unavailable(platform: str) -> str | None:
    """None: plain JAX runs on every platform."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""


def forward(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    window: Window,
    precision: lax.Precision | None,
) -> jax.Array:
    """The operator; see `vjp` for the arguments."""
    if not on_cpu():
        return cast(
            jax.Array,
            dense.forward(
                *(x, kernel.astype(x.dtype), bias),
                window=window,
                activation=None,
                out_dtype=x.dtype,
                precision=precision,
                config=None,
            ),
        )
    taps = kernel.shape[:2]
    if _is_plain(x.shape, x.dtype, taps, window):
        return wtconv.forward(
            *(x, (kernel,), bias), wavelet="haar", transpose=False, precision=precision
        )
    acc = accumulation_dtype(x.dtype)
    kernel = kernel.astype(acc)
    parts = (
        shifted_products(phase.samples(x), phase.taps(kernel)[..., 0, :], 2, phase.steps)
        for phase in _phases(x.shape[1:3], taps, window)
    )
    y = cast(jax.Array, sum(parts))
    return (y if bias is None else y + bias.astype(acc)).astype(x.dtype)


def input_grad(
    dy: jax.Array,
    kernel: jax.Array,
    *,
    size: Pair,
    window: Window,
    precision: lax.Precision | None,
) -> jax.Array:
    """The transpose of the convolution in x, applied to dy: an array `[N, *size, C]`."""
    shape, taps = (dy.shape[0], *size, dy.shape[-1]), kernel.shape[:2]
    if not on_cpu():
        return dense.input_grad(
            *(dy, kernel.astype(dy.dtype)),
            shape=shape[1:],
            dtype=dy.dtype,
            window=window,
            precision=precision,
            config=None,
        )
    if _is_plain(shape, dy.dtype, taps, window):
        return wtconv.forward(
            *(dy, (kernel,), None), wavelet="haar", transpose=True, precision=precision
        )
    acc = accumulation_dtype(dy.dtype)
    wide, kernel = dy.astype(acc), kernel.astype(acc)

    def in_samples(phase: _Phase) -> jax.Array:
        own = jnp.flip(phase.taps(kernel)[..., 0, :], (0, 1))
        around = [(reach, reach) for reach in phase.reaches]
        ready = jnp.pad(wide, [(0, 0), *around, (0, 0)])
        part = shifted_products(ready, own, 2, phase.steps)
        return dense.transposed(phase.samples, shape, part, kernel)

    parts = map(in_samples, _phases(size, taps, window))
    return cast(jax.Array, sum(parts)).astype(dy.dtype)


def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_size: Pair,
    window: Window,
    precision: lax.Precision | None,
) -> jax.Array:
    """The transpose of the convolution in the kernel, applied to dy: `[*kernel_size, 1, C]`."""
    shape, acc = (*kernel_size, 1, x.shape[-1]), accumulation_dtype(x.dtype)
    # A TPU's compiler splits it, and gets the gradient of groups wrong.
    if not on_cpu() and not (platform() == "tpu" and left_to_xla(x)):
        return dense.weight_grad(
            *(x, dy), shape=shape, dtype=acc, window=window, precision=precision, config=None
        )
    if _is_plain(x.shape, x.dtype, kernel_size, window):
        return wtconv.weight_grad(
            *(x, dy), kernel_shapes=(shape,), wavelet="haar", precision=precision
        )[0]
    kernel = jax.ShapeDtypeStruct(shape, acc)

    def in_taps(phase: _Phase) -> jax.Array:
        own = jax.eval_shape(phase.taps, kernel)
        taps = jax.ShapeDtypeStruct((*own.shape[:2], own.shape[-1]), acc)
        part = shifted_sums(phase.samples(x), dy, taps, ((0, 0), (0, 0)), phase.steps)
        return dense.transposed(phase.taps, shape, part.reshape(own.shape), x)

    parts = map(in_taps, _phases(x.shape[1:3], kernel_size, window))
    return cast(jax.Array, sum(parts))


class _Phase(NamedTuple):
    """Every stride-th sample and every stride-th tap, from some on, and the window of the call.

    Along an axis without a stride a dilated kernel's taps are `steps` apart; along one with a
    stride, the kernel has zeros between them.

    Attributes:
        first: The first sample, and tap, along H and W.
        lengths: The number of taps along H and W.
        size: The height and width of the output.
        window: The window of the call.
    """

    first: Pair
    lengths: Pair
    size: Pair
    window: Window

    @property
    def steps(self) -> Pair:
        """The distance of neighbouring taps along H and W, in samples of the phase."""
        down, across = (
            d if s == 1 else 1
            for d, s in zip(self.window.dilation, self.window.stride, strict=True)
        )
        return down, across

    @property
    def reaches(self) -> Pair:
        """The distance of the last tap from the first along H and W."""
        down, across = (d * (k - 1) for d, k in zip(self.steps, self.lengths, strict=True))
        return down, across

    def samples(self, x: jax.Array) -> jax.Array:
        """The phase's samples of padded images, as many as its taps read."""
        if self.window.reflect:
            x = dense.mirrored(x, self.window)
        else:
            x = jnp.pad(x, [(0, 0), *self.window.pads, (0, 0)])
        counts = (n + reach for n, reach in zip(self.size, self.reaches, strict=True))
        for axis, count in enumerate(counts, 1):
            x = self._every(x, axis, axis - 1, count)
        return x

    def taps(self, kernel: jax.Array) -> jax.Array:
        """The phase's taps of a kernel."""
        pairs = zip(self.window.dilation, self.steps, strict=True)
        between = [(0, 0, d // step - 1) for d, step in pairs]
        kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [*between, (0, 0, 0), (0, 0, 0)])
        for axis, count in enumerate(self.lengths):
            kernel = self._every(kernel, axis, axis, count)
        return kernel

    def _every(self, array: jax.Array, axis: int, which: int, count: int) -> jax.Array:
        """Every stride-th element along an axis, which is the image's first or second one."""
        first, step = self.first[which], self.window.stride[which]
        return lax.slice_in_dim(array, first, first + (count - 1) * step + 1, step, axis)


def _phases(size: Sequence[int], taps: Sequence[int], window: Window) -> Iterator[_Phase]:
    """The phases of a convolution of images of some size; those without taps are left out."""
    # In taps, zeros between them included.
    spans = [
        k if s == 1 else d * (k - 1) + 1
        for s, d, k in zip(window.stride, window.dilation, taps, strict=True)
    ]
    firsts = (range(min(s, span)) for s, span in zip(window.stride, spans, strict=True))
    for first in product(*firsts):
        down, across = (
            -(-(span - a) // s) for a, span, s in zip(first, spans, window.stride, strict=True)
        )
        yield _Phase((first[0], first[1]), (down, across), window.output(size, taps), window)


def _is_plain(shape: Sequence[int], dtype: DTypeLike, taps: Sequence[int], window: Window) -> bool:
    """Whether the wavelet convolution of 0 levels computes the same."""
    height, width = taps
    return not Problem(tuple(shape), jnp.dtype(dtype), (height, width), window).not_plain()
