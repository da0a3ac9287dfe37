"""The correctness cases of the instance normalisation. Imports NumPy and the oracle alone."""

import math
import zlib
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.conformance import rounded
from pallas_kernels.common.types import Keywords
from pallas_kernels.oracle import (
    Array,
    conv2d_instance_norm,
    conv2d_instance_norm_vjp,
    instance_norm,
    instance_norm_vjp,
)
from pallas_kernels.oracle.conv2d import Padding

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]
ConvDrawn = tuple[np.ndarray, *Drawn]


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
        rest: Keywords = {"activation": self.activation, "residual": residual}
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
    # As many channels as TMA copies twice.
    Case(5, 3, 16, (1,), "relu"),
    # One channel, many of them, an empty batch.
    Case(3, 3, 1, (1,)),
    Case(4, 4, 512, (1,), "relu"),
    Case(4, 4, 3, (0,)),
    # Two pixels differ from their mean by a deviation: almost nothing of dx is left.
    Case(1, 2, 3, dtype="float64"),
)
"""The cases where normalisations go wrong, by name."""

CASES = PAIRWISE + HARD


class ConvCase(NamedTuple):
    """One convolution with its norm: `nf` filters of `k` x `k` taps, images `[*batch, h, w, c]`.

    With `styles` each image has its own scale and bias.
    """

    h: int
    w: int
    c: int
    k: int
    nf: int
    batch: tuple[int, ...] = (2,)
    stride: int | tuple[int, int] = 1
    padding: Padding = ("reflect", 1)
    upsample: int = 1
    activation: str | None = "relu"
    residual: bool = False
    styles: bool = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """A short name for test ids: the sizes, then what is not its default.

        Example:
            >>> ConvCase(6, 5, 3, 3, 4, upsample=2).name
            '2x6x5x3-3x4-upsample2'
        """
        sizes = "x".join(map(str, (*self.batch, self.h, self.w, self.c)))
        rest = zip(self[6:], self._fields[6:], strict=True)
        other = [
            field if value is True else f"{field}{value}"
            for value, field in rest
            if value != self._field_defaults[field]
        ]
        return "-".join([sizes, f"{self.k}x{self.nf}", *other]).replace(" ", "")

    @property
    def arguments(self) -> Keywords:
        """Keywords of the operator and of the oracle, but for the residual."""
        names = ("stride", "padding", "upsample", "activation")
        return {name: getattr(self, name) for name in names}

    def drawn(self) -> ConvDrawn:
        """Returns x, w, scale, bias, the residual and dy, rounded as those of a `Case`.

        Example:
            >>> x, w, scale, bias, residual, dy = ConvCase(6, 5, 3, 3, 4, stride=2).drawn()
            >>> w.shape, residual, dy.shape
            ((3, 3, 3, 4), None, (2, 3, 3, 4))
        """
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        x = 0.5 + rng.normal(size=(*self.batch, self.h, self.w, self.c))
        w = rng.normal(size=(self.k, self.k, self.c, self.nf)) / self.k / math.sqrt(self.c)
        own = (*self.batch, self.nf) if self.styles else (self.nf,)
        scale, bias = rng.normal(0.7, 0.5, own), rng.normal(0.2, 0.7, own)
        shape = conv2d_instance_norm(x, w, scale, bias, **self.arguments).shape
        residual, dy = rng.normal(size=shape), rng.normal(size=shape)
        wide = "float64" if self.dtype == "float64" else "float32"
        return (
            rounded(x, self.dtype),
            rounded(w, self.dtype),
            rounded(scale, wide),
            rounded(bias, wide),
            rounded(residual, self.dtype) if self.residual else None,
            rounded(dy, self.dtype),
        )

    def expected(self) -> dict[str, Array]:
        """Returns the oracle's "y" and the gradients by the arguments' names.

        Example:
            >>> sorted(ConvCase(6, 5, 3, 3, 4).expected())
            ['dbias', 'dscale', 'dw', 'dx', 'y']
        """
        x, w, scale, bias, residual, dy = self.drawn()
        rest: Keywords = {"residual": residual, **self.arguments}
        slopes = conv2d_instance_norm_vjp(x, w, scale, bias, dy, **rest)
        names = ("dx", "dw", "dscale", "dbias", "dresidual")[: 5 if self.residual else 4]
        y = conv2d_instance_norm(x, w, scale, bias, **rest)
        return {"y": y, **dict(zip(names, slopes, strict=False))}

    def tolerance(self, name: str) -> float:
        """Returns the error of any result that rounding may cause.

        Example:
            >>> ConvCase(6, 5, 3, 3, 4).tolerance("y")
            1e-05
        """
        return {"float32": 1e-5, "float64": 1e-12}[self.dtype]


CONV_CASES: tuple[ConvCase, ...] = (
    ConvCase(6, 5, 3, 3, 4, residual=True, styles=True),
    ConvCase(9, 8, 3, 3, 4, stride=2, activation=None),
    ConvCase(5, 6, 4, 3, 3, upsample=2),
    ConvCase(11, 9, 3, 9, 5, (1,), padding="reflect"),
    ConvCase(6, 7, 2, 2, 3, (), (2, 1), ((0, 1), (1, 0)), activation=None, residual=True),
    ConvCase(7, 6, 4, 3, 6, padding="SAME", dtype="bfloat16"),
    ConvCase(7, 6, 4, 3, 6, upsample=2, residual=True, dtype="float16"),
    ConvCase(8, 7, 8, 3, 8, stride=2, activation=None, dtype="bfloat16"),
    ConvCase(6, 5, 3, 3, 4, residual=True, dtype="float64"),
)
"""The convolutions of style transfer, every argument once."""
