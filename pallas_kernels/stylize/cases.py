"""The correctness cases of the instance normalisation. Imports NumPy and the oracle alone."""

import math
import zlib
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.conformance import rounded
from pallas_kernels.oracle import Array, instance_norm, instance_norm_vjp

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]


class Case(NamedTuple):
    """One call: images `[*batch, h, w, c]` of normal numbers with this mean and deviation.

    With `styles` each image has its own scale and bias.
    """

    h: int
    w: int
    c: int
    batch: tuple[int, ...] = (2,)
    activation: str | None = None
    residual: bool = False
    styles: bool = False
    dtype: str = "float32"
    mean: float = 0.5
    deviation: float = 1.0

    @property
    def name(self) -> str:
        """A short name for test ids: the sizes, then what is not its default.

        Example:
            >>> Case(5, 4, 3, residual=True, mean=1e4).name
            '2x5x4x3-residual-mean10000.0'
        """
        sizes = "x".join(map(str, (*self.batch, self.h, self.w, self.c)))
        rest = zip(self[4:], self._fields[4:], strict=True)
        other = [
            field if value is True else value if isinstance(value, str) else f"{field}{value}"
            for value, field in rest
            if value != self._field_defaults[field]
        ]
        return "-".join([sizes, *other])

    def drawn(self) -> Drawn:
        """Returns x, scale, bias, the residual and dy, rounded; the parameters to float32 or more.

        Example:
            >>> x, scale, bias, residual, dy = Case(5, 4, 3, styles=True).drawn()
            >>> x.shape, scale.shape, residual
            ((2, 5, 4, 3), (2, 3), None)
        """
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        shape = *self.batch, self.h, self.w, self.c
        x = self.mean + self.deviation * rng.normal(size=shape)
        own = (*self.batch, self.c) if self.styles else (self.c,)
        # Far from their initial values, and of both signs.
        scale, bias = rng.normal(0.7, 0.5, own), rng.normal(0.2, 0.7, own)
        residual, dy = rng.normal(size=shape), rng.normal(size=shape)
        wide = "float64" if self.dtype == "float64" else "float32"
        return (
            rounded(x, self.dtype),
            rounded(scale, wide),
            rounded(bias, wide),
            rounded(residual, self.dtype) if self.residual else None,
            rounded(dy, self.dtype),
        )

    def expected(self) -> dict[str, Array]:
        """Returns the oracle's "y" and the gradients "dx", "dscale", "dbias", "dresidual".

        They are those of the numbers that the case's dtypes can hold.

        Example:
            >>> sorted(Case(5, 4, 3).expected())
            ['dbias', 'dscale', 'dx', 'y']
        """
        x, scale, bias, residual, dy = self.drawn()
        rest = {"activation": self.activation, "residual": residual}
        found = instance_norm_vjp(x, scale, bias, dy, **rest)
        want = {"y": instance_norm(x, scale, bias, **rest)}
        want |= {"dx": found.x, "dscale": found.scale, "dbias": found.bias}
        return want | ({"dresidual": found.residual} if self.residual else {})

    def tolerance(self, name: str) -> float:
        """Returns the error of a result that rounding may cause: more for longer sums.

        Example:
            >>> Case(5, 4, 3).tolerance("dscale"), round(Case(600, 600, 3).tolerance("dbias"), 7)
            (1e-05, 2.83e-05)
        """
        terms = math.prod(self.batch) * self.h * self.w if name in ("dscale", "dbias") else 1
        return {"float32": 1e-5, "float64": 1e-12}[self.dtype] * max(1, math.sqrt(terms) / 300)


PAIRWISE: tuple[Case, ...] = (
    Case(5, 7, 3, (2,), "relu", True, False, "float32"),
    Case(5, 7, 33, (), None, False, True, "bfloat16"),
    Case(5, 7, 128, (2, 3), "relu", False, False, "float16"),
    Case(5, 7, 1, (1,), None, True, False, "float64"),
    Case(16, 16, 3, (), "relu", False, True, "float64"),
    Case(16, 16, 33, (2,), None, True, False, "float16"),
    Case(16, 16, 128, (1,), "relu", True, True, "bfloat16"),
    Case(16, 16, 1, (2, 3), None, False, True, "float32"),
    Case(1, 40, 3, (2, 3), None, True, False, "bfloat16"),
    Case(1, 40, 33, (1,), "relu", False, False, "float32"),
    Case(1, 40, 128, (2,), None, False, True, "float64"),
    Case(1, 40, 1, (), "relu", True, False, "float16"),
    Case(31, 9, 3, (1,), "relu", False, True, "float16"),
    Case(31, 9, 33, (2, 3), "relu", True, True, "float64"),
    Case(31, 9, 128, (), None, True, True, "float32"),
    Case(31, 9, 1, (2,), "relu", False, False, "bfloat16"),
)
"""Every pair of (size, channels, batch, activation, residual, styles, dtype) stands in some row."""

HARD: tuple[Case, ...] = (
    # A mean of 10,000 deviations, and half of that of the other sign.
    Case(12, 11, 5, mean=1e4),
    Case(12, 11, 5, activation="relu", residual=True, mean=-5e3),
    # Neither has a deviation: the bias comes out.
    Case(1, 1, 4, activation="relu", residual=True),
    Case(6, 5, 3, activation="relu", mean=3.0, deviation=0.0),
    # Sums beyond what float16 holds.
    Case(16, 16, 8, mean=500.0, deviation=300.0, dtype="float16"),
    # One channel, many of them, an empty batch.
    Case(3, 3, 1, (1,)),
    Case(4, 4, 512, (1,), "relu"),
    Case(4, 4, 3, (0,)),
    # Two pixels differ from their mean by a deviation: almost nothing of dx is left.
    Case(1, 2, 3, dtype="float64"),
)
"""The cases where normalisations go wrong, by name."""

CASES = PAIRWISE + HARD
