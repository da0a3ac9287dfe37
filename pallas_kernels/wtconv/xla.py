"""Wavelet convolution in plain JAX: runs on every platform, differentiable in both modes.

On a CPU a depthwise convolution is a sum of shifted products, which XLA compiles to one vectorised
loop over the contiguous channels; `conv_general_dilated` with as many groups as channels is an
order of magnitude slower there. On a GPU the grouped convolution is faster (by 17 times on an
H200), so every platform but the CPU takes it; on a CPU `search_space` offers the tuner both.
`unfused` keeps the stages of the layer apart: where XLA's CPU compiler fuses across levels, it
computes each convolution once for every pixel of the synthesis that reads it.
"""

import math
from functools import partial
from itertools import product
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common._compat import unfused, vary_like
from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.types import Pair, Taps
from pallas_kernels.haar.xla import analysis, synthesis
from pallas_kernels.wtconv.problem import Problem

DIFFERENTIABLE = True


_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}

_CHUNK_BYTES = 4 << 20
"""The bytes of x in a chunk; with its coefficients they fill a CPU's last-level cache."""


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
    whole = (
        _chunks(problem.shape[0], math.prod(problem.shape) * jnp.dtype(problem.dtype).itemsize) == 1
    )
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
        chunked: Whether a CPU may work on a few images at a time.
    """
    shifted = on_cpu() if shifted is None else shifted
    acc = accumulation_dtype(x.dtype)
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
        shifted=shifted,
    )
    return lax.map(run, _in_chunks(x, chunked)).reshape(x.shape)


def _forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    shifted: bool,
) -> jax.Array:
    """The operator on one chunk of images, in one form."""
    pads = _pads(taps[0].shape[0], transpose)
    coefficients = _cascade(x, len(taps) - 1, _stored(pads, shifted), wavelet, transpose)
    merge = partial(
        _filter,
        pads=pads,
        wavelet=wavelet,
        transpose=transpose,
        precision=precision,
        shifted=shifted,
    )
    filtered = None
    for stored, tap in zip(coefficients[:0:-1], taps[:0:-1], strict=True):
        filtered = merge(stored, tap, filtered, None, dtype=taps[0].dtype)
    return merge(coefficients[0], taps[0], filtered, bias, dtype=x.dtype)[..., 0, :]


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

    `shifted` and `chunked` are as in `forward`.
    """
    form = on_cpu() if shifted is None else shifted

    def add(total: Taps, chunk: tuple[jax.Array, jax.Array]) -> tuple[Taps, None]:
        part = _weight_grad(*chunk, kernel_shapes, wavelet, precision, form)
        return jax.tree.map(jnp.add, total, part), None

    zeros = tuple(jnp.zeros(shape, accumulation_dtype(x.dtype)) for shape in kernel_shapes)
    zeros = vary_like((x, dy), zeros)
    return lax.scan(add, zeros, (_in_chunks(x, chunked), _in_chunks(dy, chunked)))[0]


def _weight_grad(
    x: jax.Array,
    dy: jax.Array,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
    shifted: bool,
) -> Taps:
    """The gradients of the taps from one chunk of images, in one form."""
    pads = _pads(kernel_shapes[0][0], False)
    levels = len(kernel_shapes) - 1
    of_x = _cascade(x, levels, _stored(pads, shifted), wavelet, False)
    of_dy = _cascade(dy, levels, (0, 0), wavelet, True)
    return tuple(
        _correlate(stored, grad, shape, pads, precision, shifted)
        for stored, grad, shape in zip(of_x, of_dy, kernel_shapes, strict=True)
    )


