"""Wavelet convolution in plain JAX: runs on every platform, differentiable in both modes.

On CPU a depthwise convolution is a sum of shifted products, which XLA compiles to one vectorised
loop over the contiguous channels; `conv_general_dilated` with as many groups as channels is an
order of magnitude slower there. On a GPU it is the other way round (by 17 times on an H200), so
everywhere else the grouped convolution is taken. The stages of the layer are kept apart with
`unfused`: fused across levels, XLA's CPU compiler computes each convolution once for every pixel
of the synthesis that reads it.
"""

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels._compat import unfused, vary_over, varying_axes
from pallas_kernels.haar.xla import analysis, synthesis
from pallas_kernels.numerics import accumulator
from pallas_kernels.platform import on_cpu

DIFFERENTIABLE = True

Taps = tuple[jax.Array, ...]

_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}

_CHUNK_BYTES = 4 << 20
"""Size of x that one pass over the layer works on: with its coefficients, a CPU's last cache."""


def unavailable(platform: str) -> str | None:
    """Plain JAX runs everywhere."""
    return None


def check(direction: str, problem: Any) -> None:
    """Plain JAX takes every problem."""


@partial(unfused, static_argnames=("wavelet", "transpose", "precision"))
def forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
) -> jax.Array:
    """The operator on `x [N, *spatial, C]`, or its transpose; see `vjp` for the arguments."""
    acc = accumulator(x.dtype)
    taps = tuple(tap.astype(acc) for tap in taps)
    if transpose:
        taps = tuple(jnp.flip(tap, range(x.ndim - 2)) for tap in taps)
    run = partial(
        _forward,
        taps=taps,
        bias=bias,
        wavelet=wavelet,
        transpose=transpose,
        precision=precision,
    )
    return lax.map(run, _in_chunks(x)).reshape(x.shape)


def _forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
) -> jax.Array:
    pads = _pads(taps[0].shape[0], transpose)
    coefficients = _cascade(x, len(taps) - 1, _stored(pads), wavelet, transpose)
    merge = partial(_filter, pads=pads, wavelet=wavelet, transpose=transpose, precision=precision)
    filtered = None
    for stored, tap in zip(coefficients[:0:-1], taps[:0:-1], strict=True):
        filtered = merge(stored, tap, filtered, None, dtype=taps[0].dtype)
    return merge(coefficients[0], taps[0], filtered, bias, dtype=x.dtype)[..., 0, :]


@partial(unfused, static_argnames=("kernel_shapes", "wavelet", "precision"))
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
) -> Taps:
    """Gradients of the taps: each level's coefficients of x correlated with those of dy."""

    def add(total: Taps, chunk: tuple[jax.Array, jax.Array]) -> tuple[Taps, None]:
        part = _weight_grad(*chunk, kernel_shapes, wavelet, precision)
        return jax.tree.map(jnp.add, total, part), None

    zeros = tuple(jnp.zeros(shape, accumulator(x.dtype)) for shape in kernel_shapes)
    zeros = vary_over(varying_axes((x, dy)), zeros)
    return lax.scan(add, zeros, (_in_chunks(x), _in_chunks(dy)))[0]


def _weight_grad(
    x: jax.Array,
    dy: jax.Array,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
) -> Taps:
    pads = _pads(kernel_shapes[0][0], False)
    levels = len(kernel_shapes) - 1
    of_x = _cascade(x, levels, _stored(pads), wavelet, False)
    of_dy = _cascade(dy, levels, (0, 0), wavelet, True)
    return tuple(
        _correlate(stored, grad, shape, pads, precision)
        for stored, grad, shape in zip(of_x, of_dy, kernel_shapes, strict=True)
    )


