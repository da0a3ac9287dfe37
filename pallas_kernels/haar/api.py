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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from itertools import product
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.common.arguments import (
    check_unsharded,
    checked_array,
    checked_integer,
    surely,
)
from pallas_kernels.common.measurement import request
from pallas_kernels.common.types import Tree
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.haar import vjp
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.haar.problem import Problem


class Implementation(StrEnum):
    """Implementations of the wavelet transforms."""

    MOSAIC_GPU = "mosaic_gpu"
    MOSAIC_TPU = "mosaic_tpu"
    TRITON = "triton"
    XLA = "xla"


OPERATOR = Operator(
    name="haar",
    package="pallas_kernels.haar",
    implementations=Implementation,
    rule={"tpu": ("mosaic_tpu", "xla"), "gpu": ("triton", "mosaic_gpu", "xla"), "cpu": ("xla",)},
    directions={"fwd": ("wavedec", "waverec")},
)


R = TypeVar("R")
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
    low, ((high,),) = _wavedec(data, 1, wavelet, 1, implementation)
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
    return _waverec(cA, [{"cD": cD}], 1, wavelet, None, implementation)


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
    low, ((cH, cV, cD),) = _wavedec(data, 2, wavelet, 1, implementation)
    return low, (cH, cV, cD)


def idwt2(
    coeffs: tuple[jax.Array, Details2], wavelet: str = "haar", *, implementation: Choice = None
) -> jax.Array:
    """One level of 2-D synthesis, as `pywt.idwt2`: twice the size along H and W.

    Arguments, dtypes and errors as `dwt2`.

    Example:
        >>> idwt2(dwt2(jnp.ones((4, 6, 1)))).shape
        (4, 6, 1)
    """
    if not isinstance(coeffs, Sequence) or len(coeffs) != 2:
        raise ValueError(f"coeffs: expected (cA, (cH, cV, cD)), got {_seen(coeffs)}")
    low, details = coeffs
    return _waverec(low, [_named2(details, "coeffs")], 2, wavelet, None, implementation)


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
    low, (details,) = _wavedec(data, 3, wavelet, 1, implementation)
    return dict(zip(_BANDS3, (low, *details), strict=True))


def idwt3(
    coeffs: Mapping[str, jax.Array], wavelet: str = "haar", *, implementation: Choice = None
) -> jax.Array:
    """One level of 3-D synthesis, as `pywt.idwtn`: twice the size along D, H and W.

    Arguments, dtypes and errors as `dwt3`.

    Example:
        >>> idwt3(dwt3(jnp.ones((2, 4, 6, 1)))).shape
        (2, 4, 6, 1)
    """
    bands = _named3(coeffs, "coeffs", _BANDS3)
    low = bands.pop("aaa")
    return _waverec(low, [bands], 3, wavelet, None, implementation)


