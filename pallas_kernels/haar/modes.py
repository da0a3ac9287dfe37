"""PyWavelets' modes, which say how a signal goes on beyond its ends, by padding.

WTConv's transform keeps coefficients `0 ... ceil(n / 2) - 1`, of which number i reads F samples,
from `2 i - (F / 2 - 1)` on. Those of PyWavelets begin `F / 2 - 1` samples further to the left, and
there are more of them; with "periodization" they are WTConv's, around a circle. Both are thus among
WTConv's coefficients of a signal that was extended first.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.haar.filters import IS_HAAR

Mode = Literal[
    "zero", "constant", "symmetric", "reflect", "periodic", "antireflect", "periodization"
]
"""The modes of PyWavelets that padding gives."""


class _Pad(TypedDict, total=False):
    """Keywords of `jax.numpy.pad`."""

    mode: str
    reflect_type: str


_PADS: dict[Mode, _Pad] = {
    "zero": {"mode": "constant"},
    "constant": {"mode": "edge"},
    "symmetric": {"mode": "symmetric"},
    "reflect": {"mode": "reflect"},
    "periodic": {"mode": "wrap"},
    "antireflect": {"mode": "reflect", "reflect_type": "odd"},
    # Of an even number of samples, see `extended`.
    "periodization": {"mode": "wrap"},
}


def check_mode(mode: object) -> None:
    """Raises ValueError where a mode is neither None nor one of `Mode`.

    Example:
        >>> check_mode("symmetric")
    """
    if mode is not None and mode not in get_args(Mode):
        raise ValueError(
            f"mode={mode!r}: expected None, which is WTConv's, or one of PyWavelets' modes "
            f"{', '.join(get_args(Mode))}"
        )


def is_none(mode: Mode, wavelet: str, sizes: Sequence[int], levels: int) -> bool:
    """Whether a mode is the same as None: Haar's filters cross the end of odd sizes alone.

    Args:
        mode: The mode.
        wavelet: Name of the wavelet, in lower case.
        sizes: The spatial size of the signal.
        levels: Number of levels.

    Example:
        >>> is_none("symmetric", "haar", (8, 12), 2), is_none("symmetric", "haar", (8, 6), 2)
        (True, False)
    """
    even = mode == "zero" or all(n % 2**levels == 0 for n in sizes)
    return wavelet in IS_HAAR and even


def coefficients(size: int, mode: Mode, taps: int) -> int:
    """The number of coefficients that PyWavelets has of a signal.

    Args:
        size: The number of samples.
        mode: How the signal goes on.
        taps: The length F of the wavelet's filters.

    Example:
        >>> coefficients(8, "zero", 4), coefficients(8, "periodization", 4)
        (5, 4)
    """
    return (size + (1 if mode == "periodization" else taps - 1)) // 2


def samples(half: int, mode: Mode, taps: int) -> int:
    """The number of samples that PyWavelets makes of so many coefficients.

    Example:
        >>> samples(5, "zero", 4), samples(4, "periodization", 4)
        (8, 8)
    """
    return 2 * half - (0 if mode == "periodization" else taps - 2)


def extended(x: jax.Array, mode: Mode, taps: int) -> jax.Array:
    """A signal whose coefficients by WTConv's transform hold PyWavelets' of `x`, see `kept`.

    Args:
        x: Signal `[N, *spatial, C]`.
        mode: How it goes on.
        taps: The length F of the wavelet's filters.

    Returns:
        A longer signal along each spatial axis.

    Example:
        >>> extended(jnp.arange(1.0, 4.0).reshape(1, 3, 1), "symmetric", 2).ravel().tolist()
        [1.0, 2.0, 3.0, 3.0]
    """
    before = 2 * _margin(taps) + _shift(mode, taps)
    if mode == "periodization":
        x = jnp.pad(x, [(0, 0), *((0, n % 2) for n in x.shape[1:-1]), (0, 0)], mode="edge")
    ends = [
        2 * (coefficients(n, mode, taps) + _margin(taps)) + taps // 2 - 1 for n in x.shape[1:-1]
    ]
    pads = [(before, end - before - n) for end, n in zip(ends, x.shape[1:-1], strict=True)]
    return jnp.pad(x, [(0, 0), *pads, (0, 0)], **_PADS[mode])


def kept(band: jax.Array, sizes: tuple[int, ...], mode: Mode, taps: int) -> jax.Array:
    """PyWavelets' coefficients of a signal of these sizes, in a band of the extended one."""
    start = _margin(taps)
    ends = (start + coefficients(n, mode, taps) for n in sizes)
    return band[(slice(None), *(slice(start, end) for end in ends))]


def wrapped(band: jax.Array, mode: Mode, taps: int) -> jax.Array:
    """A band of coefficients as WTConv's synthesis needs it: with "periodization" a circle."""
    if mode != "periodization":
        return band
    margin = _margin(taps)
    pads = [(0, 0), *((margin, margin) for _ in band.shape[1:-1]), (0, 0)]
    return jnp.pad(band, pads, mode="wrap")


def cropped(x: jax.Array, halves: tuple[int, ...], mode: Mode, taps: int) -> jax.Array:
    """PyWavelets' signal of so many coefficients, in the synthesis of the `wrapped` bands."""
    start = 2 * _margin(taps) if mode == "periodization" else _shift(mode, taps)
    ends = (start + samples(half, mode, taps) for half in halves)
    return x[(slice(None), *(slice(start, end) for end in ends))]


def _margin(taps: int) -> int:
    """Coefficients at an end of WTConv's that read beyond it, and are dropped."""
    return taps // 4


def _shift(mode: Mode, taps: int) -> int:
    """Samples that PyWavelets' first coefficient lies to the left of WTConv's."""
    return 0 if mode == "periodization" else taps // 2 - 1
