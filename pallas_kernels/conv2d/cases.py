"""The correctness cases of the dense convolution, shared by the tests of every implementation.

Imports NumPy and the oracle alone. A case says what to compute, and what the oracle expects;
`inputs` draws the numbers.
"""

import zlib
from itertools import product
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.conformance import rounded
from pallas_kernels.common.types import Keywords
from pallas_kernels.oracle import Array, conv2d, conv2d_vjp
from pallas_kernels.oracle.conv2d import Padding


class Case(NamedTuple):
    """One call: `n` images of `h` x `w` and `c` channels, `nf` filters of `hf` x `wf` taps."""

    n: int
    h: int
    w: int
    c: int
    hf: int
    wf: int
    nf: int
    stride: int | tuple[int, int] = 1
    padding: Padding = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = False
    activation: str | None = None
    layout: str = "nhwc_hwcf"
    dtype: str = "float32"
    out_dtype: str | None = None
    upsample: int = 1

    @property
    def name(self) -> str:
        """A short name for test ids: the sizes, then what is not its default.

        Example:
            >>> Case(2, 6, 5, 4, 3, 2, 8, padding="SAME").name
            '2x6x5x4-3x2x8-SAME'
        """
        sizes = [
            "x".join(map(str, (self.n, self.h, self.w, self.c))),
            "x".join(map(str, (self.hf, self.wf, self.nf))),
        ]
        rest = zip(self[7:], self._fields[7:], strict=True)
        other = [
            f"{field}{value}" if not isinstance(value, str) else value
            for value, field in rest
            if value != self._field_defaults[field]
        ]
        return "-".join(sizes + other).replace(" ", "")

    @property
    def arguments(self) -> Keywords:
        """Keywords of the operator and of the oracle, but for the bias."""
        names = ("stride", "padding", "dilation", "groups", "activation", "layout", "upsample")
        return {name: getattr(self, name) for name in names}

    def drawn(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """Returns x, w, the bias and dy, rounded to their dtypes; the bias to no less than float32.

        Example:
            >>> x, w, bias, dy = Case(2, 6, 5, 4, 3, 2, 8, bias=True, dtype="float16").drawn()
            >>> x.dtype, bias.dtype, dy.dtype
            (dtype('float16'), dtype('float32'), dtype('float16'))
        """
        x, w, bias, dy = inputs(self)
        if bias is not None:
            bias = rounded(bias, "float64" if self.dtype == "float64" else "float32")
        dy = rounded(dy, self.out_dtype or self.dtype)
        return rounded(x, self.dtype), rounded(w, self.dtype), bias, dy

    def expected(self) -> dict[str, Array]:
        """Returns the oracle's "y" and the gradients "dx", "dw" and, where there is one, "dbias".

        They are those of the numbers that the case's dtypes can hold.

        Example:
            >>> sorted(Case(2, 6, 5, 4, 3, 2, 8).expected())
            ['dw', 'dx', 'y']
        """
        x, w, drawn_bias, dy = self.drawn()
        x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
        bias = None if drawn_bias is None else drawn_bias.astype(np.float64)
        y = conv2d(x, w, bias=bias, **self.arguments)
        dx, dw, dbias = conv2d_vjp(x, w, dy, bias=bias, **self.arguments)
        return {"y": y, "dx": dx, "dw": dw} | ({} if bias is None else {"dbias": dbias})

    def tolerance(self, name: str) -> float:
        """Returns the error of any result that rounding may cause.

        Example:
            >>> Case(2, 6, 5, 4, 3, 2, 8).tolerance("y")
            1e-05
        """
        return {"float32": 1e-5, "float64": 1e-12}[self.dtype]


_PUBLISHED = (
    (1, 5, 5, 10, 2, 2, 2, 2),
    (2, 5, 5, 3, 2, 2, 1, 1),
    (4, 5, 5, 10, 2, 2, 2, 1),
    (1, 5, 5, 10, 2, 2, 16, 1),
    (1, 5, 5, 4, 2, 2, 2, 1),
    (4, 5, 5, 10, 2, 2, 2, 3),
    (4, 5, 5, 10, 2, 2, 16, 2),
    (2, 5, 5, 1, 2, 2, 1, 3),
    (1, 5, 5, 1, 3, 3, 1, 1),
    # Rectangular, where an exchange of H and W shows.
    (2, 6, 5, 4, 3, 2, 8, 1),
    (1, 17, 31, 7, 1, 5, 9, 2),
)
_GRID = tuple(
    (n, 5, 5, c, 2, 2, nf, stride)
    for n, c, nf, stride in product((1, 2, 4), (1, 3, 10), (1, 2, 8), (1, 2, 3))
)
TABLE: tuple[Case, ...] = tuple(
    Case(*sizes, layout=layout, dtype="float16", out_dtype="float32")
    for sizes, layout in product(_PUBLISHED + _GRID, ("nhwc_hwcf", "nchw_fchw"))
)
"""Small images, filters and strides in each combination and layout; float16 in, float32 out."""

HARD: tuple[Case, ...] = (
    Case(2, 7, 9, 3, 3, 3, 4, padding="SAME", bias=True, activation="relu"),
    Case(2, 8, 6, 3, 4, 3, 5, (2, 1), "SAME", bias=True, layout="nchw_fchw"),
    Case(1, 9, 7, 4, 3, 5, 6, 2, "reflect", bias=True, activation="gelu"),
    Case(2, 6, 9, 2, 2, 3, 3, padding="reflect", activation="relu", layout="nchw_fchw"),
    Case(1, 11, 8, 3, 3, 2, 4, (1, 3), ((0, 2), (3, 1)), (2, 3), bias=True),
    Case(2, 5, 6, 6, 3, 3, 9, padding=1, groups=3, bias=True, activation="gelu"),
    Case(1, 6, 5, 4, 3, 2, 4, 2, (1, 0), 1, 4, layout="nchw_fchw"),
    Case(2, 9, 9, 5, 3, 3, 7, 2, "reflect", 2, dtype="bfloat16", bias=True, activation="relu"),
    Case(1, 7, 6, 8, 3, 3, 6, padding=1, dtype="float16", bias=True, activation="gelu"),
    Case(2, 6, 7, 4, 2, 3, 3, padding="SAME", dtype="bfloat16", out_dtype="float32"),
    # Pixels that no window reads; taps that read nothing but padding; one pixel, one tap.
    Case(1, 8, 10, 2, 2, 2, 3, 3, dtype="float64", bias=True, activation="gelu"),
    Case(1, 2, 3, 2, 5, 5, 3, padding=4, layout="nchw_fchw", activation="relu"),
    Case(3, 1, 1, 17, 1, 1, 33, bias=True),
    Case(0, 4, 4, 2, 3, 3, 2, padding=1, bias=True),
    # Less is mirrored than keeps the size, and on the other axis more.
    Case(1, 8, 6, 2, 9, 3, 3, padding=("reflect", ((1, 1), (4, 5))), activation="relu"),
    # Upsampled, with edges repeated.
    Case(2, 4, 5, 3, 3, 3, 4, padding="reflect", bias=True, activation="gelu", upsample=2),
)
"""The cases that the table lacks: padding, dilation, groups, epilogues, other dtypes, edges."""

UPSAMPLED: tuple[Case, ...] = (
    # Phases of unequal sizes; a single output, of no second phase; more mirrored than an edge.
    Case(1, 5, 4, 4, 4, 3, 6, 1, ((2, 0), (1, 3)), 1, 2, True, layout="nchw_fchw", upsample=2),
    Case(2, 2, 3, 2, 4, 2, 3, padding="VALID", dtype="float16", upsample=2),
    Case(1, 4, 4, 2, 3, 5, 3, padding="reflect", bias=True, dtype="bfloat16", upsample=2),
    # One phase, of an even stride; three samples on; taps that are two, then one sample apart.
    Case(1, 5, 6, 2, 3, 3, 3, 2, "SAME", bias=True, activation="relu", upsample=2),
    Case(1, 6, 7, 2, 2, 3, 3, (3, 1), ("reflect", ((0, 1), (1, 0))), (1, 3), upsample=2),
    Case(1, 6, 5, 2, 3, 3, 2, (1, 2), 2, (2, 1), dtype="float64", upsample=2),
)
"""More cases of upsampled images, which only widen what `HARD` has."""

CASES = TABLE[: 2 * len(_PUBLISHED)] + HARD
"""The cases of the `check` commands: one of every sort; the rest of the table only widens it."""


def inputs(case: Case) -> tuple[Array, Array, Array | None, Array]:
    """Draws x, w, the bias and dy of a case, the same ones every time.

    Args:
        case: The case to draw for.

    Returns:
        `(x, w, bias, dy)` in float64 and the case's layout, the bias None where it has none; w is
        scaled so that the output is of the size of x.

    Example:
        >>> x, w, bias, dy = inputs(Case(2, 6, 5, 4, 3, 2, 8))
        >>> x.shape, w.shape, bias, dy.shape
        ((2, 6, 5, 4), (3, 2, 4, 8), None, (2, 4, 4, 8))
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    each = case.c // case.groups
    x = rng.normal(size=(case.n, case.h, case.w, case.c))
    w = rng.normal(size=(case.hf, case.wf, each, case.nf)) / np.sqrt(case.hf * case.wf * each)
    if case.layout == "nchw_fchw":
        x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
    bias = rng.normal(size=case.nf) if case.bias else None
    return x, w, bias, rng.normal(size=conv2d(x, w, **case.arguments).shape)
