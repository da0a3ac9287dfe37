"""The correctness cases of the pointwise MLP, shared by the tests and `check` commands.

Imports NumPy and the oracle alone. A case says what to compute, and what the oracle expects.
"""

import zlib
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.conformance import rounded
from pallas_kernels.oracle.arrays import Array
from pallas_kernels.oracle.mlp import mlp, mlp_vjp


class Case(NamedTuple):
    """One call: `rows` of `channels`, `hidden` channels inside, `features` that come out."""

    rows: int
    channels: int
    hidden: int
    features: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """A short name for tables and test ids.

        Example:
            >>> Case(5, 8, 32, 8).name
            '5x8-32-8-float32'
        """
        return f"{self.rows}x{self.channels}-{self.hidden}-{self.features}-{self.dtype}"

    def drawn(self) -> tuple[np.ndarray, ...]:
        """Returns x, both kernels, both biases and dy, rounded to the case's dtype.

        Example:
            >>> [array.shape for array in Case(5, 8, 32, 4).drawn()]
            [(5, 8), (8, 32), (32, 4), (32,), (4,), (5, 4)]
        """
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        c, h, f = self[1:4]
        shapes = (self.rows, c), (c, h), (h, f), (h,), (f,), (self.rows, f)
        # Of a size that keeps what GELU sees near 0, where it bends.
        scales = 1.0, c**-0.5, h**-0.5, 1.0, 1.0, 1.0
        return tuple(
            rounded(scale * rng.normal(size=shape), self.dtype)
            for shape, scale in zip(shapes, scales, strict=True)
        )

    def expected(self) -> dict[str, Array]:
        """Returns the oracle's "y" and the gradients of x, both kernels and both biases.

        "y_alone" is of a call that nothing differentiates, with dy as its residual.

        Example:
            >>> sorted(Case(5, 8, 32, 4).expected())
            ['dbias1', 'dbias2', 'dkernel1', 'dkernel2', 'dx', 'y', 'y_alone']
        """
        x, first, second, inner, outer, dy = (one.astype(np.float64) for one in self.drawn())
        arguments = x, (first, second), (inner, outer)
        y = mlp(*arguments)
        return {"y": y, "y_alone": y + dy} | mlp_vjp(*arguments, dy)

    def tolerance(self, name: str) -> float:
        """Returns the error that rounding may cause.

        Example:
            >>> Case(5, 8, 32, 8).tolerance("y")
            1e-05
        """
        return 1e-12 if self.dtype == "float64" else 1e-5


CASES: tuple[Case, ...] = (
    Case(150, 24, 72, 24, "bfloat16"),
    # What fills no tile and no 16 bytes; one of each; more features than channels.
    Case(67, 7, 20, 9, "float16"),
    Case(1, 1, 1, 1, "bfloat16"),
    Case(5, 8, 24, 40, "bfloat16"),
    Case(33, 12, 40, 12),
    Case(6, 5, 7, 3, "float64"),
)
"""Every dtype; sizes that fill a tile, and that do not."""
