"""The description of a call that implementations, tables and the tuner get."""

from typing import NamedTuple

from pallas_kernels.common.types import Dtype, Json
from pallas_kernels.conv2d.problem import Problem as Convolution
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.stylize.problem import Problem as Norm


class Problem(NamedTuple):
    """A call as implementations see it; shape is `(N, H, W, C)` of the images that are convolved.

    The window may upsample.
    """

    shape: tuple[int, ...]
    dtype: Dtype
    kernel_height: int
    kernel_width: int
    features: int
    window: Window
    activation: str | None = None
    residual: bool = False

    def __str__(self) -> str:
        """The problem as errors name it."""
        added = ", a residual" if self.residual else ""
        return f"{self.convolution}, activation {self.activation}{added}"

    @property
    def convolution(self) -> Convolution:
        """The convolution, as the call asks for it."""
        return Convolution(*self[:6], out_dtype=self.dtype)

    @property
    def norm(self) -> Norm:
        """The norm of its output.

        Example:
            >>> Problem((2, 9, 8, 4), "float32", 3, 3, 16, Window(stride=(2, 2))).norm.shape
            (2, 4, 3, 16)
        """
        n, *size, _ = self.shape
        height, width = self.window.output(size, (self.kernel_height, self.kernel_width))
        return Norm((n, height, width, self.features), self.dtype, self.activation, self.residual)

    def measured_as(self) -> "Problem":
        """The problem whose times count for this one: itself."""
        return self

    def distance(self, measured: Json) -> float:
        """The distance to a measured problem: that of the convolutions; a residual is one read.

        Example:
            >>> problem = Problem((2, 8, 8, 4), "float32", 3, 3, 8, Window())
            >>> measured = {"shape": [8, 8, 8, 8], "dtype": "float32", "features": 16}
            >>> problem.distance(measured | {"residual": True})
            3.0
        """
        reads = self.residual != measured.get("residual", self.residual)
        # No table of this operator is from before there was upsampling.
        window = {"upsample": self.window.upsample} | measured.get("window", {})
        return self.convolution.distance(measured | {"window": window}) + reads
