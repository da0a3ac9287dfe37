"""The description of a call that implementations, tables and the tuner get."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.common.refusals import unsupported_sizes
from pallas_kernels.common.types import Dtype, Json
from pallas_kernels.dispatch.backend import dtype_distance, size_distance


class Problem(NamedTuple):
    """A call as implementations see it; shape is `(N, H, W, C)`."""

    shape: tuple[int, ...]
    dtype: Dtype
    activation: str | None = None
    residual: bool = False

    def __str__(self) -> str:
        """The problem as errors name it."""
        added = ", a residual" if self.residual else ""
        return f"x {self.shape} {self.dtype}, activation {self.activation}{added}"

    def measured_as(self) -> "Problem":
        """The problem whose times count for this one: itself."""
        return self

    def distance(self, measured: Json) -> float:
        """The distance to a measured problem, see `dispatch.backend.Problem`.

        The activation, which costs nothing, does not count; a residual is one more read.

        Example:
            >>> problem = Problem((8, 64, 64, 32), "bfloat16", "relu")
            >>> problem.distance({"shape": [1, 64, 64, 64], "dtype": "bfloat16", "residual": True})
            2.0
        """
        reads = self.residual != measured.get("residual", self.residual)
        return (
            size_distance(self.shape, measured["shape"])
            + dtype_distance(self.dtype, measured["dtype"])
            + reads
        )

    def unsupported(self, dtypes: Sequence[str]) -> list[str]:
        """The reasons why kernels of ours refuse this problem, a phrase each.

        Args:
            dtypes: The dtypes that the kernels take.

        Example:
            >>> Problem((0, 8, 8, 4), "float64").unsupported(["float32"])
            ['float64, float32 alone', 'an empty array']
        """
        reasons = [] if self.dtype in dtypes else [f"{self.dtype}, {', '.join(dtypes)} alone"]
        reasons += unsupported_sizes(self.shape)
        if not reasons and math.prod(self.shape[1:3]) >= 1 << 30:
            reasons.append(f"images of {self.shape[1]}x{self.shape[2]} pixels, which are too many")
        return reasons
