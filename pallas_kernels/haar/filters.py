"""The filter banks of PyWavelets' discrete wavelets, in cross-correlation order."""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np

from pallas_kernels.common.types import Dtype
from pallas_kernels.oracle import HAAR, Array

IS_HAAR = ("haar", "db1")


class Wavelet(Protocol):
    """A `pywt.Wavelet`."""

    name: str
    filter_bank: tuple[Sequence[float], ...]


def wavelet_name(wavelet: str | Wavelet) -> str:
    """The name of a discrete wavelet, in lower case.

    Args:
        wavelet: Its name in PyWavelets, in any case, or a `pywt.Wavelet`.

    Returns:
        The name, e.g. `"haar"`, `"db2"`, `"bior2.2"`.

    Raises:
        ValueError: It is no discrete wavelet of PyWavelets.

    Example:
        >>> wavelet_name("DB2")
        'db2'
    """
    name = wavelet if isinstance(wavelet, str) else getattr(wavelet, "name", None)
    if not isinstance(name, str):
        raise ValueError(
            f"wavelet={wavelet!r}: expected the name of a discrete wavelet, or a pywt.Wavelet"
        )
    lower = name.lower()
    if lower not in IS_HAAR:
        _check_known(lower, name)
    if not isinstance(wavelet, str):
        _check_filters(wavelet, lower)
    return lower


def filter_bank(wavelet: str | Wavelet) -> tuple[Array, Array]:
    """The analysis and synthesis filters of a wavelet.

    Args:
        wavelet: As `wavelet_name` takes it.

    Returns:
        `(dec, rec)`, each `[2, F]` float64, low filter first, F even: analysis is
        `c_b[i] = sum_m dec[b, m] * x[2 * i + m - (F // 2 - 1)]`, synthesis adds
        `rec[b, m] * c_b[i]` at that position.

    Raises:
        ValueError: It is no discrete wavelet of PyWavelets.

    Example:
        >>> dec, rec = filter_bank("db2")
        >>> dec.shape
        (2, 4)
    """
    name = wavelet_name(wavelet)
    return (HAAR, HAAR) if name in IS_HAAR else _from_pywavelets(name)


def unsupported(
    ndim: int, dtype: Dtype, wavelet: str, dtypes: Sequence[str], axes: Sequence[int] = (2,)
) -> list[str]:
    """The reasons why kernels for the Haar wavelet do not take a signal.

    Args:
        ndim: Number of the signal's spatial axes.
        dtype: The signal's dtype, or its name.
        wavelet: Name of the wavelet.
        dtypes: Names of the dtypes that the kernels take.
        axes: Numbers of spatial axes that they take.

    Returns:
        A phrase for each reason; an empty list if the kernels take the signal.

    Example:
        >>> unsupported(1, "float64", "haar", ["float32"])
        ['1-D signals, 2-D alone', 'float64, float32 alone']
    """
    reasons = []
    if ndim not in axes:
        reasons.append(f"{ndim}-D signals, {' and '.join(f'{n}-D' for n in axes)} alone")
    if dtype not in dtypes:
        reasons.append(f"{dtype}, {', '.join(dtypes)} alone")
    if wavelet not in IS_HAAR:
        reasons.append(f"wavelet {wavelet!r}, 'haar' alone")
    return reasons


@cache
def _known() -> frozenset[str]:
    import pywt

    return frozenset(pywt.wavelist(kind="discrete"))


def _check_known(name: str, source: str) -> None:
    import pywt

    if name not in _known():
        families = [f for f in pywt.families() if any(name.startswith(f) for name in _known())]
        raise ValueError(
            f"wavelet={source!r} is not a discrete wavelet of PyWavelets; "
            f"families: {', '.join(families)}, e.g. 'haar', 'db2', 'sym4', 'bior2.2'"
        )


def _check_filters(wavelet: Wavelet, name: str) -> None:
    import pywt

    if wavelet.filter_bank != pywt.Wavelet(name).filter_bank:
        raise ValueError(
            f"wavelet: this pywt.Wavelet has the name {wavelet.name!r} and filters of its own, "
            "expected those of PyWavelets"
        )


@cache
def _from_pywavelets(name: str) -> tuple[Array, Array]:
    """The filters of a wavelet that is not Haar."""
    import pywt

    bank = pywt.Wavelet(name)
    dec = np.array([bank.dec_lo[::-1], bank.dec_hi[::-1]])
    rec = np.array([bank.rec_lo, bank.rec_hi])
    return dec, rec
