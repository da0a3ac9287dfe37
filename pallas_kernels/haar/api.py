"""PyWavelets' transforms for channels-last arrays: `dwt`, `dwt2`, `dwt3` and their cascades.

The layout of the coefficients is PyWavelets': `(cA, cD)` in 1-D, `(cA, (cH, cV, cD))` in 2-D, a
dictionary from `"aaa"` to `"ddd"` in 3-D (the letters name the axes in order), and for a cascade
`[cA_n, details_n, ..., details_1]`. Arrays are `[*batch, *spatial, C]`, batch dimensions optional.

For Haar this is PyWavelets with `mode="zero"`, odd sizes included, and synthesis is its exact
inverse. Other wavelets keep half as many coefficients as samples, as WTConv does (padding
`F / 2 - 1`, odd sizes zero-padded at the end), so they do not reconstruct the border.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.numerics import accumulator


class Implementation(StrEnum):
    """Implementations of the wavelet transforms."""

    XLA = "xla"


OPERATOR = Operator(
    name="haar",
    package="pallas_kernels.haar",
    implementations=Implementation,
    rule={"cpu": ("xla",)},
    directions=("fwd",),
)

Details2 = tuple[jax.Array, jax.Array, jax.Array]
Details3 = dict[str, jax.Array]


def dwt(
    data: jax.Array, wavelet: str = "haar", *, implementation: Choice = None
) -> tuple[jax.Array, jax.Array]:
    """One level of 1-D analysis, as `pywt.dwt`.

    Args:
        data: Signal `[*batch, L, C]`, float16, bfloat16, float32 or float64.
        wavelet: Name of a discrete wavelet.
        implementation: Filter on the implementations.

    Returns:
        `(cA, cD)`, each `[*batch, ceil(L / 2), C]` in data's dtype.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> cA, cD = dwt(jnp.array([[1.0], [3.0]]))
        >>> round(float(cA[0, 0]), 4), round(float(cD[0, 0]), 4)
        (2.8284, -1.4142)
    """
    low, high = _split(data, 1, wavelet, implementation)
    return low, high


def idwt(
    cA: jax.Array, cD: jax.Array, wavelet: str = "haar", *, implementation: Choice = None
) -> jax.Array:
    """One level of 1-D synthesis, as `pywt.idwt`: `[*batch, half, C]` to `[*batch, 2 half, C]`.

    Arguments, dtypes and errors as `dwt`.

    Example:
        >>> idwt(*dwt(jnp.ones((4, 1)))).shape
        (4, 1)
    """
    return _merge({"cA": cA, "cD": cD}, 1, wavelet, implementation)


def dwt2(
    data: jax.Array, wavelet: str = "haar", *, implementation: Choice = None
) -> tuple[jax.Array, Details2]:
    """One level of 2-D analysis, as `pywt.dwt2`.

    Args:
        data: Images `[*batch, H, W, C]`, float16, bfloat16, float32 or float64.
        wavelet: Name of a discrete wavelet.
        implementation: Filter on the implementations.

    Returns:
        `(cA, (cH, cV, cD))`, each `[*batch, ceil(H / 2), ceil(W / 2), C]` in data's dtype; cH is
        high along H, cV along W.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> cA, (cH, cV, cD) = dwt2(jnp.ones((2, 7, 9, 3)))
        >>> cA.shape
        (2, 4, 5, 3)
    """
    low, *details = _split(data, 2, wavelet, implementation)
    return low, tuple(details)


def idwt2(
    coeffs: tuple[jax.Array, Details2], wavelet: str = "haar", *, implementation: Choice = None
) -> jax.Array:
    """One level of 2-D synthesis, as `pywt.idwt2`: twice the size along H and W.

    Arguments, dtypes and errors as `dwt2`.

    Example:
        >>> idwt2(dwt2(jnp.ones((4, 6, 1)))).shape
        (4, 6, 1)
    """
    if len(coeffs) != 2 or len(coeffs[1]) != 3:
        raise ValueError(
            f"coeffs: expected (cA, (cH, cV, cD)), got {jax.tree.map(jnp.shape, coeffs)}"
        )
    low, details = coeffs
    bands = dict(zip(("cA", "cH", "cV", "cD"), (low, *details), strict=True))
    return _merge(bands, 2, wavelet, implementation)


def dwt3(data: jax.Array, wavelet: str = "haar", *, implementation: Choice = None) -> Details3:
    """One level of 3-D analysis, as `pywt.dwtn` over the three spatial axes.

    Args:
        data: Volumes `[*batch, D, H, W, C]`, float16, bfloat16, float32 or float64.
        wavelet: Name of a discrete wavelet.
        implementation: Filter on the implementations.

    Returns:
        Eight arrays of half the size by name, `"aaa"` to `"ddd"`; `"daa"` is high along D.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> sorted(dwt3(jnp.ones((2, 2, 2, 1))))
        ['aaa', 'aad', 'ada', 'add', 'daa', 'dad', 'dda', 'ddd']
    """
    return dict(zip(_BANDS3, _split(data, 3, wavelet, implementation), strict=True))


def idwt3(
    coeffs: Mapping[str, jax.Array], wavelet: str = "haar", *, implementation: Choice = None
) -> jax.Array:
    """One level of 3-D synthesis, as `pywt.idwtn`: twice the size along D, H and W.

    Arguments, dtypes and errors as `dwt3`.

    Example:
        >>> idwt3(dwt3(jnp.ones((2, 4, 6, 1)))).shape
        (2, 4, 6, 1)
    """
    if set(coeffs) != set(_BANDS3):
        raise ValueError(f"coeffs: expected the bands {_BANDS3}, got {sorted(coeffs)}")
    return _merge({name: coeffs[name] for name in _BANDS3}, 3, wavelet, implementation)


def wavedec(
    data: jax.Array, wavelet: str = "haar", level: int = 1, *, implementation: Choice = None
) -> list[jax.Array]:
    """1-D analysis cascade, as `pywt.wavedec`: `[cA_n, cD_n, ..., cD_1]`.

    Args:
        data: Signal `[*batch, L, C]`.
        wavelet: Name of a discrete wavelet.
        level: Number of levels, any; a signal of one sample is padded and split on.
        implementation: Filter on the implementations.

    Returns:
        The coarsest approximation, then the details from coarse to fine.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> [c.shape for c in wavedec(jnp.ones((10, 1)), level=2)]
        [(3, 1), (3, 1), (5, 1)]
    """
    split = partial(dwt, wavelet=wavelet, implementation=implementation)
    return _cascade(data, 1, wavelet, level, split)


def wavedec2(
    data: jax.Array, wavelet: str = "haar", level: int = 1, *, implementation: Choice = None
) -> list[jax.Array | Details2]:
    """2-D analysis cascade, as `pywt.wavedec2`: `[cA_n, (cH_n, cV_n, cD_n), ...]`.

    Arguments, returns and errors as `wavedec`, for images `[*batch, H, W, C]`.

    Example:
        >>> wavedec2(jnp.ones((1, 8, 8, 2)), level=3)[0].shape
        (1, 1, 1, 2)
    """
    split = partial(dwt2, wavelet=wavelet, implementation=implementation)
    return _cascade(data, 2, wavelet, level, split)


def wavedec3(
    data: jax.Array, wavelet: str = "haar", level: int = 1, *, implementation: Choice = None
) -> list[jax.Array | Details3]:
    """3-D analysis cascade, as `pywt.wavedecn`: `[cA_n, {"aad": ..., ...}, ...]`.

    Arguments, returns and errors as `wavedec`, for volumes `[*batch, D, H, W, C]`.

    Example:
        >>> len(wavedec3(jnp.ones((4, 4, 4, 1)), level=2)[1])
        7
    """

    def split(low: jax.Array) -> tuple[jax.Array, Details3]:
        bands = dwt3(low, wavelet, implementation=implementation)
        return bands.pop("aaa"), bands

    return _cascade(data, 3, wavelet, level, split)


def waverec(
    coeffs: Sequence[jax.Array],
    wavelet: str = "haar",
    *,
    shape: Sequence[int] | None = None,
    implementation: Choice = None,
) -> jax.Array:
    """1-D synthesis cascade, as `pywt.waverec`: the inverse of `wavedec`.

    Args:
        coeffs: `[cA_n, cD_n, ..., cD_1]`.
        wavelet: Name of a discrete wavelet.
        shape: Spatial size of the signal, `(L,)`, to undo the padding of an odd one; `None`
            returns an even size, as PyWavelets does.
        implementation: Filter on the implementations.

    Returns:
        Signal `[*batch, L, C]`.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> waverec(wavedec(jnp.ones((7, 1)), level=2), shape=(7,)).shape
        (7, 1)
    """
    merge = partial(idwt, wavelet=wavelet, implementation=implementation)
    return _rebuild(coeffs, 1, wavelet, shape, merge)


def waverec2(
    coeffs: Sequence[jax.Array | Details2],
    wavelet: str = "haar",
    *,
    shape: Sequence[int] | None = None,
    implementation: Choice = None,
) -> jax.Array:
    """2-D synthesis cascade, as `pywt.waverec2`: the inverse of `wavedec2`.

    Arguments and errors as `waverec`; `shape` is `(H, W)`.

    Example:
        >>> x = jnp.arange(35.0).reshape(5, 7, 1)
        >>> bool(jnp.allclose(waverec2(wavedec2(x, level=2), shape=(5, 7)), x, atol=1e-4))
        True
    """

    def merge(low: jax.Array, details: Details2) -> jax.Array:
        return idwt2((low, details), wavelet, implementation=implementation)

    return _rebuild(coeffs, 2, wavelet, shape, merge)


def waverec3(
    coeffs: Sequence[jax.Array | Mapping[str, jax.Array]],
    wavelet: str = "haar",
    *,
    shape: Sequence[int] | None = None,
    implementation: Choice = None,
) -> jax.Array:
    """3-D synthesis cascade, as `pywt.waverecn`: the inverse of `wavedec3`.

    Arguments and errors as `waverec`; `shape` is `(D, H, W)`.

    Example:
        >>> waverec3(wavedec3(jnp.ones((3, 4, 5, 1)), level=2), shape=(3, 4, 5)).shape
        (3, 4, 5, 1)
    """

    def merge(low: jax.Array, details: Mapping[str, jax.Array]) -> jax.Array:
        return idwt3({"aaa": low, **details}, wavelet, implementation=implementation)

    return _rebuild(coeffs, 3, wavelet, shape, merge)


# Subband s is high along axis a where bit a of s is set.
_BANDS3 = ["".join("ad"[bit] for bit in reversed(bits)) for bits in product((0, 1), repeat=3)]


def _split(data: jax.Array, ndim: int, wavelet: str, implementation: Choice) -> list[jax.Array]:
    """Validates, picks, and analyses one level into its 2**ndim bands."""
    x = _checked(data, "data", ndim)
    filter_bank(wavelet)
    module = _implementation(x, implementation)
    batch, spatial, channels = x.shape[: -1 - ndim], x.shape[-1 - ndim : -1], x.shape[-1]
    images = x.reshape(math.prod(batch), *spatial, channels).astype(accumulator(x.dtype))
    out = module.analysis(images, ndim, wavelet).astype(x.dtype)
    out = out.reshape(*batch, *out.shape[1:])
    return [out[..., s, :] for s in range(2**ndim)]


def _merge(
    bands: Mapping[str, jax.Array], ndim: int, wavelet: str, implementation: Choice
) -> jax.Array:
    """Validates, picks, and synthesises one level from its 2**ndim bands."""
    arrays = [_checked(band, f"coeffs ({name})", ndim) for name, band in bands.items()]
    first = arrays[0].shape
    if any(band.shape != first for band in arrays):
        shapes = {name: band.shape for name, band in zip(bands, arrays, strict=True)}
        raise ValueError(f"coeffs: expected bands of one shape, got {shapes}")
    filter_bank(wavelet)
    module = _implementation(arrays[0], implementation)
    batch, half = first[: -1 - ndim], first[-1 - ndim : -1]
    stacked = jnp.stack(arrays, axis=-2)
    stacked = stacked.reshape(math.prod(batch), *stacked.shape[len(batch) :])
    shape = tuple(2 * n for n in half)
    out = module.synthesis(stacked.astype(accumulator(stacked.dtype)), ndim, shape, wavelet)
    return out.reshape(*batch, *out.shape[1:]).astype(stacked.dtype)


def _cascade(
    data: jax.Array,
    ndim: int,
    wavelet: str,
    level: int,
    split: Callable[[jax.Array], tuple[jax.Array, Any]],
) -> list[Any]:
    """Splits the low band `level` times; zero levels are validated alike."""
    low, details = _checked(data, "data", ndim), []
    filter_bank(wavelet)
    if not isinstance(level, int) or level < 0:
        raise ValueError(f"level={level!r}: expected an integer >= 0")
    for _ in range(level):
        low, high = split(low)
        details.append(high)
    return [low, *reversed(details)]


def _rebuild(
    coeffs: Sequence[Any],
    ndim: int,
    wavelet: str,
    shape: Sequence[int] | None,
    merge: Callable[[jax.Array, Any], jax.Array],
) -> jax.Array:
    """Merges from coarse to fine, each result cropped to the size of the next finer bands."""
    if len(coeffs) == 0:
        raise ValueError("coeffs is empty: expected [cA_n, details_n, ..., details_1]")
    filter_bank(wavelet)
    if shape is not None:
        shape = _checked_shape(shape, ndim)
    low, *details = coeffs
    low = _checked(low, "coeffs[0]", ndim)
    for i, high in enumerate(details, start=1):
        if i > 1:
            # The size of this level's bands, before the level below was padded.
            first = jax.tree.leaves(high)[0]
            low = _cropped(low, f"coeffs[{i}]", first.shape[-1 - ndim : -1])
        low = merge(low, high)
    if shape is None:
        return low
    if not details and shape != low.shape[-1 - ndim : -1]:
        raise ValueError(f"shape={shape}: coeffs has no level, and a signal {low.shape}")
    return _cropped(low, f"shape={shape}", shape)


def _cropped(x: jax.Array, source: str, size: tuple[int, ...]) -> jax.Array:
    """Drops the padding of odd sizes: at most one sample an axis."""
    ndim = len(size)
    have = x.shape[-1 - ndim : -1]
    if any(not m - 1 <= n <= m for n, m in zip(size, have, strict=True)):
        raise ValueError(
            f"{source}: expected spatial size {have}, or one less along any axis, got {size}"
        )
    return x[(..., *(slice(n) for n in size), slice(None))]


def _checked_shape(shape: Sequence[int], ndim: int) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        sizes = ()
    if len(sizes) != ndim:
        raise ValueError(f"shape={shape!r}: expected {ndim} integers, the signal's spatial size")
    return sizes


def _checked(value: ArrayLike, name: str, ndim: int) -> jax.Array:
    x = jnp.asarray(value)
    if x.ndim < ndim + 1:
        axes = ("L", "H, W", "D, H, W")[ndim - 1]
        raise ValueError(f"{name}: expected an array [*batch, {axes}, C], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: expected a floating-point array, got {x.dtype}")
    return x


def _implementation(x: jax.Array, implementation: Choice) -> ModuleType:
    name = OPERATOR.pick("fwd", implementation, jax.default_backend(), x)
    return OPERATOR.module(name)
