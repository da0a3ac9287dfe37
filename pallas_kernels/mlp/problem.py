"""The description of a call that implementations, tables and the tuner get."""

import math
from typing import NamedTuple

from pallas_kernels.common.types import Dtype, Json
from pallas_kernels.dispatch.backend import dtype_distance, size_distance


class Problem(NamedTuple):
    """A call as implementations see it; shape is `(rows, C)`."""

    shape: tuple[int, ...]
    dtype: Dtype
    hidden: int
    features: int

    def __str__(self) -> str:
        """The problem as errors name it."""
        return f"x {self.shape} {self.dtype}, {self.hidden} hidden, {self.features} features"

    def measured_as(self) -> "Problem":
        """The problem whose times count for this one: itself."""
        return self

    def distance(self, measured: Json) -> float:
        """The distance to a measured problem, see `dispatch.backend.Problem`.

        Example:
            >>> Problem((64, 8), "bfloat16", 32, 8).distance(
            ...     {"shape": [64, 16], "dtype": "bfloat16", "hidden": 64, "features": 8}
            ... )
            2.0
        """
        sizes = (self.hidden, measured.get("hidden")), (self.features, measured.get("features"))
        return (
            size_distance(self.shape, measured["shape"])
            + dtype_distance(self.dtype, measured["dtype"])
            + sum(abs(math.log2(own) - math.log2(other)) for own, other in sizes if other)
        )