def wavedec(
    data: jax.Array, wavelet: str = "haar", level: int = 1, *, implementation: Choice = None
) -> list[jax.Array]:
    """1-D analysis cascade, as `pywt.wavedec`: `[cA_n, cD_n, ..., cD_1]`.

    Args:
        data: Signal `[*batch, L, C]`.
        wavelet: Name of a discrete wavelet.
        level: Number of levels, any (a signal of one sample is padded and split on); one where
            PyWavelets' default is as many as the signal is long enough for.
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
    low, details = _wavedec(data, 1, wavelet, level, implementation)
    return [low, *(high for (high,) in details)]


def wavedec2(
    data: jax.Array, wavelet: str = "haar", level: int = 1, *, implementation: Choice = None
) -> list[jax.Array | Details2]:
    """2-D analysis cascade, as `pywt.wavedec2`: `[cA_n, (cH_n, cV_n, cD_n), ...]`.

    Arguments, returns and errors as `wavedec`, for images `[*batch, H, W, C]`.

    Example:
        >>> wavedec2(jnp.ones((1, 8, 8, 2)), level=2)[0].shape
        (1, 2, 2, 2)
    """
    low, details = _wavedec(data, 2, wavelet, level, implementation)
    return [low, *((cH, cV, cD) for cH, cV, cD in details)]


def wavedec3(
    data: jax.Array, wavelet: str = "haar", level: int = 1, *, implementation: Choice = None
) -> list[jax.Array | Details3]:
    """3-D analysis cascade, as `pywt.wavedecn`: `[cA_n, {"aad": ..., ...}, ...]`.

    Arguments, returns and errors as `wavedec`, for volumes `[*batch, D, H, W, C]`.

    Example:
        >>> len(wavedec3(jnp.ones((4, 4, 4, 1)), level=2)[1])
        7
    """
    low, details = _wavedec(data, 3, wavelet, level, implementation)
    return [low, *(dict(zip(_BANDS3[1:], bands, strict=True)) for bands in details)]


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
    low, details = _parted(coeffs)
    bands = [{"cD": high} for high in details]
    return _waverec(low, bands, 1, wavelet, shape, implementation)


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
    low, details = _parted(coeffs)
    bands = [_named2(high, f"coeffs[{i}]") for i, high in enumerate(details, start=1)]
    return _waverec(low, bands, 2, wavelet, shape, implementation)


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
        >>> waverec3(wavedec3(jnp.ones((3, 4, 5, 1)), level=1), shape=(3, 4, 5)).shape
        (3, 4, 5, 1)
    """
    low, details = _parted(coeffs)
    bands = [_named3(high, f"coeffs[{i}]", _BANDS3[1:]) for i, high in enumerate(details, start=1)]
    return _waverec(low, bands, 3, wavelet, shape, implementation)


# Subband s is high along axis a where bit a of s is set.
_BANDS3 = ["".join("ad"[bit] for bit in reversed(bits)) for bits in product((0, 1), repeat=3)]


def _wavedec(
    data: ArrayLike, ndim: int, wavelet: str, level: int, implementation: Choice
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], ...]]:
    """Validates, picks, and analyses: the low band, and the details from coarse to fine."""
    x = _checked(data, "data", ndim)
    filter_bank(wavelet)
    levels = checked_integer(level, "level", least=0)
    if levels == 0:
        return x, ()
    batch = x.shape[: -1 - ndim]
    flat = x.reshape(math.prod(batch), *x.shape[-1 - ndim :])
    plan = _plan(flat.shape, x.dtype, levels, wavelet, implementation)
    return _unflat(vjp.wavedec(plan, flat), batch)


def _waverec(
    low: ArrayLike,
    details: Sequence[Mapping[str, ArrayLike]],
    ndim: int,
    wavelet: str,
    shape: Sequence[int] | None,
    implementation: Choice,
) -> jax.Array:
    """Validates, picks, and synthesises; each level's details by the names of its bands."""
    filter_bank(wavelet)
    size = None if shape is None else _checked_shape(shape, ndim)
    named = "coeffs[0]" if len(details) != 1 else "coeffs (cA)"
    x = _checked(low, named, ndim)
    levels = [
        [_checked(band, f"coeffs ({name})", ndim) for name, band in bands.items()]
        for bands in details
    ]
    _check_levels(x.shape, details, levels, ndim)
    if not levels:
        if size not in (None, x.shape[-1 - ndim : -1]):
            raise ValueError(f"shape={size}: coeffs has no level, and a signal {x.shape}")
        return x
    whole = tuple(2 * n for n in levels[-1][0].shape[-1 - ndim : -1])
    if size is None:
        size = whole
    _check_crop(whole, f"shape={size}", size)
    batch, channels = x.shape[: -1 - ndim], x.shape[-1]
    bands = x, tuple(map(tuple, levels))
    dtype = jnp.result_type(*jax.tree.leaves(bands))
    flat_low, flat_details = jax.tree.map(
        lambda band: band.astype(dtype).reshape(math.prod(batch), *band.shape[len(batch) :]), bands
    )
    problem = (math.prod(batch), *size, channels)
    plan = _plan(problem, dtype, len(levels), wavelet, implementation)
    return _unflat(vjp.waverec(plan, flat_low, flat_details), batch)


