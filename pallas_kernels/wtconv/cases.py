"""The correctness cases of the wavelet convolution, shared by the tests and `check` commands.

Imports NumPy and the oracle alone, so that every backend of both frameworks can read the one table.
A case says what to compute, and what the oracle expects; `inputs` draws the numbers, every scale
and bias away from its initial value.
"""

import zlib
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.conformance import rounded
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.oracle import Array, subsample, wtconv, wtconv_vjp


class Case(NamedTuple):
    """One call: x is `[*batch, *spatial, channels]`.

    Where a framework has strides, those of a `strided` x and dy skip every second sample.
    """

    spatial: tuple[int, ...]
    levels: int
    kernel_size: int
    dtype: str = "float32"
    batch: tuple[int, ...] = (2,)
    channels: int = 3
    stride: int = 1
    wavelet: str = "haar"
    bias: bool = True
    strided: bool = False

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.spatial)

    @property
    def name(self) -> str:
        """A short name for tables and test ids.

        Example:
            >>> Case((7, 9), 2, 5).name
            'b2-7x9-c3-l2-k5-float32'
        """
        parts = [
            "b" + "x".join(map(str, self.batch)),
            "x".join(map(str, self.spatial)),
            f"c{self.channels}",
            f"l{self.levels}",
            f"k{self.kernel_size}",
            self.dtype,
        ]
        parts += [f"s{self.stride}"] * (self.stride > 1)
        parts += [self.wavelet] * (self.wavelet != "haar") + ["nobias"] * (not self.bias)
        parts += ["strided"] * self.strided
        return "-".join(parts)

    def drawn(self) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """Returns x, the parameters and dy, rounded to the case's dtype.

        Example:
            >>> Case((7, 9), 1, 5, "float16").drawn()[0].dtype
            dtype('float16')
        """
        x, params, dy = inputs(self)
        params = {name: rounded(value, self.dtype) for name, value in params.items()}
        return rounded(x, self.dtype), params, rounded(dy, self.dtype)

    def expected(self) -> dict[str, Array]:
        """Returns the oracle's output "y", its gradient "dx" and the parameters' by their names.

        They are those of the numbers that the case's dtype can hold.

        Example:
            >>> sorted(Case((4,), 0, 3).expected())
            ['base_bias', 'base_kernel', 'base_scale', 'dx', 'y']
        """
        x, drawn, dy = self.drawn()
        x, dy = x.astype(np.float64), dy.astype(np.float64)
        params = {name: value.astype(np.float64) for name, value in drawn.items()}
        dec, rec = filter_bank(self.wavelet)
        y = wtconv(x, params, self.ndim, stride=self.stride, dec=dec, rec=rec)
        dx, dparams = wtconv_vjp(x, params, dy, self.ndim, stride=self.stride, dec=dec, rec=rec)
        return {"y": y, "dx": dx, **dparams}

    def tolerance(self, name: str) -> float:
        """Returns the error that rounding may cause; a weight gradient is a sum over n terms.

        Example:
            >>> Case((7, 9), 1, 5).tolerance("y")
            1e-05
        """
        if self.dtype == "float64":
            return 1e-12
        weight = name.startswith(("base", "wavelet"))
        terms = np.prod((*self.batch, *self.spatial)) if weight else 1
        return 1e-5 * max(1.0, float(terms) ** 0.5 / 300)


