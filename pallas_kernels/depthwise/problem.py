"""The description of a call that implementations, tables and the tuner get."""

import math
from typing import NamedTuple

from pallas_kernels.common.types import Dtype, Json, Pair
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.dispatch.backend import size_distance
from pallas_kernels.wtconv.problem import Problem as WTConvProblem


class Problem(NamedTuple):
    """A call as implementations see it; shape is `(N, H, W, C)`.

    The window is that of a dense convolution of as many groups as channels.
    """

    shape: tuple[int, ...]
    dtype: Dtype
    kernel_size: Pair
    window: Window

    def __str__(self) -> str:
        """The problem as errors name it."""
        height, width = self.kernel_size
        return f"x {self.shape} {self.dtype}, kernel {height}x{width}, {self.window}"

    def measured_as(self) -> "Problem":
        """The problem whose times count for this one: itself."""
        return self

    def distance(self, measured: Json) -> float:
        """The distance to a measured problem, see `dispatch.backend.Problem`.

        Neither the batch nor the padding counts. A kernel size more is as far as twice the
        channels; stride and dilation must be this problem's.

        Example:
            >>> problem = Problem((2, 8, 8, 4), "float32", (3, 3), Window())
            >>> measured = {"shape": [8, 8, 8, 8], "dtype": "float32", "kernel_size": [3, 5]}
            >>> problem.distance(measured)
            3.0
            >>> problem.distance(measured | {"window": {"stride": [2, 2]}})
            inf
        """
        window = measured.get("window", {})
        same = str(self.dtype) == measured["dtype"] and all(
            list(getattr(self.window, name)) == list(window.get(name, (1, 1)))
            for name in ("stride", "dilation")
            if name in window
        )
        if not same:
            return math.inf
        taps = measured.get("kernel_size", self.kernel_size)
        return size_distance(self.shape, measured["shape"]) + sum(
            abs(own - other) for own, other in zip(self.kernel_size, taps, strict=True)
        )

    def not_plain(self) -> list[str]:
        """The reasons why this is no base convolution of the wavelet convolution.

        That has a square kernel, stride 1, and pads with zeros to the same size.

        Returns:
            A phrase for each reason, none where it is one.

        Example:
            >>> Problem((2, 8, 8, 4), "float32", (3, 5), Window(stride=(2, 2))).not_plain()
            ['kernels of 3x5, square ones alone', 'strides of 2x2, 1 alone']
        """
        height, width = self.kernel_size
        window, reasons = self.window, []
        if height != width:
            reasons.append(f"kernels of {height}x{width}, square ones alone")
        for name in ("stride", "dilation"):
            down, across = getattr(window, name)
            if (down, across) != (1, 1):
                reasons.append(f"{name}s of {down}x{across}, 1 alone")
        same = tuple(((k - 1) // 2, k // 2) for k in self.kernel_size)
        if not reasons and (window.pads != same or window.reflect):
            reasons.append(f"padding by {window.pads}, zeros that keep the size alone")
        return reasons

    def as_wtconv(self) -> WTConvProblem:
        """The wavelet convolution of 0 levels that computes the same."""
        return WTConvProblem(self.shape, self.dtype, self.kernel_size[0], 0, "haar")
