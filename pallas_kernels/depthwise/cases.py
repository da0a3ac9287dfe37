"""The correctness cases of the depthwise convolution, shared by the tests and `check` commands.

Imports NumPy and the oracle alone. A case says what to compute, and what the oracle expects.
"""

import zlib
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.conformance import rounded
from pallas_kernels.common.types import Keywords
from pallas_kernels.oracle import Array, depthwise_conv2d, depthwise_conv2d_vjp
from pallas_kernels.oracle.conv2d import Padding


class Case(NamedTuple):
    """One call: `n` images of `h` x `w` and `c` channels, a kernel of `k` x `k` taps."""

    n: int
    h: int
    w: int
    c: int
    k: int
    dtype: str = "float32"
    stride: int | tuple[int, int] = 1
    padding: Padding = "SAME"
    dilation: int | tuple[int, int] = 1
    bias: bool = True
    width: int | None = None
    """The width of a kernel that is not square."""

    @property
    def taps(self) -> tuple[int, int]:
        """Height and width of the kernel.

        Example:
            >>> Case(1, 4, 4, 2, 3, width=5).taps
            (3, 5)
        """
        return self.k, self.width or self.k

    @property
    def name(self) -> str:
        """A short name for tables and test ids.

        Example:
            >>> Case(2, 9, 8, 4, 3, stride=2).name
            '2x9x8x4-k3x3-float32-stride2'
        """
        parts = ["x".join(map(str, self[:4])), "k" + "x".join(map(str, self.taps)), self.dtype]
        parts += [
            f"{field}{getattr(self, field)}"
            for field in ("stride", "padding", "dilation")
            if getattr(self, field) != self._field_defaults[field]
        ]
        return "-".join(parts + ["nobias"] * (not self.bias)).replace(" ", "")

    @property
    def arguments(self) -> Keywords:
        """Keywords of the operator and of the oracle, but for the bias."""
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation")}

    def drawn(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """Returns x, the kernel, the bias and dy, rounded to the case's dtype.

        Example:
            >>> x, kernel, bias, dy = Case(2, 9, 8, 4, 3, "float16", stride=2).drawn()
            >>> kernel.shape, dy.shape, dy.dtype
            ((3, 3, 1, 4), (2, 5, 4, 4), dtype('float16'))
        """
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        x = rng.normal(size=(self.n, self.h, self.w, self.c))
        kernel = rng.normal(size=(*self.taps, 1, self.c))
        bias = rng.normal(size=self.c) if self.bias else None
        dy = rng.normal(size=depthwise_conv2d(x, kernel, **self.arguments).shape)
        x, kernel, dy = (rounded(array, self.dtype) for array in (x, kernel, dy))
        return x, kernel, None if bias is None else rounded(bias, self.dtype), dy

    def expected(self) -> dict[str, Array]:
        """Returns the oracle's "y" and the gradients "dx", "dkernel" and, of a bias, "dbias".

        They are those of the numbers that the case's dtype can hold.

        Example:
            >>> sorted(Case(1, 4, 4, 2, 3, bias=False).expected())
            ['dkernel', 'dx', 'y']
        """
        x, kernel, drawn_bias, dy = self.drawn()
        x, kernel, dy = (array.astype(np.float64) for array in (x, kernel, dy))
        bias = None if drawn_bias is None else drawn_bias.astype(np.float64)
        y = depthwise_conv2d(x, kernel, bias, **self.arguments)
        dx, dkernel, dbias = depthwise_conv2d_vjp(x, kernel, dy, **self.arguments)
        found = {"y": y, "dx": dx, "dkernel": dkernel}
        return found | ({} if bias is None else {"dbias": dbias})

    def tolerance(self, name: str) -> float:
        """Returns the error that rounding may cause; these sums are too short to add to it.

        Example:
            >>> Case(2, 9, 8, 4, 3).tolerance("y")
            1e-05
        """
        return 1e-12 if self.dtype == "float64" else 1e-5


PAIRWISE: tuple[Case, ...] = (
    Case(2, 9, 8, 4, 3),
    Case(1, 7, 7, 33, 5, "bfloat16"),
    Case(2, 6, 9, 3, 7, "float16"),
    Case(1, 10, 5, 2, 9, "float64"),
    Case(1, 8, 7, 3, 4),
    Case(2, 5, 6, 2, 6, "bfloat16"),
    Case(1, 9, 9, 2, 8, "float16"),
    Case(2, 9, 10, 3, 3, "float16", stride=2),
    Case(1, 11, 8, 5, 5, stride=2),
    Case(2, 8, 8, 2, 7, "bfloat16", stride=2),
    Case(1, 12, 9, 3, 9, stride=2),
    Case(1, 7, 9, 2, 4, "float64", stride=2),
    Case(1, 9, 12, 2, 6, stride=2),
    Case(1, 10, 11, 2, 8, "bfloat16", stride=2),
)
"""Every kernel size from 3 to 9 with stride 1 and with stride 2; odd and even sizes."""

HARD: tuple[Case, ...] = (
    # Kernels larger than the image; one pixel, one channel; one tap.
    Case(2, 2, 3, 3, 9),
    Case(1, 1, 1, 1, 3, bias=False),
    Case(3, 4, 5, 130, 1),
    Case(0, 4, 4, 2, 3),
    # Padding that is none, PyTorch's of a stride, more before than after, and mirrored.
    Case(1, 8, 9, 3, 5, padding="VALID"),
    Case(1, 8, 8, 3, 3, stride=2, padding=1),
    Case(1, 5, 6, 2, 3, padding=((2, 0), (3, 1))),
    Case(2, 7, 8, 2, 5, padding="reflect"),
    # Pixels that no tap reads; a stride for each axis; dilation, with a stride too; a rectangle.
    Case(1, 8, 10, 2, 2, stride=3, padding="VALID"),
    Case(1, 9, 8, 2, 3, stride=(1, 2)),
    Case(1, 9, 11, 2, 3, "bfloat16", dilation=2),
    Case(1, 11, 12, 2, 3, stride=2, dilation=(3, 2)),
    Case(1, 6, 7, 3, 3, width=5),
    # Wider than what the kernels of GPUs multiply at once, with channels that they load in pairs.
    Case(1, 5, 66, 34, 3, "float16"),
)
"""The cases where implementations of depthwise convolutions go wrong."""

CASES = PAIRWISE + HARD
