"""The description of a call that implementations, tables and the tuner get."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.common.refusals import unsupported_sizes
from pallas_kernels.common.types import Dtype, Json
from pallas_kernels.dispatch.backend import size_distance
from pallas_kernels.haar.filters import unsupported


class Problem(NamedTuple):
    """A call as implementations see it; shape is that of the whole signal."""

    shape: tuple[int, ...]
    dtype: Dtype
    ndim: int
    levels: int
    wavelet: str

    def __str__(self) -> str:
        """The problem as errors name it."""
        return f"a signal {self.shape} {self.dtype}, {self.levels} levels of {self.wavelet}"

    def measured_as(self) -> "Problem":
        """The problem whose times count for this one: itself."""
        return self

    def distance(self, measured: Json) -> float:
        """The distance to a measured problem, see `dispatch.backend.Problem`.

        Example:
            >>> measured = {"shape": [8, 16, 16, 4], "dtype": "float32", "levels": 3}
            >>> Problem((2, 16, 16, 8), "float32", 2, 2, "haar").distance(measured)
            2.0
        """
        if str(self.dtype) != measured["dtype"]:
            return math.inf
        levels = measured.get("levels", self.levels)
        return size_distance(self.shape, measured["shape"]) + abs(self.levels - levels)

    def unsupported(self, dtypes: Sequence[str], max_levels: int) -> list[str]:
        """The reasons why kernels for images and the Haar wavelet refuse this problem.

        Args:
            dtypes: The dtypes that the kernels take.
            max_levels: The most levels that they take.

        Returns:
            A phrase for each reason, none where they take the problem.

        Example:
            >>> Problem((2, 8, 4), "float32", 1, 3, "haar").unsupported(["float32"], 2)
            ['1-D signals, 2-D alone', '3 levels, up to 2']
        """
        reasons = unsupported(self.ndim, self.dtype, self.wavelet, dtypes)
        if self.levels > max_levels:
            reasons.append(f"{self.levels} levels, up to {max_levels}")
        return reasons + unsupported_sizes(self.shape)
