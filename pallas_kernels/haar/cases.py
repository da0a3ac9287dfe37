"""The correctness cases of the wavelet transforms, shared by the tests of every implementation.

Imports NumPy and the oracle alone. A case says what to transform, and what the oracle expects;
`inputs` draws the numbers. Coefficients are a list: the coarsest low band, then the high bands of
each level, finest first.
"""

import zlib
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.conformance import rounded
from pallas_kernels.common.types import Tree
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.oracle import Array, wavedec, waverec


class Case(NamedTuple):
    """One cascade: the signal is `[*batch, *spatial, channels]`."""

    spatial: tuple[int, ...]
    level: int
    wavelet: str = "haar"
    dtype: str = "float32"
    batch: tuple[int, ...] = (2,)
    channels: int = 3

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.spatial)

    @property
    def name(self) -> str:
        """A short name for tables and test ids.

        Example:
            >>> Case((7, 9), 2, "db2").name
            'b2-7x9-c3-l2-db2-float32'
        """
        batch, spatial = ("x".join(map(str, sizes)) for sizes in (self.batch, self.spatial))
        return f"b{batch}-{spatial}-c{self.channels}-l{self.level}-{self.wavelet}-{self.dtype}"

    def drawn(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns the signal and the coefficients, rounded to the case's dtype.

        Example:
            >>> x, (low, *details) = Case((7, 9), 2, dtype="float16").drawn()
            >>> x.dtype, low.shape, len(details)
            (dtype('float16'), (2, 2, 3, 3), 2)
        """
        x, low, details = inputs(self)
        return rounded(x, self.dtype), [rounded(band, self.dtype) for band in (low, *details)]

    def expected(self) -> dict[str, Tree]:
        """Returns the oracle's transforms, and their gradients: each is the other's transpose.

        The coefficients are "wavedec" of the signal, and "dwaverec" for the signal as the gradient
        of what is synthesised; the signals are "waverec" of the coefficients, and "dwavedec" for
        them as the gradient of what is analysed. All are those of the numbers that the case's
        dtype can hold.

        Example:
            >>> sorted(Case((7, 9), 2).expected())
            ['dwavedec', 'dwaverec', 'wavedec', 'waverec']
        """
        x, coefficients = self.drawn()
        x, coefficients = x.astype(np.float64), [band.astype(np.float64) for band in coefficients]
        dec, rec = filter_bank(self.wavelet)
        return {
            "wavedec": _analysed(x, self, dec),
            "dwavedec": _synthesised(coefficients, self, dec),
            "waverec": _synthesised(coefficients, self, rec),
            "dwaverec": _analysed(x, self, rec),
        }

    def tolerance(self, name: str) -> float:
        """Returns the error of any result that rounding may cause.

        Example:
            >>> Case((7, 9), 2).tolerance("wavedec")
            1e-05
        """
        return {"float32": 1e-5, "float64": 1e-13}[self.dtype]


def _analysed(x: Array, case: Case, bank: Array) -> list[Array]:
    """The coefficients of a cascade with any filters."""
    levels = wavedec(x, case.ndim, case.level, bank)
    low = levels[-1][..., 0, :] if levels else x
    return [low, *(level[..., 1:, :] for level in levels)]


def _synthesised(coefficients: list[Array], case: Case, bank: Array) -> Array:
    """The transpose of `_analysed`: nothing is in the low bands of the finer levels."""
    low, *details = coefficients
    if not details:
        return low
    lows = [np.zeros_like(high[..., 0, :]) for high in details[:-1]] + [low]
    levels = [
        np.concatenate([band[..., None, :], high], axis=-2)
        for band, high in zip(lows, details, strict=True)
    ]
    return waverec(levels, case.ndim, case.spatial, bank)


PAIRWISE: tuple[Case, ...] = (
    Case((1,), 0, "haar", "float64", ()),
    Case((16,), 1, "db2", batch=(2, 3)),
    Case((1,), 1, "bior2.2", "bfloat16", (2, 3)),
    Case((28,), 2, "bior2.2", batch=()),
    Case((1,), 2, "db3", "float16"),
    Case((7,), 3, "bior2.2", "bfloat16", ()),
    Case((28,), 3, "db2", "float16"),
    Case((28,), 4, "db3", batch=()),
    Case((1,), 4, "bior2.2", "float16", (2, 3)),
    Case((1,), 4, "db2", "float64"),
    Case((16,), 5, "bior2.2", batch=()),
    Case((7,), 5, "haar", "float16", (2, 3)),
    Case((28,), 5, "db3", "float64"),
    Case((16,), 6, "db2", "float16", ()),
    Case((7,), 6, "haar", "bfloat16", (2, 3)),
    Case((28,), 6, "bior2.2", "float64", (2, 3)),
    Case((1,), 6, "db3", "float64", ()),
    Case((7, 7), 0, "bior2.2"),
    Case((28, 28), 1, "haar", "float16", ()),
    Case((7, 7), 2, "db2", "float64", (2, 3)),
    Case((8, 8), 3, "db3", "float64"),
    Case((7, 7), 4, "haar", "bfloat16"),
    Case((2, 3), 5, "db2", "bfloat16"),
    Case((2, 3), 6),
    Case((4, 4, 4), 0, "db2", "float16", ()),
    Case((6, 6, 6), 0, "db3", "bfloat16", (2, 3)),
    Case((1, 3, 2), 0, "bior2.2"),
    Case((5, 5, 5), 1, "db3", "float64"),
    Case((4, 4, 4), 2, "haar", "bfloat16", ()),
    Case((1, 3, 2), 3, batch=(2, 3)),
    Case((4, 4, 4), 4, "haar", "float64"),
    Case((1, 3, 2), 5, "haar", "float64"),
    Case((1, 3, 2), 6, "haar", "float64"),
)
"""Every pair of (1-D to 3-D, kind of size, level 0-6, wavelet, dtype, batch) stands in some row."""

HARD: tuple[Case, ...] = (
    # Odd only at a deeper level, where cropping goes wrong first.
    Case((28, 28), 4),
    Case((14, 14), 2),
    Case((6, 6, 6), 2),
    # Tiny and non-square, an empty batch, one channel.
    Case((1, 1), 3),
    Case((2, 3), 2),
    Case((5, 18), 3, channels=1),
    Case((9, 6), 2, batch=(0,)),
    # Filters longer than the signal; half their length even and odd.
    Case((5, 6), 1, "sym4"),
    Case((7,), 2, "bior2.4", "float64"),
)
"""The cases where transforms of this kind go wrong, by name."""

CASES = PAIRWISE + HARD


def inputs(case: Case) -> tuple[Array, Array, list[Array]]:
    """Draws a signal and coefficients of a case, the same ones every time.

    Args:
        case: The case to draw for.

    Returns:
        `(x, low, details)` in float64: the signal `[*batch, *spatial, C]`, the coarsest low band
        `[*batch, *size, C]` and for each level, finest first, its high bands
        `[*batch, *size, 2**ndim - 1, C]` in the order of `pallas_kernels.oracle`.

    Example:
        >>> x, low, details = inputs(Case((7, 9), 2))
        >>> x.shape, low.shape, [d.shape for d in details]
        ((2, 7, 9, 3), (2, 2, 3, 3), [(2, 4, 5, 3, 3), (2, 2, 3, 3, 3)])
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    x = rng.normal(size=(*case.batch, *case.spatial, case.channels))
    size, details = case.spatial, []
    for _ in range(case.level):
        size = tuple((n + 1) // 2 for n in size)
        details.append(rng.normal(size=(*case.batch, *size, 2**case.ndim - 1, case.channels)))
    return x, rng.normal(size=(*case.batch, *size, case.channels)), details