PAIRWISE: tuple[Case, ...] = (
    Case((16,), 0, 1, "bfloat16"),
    Case((28,), 0, 5),
    Case((5,), 0, 3),
    Case((13,), 0, 3, "float64"),
    Case((5,), 1, 7),
    Case((16,), 1, 2),
    Case((28,), 1, 2),
    Case((1,), 1, 3, "float64"),
    Case((28,), 2, 1, "float16"),
    Case((13,), 2, 7, "float64"),
    Case((1,), 2, 2, "bfloat16"),
    Case((16,), 3, 7, "float16"),
    Case((5,), 3, 5, "bfloat16"),
    Case((1,), 3, 1),
    Case((13,), 3, 1),
    Case((5,), 4, 2, "bfloat16"),
    Case((13,), 4, 3, "float16"),
    Case((28,), 4, 5, "float64"),
    Case((16,), 4, 7),
    Case((1,), 5, 5),
    Case((16,), 5, 3, "bfloat16"),
    Case((13,), 5, 2, "float16"),
    Case((28,), 5, 7),
    Case((13,), 6, 2),
    Case((5,), 6, 3, "float16"),
    Case((16,), 6, 5, "float64"),
    Case((1, 1), 0, 2, "float16"),
    Case((7, 7), 1, 1, "bfloat16"),
    Case((8, 8), 2, 5, "float64"),
    Case((28, 28), 3, 3),
    Case((1, 1), 4, 1, "float64"),
    Case((5, 18), 5, 1, "float64"),
    Case((28, 28), 6, 7, "bfloat16"),
    # In 3-D large kernels and many levels take the compiler longest: no row has both.
    Case((1, 1, 1), 0, 7, "bfloat16"),
    Case((5, 5, 5), 1, 5, "float16"),
    Case((4, 7, 2), 2, 3),
    Case((6, 6, 6), 3, 2, "float64"),
    Case((4, 4, 4), 4, 1),
    Case((4, 7, 2), 5, 1, "float64"),
    Case((1, 1, 1), 6, 1),
)
"""Every pair of (1-D to 3-D, kind of size, levels 0-6, kernel, dtype) stands in some row."""

HARD: tuple[Case, ...] = (
    # Odd only at a deeper level, where cropping goes wrong first.
    Case((28, 28), 4, 5),
    Case((14, 14), 2, 5),
    Case((14, 14), 3, 2, "bfloat16"),
    # Tiny and non-square: the kernel is larger than the image.
    Case((2, 3), 2, 3),
    Case((2, 3), 5, 5, "float16"),
    Case((7, 7), 2, 5, "bfloat16"),
    Case((17, 6), 3, 5, bias=False),
    # Batch dimensions: none, several, empty; many channels.
    Case((9, 6), 2, 3, batch=()),
    Case((6, 9), 1, 5, batch=(2, 3), channels=4),
    Case((4, 4), 1, 3, batch=(0,)),
    Case((6, 5), 1, 5, batch=(1,), channels=100),
    # Neither contiguous nor channels-last.
    Case((6, 7), 2, 3, strided=True),
    # Strides over odd sizes.
    Case((9, 12), 2, 5, stride=2),
    Case((10, 7), 1, 2, "bfloat16", stride=3),
    Case((11,), 2, 3, stride=3),
    Case((6, 5, 4), 1, 3, stride=2, batch=(1,), channels=2),
    # Other filters: both phases (half the length even and odd), orthogonal and biorthogonal.
    Case((9, 12), 2, 3, wavelet="db2"),
    Case((12, 9), 2, 5, "float64", wavelet="db3"),
    Case((8, 11), 3, 2, wavelet="bior2.2"),
    Case((13,), 2, 3, wavelet="bior1.3", stride=2),
    Case((5, 4, 6), 1, 3, wavelet="sym4", batch=(1,), channels=2),
)
"""The cases where implementations of this layer have gone wrong, by name."""

CASES = PAIRWISE + HARD


def inputs(case: Case) -> tuple[Array, dict[str, Array], Array]:
    """Draws x, the parameters and dy of a case, the same ones every time.

    Args:
        case: The case to draw for.

    Returns:
        `(x, params, dy)` in float64: x `[*batch, *spatial, C]`, the parameters as
        `pallas_kernels.oracle.wtconv` takes them, and dy of the output's shape.

    Example:
        >>> x, params, dy = inputs(Case((7, 9), 1, 5, stride=2))
        >>> x.shape, params["wavelet_kernel_0"].shape, dy.shape
        ((2, 7, 9, 3), (5, 5, 4, 3), (2, 4, 5, 3))
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    taps, bands = (case.kernel_size,) * case.ndim, 2**case.ndim
    x = rng.normal(size=(*case.batch, *case.spatial, case.channels))
    params = {
        "base_kernel": rng.normal(size=(*taps, 1, case.channels)),
        "base_scale": rng.uniform(0.5, 1.5, size=case.channels),
    }
    if case.bias:
        params["base_bias"] = rng.normal(size=case.channels)
    for i in range(case.levels):
        params[f"wavelet_kernel_{i}"] = rng.normal(size=(*taps, bands, case.channels))
        params[f"wavelet_scale_{i}"] = rng.uniform(0.5, 1.5, size=(bands, case.channels))
    dy = rng.normal(size=subsample(x, case.ndim, case.stride).shape)
    return x, params, dy
