"""The wavelet convolution of large images on a CPU, in plain JAX, a strip of rows at a time.

A strip, its bands and all that is made of them stay in cache, where a whole image would travel to
memory at each stage. Only the low bands, a third of the image together, are made of whole images
beforehand. Of each level a strip reads the rows around it that the convolution needs. After the
convolution rows are apart: a row of bands becomes two rows of the level above. So nothing but the
bands of the rows around a strip is computed twice. A row of Haar's bands depends on two rows of the
image; longer wavelets are left to `xla`.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.types import Taps
from pallas_kernels.wtconv.xla_levels import (
    Pads,
    Reach,
    analyse,
    convolve,
    convolve_and_add,
    correlate,
    low_band,
    surrounded,
    synthesise,
)

_STRIP_BYTES = 1 << 20
"""The bytes of an image in a strip; with its bands and their sums they fill a core's caches."""


def forward(
    x: jax.Array, taps: Taps, bias: jax.Array | None, reaches: Sequence[Reach]
) -> jax.Array:
    """The operator with Haar's wavelet, or its transpose.

    Args:
        x: `[N, *spatial, C]`.
        taps: The kernels, the base's first.
        bias: `[C]` or None.
        reaches: The reach of each level's kernel, the base's first.
    """
    levels = len(taps) - 1
    images = _images(x, levels)
    rows, height = _division(x, levels)

    def strip(first: jax.Array) -> jax.Array:
        bands = None
        for level in range(levels, 0, -1):
            size = rows >> level, *images[level].shape[2:-1]
            low = None if bands is None else _synthesis(bands, size)
            reach = reaches[level]
            stored = _bands(images[level - 1], first >> level, size[0], reach.pads)
            bands = convolve_and_add(stored, reach.of(taps[level]), low)
        return convolve(
            _pixels(x, first, rows, reaches[0].pads),
            taps[0],
            bands,
            bias,
            reach=reaches[0],
            wavelet="haar",
            transpose=False,
            precision=None,
            shifted=True,
            dtype=x.dtype,
        )

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        # The last strip computes rows of the one before it again.
        first = jnp.minimum(i * rows, height - rows)
        return lax.dynamic_update_slice_in_dim(y, strip(first), first, axis=1)

    y = jnp.zeros((x.shape[0], height, *x.shape[2:]), x.dtype)
    y = lax.fori_loop(0, -(-height // rows), add, vary_like((x, taps, bias), y))
    return y[:, : x.shape[1]]


def weight_grad(
    x: jax.Array, dy: jax.Array, shapes: Sequence[tuple[int, ...]], reaches: Sequence[Reach]
) -> Taps:
    """The gradients of the taps with Haar's wavelet.

    Args:
        x: `[N, *spatial, C]`.
        dy: The gradient of the result, `[N, *spatial, C]`.
        shapes: The shapes of the taps, the base's first.
        reaches: The reach of each level's kernel, the base's first.
    """
    levels = len(shapes) - 1
    images, dimages = _images(x, levels), _images(dy, levels)
    rows, height = _division(x, levels)
    none = ((0, 0),) * (x.ndim - 2)

    def strip(first: jax.Array) -> Iterator[jax.Array]:
        for level, (shape, reach) in enumerate(zip(shapes, reaches, strict=True)):
            read, above = (_bands, level - 1) if level else (_pixels, 0)
            part = first >> level, rows >> level
            stored = read(images[above], *part, reach.pads)
            grad = read(dimages[above], *part, none)
            yield correlate(stored, grad, none, shape, reach, None, True)

    def add(totals: Taps, first: jax.Array) -> tuple[Taps, None]:
        return tuple(map(jnp.add, totals, strip(first))), None

    zeros = tuple(jnp.zeros(shape, accumulation_dtype(x.dtype)) for shape in shapes)
    return lax.scan(add, vary_like((x, dy), zeros), jnp.arange(0, height, rows))[0]


def _images(x: jax.Array, levels: int) -> list[jax.Array]:
    """The image and its low bands, as far as convolutions read them or are added to them."""
    images = [x]
    for _ in range(levels):
        images.append(low_band(images[-1]))
    return images


def _division(x: jax.Array, levels: int) -> tuple[int, int]:
    """The rows of a strip, and of all, in whole rows of the deepest bands."""
    unit = 2**levels
    height = -(-x.shape[1] // unit) * unit
    most = _STRIP_BYTES * x.shape[1] // x.nbytes
    return min(max(1, most // unit) * unit, height), height


def _pixels(image: jax.Array, first: jax.Array, count: int, pads: Pads) -> jax.Array:
    """Rows of an image `[N, count, *others, C]` and as many around them as `pads` says."""
    (before, after), *others = pads
    rows = _rows(image, first - before, count + before + after)
    return surrounded(rows, pads=((0, 0), *others))


def _bands(image: jax.Array, first: jax.Array, count: int, pads: Pads) -> jax.Array:
    """Rows of an image's bands `[N, count, *others, bands, C]` and as many around them."""
    (before, after), *others = pads
    rows = _rows(image, 2 * (first - before), 2 * (count + before + after))
    return analyse(rows, inner=None, pads=((0, 0), *others), wavelet="haar", transpose=False)


def _synthesis(bands: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """The low band `[N, *size, C]` of the level above."""
    return synthesise(bands, ndim=len(size), shape=size, wavelet="haar", transpose=False)


def _rows(image: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """The rows `first` to `first + count` of `image [N, H, ...]`, zeros where there are none."""
    most = min(count, image.shape[1])
    start = jnp.clip(first, 0, image.shape[1] - most)
    found = lax.dynamic_slice_in_dim(image, start, most, axis=1)
    around = [(0, 0), (count, count), *[(0, 0)] * (image.ndim - 2)]
    return lax.dynamic_slice_in_dim(jnp.pad(found, around), count + first - start, count, axis=1)