def _in_chunks(x: jax.Array) -> jax.Array:
    """`[N, ...]` as `[chunks, N / chunks, ...]`, so that a chunk's coefficients stay in cache.

    On a single CPU alone: there the temporaries of a whole batch are fresh pages in every call. A
    batch of symbolic size stays whole, as does one that may be sharded over several devices, or
    one on a device with enough threads for all of it.
    """
    n, chunks = x.shape[0], 1
    if on_cpu() and jax.device_count() == 1 and isinstance(n, int) and n > 0:
        # A chunk may be larger than wanted only where it is a single image.
        most = max(1, _CHUNK_BYTES // (x.nbytes // n))
        chunks = next(c for c in range(-(-n // most), n + 1) if n % c == 0)
    return x.reshape(chunks, n // chunks, *x.shape[1:])


def _pads(kernel_size: int, transpose: bool) -> tuple[int, int]:
    """PyTorch's `same` padding; the transpose of an even kernel pads the other way round."""
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    return (after, before) if transpose else (before, after)


def _cascade(
    x: jax.Array, levels: int, stored: tuple[int, int], wavelet: str, transpose: bool
) -> list[jax.Array]:
    """Coefficients `[N, *size, bands, C]`, x as one band first, zero-padded by `stored`."""
    x = x[..., None, :]
    coefficients = [_padded(x, pads=stored) if any(stored) else x]
    source, inner = x, (0, 0)
    for _ in range(levels):
        source = _analyse(source, inner=inner, pads=stored, wavelet=wavelet, transpose=transpose)
        coefficients.append(source)
        inner = stored
    return coefficients


@partial(unfused, static_argnames=("inner", "pads", "wavelet", "transpose"))
def _analyse(
    source: jax.Array,
    *,
    inner: tuple[int, int],
    pads: tuple[int, int],
    wavelet: str,
    transpose: bool,
) -> jax.Array:
    """Coefficients, padded by `pads`, of the low band of `source`, which is padded by `inner`."""
    low = source[(slice(None), *(slice(inner[0], n - inner[1]) for n in source.shape[1:-2]), 0)]
    low = low.astype(accumulator(low.dtype))
    return _padded_bands(analysis(low, low.ndim - 2, wavelet, transpose), pads)


def _padded_bands(bands: jax.Array, pads: tuple[int, int]) -> jax.Array:
    return jnp.pad(bands, [(0, 0), *[pads] * (bands.ndim - 3), (0, 0), (0, 0)])


_padded = unfused(_padded_bands, static_argnames=("pads",))


@partial(unfused, static_argnames=("pads", "wavelet", "transpose", "precision", "dtype"))
def _filter(
    stored: jax.Array,
    taps: jax.Array,
    deeper: jax.Array | None,
    bias: jax.Array | None,
    *,
    pads: tuple[int, int],
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    dtype: DTypeLike,
) -> jax.Array:
    """Depthwise convolution of one level plus, in its low band, the synthesis of the next."""
    out = _depthwise(stored, taps, pads, precision)
    ndim, size = out.ndim - 3, out.shape[1:-2]
    if bias is not None:
        out = out + bias.astype(taps.dtype)
    if deeper is None:
        return out.astype(dtype)
    bands = out.shape[-2]
    # A pad of the synthesis, fused into the sum, defeats the vectoriser; a pad of its result not.
    merge = synthesis if bands == 1 else _synthesis
    low = merge(deeper, ndim=ndim, shape=size, wavelet=wavelet, transpose=transpose)
    out = out + jnp.pad(low[..., None, :], [(0, 0)] * (ndim + 1) + [(0, bands - 1), (0, 0)])
    return out.astype(dtype)


_synthesis = unfused(synthesis, static_argnames=("ndim", "shape", "wavelet", "transpose"))


def _depthwise(
    stored: jax.Array, taps: jax.Array, pads: tuple[int, int], precision: lax.Precision | None
) -> jax.Array:
    """Convolution of coefficients `[N, *size, bands, C]`, stored as `_stored` says."""
    ndim = stored.ndim - 3
    if on_cpu():
        size = tuple(n - sum(pads) for n in stored.shape[1:-2])
        windows = (
            (tap, tuple(slice(t, t + n) for t, n in zip(tap, size, strict=True)))
            for tap in product(range(taps.shape[0]), repeat=ndim)
        )
        return sum(
            stored[(slice(None), *window)].astype(taps.dtype) * taps[tap] for tap, window in windows
        )
    *kernel, bands, channels = taps.shape
    out = lax.conv_general_dilated(
        stored.reshape(*stored.shape[:-2], bands * channels).astype(taps.dtype),
        taps.reshape(*kernel, 1, bands * channels),
        window_strides=(1,) * ndim,
        padding=(pads,) * ndim,
        dimension_numbers=_LAYOUTS[ndim],
        feature_group_count=bands * channels,
        # Tensor cores and matrix units would round float32 to fewer bits unless told not to.
        precision=lax.Precision.HIGHEST if precision is None else precision,
    )
    return out.reshape(*out.shape[:-1], bands, channels)


def _correlate(
    stored: jax.Array,
    dy: jax.Array,
    shape: tuple[int, ...],
    pads: tuple[int, int],
    precision: lax.Precision | None,
) -> jax.Array:
    """`dW[tap] = sum_p x[p + tap - r] * dy[p]`, the transpose of `_depthwise` in its taps."""
    ndim = stored.ndim - 3
    acc = accumulator(dy.dtype)
    if not on_cpu():
        taps = jax.ShapeDtypeStruct(shape, acc)
        pullback = jax.linear_transpose(lambda t: _depthwise(stored, t, pads, precision), taps)
        return pullback(dy.astype(acc))[0]

    def one(tap: jax.Array) -> jax.Array:
        shifted = lax.dynamic_slice(stored, (0, *tap, 0, 0), dy.shape).astype(acc)
        return jnp.sum(shifted * dy.astype(acc), axis=range(1 + ndim))

    # One tap at a time: two arrays are live, not one for every tap.
    every_tap = np.array(list(product(range(shape[0]), repeat=ndim)))
    return lax.map(one, every_tap).reshape(shape)


def _stored(pads: tuple[int, int]) -> tuple[int, int]:
    """The padding that coefficients are stored with: shifted products read it from memory."""
    return pads if on_cpu() else (0, 0)