def _check_levels(
    shape: tuple[int, ...],
    names: Sequence[Mapping[str, ArrayLike]],
    levels: Sequence[Sequence[jax.Array]],
    ndim: int,
) -> None:
    """Bands of a level have one shape, that of the low band, and fit the level below them."""
    for i, (bands, arrays) in enumerate(zip(names, levels, strict=True), start=1):
        here = arrays[0].shape
        if i > 1:
            _check_crop(shape[-1 - ndim : -1], f"coeffs[{i}]", here[-1 - ndim : -1])
            shape = (*shape[: -1 - ndim], *here[-1 - ndim : -1], shape[-1])
        if any(array.shape != shape for array in arrays):
            seen = {name: array.shape for name, array in zip(bands, arrays, strict=True)}
            raise ValueError(
                f"coeffs: expected bands of shape {shape}, that of the low band, got {seen}"
            )
        shape = (*shape[: -1 - ndim], *(2 * n for n in shape[-1 - ndim : -1]), shape[-1])


def _check_crop(have: tuple[int, ...], source: str, size: tuple[int, ...]) -> None:
    """Dropping the padding of odd sizes takes at most one sample an axis."""
    sizes = zip(size, have, strict=True)
    if any(surely(operator.gt, n, m) or surely(operator.lt, n, m - 1) for n, m in sizes):
        raise ValueError(
            f"{source}: expected spatial size {have}, or one less along any axis, got {size}"
        )


def _plan(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    levels: int,
    wavelet: str,
    implementation: Choice,
) -> vjp.Plan:
    problem = Problem(shape, dtype, len(shape) - 2, levels, wavelet)
    chosen = request(OPERATOR, "fwd", implementation).choose(
        problem, vjp.measurement, OPERATOR, problem
    )
    module = OPERATOR.module(chosen.implementation)
    return vjp.Plan(module, shape[1:-1], levels, wavelet, chosen.config)


def _unflat(bands: R, batch: tuple[int, ...]) -> R:
    return jax.tree.map(lambda band: band.reshape(*batch, *band.shape[1:]), bands)


def _parted(coeffs: Sequence[Tree]) -> tuple[Tree, list[Tree]]:
    """The low band, and the details."""
    if not isinstance(coeffs, Sequence):
        raise ValueError(f"coeffs: expected [cA_n, details_n, ..., details_1], got {_seen(coeffs)}")
    if len(coeffs) == 0:
        raise ValueError("coeffs is empty: expected [cA_n, details_n, ..., details_1]")
    return coeffs[0], list(coeffs[1:])


def _named2(details: object, source: str) -> dict[str, ArrayLike]:
    if not isinstance(details, Sequence) or len(details) != 3:
        whole = "(cA, (cH, cV, cD))" if source == "coeffs" else "(cH, cV, cD)"
        raise ValueError(f"{source}: expected {whole}, got {_seen(details)} for the details")
    return dict(zip(("cH", "cV", "cD"), details, strict=True))


def _named3(details: object, source: str, names: Sequence[str]) -> dict[str, ArrayLike]:
    if not isinstance(details, Mapping) or set(details) != set(names):
        seen = list(details) if isinstance(details, Mapping) else _seen(details)
        raise ValueError(f"{source}: expected the bands {list(names)}, got {seen}")
    return {name: details[name] for name in names}


def _seen(value: object) -> str:
    """A value as an error names it: its type, and the shapes of what it holds."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"({', '.join(map(_seen, value))})"
    return str(jnp.shape(value)) if hasattr(value, "shape") else type(value).__name__


def _checked_shape(shape: Sequence[int], ndim: int) -> tuple[int, ...]:
    sizes: tuple[Any, ...] = ()
    with suppress(TypeError):
        sizes = tuple(n if jax.export.is_symbolic_dim(n) else operator.index(n) for n in shape)
    if len(sizes) != ndim:
        raise ValueError(f"shape={shape!r}: expected {ndim} integers, the signal's spatial size")
    return sizes


def _checked(value: ArrayLike, name: str, ndim: int) -> jax.Array:
    x = checked_array(value, name)
    if x.ndim < ndim + 1:
        axes = ("L", "H, W", "D, H, W")[ndim - 1]
        raise ValueError(f"{name}: expected an array [*batch, {axes}, C], got shape {x.shape}")
    check_unsharded(x, name)
    return x
