"""The filter banks of PyWavelets' discrete wavelets, in cross-correlation order."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from pallas_kernels.common.types import Dtype
from pallas_kernels.oracle import HAAR, Array

IS_HAAR = ("haar", "db1")


def filter_bank(wavelet: str) -> tuple[Array, Array]:
    """The analysis and synthesis filters of a wavelet.

    Args:
        wavelet: Name of a discrete wavelet of PyWavelets, e.g. `"haar"`, `"db2"`, `"bior2.2"`.

    Returns:
        `(dec, rec)`, each `[2, F]` float64, low filter first, F even: analysis is
        `c_b[i] = sum_m dec[b, m] * x[2 * i + m - (F // 2 - 1)]`, synthesis adds
        `rec[b, m] * c_b[i]` at that position.

    Raises:
        ValueError: The name is not a discrete wavelet of PyWavelets.

    Example:
        >>> dec, rec = filter_bank("db2")
        >>> dec.shape
        (2, 4)
    """
    if not isinstance(wavelet, str):
        raise ValueError(f"wavelet={wavelet!r}: expected the name of a discrete wavelet")
    return (HAAR, HAAR) if wavelet in IS_HAAR else _from_pywavelets(wavelet)


def unsupported(ndim: int, dtype: Dtype, wavelet: str, dtypes: Sequence[str]) -> list[str]:
    """The reasons why kernels for images and the Haar wavelet do not take a signal.

    Args:
        ndim: Number of the signal's spatial axes.
        dtype: The signal's dtype, or its name.
        wavelet: Name of the wavelet.
        dtypes: Names of the dtypes that the kernels take.

    Returns:
        A phrase for each reason; an empty list if the kernels take the signal.

    Example:
        >>> unsupported(1, "float64", "haar", ["float32"])
        ['1-D signals, 2-D alone', 'float64, float32 alone']
    """
    reasons = []
    if ndim != 2:
        reasons.append(f"{ndim}-D signals, 2-D alone")
    if dtype not in dtypes:
        reasons.append(f"{dtype}, {', '.join(dtypes)} alone")
    if wavelet not in IS_HAAR:
        reasons.append(f"wavelet {wavelet!r}, 'haar' alone")
    return reasons


@cache
def _from_pywavelets(wavelet: str) -> tuple[Array, Array]:
    """The filters of a wavelet that is not Haar."""
    import pywt

    known = pywt.wavelist(kind="discrete")
    if wavelet not in known:
        families = [f for f in pywt.families() if any(name.startswith(f) for name in known)]
        raise ValueError(
            f"wavelet={wavelet!r} is not a discrete wavelet of PyWavelets; "
            f"families: {', '.join(families)}, e.g. 'haar', 'db2', 'sym4', 'bior2.2'"
        )
    bank = pywt.Wavelet(wavelet)
    dec = np.array([bank.dec_lo[::-1], bank.dec_hi[::-1]])
    rec = np.array([bank.rec_lo, bank.rec_hi])
    return dec, rec
