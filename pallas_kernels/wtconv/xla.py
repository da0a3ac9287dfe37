"""Wavelet convolution in plain JAX: runs on every platform, differentiable in both modes.

A depthwise convolution is a sum of shifted products, which XLA compiles to one vectorised loop
over the contiguous channels; `conv_general_dilated` with as many groups as channels is an order
of magnitude slower on CPU. The stages of the layer are kept apart with `unfused`: fused across
levels, XLA computes each convolution once for every pixel of the synthesis that reads it.
"""

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._compat import unfused
from pallas_kernels.haar.xla import analysis, synthesis
from pallas_kernels.numerics import accumulator

DIFFERENTIABLE = True


def unavailable(platform: str) -> str | None:
    """Plain JAX runs everywhere."""
    return None


def check(direction: str, problem: Any) -> None:
    """Plain JAX takes every problem."""


def forward(
    x: jax.Array,
    taps: tuple[jax.Array, ...],
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
) -> jax.Array:
    """The operator on `x [N, *spatial, C]`, or its transpose; see `vjp` for the arguments."""
    ndim = x.ndim - 2
    acc = accumulator(x.dtype)
    taps = [tap.astype(acc) for tap in taps]
    if transpose:
        taps = [jnp.flip(tap, range(ndim)) for tap in taps]
    pads = _pads(taps[0].shape[0], transpose)
    coefficients = _cascade(x, len(taps) - 1, pads, wavelet, transpose)
    merge = partial(_filter, pads=pads, wavelet=wavelet, transpose=transpose)
    filtered = None
    for padded, tap in zip(coefficients[::-1], taps[:0:-1], strict=True):
        filtered = merge(padded, tap, filtered)
    y = merge(_padded(x, pads=pads)[..., None, :], taps[0], filtered)[..., 0, :]
    if bias is not None:
        y = y + bias.astype(acc)
    return y.astype(x.dtype)


def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    kernel_shapes: tuple[tuple[int, ...], ...],
    *,
    wavelet: str,
    precision: lax.Precision | None,
) -> tuple[jax.Array, ...]:
    """Gradients of the taps: each level's coefficients of x correlated with those of dy."""
    pads = _pads(kernel_shapes[0][0], False)
    levels = len(kernel_shapes) - 1
    of_x = _cascade(x, levels, pads, wavelet, False)
    of_dy = _cascade(dy, levels, (0, 0), wavelet, True)
    pairs = [(_padded(x, pads=pads)[..., None, :], dy[..., None, :])]
    pairs += zip(of_x, of_dy, strict=True)
    return tuple(
        _correlate(padded, grad, shape[0])
        for (padded, grad), shape in zip(pairs, kernel_shapes, strict=True)
    )


def _pads(kernel_size: int, transpose: bool) -> tuple[int, int]:
    """PyTorch's `same` padding; the transpose of an even kernel pads the other way round."""
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    return (after, before) if transpose else (before, after)


def _cascade(x, levels, pads, wavelet, transpose):
    """Padded coefficients `[N, *half, 2**ndim, C]` of every level, finest first."""
    split = partial(_analyse, pads=pads, wavelet=wavelet, transpose=transpose)
    coefficients = []
    low = x.astype(accumulator(x.dtype)) if levels else x
    for _ in range(levels):
        coefficients.append(split(low))
        size = [n - sum(pads) for n in coefficients[-1].shape[1:-2]]
        window = (slice(pads[0], pads[0] + n) for n in size)
        low = coefficients[-1][(slice(None), *window, 0)]
    return coefficients


@partial(unfused, static_argnames=("pads", "wavelet", "transpose"))
def _analyse(low, *, pads, wavelet, transpose):
    ndim = low.ndim - 2
    bands = analysis(low, ndim, wavelet, transpose)
    return jnp.pad(bands, [(0, 0), *[pads] * ndim, (0, 0), (0, 0)])


@partial(unfused, static_argnames=("pads",))
def _padded(x, *, pads):
    return jnp.pad(x, [(0, 0), *[pads] * (x.ndim - 2), (0, 0)])


@partial(unfused, static_argnames=("pads", "wavelet", "transpose"))
def _filter(padded, taps, deeper, *, pads, wavelet, transpose):
    """Depthwise convolution of one level plus, in its low band, the synthesis of the next."""
    ndim = padded.ndim - 3
    size = tuple(n - sum(pads) for n in padded.shape[1:-2])
    out = sum(
        padded[(slice(None), *(slice(t, t + n) for t, n in zip(tap, size, strict=True)))].astype(
            taps.dtype
        )
        * taps[tap]
        for tap in product(range(taps.shape[0]), repeat=ndim)
    )
    if deeper is None:
        return out
    low = synthesis(deeper, ndim, size, wavelet, transpose)[..., None, :]
    zeros = [(0, 0)] * low.ndim
    zeros[-2] = (0, padded.shape[-2] - 1)
    return out + jnp.pad(low, zeros)


def _correlate(padded: jax.Array, dy: jax.Array, kernel_size: int) -> jax.Array:
    """`dW[tap] = sum_p padded[p + tap] * dy[p]`, one tap at a time: two arrays are live, not 25."""
    ndim = padded.ndim - 3
    acc = accumulator(dy.dtype)
    every_tap = np.array(list(product(range(kernel_size), repeat=ndim)))

    def one(tap):
        start = (0, *tap, 0, 0)
        shifted = lax.dynamic_slice(padded, start, dy.shape).astype(acc)
        return jnp.sum(shifted * dy.astype(acc), axis=range(1 + ndim))

    return lax.map(one, every_tap).reshape(*[kernel_size] * ndim, *dy.shape[-2:])
