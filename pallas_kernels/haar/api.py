"""PyWavelets' transforms for channels-last arrays: `dwt`, `dwt2`, `dwt3` and their cascades.

The layout of the coefficients is PyWavelets': `(cA, cD)` in 1-D, `(cA, (cH, cV, cD))` in 2-D, a
dictionary from `"aaa"` to `"ddd"` in 3-D (the letters name the axes in order), and for a cascade
`[cA_n, details_n, ..., details_1]`. Arrays are `[*batch, *spatial, C]`, batch dimensions optional;
`axis=` and `axes=` read others, such as `[N, H, W]`, at the price of a transposition.

`mode=None` is WTConv's transform: zeros follow a signal of odd size, and there are half as many
coefficients as samples. For Haar that is PyWavelets with `mode="zero"`, odd sizes included, and
synthesis is its exact inverse. Other wavelets are padded with `F / 2 - 1` zeros, so they do not
reconstruct the border. Any other mode is PyWavelets' own of that name, for every wavelet, with as
many coefficients; unless it is the same as None, it is computed a level at a time.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from functools import partial
from itertools import product
from typing import Any, SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.common import sharding
from pallas_kernels.common.arguments import (
    MOST_LEVELS,
    checked_array,
    checked_integer,
    surely,
)
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import request
from pallas_kernels.common.types import Tree
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.haar import modes, vjp
from pallas_kernels.haar.filters import Wavelet, filter_bank, wavelet_name
from pallas_kernels.haar.layout import Layout, all_but_last, checked_axes, layout_of
from pallas_kernels.haar.modes import Mode, check_mode, is_none
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
Band = ArrayLike | None
"""A subband; None stands for zeros."""
Details2 = tuple[jax.Array, jax.Array, jax.Array]
DetailsN = dict[str, jax.Array]


def dwt(
    data: jax.Array,
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axis: int = -2,
    *,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> tuple[jax.Array, jax.Array]:
    """One level of 1-D analysis, channels last, as `pywt.dwt`.

    Args:
        data: Signal `[*batch, L, C]`, float16, bfloat16, float32 or float64.
        wavelet: Name of a discrete wavelet, in any case, or a `pywt.Wavelet`.
        mode: How the signal goes on beyond its ends. None is WTConv's way, for Haar PyWavelets'
            `"zero"`; a name is PyWavelets' mode.
        axis: The axis of the samples.
        implementation: Filter on the implementations.
        out_sharding: How data, or what it is made of, is split over a mesh, see `wtconv2d`.

    Returns:
        `(cA, cD)`, each `[*batch, ceil(L / 2), C]` in data's dtype; with a mode as many as
        PyWavelets has.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> cA, cD = dwt(jnp.array([[1.0], [3.0]]))
        >>> round(float(cA[0, 0]), 4), round(float(cD[0, 0]), 4)
        (2.8284, -1.4142)
        >>> dwt(jnp.ones((2, 9)), "DB2", "symmetric", axis=-1)[0].shape
        (2, 6)
    """
    low, ((high,),) = _wavedec(data, (axis,), wavelet, 1, mode, implementation, out_sharding)
    return low, high


def idwt(
    cA: jax.Array | None,
    cD: jax.Array | None,
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axis: int = -2,
    *,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """One level of 1-D synthesis, channels last, as `pywt.idwt`: the inverse of `dwt`.

    Twice as many samples as coefficients, with a mode as many as PyWavelets makes. One of cA and
    cD may be None, which stands for zeros. Arguments, dtypes and errors as `dwt`.

    Example:
        >>> idwt(*dwt(jnp.ones((4, 1)))).shape
        (4, 1)
    """
    return _waverec(cA, [{"cD": cD}], (axis,), wavelet, mode, None, implementation, out_sharding)


def dwt2(
    data: jax.Array,
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axes: Sequence[int] = (-3, -2),
    *,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> tuple[jax.Array, Details2]:
    """One level of 2-D analysis, channels last, as `pywt.dwt2`.

    Args:
        data: Images `[*batch, H, W, C]`, float16, bfloat16, float32 or float64.
        wavelet: As `dwt` takes it.
        mode: As `dwt` takes it.
        axes: The axes of the rows and of the columns; `(1, 2)` reads images `[N, H, W]`.
        implementation: Filter on the implementations.
        out_sharding: How data, or what it is made of, is split over a mesh, see `wtconv2d`.

    Returns:
        `(cA, (cH, cV, cD))`, each `[*batch, ceil(H / 2), ceil(W / 2), C]` in data's dtype; cH is
        high along H, cV along W. With a mode they are as large as PyWavelets'.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> cA, (cH, cV, cD) = dwt2(jnp.ones((2, 7, 9, 3)))
        >>> cA.shape
        (2, 4, 5, 3)
    """
    axes = checked_axes(axes, 2)
    low, ((cH, cV, cD),) = _wavedec(data, axes, wavelet, 1, mode, implementation, out_sharding)
    return low, (cH, cV, cD)


def idwt2(
    coeffs: tuple[Band, tuple[Band, Band, Band] | None],
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axes: Sequence[int] = (-3, -2),
    *,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """One level of 2-D synthesis, channels last, as `pywt.idwt2`: the inverse of `dwt2`.

    Twice as many rows and columns as coefficients, with a mode as many as PyWavelets makes. Bands
    may be None, which stands for zeros. Arguments, dtypes and errors as `dwt2`.

    Example:
        >>> idwt2(dwt2(jnp.ones((4, 6, 1)))).shape
        (4, 6, 1)
    """
    if not isinstance(coeffs, Sequence) or len(coeffs) != 2:
        raise ValueError(f"coeffs: expected (cA, (cH, cV, cD)), got {_seen(coeffs)}")
    low, details = coeffs
    axes = checked_axes(axes, 2)
    return _waverec(
        low, [_named2(details, "coeffs")], axes, wavelet, mode, None, implementation, out_sharding
    )


def dwt3(
    data: jax.Array,
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axes: Sequence[int] = (-4, -3, -2),
    *,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> DetailsN:
    """One level of 3-D analysis, channels last, as `pywt.dwtn` over three axes.

    Args:
        data: Volumes `[*batch, D, H, W, C]`, float16, bfloat16, float32 or float64.
        wavelet: As `dwt` takes it.
        mode: As `dwt` takes it.
        axes: The three axes; `(1, 2, 3)` reads volumes `[N, D, H, W]`.
        implementation: Filter on the implementations.
        out_sharding: How data, or what it is made of, is split over a mesh, see `wtconv2d`.

    Returns:
        Eight arrays of half the size by name, `"aaa"` to `"ddd"`; `"daa"` is high along D. With a
        mode they are as large as PyWavelets'.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> sorted(dwt3(jnp.ones((2, 2, 2, 1))))
        ['aaa', 'aad', 'ada', 'add', 'daa', 'dad', 'dda', 'ddd']
    """
    axes = checked_axes(axes, 3)
    return dwtn(data, wavelet, mode, axes, implementation=implementation, out_sharding=out_sharding)


def idwt3(
    coeffs: Mapping[str, Band],
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axes: Sequence[int] = (-4, -3, -2),
    *,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """One level of 3-D synthesis, channels last, as `pywt.idwtn`: the inverse of `dwt3`.

    All eight bands are named; None stands for zeros. Arguments, dtypes and errors as `dwt3`.

    Example:
        >>> idwt3(dwt3(jnp.ones((2, 4, 6, 1)))).shape
        (2, 4, 6, 1)
    """
    bands = _named(coeffs, "coeffs", _bands(3))
    axes = checked_axes(axes, 3)
    return _waverec(
        bands.pop("aaa"), [bands], axes, wavelet, mode, None, implementation, out_sharding
    )


def dwtn(
    data: jax.Array,
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axes: Sequence[int] | None = None,
    *,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> DetailsN:
    """One level of analysis along some axes, all but the last (channels last), as `pywt.dwtn`.

    Args:
        data: Signals, float16, bfloat16, float32 or float64.
        wavelet: As `dwt` takes it.
        mode: As `dwt` takes it.
        axes: One to three axes. None is all but the last, which holds channels; PyWavelets'
            default transforms the last one too.
        implementation: Filter on the implementations.
        out_sharding: How data, or what it is made of, is split over a mesh, see `wtconv2d`.

    Returns:
        Arrays of half the size by name, `"a"` and `"d"` for each axis in order.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> {name: band.shape for name, band in dwtn(jnp.ones((5, 6)), axes=(0,)).items()}
        {'a': (3, 6), 'd': (3, 6)}
    """
    axes = all_but_last(checked_array(data, "data")) if axes is None else checked_axes(axes)
    low, (details,) = _wavedec(data, axes, wavelet, 1, mode, implementation, out_sharding)
    return dict(zip(_bands(len(axes)), (low, *details), strict=True))


def idwtn(
    coeffs: Mapping[str, Band],
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axes: Sequence[int] | None = None,
    *,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """One level of synthesis along some axes, all but the last (channels last), as `pywt.idwtn`.

    Bands that are None or missing stand for zeros. Arguments, dtypes and errors as `dwtn`, whose
    inverse it is.

    Example:
        >>> idwtn({"aa": jnp.ones((2, 3, 1)), "dd": None}).shape
        (4, 6, 1)
    """
    axes = all_but_last(coeffs) if axes is None else checked_axes(axes)
    names = _bands(len(axes))
    bands = _named(_completed(coeffs, names), "coeffs", names)
    return _waverec(
        bands.pop(names[0]), [bands], axes, wavelet, mode, None, implementation, out_sharding
    )


def wavedec(
    data: jax.Array,
    wavelet: str | Wavelet = "haar",
    level: int | None = 1,
    *,
    mode: Mode | None = None,
    axis: int = -2,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> list[jax.Array]:
    """1-D analysis cascade, channels last, as `pywt.wavedec`: `[cA_n, cD_n, ..., cD_1]`.

    Args:
        data: Signal `[*batch, L, C]`.
        wavelet: As `dwt` takes it.
        level: Number of levels, at most 63 (a signal of one sample is padded and split on). None
            is as many as `dwt_max_level` says, PyWavelets' default.
        mode: As `dwt` takes it; PyWavelets has it before `level`.
        axis: The axis of the samples.
        implementation: Filter on the implementations.
        out_sharding: How data, or what it is made of, is split over a mesh, see `wtconv2d`.

    Returns:
        The coarsest approximation, then the details from coarse to fine.

    Raises:
        ValueError: A bad argument, named.
        NotImplementedError: No allowed implementation can run here.

    Example:
        >>> [c.shape for c in wavedec(jnp.ones((10, 1)), level=2)]
        [(3, 1), (3, 1), (5, 1)]
    """
    low, details = _wavedec(data, (axis,), wavelet, level, mode, implementation, out_sharding)
    return [low, *(high for (high,) in details)]


def wavedec2(
    data: jax.Array,
    wavelet: str | Wavelet = "haar",
    level: int | None = 1,
    *,
    mode: Mode | None = None,
    axes: Sequence[int] = (-3, -2),
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> list[jax.Array | Details2]:
    """2-D analysis cascade, channels last, as `pywt.wavedec2`: `[cA_n, (cH_n, cV_n, cD_n), ...]`.

    Arguments, returns and errors as `wavedec`, for images `[*batch, H, W, C]`; `axes=(1, 2)` reads
    images `[N, H, W]`.

    Example:
        >>> wavedec2(jnp.ones((1, 8, 8, 2)), level=2)[0].shape
        (1, 2, 2, 2)
        >>> len(wavedec2(jnp.ones((4, 16, 16)), level=None, axes=(1, 2)))
        5
    """
    axes = checked_axes(axes, 2)
    low, details = _wavedec(data, axes, wavelet, level, mode, implementation, out_sharding)
    return [low, *((cH, cV, cD) for cH, cV, cD in details)]


def wavedec3(
    data: jax.Array,
    wavelet: str | Wavelet = "haar",
    level: int | None = 1,
    *,
    mode: Mode | None = None,
    axes: Sequence[int] = (-4, -3, -2),
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> list[jax.Array | DetailsN]:
    """3-D analysis cascade, channels last, as `pywt.wavedecn`: `[cA_n, {"aad": ..., ...}, ...]`.

    Arguments, returns and errors as `wavedec`, for volumes `[*batch, D, H, W, C]`.

    Example:
        >>> len(wavedec3(jnp.ones((4, 4, 4, 1)), level=2)[1])
        7
    """
    axes = checked_axes(axes, 3)
    return wavedecn(
        data,
        wavelet,
        level,
        mode=mode,
        axes=axes,
        implementation=implementation,
        out_sharding=out_sharding,
    )


def wavedecn(
    data: jax.Array,
    wavelet: str | Wavelet = "haar",
    level: int | None = 1,
    *,
    mode: Mode | None = None,
    axes: Sequence[int] | None = None,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> list[jax.Array | DetailsN]:
    """Analysis cascade along some axes, all but the last (channels last), as `pywt.wavedecn`.

    Arguments and errors as `wavedec`, `axes` as `dwtn`; returns `[cA_n, details_n, ...]`, details
    by name as those of `dwtn`.

    Example:
        >>> low, details = wavedecn(jnp.ones((4, 6, 1)))
        >>> sorted(details)
        ['ad', 'da', 'dd']
    """
    axes = all_but_last(checked_array(data, "data")) if axes is None else checked_axes(axes)
    low, details = _wavedec(data, axes, wavelet, level, mode, implementation, out_sharding)
    names = _bands(len(axes))[1:]
    return [low, *(dict(zip(names, bands, strict=True)) for bands in details)]


def waverec(
    coeffs: Sequence[Band],
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axis: int = -2,
    *,
    shape: Sequence[int] | None = None,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """1-D synthesis cascade, channels last, as `pywt.waverec`: the inverse of `wavedec`.

    Args:
        coeffs: `[cA_n, cD_n, ..., cD_1]`; None stands for zeros.
        wavelet: As `dwt` takes it.
        mode: The mode that `wavedec` had.
        axis: The axis of the samples.
        shape: Spatial size of the signal, `(L,)`, to undo the padding of an odd one; `None`
            returns an even size, as PyWavelets does.
        implementation: Filter on the implementations.
        out_sharding: How data, or what it is made of, is split over a mesh, see `wtconv2d`.

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
    return _waverec(low, bands, (axis,), wavelet, mode, shape, implementation, out_sharding)