def _in_chunks(x: jax.Array, chunked: bool) -> jax.Array:
    """`x [N, ...]` as `[chunks, N / chunks, ...]`, so that a chunk's coefficients stay in cache.

    Only a single CPU has more than one chunk: there the temporaries of a whole batch are fresh
    pages in every call. A batch of symbolic size stays whole, as does one that may be sharded over
    several devices, and one on a device with enough threads for all of it.
    """
    chunks = _chunks(x.shape[0], x.nbytes) if chunked else 1
    return x.reshape(chunks, x.shape[0] // chunks, *x.shape[1:])


def _chunks(n: int, nbytes: int) -> int:
    """The number of chunks of a batch of n images."""
    if not (on_cpu() and jax.device_count() == 1 and isinstance(n, int) and n > 0):
        return 1
    # Only a chunk of a single image may exceed the size.
    most = max(1, _CHUNK_BYTES // (nbytes // n))
    return next(c for c in range(-(-n // most), n + 1) if n % c == 0)


def _pads(kernel_size: int, transpose: bool) -> Pair:
    """PyTorch's `same` padding before and after, which the transpose of an even kernel swaps."""
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    return (after, before) if transpose else (before, after)


def _cascade(
    x: jax.Array, levels: int, stored: Pair, wavelet: str, transpose: bool
) -> list[jax.Array]:
    """Each level's coefficients `[N, *size, bands, C]`, zero-padded by `stored`; x comes first."""
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
    inner: Pair,
    pads: Pair,
    wavelet: str,
    transpose: bool,
) -> jax.Array:
    """The bands, padded by `pads`, of the low band of `source`, which is padded by `inner`."""
    low = source[(slice(None), *(slice(inner[0], n - inner[1]) for n in source.shape[1:-2]), 0)]
    low = low.astype(accumulation_dtype(low.dtype))
    return _padded_bands(analysis(low, low.ndim - 2, wavelet, transpose), pads)


def _padded_bands(bands: jax.Array, pads: Pair) -> jax.Array:
    """Bands `[N, *size, bands, C]` with zeros around them."""
    return jnp.pad(bands, [(0, 0), *[pads] * (bands.ndim - 3), (0, 0), (0, 0)])


_padded = unfused(_padded_bands, static_argnames=("pads",))


@partial(unfused, static_argnames=("pads", "wavelet", "transpose", "precision", "shifted", "dtype"))
def _filter(
    stored: jax.Array,
    taps: jax.Array,
    deeper: jax.Array | None,
    bias: jax.Array | None,
    *,
    pads: Pair,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    shifted: bool,
    dtype: DTypeLike,
) -> jax.Array:
    """The depthwise convolution of one level plus, in its low band, the synthesis of the next."""
    out = _depthwise(stored, taps, pads, precision, shifted)
    ndim, size = out.ndim - 3, out.shape[1:-2]
    if bias is not None:
        out = out + bias.astype(taps.dtype)
    if deeper is None:
        return out.astype(dtype)
    bands = out.shape[-2]
    # A pad that XLA fuses with the synthesis defeats the vectoriser, so wavelet levels keep the
    # synthesis unfused and pad its result.
    merge = synthesis if bands == 1 else _synthesis
    low = merge(deeper, ndim=ndim, shape=size, wavelet=wavelet, transpose=transpose)
    out = out + jnp.pad(low[..., None, :], [(0, 0)] * (ndim + 1) + [(0, bands - 1), (0, 0)])
    return out.astype(dtype)


_synthesis = unfused(synthesis, static_argnames=("ndim", "shape", "wavelet", "transpose"))


def _depthwise(
    stored: jax.Array,
    taps: jax.Array,
    pads: Pair,
    precision: lax.Precision | None,
    shifted: bool,
) -> jax.Array:
    """The convolution of coefficients `[N, *size, bands, C]`, padded as `_stored` says."""
    ndim = stored.ndim - 3
    if shifted:
        size = tuple(n - sum(pads) for n in stored.shape[1:-2])
        windows = (
            (tap, tuple(slice(t, t + n) for t, n in zip(tap, size, strict=True)))
            for tap in product(range(taps.shape[0]), repeat=ndim)
        )
        products = (
            stored[(slice(None), *window)].astype(taps.dtype) * taps[tap] for tap, window in windows
        )
        return cast(jax.Array, sum(products))
    *kernel, bands, channels = taps.shape
    out = lax.conv_general_dilated(
        stored.reshape(*stored.shape[:-2], bands * channels).astype(taps.dtype),
        taps.reshape(*kernel, 1, bands * channels),
        window_strides=(1,) * ndim,
        padding=(pads,) * ndim,
        dimension_numbers=_LAYOUTS[ndim],
        feature_group_count=bands * channels,
        # By default tensor cores and matrix units would round float32 to fewer bits.
        precision=lax.Precision.HIGHEST if precision is None else precision,
    )
    return out.reshape(*out.shape[:-1], bands, channels)


def _correlate(
    stored: jax.Array,
    dy: jax.Array,
    shape: tuple[int, ...],
    pads: Pair,
    precision: lax.Precision | None,
    shifted: bool,
) -> jax.Array:
    """The transpose of `_depthwise` in its taps: `dW[tap] = sum_p x[p + tap - r] * dy[p]`."""
    ndim = stored.ndim - 3
    acc = accumulation_dtype(dy.dtype)
    if not shifted:
        taps = jax.ShapeDtypeStruct(shape, acc)
        pullback = jax.linear_transpose(
            lambda t: _depthwise(stored, t, pads, precision, shifted), taps
        )
        return pullback(dy.astype(acc))[0]

    def one(tap: jax.Array) -> jax.Array:
        window = lax.dynamic_slice(stored, (0, *tap, 0, 0), dy.shape).astype(acc)
        return jnp.sum(window * dy.astype(acc), axis=range(1 + ndim))

    # One tap at a time: two arrays are live, not one for every tap.
    every_tap = np.array(list(product(range(shape[0]), repeat=ndim)))
    return lax.map(one, every_tap).reshape(shape)


def _stored(pads: Pair, shifted: bool) -> Pair:
    """The padding that coefficients are stored with, which shifted products read from memory."""
    return pads if shifted else (0, 0)