def waverec2(
    coeffs: Sequence[Band | tuple[Band, Band, Band]],
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axes: Sequence[int] = (-3, -2),
    *,
    shape: Sequence[int] | None = None,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """2-D synthesis cascade, channels last, as `pywt.waverec2`: the inverse of `wavedec2`.

    Arguments and errors as `waverec`; `shape` is `(H, W)`.

    Example:
        >>> x = jnp.arange(35.0).reshape(5, 7, 1)
        >>> bool(jnp.allclose(waverec2(wavedec2(x, level=2), shape=(5, 7)), x, atol=1e-4))
        True
    """
    low, details = _parted(coeffs)
    bands = [_named2(high, f"coeffs[{i}]") for i, high in enumerate(details, start=1)]
    axes = checked_axes(axes, 2)
    return _waverec(low, bands, axes, wavelet, mode, shape, implementation, out_sharding)


def waverec3(
    coeffs: Sequence[Band | Mapping[str, Band]],
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axes: Sequence[int] = (-4, -3, -2),
    *,
    shape: Sequence[int] | None = None,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """3-D synthesis cascade, channels last, as `pywt.waverecn`: the inverse of `wavedec3`.

    Arguments and errors as `waverec`; `shape` is `(D, H, W)`.

    Example:
        >>> waverec3(wavedec3(jnp.ones((3, 4, 5, 1)), level=1), shape=(3, 4, 5)).shape
        (3, 4, 5, 1)
    """
    low, details = _parted(coeffs)
    names = _bands(3)[1:]
    bands = [_named(high, f"coeffs[{i}]", names) for i, high in enumerate(details, start=1)]
    axes = checked_axes(axes, 3)
    return _waverec(low, bands, axes, wavelet, mode, shape, implementation, out_sharding)


def waverecn(
    coeffs: Sequence[Band | Mapping[str, Band]],
    wavelet: str | Wavelet = "haar",
    mode: Mode | None = None,
    axes: Sequence[int] | None = None,
    *,
    shape: Sequence[int] | None = None,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """Synthesis cascade along some axes, all but the last (channels last), as `pywt.waverecn`.

    Arguments and errors as `waverec`, `axes` as `dwtn`; the inverse of `wavedecn`.

    Example:
        >>> waverecn(wavedecn(jnp.ones((4, 6, 1)))).shape
        (4, 6, 1)
    """
    low, details = _parted(coeffs)
    axes = all_but_last(coeffs) if axes is None else checked_axes(axes)
    names = _bands(len(axes))[1:]
    bands = [
        _named(_completed(high, names), f"coeffs[{i}]", names)
        for i, high in enumerate(details, start=1)
    ]
    return _waverec(low, bands, axes, wavelet, mode, shape, implementation, out_sharding)


def dwt_max_level(data_len: int, filter_len: int | str | Wavelet) -> int:
    """The number of levels that a signal is long enough for, as `pywt.dwt_max_level`.

    Args:
        data_len: Number of samples.
        filter_len: Number of the filters' taps, or the wavelet.

    Returns:
        The deepest level with a coefficient that no sample beyond the ends counts for.

    Raises:
        ValueError: A bad argument, named.

    Example:
        >>> dwt_max_level(100, "haar"), dwt_max_level(100, "db2")
        (6, 5)
    """
    size = checked_integer(data_len, "data_len", least=0)
    if not isinstance(filter_len, SupportsIndex):
        filter_len = filter_bank(filter_len)[0].shape[1]
    taps = checked_integer(filter_len, "filter_len", least=2)
    return max(0, (size // (taps - 1)).bit_length() - 1)


def _bands(ndim: int) -> list[str]:
    """The names of subbands: number s is high along axis a where bit a of s is set."""
    return ["".join("ad"[bit] for bit in reversed(bits)) for bits in product((0, 1), repeat=ndim)]


def _wavedec(
    data: ArrayLike,
    axes: tuple[int, ...],
    wavelet: str | Wavelet,
    level: int | None,
    mode: Mode | None,
    implementation: Choice,
    out_sharding: sharding.OutSharding,
) -> vjp.Coefficients:
    """Validates, picks, and analyses: the low band, and the details from coarse to fine."""
    x, layout = _checked(data, "data", axes)
    name = wavelet_name(wavelet)
    check_mode(mode)
    ndim = len(axes)
    sizes = x.shape[-1 - ndim : -1]
    if isinstance(level, str):
        raise ValueError(f"level={level!r}: expected an integer or None; a mode is mode={level!r}")
    if level is None:
        levels = dwt_max_level(min(sizes), name)
    else:
        levels = checked_integer(level, "level", least=0, most=MOST_LEVELS)
    if levels == 0:
        return layout.restored(x), ()
    if mode is None or is_none(mode, name, sizes, levels):
        stated = _stated(x, vjp.rule(sizes, levels, name), layout, out_sharding)
        bands = _analysed(x, ndim, levels, name, implementation, stated)
    else:
        # Where a signal goes on beyond its ends only one device can tell that has all of it.
        whole = vjp.rule(sizes, levels, name)._replace(cells=())
        stated = _stated(x, whole, layout, out_sharding)
        bands = _analysed_by_level(x, ndim, levels, name, mode, implementation, stated)
    return jax.tree.map(layout.restored, bands)


def _analysed(
    x: jax.Array,
    ndim: int,
    levels: int,
    wavelet: str,
    implementation: Choice,
    stated: sharding.Stated | None,
) -> vjp.Coefficients:
    plan = _plan(x, x.shape[-1 - ndim : -1], x.dtype, levels, wavelet, implementation, stated)
    return vjp.wavedec(plan, x)


def _analysed_by_level(
    x: jax.Array,
    ndim: int,
    levels: int,
    wavelet: str,
    mode: Mode,
    implementation: Choice,
    stated: sharding.Stated | None,
) -> vjp.Coefficients:
    """The cascade in one of PyWavelets' modes: each level of a signal that was extended."""
    taps, batch = filter_bank(wavelet)[0].shape[1], x.shape[: -1 - ndim]
    low = _whole(sharding.flat(x.astype(accumulation_dtype(x.dtype)), len(batch)))
    details: list[tuple[jax.Array, ...]] = []
    for _ in range(levels):
        kept = partial(modes.kept, sizes=low.shape[1:-1], mode=mode, taps=taps)
        bands = _analysed(modes.extended(low, mode, taps), ndim, 1, wavelet, implementation, stated)
        low, (high,) = jax.tree.map(kept, bands)
        details.append(high)
    return jax.tree.map(
        lambda band: sharding.unflat(band.astype(x.dtype), batch),
        (low, tuple(reversed(details))),
    )


def _waverec(
    low: Band,
    details: Sequence[Mapping[str, Band]],
    axes: tuple[int, ...],
    wavelet: str | Wavelet,
    mode: Mode | None,
    shape: Sequence[int] | None,
    implementation: Choice,
    out_sharding: sharding.OutSharding,
) -> jax.Array:
    """Validates, picks, and synthesises; each level's details by the names of its bands."""
    ndim, name = len(axes), wavelet_name(wavelet)
    check_mode(mode)
    taps = filter_bank(name)[0].shape[1]
    # Haar's synthesis is the same in all modes.
    mode = None if taps == 2 else mode
    size = None if shape is None else _checked_shape(shape, ndim)
    named = "coeffs[0]" if len(details) != 1 else "coeffs (cA)"
    present: list[tuple[jax.Array, Layout]] = []

    def checked(band: Band, source: str) -> jax.Array | None:
        if band is None:
            return None
        present.append(_checked(band, source, axes))
        return present[-1][0]

    given = checked(low, named)
    levels = [
        {key: checked(band, f"coeffs ({key})") for key, band in bands.items()} for bands in details
    ]
    if not present:
        raise ValueError("coeffs: every band is None, expected an array among them")
    layout, dtype = present[0][1], jnp.result_type(*(array for array, _ in present))
    x, bands, whole = _filled(given, levels, dtype, ndim, mode, taps)
    if not levels:
        if size not in (None, whole):
            raise ValueError(f"shape={size}: coeffs has no level, and a signal {x.shape}")
        return layout.restored(x)
    if size is None:
        size = whole
    _check_crop(whole, f"shape={size}", size)
    rule = vjp.rule(size, len(levels), name)
    stated = _stated(x, rule._replace(cells=()) if mode else rule, layout, out_sharding)
    if mode is None:
        y = _synthesised(x, bands, size, name, implementation, stated)
    else:
        y = _synthesised_by_level(x, bands, size, name, mode, implementation, stated)
    return layout.restored(y)


def _synthesised(
    low: jax.Array,
    details: vjp.Details,
    size: tuple[int, ...],
    wavelet: str,
    implementation: Choice,
    stated: sharding.Stated | None,
) -> jax.Array:
    dtype = jnp.result_type(*jax.tree.leaves((low, details)))
    plan = _plan(low, size, dtype, len(details), wavelet, implementation, stated)
    return vjp.waverec(plan, low, details)


def _synthesised_by_level(
    low: jax.Array,
    details: vjp.Details,
    size: tuple[int, ...],
    wavelet: str,
    mode: Mode,
    implementation: Choice,
    stated: sharding.Stated | None,
) -> jax.Array:
    """The inverse cascade in one of PyWavelets' modes."""
    taps, batch = filter_bank(wavelet)[0].shape[1], low.shape[: -1 - len(size)]
    dtype = jnp.result_type(*jax.tree.leaves((low, details)))
    low, details = jax.tree.map(
        lambda band: _whole(sharding.flat(band, len(batch))), (low, details)
    )
    x = low.astype(accumulation_dtype(dtype))
    for high in details:
        half = high[0].shape[1:-1]
        x = x[(slice(None), *map(slice, half))]
        bands = [modes.wrapped(band.astype(x.dtype), mode, taps) for band in (x, *high)]
        whole = tuple(2 * n for n in bands[0].shape[1:-1])
        full = _synthesised(bands[0], (tuple(bands[1:]),), whole, wavelet, implementation, stated)
        x = modes.cropped(full, half, mode, taps)
    x = x[(slice(None), *map(slice, size))].astype(dtype)
    return sharding.unflat(x, batch)


def _whole(x: jax.Array) -> jax.Array:
    """Signals `[N, *spatial, C]`, of which no Explicit axis splits any."""
    for axis in range(1, x.ndim - 1):
        x = sharding.whole(x, axis)
    return x


def _filled(
    low: jax.Array | None,
    levels: Sequence[Mapping[str, jax.Array | None]],
    dtype: jnp.dtype,
    ndim: int,
    mode: Mode | None,
    taps: int,
) -> tuple[jax.Array, vjp.Details, tuple[int, ...]]:
    """The low band, all details and the size that they make, with zeros in place of None.

    Bands of a level have one shape, that of the low band, and fit the level below them.
    """
    shape = None if low is None else low.shape
    details = []
    for i, bands in enumerate(levels, start=1):
        here = next((band.shape for band in bands.values() if band is not None), shape)
        if here is None:
            raise ValueError(f"coeffs: every band of the coarsest level is None, {list(bands)} too")
        if shape is None:
            low, shape = jnp.zeros(here, dtype), here
        elif i > 1:
            _check_crop(shape[-1 - ndim : -1], f"coeffs[{i}]", here[-1 - ndim : -1])
            shape = (*shape[: -1 - ndim], *here[-1 - ndim : -1], shape[-1])
        seen = {key: band.shape for key, band in bands.items() if band is not None}
        if any(found != shape for found in seen.values()):
            raise ValueError(
                f"coeffs: expected bands of shape {shape}, that of the low band, got {seen}"
            )
        details.append(tuple(jnp.zeros(shape, dtype) if b is None else b for b in bands.values()))
        sizes = (
            2 * n if mode is None else modes.samples(n, mode, taps) for n in shape[-1 - ndim : -1]
        )
        shape = (*shape[: -1 - ndim], *sizes, shape[-1])
    assert low is not None and shape is not None
    return low, tuple(details), shape[-1 - ndim : -1]


def _check_crop(have: tuple[int, ...], source: str, size: tuple[int, ...]) -> None:
    """Dropping the padding of odd sizes takes at most one sample an axis."""
    sizes = zip(size, have, strict=True)
    if any(surely(operator.gt, n, m) or surely(operator.lt, n, m - 1) for n, m in sizes):
        raise ValueError(
            f"{source}: expected spatial size {have}, or one less along any axis, got {size}"
        )


def _plan(
    x: jax.Array,
    size: tuple[int, ...],
    dtype: jnp.dtype,
    levels: int,
    wavelet: str,
    implementation: Choice,
    stated: sharding.Stated | None,
) -> vjp.Plan:
    """The plan for x, a signal of this size or its low band."""
    rule = vjp.rule(size, levels, wavelet)
    spread = sharding.spread(rule, [x], stated)
    (asked,) = spread.allowed(request(OPERATOR, "fwd", implementation))
    whole = math.prod(x.shape[: -1 - len(size)]), *size, x.shape[-1]
    shape = spread.shard.local(whole, rule.operands[0])
    problem = Problem(shape, dtype, len(size), levels, wavelet)
    chosen = asked.choose(problem, vjp.measurement, OPERATOR, problem)
    module = OPERATOR.module(chosen.implementation)
    return vjp.Plan(module, size, levels, wavelet, chosen.config, asked, stated)


def _stated(
    x: jax.Array, rule: sharding.Rule, layout: Layout, out_sharding: sharding.OutSharding
) -> sharding.Stated | None:
    """The sharding of signals `[*batch, *spatial, C]` that the caller has stated."""
    if out_sharding is None:
        return None
    moved = layout.moved_sharding(out_sharding, x.ndim)
    return sharding.spread(rule, [x], moved).stated


def _parted(coeffs: Sequence[Tree]) -> tuple[Tree, list[Tree]]:
    """The low band, and the details."""
    if not isinstance(coeffs, Sequence):
        raise ValueError(f"coeffs: expected [cA_n, details_n, ..., details_1], got {_seen(coeffs)}")
    if len(coeffs) == 0:
        raise ValueError("coeffs is empty: expected [cA_n, details_n, ..., details_1]")
    return coeffs[0], list(coeffs[1:])


def _named2(details: object, source: str) -> dict[str, Band]:
    details = (None, None, None) if details is None else details
    if not isinstance(details, Sequence) or len(details) != 3:
        whole = "(cA, (cH, cV, cD))" if source == "coeffs" else "(cH, cV, cD)"
        raise ValueError(f"{source}: expected {whole}, got {_seen(details)} for the details")
    return dict(zip(("cH", "cV", "cD"), details, strict=True))


def _named(details: object, source: str, names: Sequence[str]) -> dict[str, Band]:
    details = dict.fromkeys(names) if details is None else details
    if not isinstance(details, Mapping) or set(details) != set(names):
        seen = list(details) if isinstance(details, Mapping) else _seen(details)
        raise ValueError(f"{source}: expected the bands {list(names)}, got {seen}")
    return {name: details[name] for name in names}


def _completed(details: R, names: Sequence[str]) -> R | dict[str, Band]:
    """Details by name with None for those that are missing."""
    return {**dict.fromkeys(names), **details} if isinstance(details, Mapping) else details


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


def _checked(value: ArrayLike, name: str, axes: tuple[int, ...]) -> tuple[jax.Array, Layout]:
    """An array `[*batch, *spatial, C]`, and how its axes lay before."""
    x = checked_array(value, name)
    layout = layout_of(x.shape, name, axes)
    return layout.moved(x), layout
